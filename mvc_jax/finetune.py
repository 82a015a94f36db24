"""Cache, pairs -> a fine-tuned UNet that a source image conditions.

Reads: the base model, `encode/`, `pairs/`. Writes: `model/`, the whole pipeline in the
diffusers layout (`StableDiffusionInstructPix2PixPipeline`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import manifest, order
from mvc_jax.diffusion import loss
from mvc_jax.errors import require
from mvc_jax.models import diffusers_layout, stable_diffusion
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.loop import TrainState, create_state, fit, weighted_mean
from mvc_jax.training.metrics import MetricsLog


def check(config: ConfigDict) -> None:
    """Checks the section `finetune`."""
    section = config.finetune
    for field in ("steps", "batch_size", "log_every", "checkpoint_every"):
        require(
            section[field] > 0,
            f"config.finetune.{field}",
            wanted="at least 1",
            got=section[field],
            fix="Raise it.",
        )
    require(
        0 < section.learning_rate < float("inf"),
        "config.finetune.learning_rate",
        wanted="a number above 0",
        got=section.learning_rate,
        fix="The paper's is 0.0001.",
    )
    require(
        0 <= section.ema_decay < 1,
        "config.finetune.ema_decay",
        wanted="a rate in [0, 1); 0 keeps no average",
        got=section.ema_decay,
        fix="0.999 is usual.",
    )
    require(
        0 <= section.drop_rate <= 1 / 3,
        "config.finetune.drop_rate",
        wanted="a rate in [0, 1/3] (text, image and both are each dropped with it)",
        got=section.drop_rate,
        fix="InstructPix2Pix uses 0.05.",
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Widens the base UNet, trains it on the pairs, writes the pipeline."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "base": config.base.to_dict()}
    settings["finetune"] = config.finetune.to_dict()
    stage = manifest.open_stage(workdir, "finetune", settings, ("encode", "pairs"))
    if stage.complete:
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    recorded = diffusers_layout.recorded(
        workdir / "encode" / "base.json", workdir / "pretrain" / "model"
    )
    base, params = diffusers_layout.load(**recorded)
    model, params = base.widened(params)
    # Master weights are fp32, in whatever precision the base is stored.
    unet = jax.tree.map(lambda x: x.astype(np.float32, copy=False), params["unet"])
    if model is base:
        logging.info("the base's UNet takes source latents already: not widened")
    settings = config.finetune
    schedule = optim.warmup_cosine(
        settings.learning_rate, warmup=settings.warmup, steps=settings.steps
    )
    tx = optim.adam(schedule, max_norm=settings.max_norm)
    pairs = files.read_array(workdir / "pairs" / "pairs.npy")
    state = fit(
        functools.partial(
            train_step,
            model=model,
            tx=tx,
            key=rng.purpose_key(config.seed, "finetune"),
            drop_rate=settings.drop_rate,
            ema_decay=settings.ema_decay,
        ),
        create_state(unet, tx, mesh, ema=settings.ema_decay > 0),
        data=read_cache(workdir),
        gather=gather,
        rows=functools.partial(
            pair_rows, pairs, seed=config.seed, batch_size=settings.batch_size
        ),
        mesh=mesh,
        steps=settings.steps,
        log_every=settings.log_every,
        checkpoints=Checkpoints(
            stage.folder / "checkpoints", every=settings.checkpoint_every
        ),
        metrics=lambda first: MetricsLog(workdir, "finetune", from_step=first),
        name="finetune",
    )
    params = {**params, "unet": jax.device_get(state.averaged)}
    written = diffusers_layout.save(stage.folder / "model", model, params)
    stage.finish([f"model/{name}" for name in written], steps=settings.steps)


def read_cache(workdir: epath.Path) -> dict[str, np.ndarray]:
    """What `encode` wrote, as the arrays that `gather` reads."""
    folder = workdir / "encode"
    rows = files.read_jsonl(folder / "prompts.jsonl")
    return {
        "moments": files.read_array(folder / "moments.npy"),
        "text_states": files.read_array(folder / "text_states.npy"),
        "state_of": np.asarray([row["state"] for row in rows], np.int32),
    }


def pair_rows(
    pairs: np.ndarray, step: int, *, seed: int, batch_size: int
) -> dict[str, np.ndarray]:
    """The pairs of the batch at `step`: `source` and `target`, int32 [B]."""
    chosen = pairs[
        order.batch_indices(
            seed, "finetune", step, batch_size=batch_size, size=len(pairs)
        )
    ]
    return {"source": chosen[:, 0], "target": chosen[:, 1]}


def gather(data: dict, rows: dict) -> dict:
    """Cache and rows -> batch, on the device; the text is the target's prompt."""
    return {
        "source_moments": data["moments"][rows["source"]],
        "target_moments": data["moments"][rows["target"]],
        "text_states": data["text_states"][data["state_of"][rows["target"]]],
        "null_states": data["text_states"][0],
        "weight": rows["weight"],
    }


def train_step(
    state: TrainState,
    batch: dict,
    *,
    model: stable_diffusion.StableDiffusion,
    tx,
    key: jax.Array,
    drop_rate: float,
    ema_decay: float,
) -> tuple[TrainState, dict]:
    """One InstructPix2Pix step (arXiv 2211.09800, equation 2).

    The noisy scaled *sample* of the target's posterior, with the unscaled *mode* of the
    source's on the channel axis; text and source dropped as in section 3.2.1.

    Args:
      state: with the UNet's parameters.
      batch: `source_moments` and `target_moments` [B, h, w, 2c], `text_states`
        [B, L, D], `null_states` [L, D], `weight` [B], 0 for padding.
      model: the architecture, conditioned.
      tx: the optimiser.
      key: root of the step's randomness; example i of step n draws by (n, i).
      drop_rate: p of `loss.drop_conditions`.
      ema_decay: of the averaged parameters, where the state keeps them.

    Returns:
      the next state; `loss` and `grad_norm`.
    """
    step_key = jax.random.fold_in(key, state.step)
    keys = rng.example_keys(step_key, jnp.arange(batch["weight"].shape[0]))
    posterior_keys, noise_keys, time_keys, drop_keys = rng.use_keys(keys, 4)
    moments = batch["target_moments"]
    shape = (*moments.shape[1:3], model.latent_channels)
    latents = loss.posterior_sample(moments, rng.normal_like(posterior_keys, shape))
    latents = latents * model.scaling_factor
    noise = rng.normal_like(noise_keys, shape)
    alphas = model.alphas_cumprod
    timesteps = rng.integers(time_keys, len(alphas))
    target = loss.prediction_target(
        latents, noise, timesteps, alphas, model.prediction_type
    )
    drop_text, drop_image = loss.drop_conditions(rng.uniform(drop_keys), drop_rate)
    states = jnp.where(
        drop_text[:, None, None], batch["null_states"][None], batch["text_states"]
    )
    cond_latents = loss.posterior_mode(batch["source_moments"])
    cond_latents = jnp.where(drop_image[:, None, None, None], 0.0, cond_latents)
    noisy = loss.add_noise(latents, noise, timesteps, alphas)
    inputs = jnp.concatenate([noisy, cond_latents], axis=-1)

    def loss_of(unet):
        prediction = model.denoise({"unet": unet}, inputs, timesteps, states)
        return weighted_mean(loss.squared_error(prediction, target), batch["weight"])

    value, grads = jax.value_and_grad(loss_of)(state.params)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    return state.update(grads, tx, ema_decay=ema_decay), metrics
