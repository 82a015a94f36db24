"""Companions of the small base for the ablation: an image tower and a ControlNet.

Published bases have public ones. Both are trained on the pool, with the text encoder
and the UNet of the base frozen.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from mvc_jax.data import edges, order
from mvc_jax.diffusion import loss
from mvc_jax.models.clip import Clip, small_tower
from mvc_jax.models.controlnet import ControlNet
from mvc_jax.models.stable_diffusion import Params, StableDiffusion, random_params
from mvc_jax.pretraining.base import Loop, add_noise
from mvc_jax.pretraining.info_nce import info_nce
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.loop import TrainState, create_state, weighted_mean

_LOGIT_SCALE = np.float32(np.log(1 / 0.07))  # initial value, as CLIP's


@dataclasses.dataclass(frozen=True)
class Pool:
    """The data on which the base was trained.

    Attributes:
      images: uint8 [N, H, W, 3].
      moments: of the images, [N, h, w, 2c].
      prompts: of the images.
    """

    images: np.ndarray
    moments: np.ndarray
    prompts: tuple[str, ...]


def train_image_encoder(
    model: StableDiffusion,
    params: Params,
    pool: Pool,
    *,
    seed: int,
    loop: Loop,
    batch_size: int,
    learning_rate: float,
    patch: int,
    width: int,
    layers: int,
    heads: int,
) -> tuple[Clip, Params]:
    """Trains an image tower whose embeddings match the pooled states of the prompts.

    Args:
      model: the base.
      params: its host parameters, with `text_encoder`.
      pool: training data.
      seed: of the run.
      loop: the loop of the tower.
      batch_size: images per step.
      learning_rate: its peak.
      patch: pixels along a side of a patch.
      width: dims of the tower's states.
      layers: of the tower.
      heads: of its attention.

    Returns:
      the architecture, and host parameters.
    """
    tower = small_tower(
        side=pool.images.shape[1],
        patch=patch,
        width=width,
        layers=layers,
        heads=heads,
        embedding=model.text_width,
    )
    purpose = "pretrain/image_encoder"
    texts, groups = _pooled(model, params, pool.prompts, batch_size, loop.mesh)
    arrays = {"images": pool.images, "texts": texts[groups], "groups": groups}
    read = order.reader(seed, purpose, arrays, batch_size=batch_size)

    def read_preprocessed(step: int, *rows: Any) -> dict[str, np.ndarray]:
        batch = read(step, *rows)
        return {**batch, "images": tower.preprocess(batch["images"])}

    initial = random_params(tower.shapes(), order.generator(seed, f"{purpose}/init"))
    initial["logit_scale"] = _LOGIT_SCALE
    tx = optim.adam(loop.warmup_cosine(learning_rate), max_norm=1.0)
    state = loop.fit(
        functools.partial(image_step, model=tower, tx=tx),
        create_state(initial, tx, loop.mesh),
        read=read_preprocessed,
        constants={},
    )
    return tower, sharding.to_host(state.params)


def _pooled(
    model: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    batch_size: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled states [T, D] of distinct prompts, and the index [N] of each prompt's."""
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
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: Clip,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of contrastive learning (arXiv 2103.00020).

    `batch` has preprocessed `images` [B, S, S, 3], `texts` [B, P], int32 `groups` [B],
    equal for equal texts, and `weight` [B].
    """

    def loss_of(params):
        return info_nce(
            model.image_embeddings(params, batch["images"]),
            batch["texts"],
            batch["groups"],
            params["logit_scale"],
            batch["weight"],
        )

    (value, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": value, "accuracy": accuracy}
    return state.update(grads, tx, metrics), metrics


def train_controlnet(
    model: StableDiffusion,
    params: Params,
    pool: Pool,
    *,
    seed: int,
    loop: Loop,
    batch_size: int,
    learning_rate: float,
    drop_rate: float,
) -> tuple[ControlNet, Params]:
    """Trains a ControlNet on the Canny edges of the pool's images.

    Args:
      model: the base.
      params: its host parameters, with `text_encoder` and `unet`.
      pool: training data.
      seed: of the run.
      loop: the loop of the ControlNet.
      batch_size: images per step.
      learning_rate: its peak.
      drop_rate: fraction of the prompts that is replaced by the empty one.

    Returns:
      the architecture, and host parameters.
    """
    network = new_controlnet(model)
    purpose = "pretrain/controlnet"
    init = order.generator(seed, f"{purpose}/init")
    initial = initial_controlnet_params(network, params["unet"], init)
    arrays = {
        "edges": edges.canny(pool.images),
        "moments": pool.moments,
        "ids": model.tokenize(pool.prompts),
    }
    tx = optim.adam(loop.warmup_cosine(learning_rate), max_norm=1.0)
    base = {name: params[name] for name in ("text_encoder", "unet")}
    train_step = functools.partial(
        control_step,
        model=dataclasses.replace(model, mesh=loop.mesh),
        network=dataclasses.replace(network, mesh=loop.mesh),
        tx=tx,
        key=rng.purpose_key(seed, purpose),
        drop_rate=drop_rate,
    )
    state = loop.fit(
        train_step,
        create_state(initial, tx, loop.mesh),
        read=order.reader(seed, purpose, arrays, batch_size=batch_size),
        constants={"null_ids": model.tokenize([""]), "base": base},
    )
    return network, sharding.to_host(state.params)


def new_controlnet(model: StableDiffusion) -> ControlNet:
    """The architecture of an untrained ControlNet for a base.

    Its embedding of pictures is narrow: 16 channels on the first level.
    """
    unet = model.configs["unet"]
    copied = (
        "down_block_types",
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "use_linear_projection",
        "flip_sin_to_cos",
        "freq_shift",
    )
    levels = len(model.configs["vae"]["block_out_channels"])
    config = {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "in_channels": model.latent_channels,
        "conditioning_embedding_out_channels": [16 * 2**i for i in range(levels)],
        **{name: unet[name] for name in copied if name in unet},
    }
    return ControlNet(config)


def initial_controlnet_params(
    network: ControlNet, unet: Params, rng: np.random.Generator
) -> Params:
    """Host parameters: copies of the UNet's, and zero convolutions.

    All residuals are zero, so the UNet's prediction is unchanged (arXiv 2302.05543,
    section 3.1).
    """
    params = random_params(network.shapes(), rng)
    for name, tree in params.items():
        if name in unet:
            params[name] = copy.deepcopy(jax.tree.map(np.asarray, unet[name]))
        elif name != "controlnet_cond_embedding":
            params[name] = jax.tree.map(np.zeros_like, tree)
    embedding = params["controlnet_cond_embedding"]
    embedding["conv_out"] = jax.tree.map(np.zeros_like, embedding["conv_out"])
    return params


def control_step(
    state: TrainState,
    batch: dict[str, Any],
    *,
    model: StableDiffusion,
    network: ControlNet,
    tx: optax.GradientTransformation,
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
    noisy, timesteps, target = add_noise(model, batch["moments"], keys)
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
