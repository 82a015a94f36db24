"""Cache, pairs -> a fine-tuned UNet that a source image conditions.

Reads: the base model, `encode/`, `pairs/`. Writes: `model/`, the whole pipeline in the
diffusers layout (`StableDiffusionInstructPix2PixPipeline`) with its model card;
`samples/`, pictures from fixed noise and fixed pairs; with `mode = "lora"` also
`lora/`, the adapters alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.checkpoints import (
    diffusers_layout,
    lora_file,
    model_card,
    pipeline_folder,
)
from mvc_jax.data import order, splits
from mvc_jax.data.cache import open_cache, pairs_of_all_classes, read_pairs
from mvc_jax.diffusion import instruct_pix2pix, loss, samplers
from mvc_jax.errors import UserError, require_one_of, require_within
from mvc_jax.models import lora, stable_diffusion
from mvc_jax.stage import open_stage
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.gallery import Gallery
from mvc_jax.training.loop import TrainState, create_state, fit, gradients
from mvc_jax.training.memory import MemoryBudget
from mvc_jax.training.throughput import count_flops
from mvc_jax.training.train_logger import DrawHook, TrainLogger

# They change what is kept, what is shown or how fast it goes, but not what is computed.
_NO_RESULT = (
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep",
    "sample_every",
    "samples",
    "memory_gib",
    "attention",
    "remat",
    "accumulate",
)
_CHOICES = {
    "mode": ("full", "lora"),
    "schedule": ("constant", "cosine"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "xla", "mapped", "cudnn"),
    "remat": ("none", "blocks", "full"),
}
_COUNTS = ("steps", "batch_size", "accumulate", "max_skipped", "keep", "samples")
_COUNTS += ("log_every", "checkpoint_every")
_SWITCHES = ("warmup", "max_norm", "min_snr", "sample_every")
_SWITCHES += ("checkpoint_minutes", "memory_gib")
_RANGES = {
    **dict.fromkeys(_COUNTS, (1, 1e9, "configs/common.py has values that work.")),
    **dict.fromkeys(_SWITCHES, (0, 1e9, "0 switches it off.")),
    "learning_rate": (1e-12, 1e3, "The paper's is 0.0001."),
    "ema_decay": (0, 1 - 1e-9, "0.999 is usual; 0 keeps no average."),
    "drop_rate": (0, 1 / 3, "At most 1/3, for text, image, and both drop with it."),
}
_MEMORY_HINT = (
    "Lower config.finetune.batch_size ({batch_size}) or raise "
    "config.finetune.accumulate ({accumulate}); set config.finetune.remat ({remat}) to "
    "blocks or full; share the state among devices by config.mesh.fsdp; or train "
    "adapters alone by config.finetune.mode=lora ({mode})."
)


def check(config: ConfigDict) -> None:
    """Checks the section `finetune`, and how `generate` guides its pictures."""
    section = config.finetune.to_dict()
    require_within("config.finetune", section, _RANGES)
    require_one_of("config.finetune", section, _CHOICES)
    ranks = {"rank": (1, 4096, "4 to 64 are usual.")}
    require_within("config.finetune.lora", section["lora"], ranks)
    if section["sample_every"]:
        samplers.check_interval(config.generate.guidance_interval)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Widens the base UNet, trains it on the pairs, writes the pipeline."""
    workdir, section = epath.Path(workdir), config.finetune
    settings = {"seed": config.seed, "base": config.base.to_dict()}
    settings["finetune"] = shaping(section)
    stage = open_stage(workdir, "finetune", settings, ("encode", "pairs"))
    if stage.complete:
        return
    try:
        written, skipped = train(config, workdir, stage.folder)
    except UserError:
        if not any((stage.folder / "checkpoints").glob("[0-9]*")):
            stage.abandon()  # nothing is kept: other settings may follow
        raise
    stage.finish(written, steps=section.steps, skipped_steps=skipped)


