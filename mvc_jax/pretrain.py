"""Images, captions -> a small Stable Diffusion, where no base model is given.

Reads: the base pool and its captions. Writes: `model/`, a folder in the diffusers
layout that the later stages load exactly as they load a downloaded one: tokenizer,
autoencoder, then text encoder and text-to-image UNet together. And, where their steps
are not 0, what the ablation needs beside it (`companions`): `model/image_encoder/` and
`controlnet/`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.data import captions, order, splits
from mvc_jax.diffusion import loss
from mvc_jax.errors import require
from mvc_jax.models import clip, controlnet, stable_diffusion
from mvc_jax.pretraining import companions, small, tokenizer
from mvc_jax.stage import open_stage
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.loop import TrainState, create_state, fit, weighted_mean
from mvc_jax.training.train_logger import TrainLogger

# Stable Diffusion 1.x's own schedule, as `scheduler_config.ddim_config` returns it.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def check(config: ConfigDict) -> None:
    """Checks the section `pretrain`."""
    vae, unet = config.pretrain.vae, config.pretrain.unet
    _check_numbers(config.pretrain)
    factor = 2 ** (len(vae.channels) - 1)
    require(
        config.data.size % factor == 0,
        "config.data.size",
        wanted=f"a multiple of {factor} (the autoencoder halves it "
        f"{len(vae.channels) - 1} times)",
        got=config.data.size,
        fix="Round it.",
    )
    for name, channels, groups in (
        ("vae", vae.channels, vae.groups),
        ("unet", unet.channels, 32),
    ):
        require(
            all(c % groups == 0 for c in channels),
            f"config.pretrain.{name}.channels",
            wanted=f"multiples of {groups}, the groups of its normalisation",
            got=tuple(channels),
            fix="Round them.",
        )
    tower = config.pretrain.image_encoder
    require(
        config.data.size % tower.patch == 0 and tower.width % tower.heads == 0,
        "config.pretrain.image_encoder",
        wanted=f"a patch that divides data.size={config.data.size}, and heads that "
        "divide the width",
        got=f"patch={tower.patch}, heads={tower.heads}, width={tower.width}",
        fix="Round them.",
    )
    require(
        config.data.pool > 0,
        "config.data.pool",
        wanted="images to train a base model on",
        got=config.data.pool,
        fix="Raise it, or name a model folder in config.base.path.",
    )


def _check_numbers(section: ConfigDict) -> None:
    """Every number of the section is positive, but for those that 0 switches off."""
    least = {"context_length": 4, "vocab_size": 514}
    zero = ("ema_decay", "drop_rate")
    for part, prefix in (
        (section, "config.pretrain"),
        (section.vae, "config.pretrain.vae"),
        (section.unet, "config.pretrain.unet"),
        (section.text, "config.pretrain.text"),
        *((section[name], f"config.pretrain.{name}") for name in companions.NAMES),
    ):
        for field, value in part.items():
            if isinstance(value, ConfigDict) or field in ("warmup", "kl_weight"):
                continue
            off = field == "steps" and prefix.endswith(companions.NAMES)
            low = least.get(field, 0 if off or field in zero else 1e-9)
            numbers = value if isinstance(value, tuple) else (value,)
            require(
                len(numbers) > 0
                and all(isinstance(n, int | float) and low <= n < 1e9 for n in numbers),
                f"{prefix}.{field}",
                wanted=f"a number of at least {low:g}"
                if low >= 1
                else "numbers above 0",
                got=value,
                fix="configs/digits.py has values that work.",
            )
    require(
        section.text.width % section.text.heads == 0,
        "config.pretrain.text.heads",
        wanted=f"a divisor of the width {section.text.width}",
        got=section.text.heads,
        fix="4 is usual here.",
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains the base model on the pool and writes it."""
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings["pretrain"] = config.pretrain.to_dict()
    stage = open_stage(workdir, "pretrain", settings, inputs=("caption",))
    if stage.complete:
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    caption_folder = epath.Path(workdir) / "caption"
    pool = splits.read_split(caption_folder, "pool")
    texts = captions.read_captions(caption_folder / "captions.jsonl", pool.ids)
    folder = stage.folder / "model"
    template, class_type = config.data.prompt, config.data.class_type
    names = [pool.class_names[label] for label in pool.labels]
    alone = [
        captions.fill(template, "", class_type=class_type, class_name=name).text
        for name in names
    ]
    model = _new_model(config, folder, texts + alone)
    prompts = [
        captions.prompt(
            template,
            text,
            class_type=class_type,
            class_name=name,
            count_tokens=model.count_tokens,
            max_tokens=model.context_length,
        ).text
        for text, name in zip(texts, names, strict=True)
    ]

    vae = train_vae(config, stage.folder, workdir, model, pool.images, mesh)
    size = sharding.padded_size(config.encode.batch_size, mesh)
    encode = sharding.over_batches(
        model.encode_pixels, {"vae": vae}, size=size, mesh=mesh
    )
    starts = range(0, len(pool.images), size)
    moments = np.concatenate([*encode(pool.images[i : i + size] for i in starts)])
    model = _with_scaling_factor(model, moments)
    rest = train_unet(
        config, stage.folder, workdir, model, moments, model.tokenize(prompts), mesh
    )
    pool_data = companions.Pool(pool.images, moments, tuple(prompts))
    artifacts, beside = _train_companions(
        config, stage.folder, workdir, model, rest, pool_data, mesh
    )
    written = diffusers_layout.save(folder, model, {"vae": vae, **rest}, beside=beside)
    artifacts += [f"model/{name}" for name in written]
    stage.finish(artifacts, images=len(pool.ids))


