"""Images that the small base draws of prompts of its pool, to judge it by."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, UInt8

from mvc_jax.data import order
from mvc_jax.diffusion import instruct_pix2pix, samplers
from mvc_jax.models.stable_diffusion import Params, StableDiffusion, to_pixels
from mvc_jax.training import rng, sharding

SAMPLER, STEPS, SCALE = "dpmpp_2m", 20, 3.0
_BATCH = 25


def choose(
    labels: Int[np.ndarray, " N"], count: int, *, seed: int
) -> Int[np.ndarray, " n"]:
    """Images of the pool whose prompts are drawn: those of each class in turn."""
    draw = order.generator(seed, "pretrain/samples")
    shuffled = draw.permutation(len(labels))
    classes = [shuffled[labels[shuffled] == k] for k in np.unique(labels)]
    turns = (divmod(i, len(classes)) for i in range(count))
    return np.asarray([classes[k][n % len(classes[k])] for n, k in turns], np.int64)


def draw(
    model: StableDiffusion,
    params: Params,
    ids: Int[np.ndarray, "N *E L"],
    *,
    time_ids: Int[np.ndarray, "N 6"] | None = None,
    seed: int,
    grey: bool,
    mesh: Mesh,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Draws an image of each prompt, with guidance of scale 3 and 20 steps.

    Args:
      model: the base, with its scaling factor.
      params: host parameters of all components.
      ids: tokens of the prompts.
      time_ids: of XL, the sizes of the images (`data/time_ids.py`).
      seed: of the run.
      grey: whether the colour channels are averaged.
      mesh: the devices.
    """
    size = sharding.padded_size(min(_BATCH, len(ids)), mesh)
    # Widened by zeros, as in the set `pretrained`: it ignores the source.
    model, params = model.widened(params)
    function = functools.partial(
        _sample,
        model=dataclasses.replace(model, mesh=mesh),
        null_ids=model.tokenize([""]),
        key=rng.purpose_key(seed, "pretrain/samples"),
        grey=grey,
    )
    run = sharding.over_batches(function, params, size=size, mesh=mesh)
    batch = {"ids": ids, "number": np.arange(len(ids), dtype=np.int32)}
    if time_ids is not None:
        batch["time_ids"] = time_ids
    starts = range(0, len(ids), size)
    rows = ({name: x[i : i + size] for name, x in batch.items()} for i in starts)
    return np.concatenate([*run(rows)])


def _sample(
    params: Params,
    batch: dict[str, Array],
    *,
    model: StableDiffusion,
    null_ids: Int[np.ndarray, "1 *E L"],
    key: Key[Array, ""],
    grey: bool,
) -> UInt8[Array, "B H W 3"]:
    """`batch` has `ids` of the prompts, the images' `number`, of XL `time_ids`."""
    conditions = model.conditions(params, batch["ids"], batch.get("time_ids"))
    null = model.conditions(params, jnp.asarray(null_ids))
    side = model.configs["vae"]["sample_size"] // model.downsampling
    keys = rng.example_keys(key, batch["number"])
    noise = rng.normal_like(keys, (side, side, model.latent_channels))
    sampler = samplers.make(
        SAMPLER,
        STEPS,
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
    )
    latents = instruct_pix2pix.draw(
        functools.partial(model.denoise, params),
        noise,
        jnp.zeros((*noise.shape[:-1], 2 * model.latent_channels)),
        conditions,
        jax.tree.map(lambda array: array[0], null),
        sampler=sampler,
        text_scale=SCALE,
        image_scale=0.0,  # there is no source
    )
    return to_pixels(model.decode_in_parts(params, latents), grey=grey)