def shaping(section: ConfigDict) -> dict:
    """The fields that shape the result."""
    return {k: v for k, v in section.to_dict().items() if k not in _NO_RESULT}


def train(config: ConfigDict, workdir: epath.Path, folder: epath.Path):
    """Fits the UNet, or adapters, from the last checkpoint on, and exports it.

    Returns:
      the files written, relative to `folder`, and the number of steps skipped.
    """
    section = config.finetune
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    model, params = load_base(workdir)
    how = {field: section[field] for field in ("dtype", "attention", "remat")}
    model = model.with_compute_options(**how)
    cache = open_cache(workdir / "encode")
    cache.verify()
    trained, fixed = trained_and_frozen(config, params.pop("unet"), model.dtype)
    fixed["null_states"] = cache.null_states
    fixed = jax.device_put(fixed, sharding.tree_shardings(fixed, mesh))
    gallery = None
    if section.sample_every:
        gallery = make_gallery(config, workdir, model, mesh, cache, params, fixed)
    model = dataclasses.replace(model, batch_sharding=sharding.batch_sharding(mesh))
    step, tx = make_step(config, model, sharding.tree_shardings(trained, mesh))
    state = create_state(trained, tx, mesh, ema=section.ema_decay > 0)
    del trained  # gigabytes on the host
    state = fit(
        step,
        state,
        read=functools.partial(
            read_pairs,
            cache,
            files.read_array(workdir / "pairs" / "pairs.npy"),
            seed=config.seed,
            batch_size=section.batch_size,
        ),
        constants=fixed,
        mesh=mesh,
        steps=section.steps,
        checkpoints=Checkpoints(
            folder / "checkpoints",
            every=section.checkpoint_every,
            minutes=section.checkpoint_minutes,
            keep=section.keep,
            best="loss",
        ),
        logger=TrainLogger(
            workdir,
            "finetune",
            log_every=section.log_every,
            max_skipped=section.max_skipped,
            flops=step_flops(model, section.mode, *cache.moments.shape[1:3]),
            draw_hook=gallery and DrawHook(section.sample_every, gallery.draw),
        ),
        accumulate=section.accumulate,
        memory_budget=MemoryBudget(
            int(section.memory_gib * 2**30), _MEMORY_HINT.format(**section)
        ),
    )
    return export(config, workdir, model, params, state), int(state.skipped)


def trained_and_frozen(config: ConfigDict, unet: dict, dtype: str):
    """The parameters to fit, and those that every batch gets as `base`."""
    if config.finetune.mode == "full":
        return unet, {}
    draw = order.generator(config.seed, "finetune/lora")
    adapters = lora.init(
        unet, name_of=lora_file.layer_name, rng=draw, **config.finetune.lora
    )
    return adapters, {"base": lora.frozen(unet, dtype)}


def load_base(workdir: epath.Path, components=tuple(diffusers_layout.WEIGHTS)):
    """The base that `encode` read, conditioned on source latents; host parameters."""
    base, params = diffusers_layout.load(
        **diffusers_layout.recorded_base(workdir), components=components
    )
    model, params = base.widened(params)
    if model is base:
        logging.info("the base's UNet takes source latents already: not widened")
    return model, params


def make_step(config: ConfigDict, model, shardings):
    """`train_step` with all but state and batch, and its optimiser."""
    section = config.finetune
    times = {"warmup": section.warmup, "steps": section.steps}
    schedule = optim.schedule(section.schedule, section.learning_rate, **times)
    tx = optim.adam(schedule, max_norm=section.max_norm)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=schedule,
        key=rng.purpose_key(config.seed, "finetune"),
        drop_rate=section.drop_rate,
        ema_decay=section.ema_decay,
        min_snr=section.min_snr,
        accumulate=section.accumulate,
        shardings=shardings,
    )
    return step, tx


