"""Latents that are changed channel by channel, as GIF-SD does after sampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mvc_jax.training import rng


def perturbed(
    keys: Key[Array, " B"], latents: Float[Array, "B h w c"], limit: float
) -> Float[Array, "B h w c"]:
    """Scales and shifts each channel, and changes no number by more than `limit`.

    x' = clip((1 + z) x + b, x - limit, x + limit) with z ~ U(0, 1) and b ~ N(0, 1), one
    of each for a channel (Zhang et al., arXiv 2211.13976). There z and b then take a
    step by the gradient of CLIP's prediction, its entropy and the diversity of a batch;
    that step is left out here.

    Args:
      keys: of the images.
      latents: scaled, as they are sampled.
      limit: at least 0; 0 leaves the latents as they are.
    """
    scale_keys, shift_keys = rng.use_keys(rng.for_purpose(keys, "perturbation"), 2)
    shape = (1, 1, latents.shape[-1])
    scale = jax.vmap(lambda key: jax.random.uniform(key, shape))(scale_keys)
    shift = rng.normal_like(shift_keys, shape)
    change = scale * latents + shift
    return latents + jnp.clip(change, -limit, limit)
