"""What stands beside a small base for the ablation: an image tower, a ControlNet.

A part of `pretrain` with a file of its own: downloaded bases have public ones, the base
that `pretrain` makes has these. Both are trained on the pool, text encoder and UNet of
the base being frozen.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from mvc_jax.data import edges, order
from mvc_jax.diffusion import loss
from mvc_jax.models import clip, controlnet, stable_diffusion
from mvc_jax.pretraining import info_nce
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.loop import TrainState, create_state, fit, weighted_mean

NAMES = ("image_encoder", "controlnet")  # as sections of the config, too

Loop = dict[str, Any]  # further arguments of `fit`
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pool:
    """What the base was trained on.

    Attributes:
      images: uint8 [N, H, W, 3].
      moments: of them, [N, h, w, 2c].
      prompts: of them.
    """

    images: np.ndarray
    moments: np.ndarray
    prompts: tuple[str, ...]


def train_image_encoder(
    model: stable_diffusion.StableDiffusion,
    params: Params,
    pool: Pool,
    *,
    seed: int,
    loop: Loop,
    batch_size: int,
    learning_rate: float,
    **shape: int,
) -> tuple[clip.Clip, Params]:
    """An image tower whose embeddings agree with the pooled states of the prompts.

    Args:
      model: the base.
      params: its host parameters; of these `text_encoder`.
      pool: what to train on.
      seed: of the run.
      loop: further arguments of `fit`.
      batch_size: images of a step.
      learning_rate: its peak.
      **shape: further arguments of `clip.small_tower`.

    Returns:
      the architecture, and host parameters.
    """
    side = pool.images.shape[1]
    tower = clip.small_tower(side=side, embedding=model.text_width, **shape)
    purpose = "pretrain/image_encoder"
    texts, groups = _pooled(model, params, pool.prompts, batch_size, loop["mesh"])
    arrays = {"images": pool.images, "texts": texts[groups], "groups": groups}
    read = order.reader(seed, purpose, arrays, batch_size=batch_size)

    def preprocessed(step: int) -> dict[str, np.ndarray]:
        batch = read(step)
        return batch | {"images": tower.preprocess(batch["images"])}

    start = stable_diffusion.random_params(
        tower.shapes(), order.generator(seed, f"{purpose}/init")
    )
    start["logit_scale"] = np.float32(np.log(1 / 0.07))  # CLIP's
    tx = optim.adam(_schedule(learning_rate, loop["steps"]), max_norm=1.0)
    state = fit(
        functools.partial(image_step, model=tower, tx=tx),
        create_state(start, tx, loop["mesh"]),
        read=preprocessed,
        constants={},
        **loop,
    )
    return tower, jax.device_get(state.params)


def _pooled(
    model: stable_diffusion.StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    batch_size: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled states [T, D] of the distinct prompts, and which of them each has [N]."""
    distinct, groups = np.unique(np.asarray(prompts), return_inverse=True)
    encode = sharding.over_batches(
        model.pooled_text,
        {"text_encoder": params["text_encoder"]},
        size=sharding.padded_size(batch_size, mesh),
        mesh=mesh,
    )
    ids = model.tokenize(distinct.tolist())
    starts = range(0, len(ids), batch_size)
    states = np.concatenate([*encode(ids[i : i + batch_size] for i in starts)])
    return states, groups.astype(np.int32)