def export(config, workdir, model, params, state) -> list[str]:
    """Writes the pipeline with its card, and in `lora` mode the adapters too.

    Returns:
      the files written, relative to the folder of this stage.
    """
    folder, trained, written = workdir / "finetune", state.averaged, []
    if config.finetune.mode == "lora":
        written += [
            f"lora/{name}" for name in lora_file.write(folder / "lora", trained)
        ]
        # The base again, for on the device it may have been rounded to bfloat16.
        _, whole = load_base(workdir, ("unet",))
        trained = lora.merge(whole["unet"], trained)
    facts = model_facts(config, workdir, int(state.step - state.skipped))
    made_by = {"stage": "finetune", "base": facts.base, "data": facts.dataset}
    whole = params | {"unet": trained}
    names = diffusers_layout.save(folder / "model", model, whole, made_by=made_by)
    names += model_card.write(folder / "model", facts)
    return [*written, *(f"model/{name}" for name in names)]


def model_facts(config: ConfigDict, workdir: epath.Path, steps: int):
    """What the model card tells."""
    folder, commit = pipeline_folder.resolve(**diffusers_layout.recorded_base(workdir))
    given = config.base.path if commit else str(folder.absolute())
    dataset = files.read_json(workdir / "caption" / "dataset.json")
    prompts = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    section = shaping(config.finetune)
    adapters = section.pop("lora")
    if section["mode"] == "lora":
        section |= {f"lora.{name}": value for name, value in adapters.items()}
    return model_card.Facts(
        base=given if config.base.path else "../../pretrain/model",
        variant=config.base.variant,
        revision=commit,
        license=model_card.base_license(folder),
        dataset=dataset["name"],
        classes=dataset["class_names"],
        images=len(prompts),
        resolution=config.data.size,
        prompt=prompts[0]["prompt"],
        hyperparameters=section,
        steps=steps,
        adapters="../lora" if section["mode"] == "lora" else None,
    )


def step_flops(
    model: stable_diffusion.StableDiffusion, mode: str, height: int, width: int
) -> float:
    """FLOPs of a step on one example, by attention's plain form, without remat.

    A forward pass, twice that for all gradients; once where weights are frozen.
    """
    plain = {"attention": "xla", "remat": "none", "batch_sharding": None}
    plain = dataclasses.replace(model, **plain)

    def forward(unet, *inputs):
        return plain.denoise({"unet": unet}, *inputs)

    inputs = plain.inputs(height, width)
    passes = {"full": 3, "lora": 2}[mode]
    return passes * count_flops(forward, plain.shapes("unet"), *inputs)


def train_step(
    state: TrainState,
    batch: dict,
    *,
    model: stable_diffusion.StableDiffusion,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: jax.Array,
    drop_rate: float,
    ema_decay: float = 0.0,
    min_snr: float = 0.0,
    accumulate: int = 1,
    shardings: Any = None,
) -> tuple[TrainState, dict]:
    """One InstructPix2Pix step (arXiv 2211.09800, equation 2).

    Args:
      state: with the UNet's parameters; or with adapters, where the batch has a `base`.
      batch: `source_moments` and `target_moments` [B, h, w, 2c], `text_states`
        [B, L, D], `null_states` [L, D], `weight` [B], 0 for padding; for adapters the
        frozen parameters of the UNet, `base`.
      model: the architecture, conditioned.
      tx: the optimiser.
      schedule: its learning rate by steps taken, to be logged.
      key: root of the step's randomness; example i of step n draws by (n, i).
      drop_rate: p of `loss.drop_conditions`.
      ema_decay: of the averaged parameters, where the state keeps them.
      min_snr: gamma of `loss.loss_weights`; 0: all timesteps weigh alike.
      accumulate: micro-batches, a divisor of B.
      shardings: of the parameters, where these are split.

    Returns:
      the next state; `loss`, `grad_norm` (before clipping), `learning_rate`.
    """
    step_key = jax.random.fold_in(key, state.step)
    examples = noised(batch, step_key, model=model, drop_rate=drop_rate)
    alphas = model.alphas_cumprod

    def losses(trained, part):
        prediction = model.denoise(
            unet_params(trained, batch),
            part["inputs"],
            part["timesteps"],
            part["text_states"],
        )
        error = loss.squared_error(prediction, part["target"])
        if min_snr > 0:
            error *= loss.loss_weights(
                part["timesteps"], alphas, model.prediction_type, min_snr
            )
        return error

    value, grads = gradients(losses, state.params, examples, accumulate, shardings)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    metrics |= {"learning_rate": jnp.asarray(schedule(state.step - state.skipped))}
    return state.update(grads, tx, metrics, ema_decay=ema_decay), metrics