def _train_companions(
    config, folder, workdir, model, params, pool: companions.Pool, mesh: Mesh
) -> tuple[list[str], dict[str, list[str]]]:
    """Trains what the ablation needs beside the base, where there are steps for it.

    Returns:
      the files written, and what of them belongs into the base's index.
    """
    written, beside = [], {}
    for name in companions.NAMES:
        settings = config.pretrain[name].to_dict()
        steps = settings.pop("steps")
        if not steps:
            continue
        loop = _loop_arguments(config, folder, workdir, mesh, name, steps)
        train = getattr(companions, f"train_{name}")
        made = train(model, params, pool, seed=config.seed, loop=loop, **settings)
        if name == "image_encoder":
            files = clip.save(folder / "model", *made)
            written += [f"model/{file}" for file in files]
            beside = clip.INDEX_ENTRIES
        else:
            files = controlnet.save(folder / "controlnet", *made)
            written += [f"controlnet/{file}" for file in files]
    return written, beside


def _new_model(config: ConfigDict, folder: epath.Path, texts: list[str]):
    """The architecture of the config, with a tokenizer learnt from the captions."""
    settings = config.pretrain
    tokenizer.train(
        folder / "tokenizer",
        texts,
        vocab_size=settings.vocab_size,
        max_length=settings.context_length,
    )
    read = diffusers_layout.read_tokenizer(folder / "tokenizer")
    networks = {
        name: {
            field: value
            for field, value in settings[name].items()
            if field in ("channels", "groups", "heads", "layers", "width")
        }
        for name in ("vae", "unet", "text")
    }
    return small.stable_diffusion(
        read,
        SCHEDULER,
        size=config.data.size,
        length=settings.context_length,
        **networks,
    )


def train_vae(config, folder, workdir, model, images, mesh: Mesh):
    """Fits the autoencoder; returns its host parameters."""
    settings = config.pretrain.vae
    schedule = optim.warmup_cosine(
        settings.learning_rate, warmup=settings.steps // 20, steps=settings.steps
    )
    tx = optim.adam(schedule, max_norm=1.0)
    params = stable_diffusion.random_params(
        model.shapes("vae"), order.generator(config.seed, "pretrain/vae/init")
    )
    state = fit(
        functools.partial(
            vae_step,
            model=model,
            tx=tx,
            key=rng.purpose_key(config.seed, "pretrain/vae"),
            kl_weight=settings.kl_weight,
        ),
        create_state(params, tx, mesh),
        read=order.reader(
            config.seed,
            "pretrain/vae",
            {"images": images},
            batch_size=settings.batch_size,
        ),
        fixed={},
        **_loop_arguments(config, folder, workdir, mesh, "vae", settings.steps),
    )
    return jax.device_get(state.params)