def image_step(
    state: TrainState, batch: dict[str, Array], *, model: clip.Clip, tx: Any
) -> tuple[TrainState, dict[str, Array]]:
    """One step of contrastive learning (arXiv 2103.00020).

    `batch` has `images` [B, S, S, 3] as the tower takes them, `texts` [B, P], int32
    `groups` [B], equal for equal texts, and `weight` [B].
    """

    def loss_of(params):
        return info_nce.info_nce(
            model.image_embeddings(params, batch["images"]),
            batch["texts"],
            batch["groups"],
            params["logit_scale"],
            batch["weight"],
        )

    (value, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": value, "accuracy": right}
    return state.update(grads, tx, metrics), metrics


def train_controlnet(
    model: stable_diffusion.StableDiffusion,
    params: Params,
    pool: Pool,
    *,
    seed: int,
    loop: Loop,
    batch_size: int,
    learning_rate: float,
    drop_rate: float,
) -> tuple[controlnet.ControlNet, Params]:
    """A ControlNet on the Canny edges of the pool.

    Args:
      model: the base.
      params: its host parameters; `text_encoder` and `unet`.
      pool: what to train on.
      seed: of the run.
      loop: further arguments of `fit`.
      batch_size: images of a step.
      learning_rate: its peak.
      drop_rate: share of the prompts that is dropped.

    Returns:
      the architecture, and host parameters.
    """
    network = controlnet.of_unet(model)
    purpose = "pretrain/controlnet"
    init = order.generator(seed, f"{purpose}/init")
    start = controlnet.start(network, params["unet"], init)
    arrays = {
        "edges": edges.canny(pool.images),
        "moments": pool.moments,
        "ids": model.tokenize(pool.prompts),
    }
    tx = optim.adam(_schedule(learning_rate, loop["steps"]), max_norm=1.0)
    base = {name: params[name] for name in ("text_encoder", "unet")}
    state = fit(
        functools.partial(
            control_step,
            model=model,
            network=network,
            tx=tx,
            key=rng.purpose_key(seed, purpose),
            drop_rate=drop_rate,
        ),
        create_state(start, tx, loop["mesh"]),
        read=order.reader(seed, purpose, arrays, batch_size=batch_size),
        constants={"null_ids": model.tokenize([""]), "base": base},
        **loop,
    )
    return network, jax.device_get(state.params)


def control_step(
    state: TrainState,
    batch: dict[str, Any],
    *,
    model: stable_diffusion.StableDiffusion,
    network: controlnet.ControlNet,
    tx: Any,
    key: Key[Array, ""],
    drop_rate: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the ControlNet on a frozen base (arXiv 2302.05543, equation 5).

    `batch` has uint8 `edges` [B, H, W, 3], `moments` [B, h, w, 2c], token `ids` [B, L],
    `null_ids` [1, L], which replace a prompt at `drop_rate`, the frozen parameters
    `base`, and `weight` [B].
    """
    keys = rng.step_keys(key, state.step, len(batch["weight"]))
    *keys, drop_keys = rng.use_keys(keys, 4)
    noisy, timesteps, target = noised(model, batch["moments"], keys)
    dropped = rng.uniform(drop_keys) < drop_rate
    ids = jnp.where(dropped[:, None], batch["null_ids"], batch["ids"])
    states = model.text_states(batch["base"], ids)
    pictures = batch["edges"] / 255.0

    def loss_of(params):
        residuals = network.residuals(params, noisy, timesteps, states, pictures)
        prediction = model.denoise(batch["base"], noisy, timesteps, states, residuals)
        return weighted_mean(loss.squared_error(prediction, target), batch["weight"])

    value, grads = jax.value_and_grad(loss_of)(state.params)
    metrics = {"loss": value}
    return state.update(grads, tx, metrics), metrics


def noised(
    model: stable_diffusion.StableDiffusion,
    moments: Float[Array, "B h w c2"],
    keys: list[Key[Array, " B"]],
) -> tuple[Float[Array, "B h w c"], Int[Array, " B"], Float[Array, "B h w c"]]:
    """Noisy latents, their timesteps, and what the UNet should say of them.

    Args:
      model: the base.
      moments: of images; a posterior's sample is drawn.
      keys: of the noise, of the samples, of the timesteps.
    """
    noise_keys, posterior_keys, time_keys = keys
    shape = (*moments.shape[1:3], model.latent_channels)
    latents = loss.posterior_sample(moments, rng.normal_like(posterior_keys, shape))
    latents = latents * model.scaling_factor
    noise = rng.normal_like(noise_keys, shape)
    alphas = model.alphas_cumprod
    timesteps = rng.integers(time_keys, len(alphas))
    noisy = loss.add_noise(latents, noise, timesteps, alphas)
    target = loss.prediction_target(
        latents, noise, timesteps, alphas, model.prediction_type
    )
    return noisy, timesteps, target


def _schedule(learning_rate: float, steps: int):
    return optim.warmup_cosine(learning_rate, warmup=steps // 20, steps=steps)