def noised(
    batch: dict,
    key: jax.Array,
    *,
    model: stable_diffusion.StableDiffusion,
    drop_rate: float,
) -> dict[str, jax.Array]:
    """`instruct_pix2pix.examples` of a batch, with the draws of one step's key."""
    keys = rng.example_keys(key, jnp.arange(batch["weight"].shape[0]))
    posterior_keys, noise_keys, time_keys, drop_keys = rng.use_keys(keys, 4)
    shape = (*batch["target_moments"].shape[1:3], model.latent_channels)
    draws = {
        "posterior": rng.normal_like(posterior_keys, shape),
        "noise": rng.normal_like(noise_keys, shape),
        "timesteps": rng.integers(time_keys, len(model.alphas_cumprod)),
        "dropout": rng.uniform(drop_keys),
    }
    return instruct_pix2pix.examples(
        batch,
        draws,
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
        scaling_factor=model.scaling_factor,
        drop_rate=drop_rate,
    )


def make_gallery(config, workdir, model, mesh, cache, params, fixed) -> Gallery:
    """Draws pairs of all classes, guided as `generate` will."""
    train = splits.read_split(workdir / "caption", "train")
    pairs = files.read_array(workdir / "pairs" / "pairs.npy")
    pairs = pairs_of_all_classes(pairs, train.labels, config.finetune.samples)
    (source, target), asked = pairs.T, config.generate
    guidance = ("text_scale", "image_scale", "guidance_interval", "guidance_rescale")
    draw = functools.partial(
        instruct_pix2pix.draw,
        solver=model.solver(asked.sampler, asked.steps),
        **{name: asked[name] for name in guidance},
    )
    key = rng.purpose_key(config.seed, "finetune/samples")
    shape = (*cache.moments.shape[1:3], model.latent_channels)

    @jax.jit
    def sample(trained, fixed, batch):
        latents = draw(
            functools.partial(model.denoise, unet_params(trained, fixed)),
            rng.normal_like(rng.example_keys(key, batch["index"]), shape),
            batch["moments"],
            batch["text_states"],
            fixed["null_states"],
        )
        images = model.decode(fixed, latents)
        return stable_diffusion.to_pixels(images, grey=train.grey)

    fixed = fixed | {"vae": params["vae"]}
    fixed = jax.device_put(fixed, sharding.tree_shardings(fixed, mesh))
    batch = {
        "moments": cache.moments_of(source),
        "text_states": cache.states_of(target),
        "index": np.arange(len(pairs), dtype=np.int32),
    }
    return Gallery(
        workdir / "finetune" / "samples",
        lambda trained, batch: sample(trained, fixed, batch),
        batch,
        names=[train.class_names[label] for label in train.labels[source]],
        beside={"source": train.images[source], "a real one": train.images[target]},
        mesh=mesh,
    )


def unet_params(trained: dict, fixed: dict) -> dict:
    """Parameters as `denoise` takes them: the UNet's own, or base and adapters."""
    if "base" in fixed:
        return {"unet": fixed["base"], "lora": trained}
    return {"unet": trained}