def train_unet(config, folder, workdir, model, moments, ids, mesh: Mesh):
    """Fits text encoder and UNet together; returns their averaged host parameters."""
    settings = config.pretrain.unet
    schedule = optim.warmup_cosine(
        settings.learning_rate, warmup=settings.warmup, steps=settings.steps
    )
    tx = optim.adam(schedule)
    init = order.generator(config.seed, "pretrain/unet/init")
    params = {
        name: stable_diffusion.random_params(model.shapes(name), init)
        for name in ("text_encoder", "unet")
    }
    null_ids = model.tokenize([""])
    state = fit(
        functools.partial(
            unet_step,
            model=model,
            tx=tx,
            key=rng.purpose_key(config.seed, "pretrain/unet"),
            drop_rate=settings.drop_rate,
            ema_decay=settings.ema_decay,
        ),
        create_state(params, tx, mesh, ema=True),
        read=order.reader(
            config.seed,
            "pretrain/unet",
            {"moments": moments, "ids": ids},
            batch_size=settings.batch_size,
        ),
        fixed={"null_ids": null_ids},
        **_loop_arguments(config, folder, workdir, mesh, "unet", settings.steps),
    )
    return jax.device_get(state.averaged)


def vae_step(state: TrainState, batch: dict, *, model, tx, key, kl_weight: float):
    """One step on the absolute error of the reconstruction, with a light KL term.

    The loss of latent diffusion (arXiv 2112.10752, appendix G) without its perceptual
    and adversarial terms. `batch` has `images` uint8 [B, H, W, 3] and `weight` [B].
    """
    keys = rng.step_keys(key, state.step, len(batch["weight"]))

    def loss_of(params):
        images = batch["images"] / 127.5 - 1.0
        moments = model.moments({"vae": params}, images)
        shape = (*moments.shape[1:3], model.latent_channels)
        latents = loss.posterior_sample(moments, rng.normal_like(keys, shape))
        decoded = model.decode({"vae": params}, latents)
        error = jnp.mean(jnp.abs(decoded - images), axis=(1, 2, 3))
        kl = loss.kl_divergence(moments)
        weight = batch["weight"]
        return weighted_mean(error + kl_weight * kl, weight), weighted_mean(kl, weight)

    (value, kl), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": value, "kl": kl}
    return state.update(grads, tx, metrics), metrics


def unet_step(
    state: TrainState,
    batch: dict,
    *,
    model,
    tx,
    key,
    drop_rate: float,
    ema_decay: float,
):
    """One step of latent diffusion on text (arXiv 2112.10752, equation 3).

    `batch` has `moments` [B, h, w, 2c], token `ids` [B, L], `null_ids` [1, L] of the
    empty prompt, which replaces a prompt at `drop_rate`, and `weight` [B].
    """
    keys = rng.step_keys(key, state.step, len(batch["weight"]))
    *keys, drop_keys = rng.use_keys(keys, 4)
    noisy, timesteps, target = companions.noised(model, batch["moments"], keys)
    dropped = rng.uniform(drop_keys) < drop_rate
    ids = jnp.where(dropped[:, None], batch["null_ids"], batch["ids"])

    def loss_of(params):
        states = model.text_states(params, ids)
        prediction = model.denoise(params, noisy, timesteps, states)
        return weighted_mean(loss.squared_error(prediction, target), batch["weight"])

    value, grads = jax.value_and_grad(loss_of)(state.params)
    metrics = {"loss": value}
    return state.update(grads, tx, metrics, ema_decay=ema_decay), metrics


def _loop_arguments(config, folder, workdir, mesh, part: str, steps: int) -> dict:
    return {
        "mesh": mesh,
        "steps": steps,
        "checkpoints": Checkpoints(
            folder / "checkpoints" / part, every=config.pretrain.checkpoint_every
        ),
        "logger": TrainLogger(
            workdir, f"pretrain/{part}", log_every=config.pretrain.log_every
        ),
    }


def _with_scaling_factor(model, moments: np.ndarray):
    """1 / standard deviation of the posterior's samples (arXiv 2112.10752, G.1)."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    deviation = np.sqrt(mean.var() + np.exp(log_variance).mean())
    factor = float(np.float32(1.0 / deviation))
    logging.info("scaling factor of the latents: %.4g", factor)
    vae = {**model.configs["vae"], "scaling_factor": factor}
    return stable_diffusion.StableDiffusion(
        {**model.configs, "vae": vae}, model.tokenizer
    )
