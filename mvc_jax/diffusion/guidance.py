"""Classifier-free guidance; all branches of a step are one batch.

The branches of an image are neighbours in that batch. Where the batch is split over
devices, every image so stays on its device; with one branch after the other, XLA would
exchange rows between the devices at each step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Text states [B, L, D], or by name all arrays [B, ...] that a UNet is given beside
# latents and timesteps; of the empty prompt, those of one example without the axis B.
Conditions = Any
Denoise = Callable[[Array, Array, Conditions], Array]  # (latents, timesteps, ...)
Scale = float | Float[Array, " B"]  # one for all images, or one for each


def image_text_guidance(
    denoise: Denoise,
    *,
    text_states: Conditions,
    null_states: Conditions,
    cond_latents: Float[Array, "B h w c"],
    text_scale: Scale,
    image_scale: Scale,
    rescale: float = 0.0,
) -> Callable[[Array, Array], Array]:
    """Two-scale guidance of InstructPix2Pix (arXiv 2211.09800, equation 3).

    e = e(0,0) + s_I (e(0,I) - e(0,0)) + s_T (e(T,I) - e(0,I))

    Args:
      denoise: takes latents [3B, h, w, 2c]: noisy latents and source latents.
      text_states: T.
      null_states: of the empty prompt, as `without_text` takes them.
      cond_latents: I, the unscaled mode of the source's posterior.
      text_scale: s_T.
      image_scale: s_I.
      rescale: phi of `rescaled`, towards e(T,I).

    Returns:
      `(latents [B, h, w, c], timesteps [B]) -> prediction [B, h, w, c]`, in the
      precision of the latents whatever that of the network is.
    """
    null = without_text(text_states, null_states)
    states = jax.tree.map(_interleaved, null, null, text_states)
    images = _interleaved(jnp.zeros_like(cond_latents), cond_latents, cond_latents)
    text_scale, image_scale = _per_image(text_scale), _per_image(image_scale)

    def guided(latents, timesteps):
        noisy = _interleaved(latents, latents, latents)
        timesteps = _interleaved(timesteps, timesteps, timesteps)
        out = denoise(jnp.concatenate([noisy, images], axis=-1), timesteps, states)
        out = out.astype(latents.dtype).reshape(-1, 3, *out.shape[1:])
        none, image, both = out[:, 0], out[:, 1], out[:, 2]
        mixed = none + image_scale * (image - none) + text_scale * (both - image)
        return rescaled(mixed, both, rescale) if rescale else mixed

    return guided


def conditional(
    denoise: Denoise,
    *,
    text_states: Conditions,
    cond_latents: Float[Array, "B h w c"],
) -> Callable[[Array, Array], Array]:
    """e(T,I): what guidance with scales of 1 gives, for a third of its computation."""

    def predict(latents, timesteps):
        stacked = jnp.concatenate([latents, cond_latents], axis=-1)
        return denoise(stacked, timesteps, text_states).astype(latents.dtype)

    return predict


def without_text(conditions: Conditions, null: Conditions) -> Conditions:
    """`conditions` in which each text is the empty one.

    What `null` does not have, as the size of an image, stays as it is.
    """
    if isinstance(conditions, Mapping):
        return {
            name: without_text(array, null[name]) if name in null else array
            for name, array in conditions.items()
        }
    return jnp.broadcast_to(null, conditions.shape)


def rescaled(
    guided: Float[Array, "B h w c"],
    conditional: Float[Array, "B h w c"],
    phi: float,
) -> Float[Array, "B h w c"]:
    """Guidance rescale: Lin et al., arXiv 2305.08891, equations 15 and 16.

    Large scales raise the contrast. This brings the standard deviation of each image's
    prediction towards that of `conditional`: all the way at phi = 1, not at all at 0.
    """
    axes = (1, 2, 3)
    factor = conditional.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return phi * (guided * factor) + (1.0 - phi) * guided


def _interleaved(*branches: Array) -> Array:
    """Arrays [B, ...] as one [K B, ...], the K rows of an image beside each other."""
    stacked = jnp.stack(branches, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _per_image(scale: Scale) -> Scale | Float[Array, "B 1 1 1"]:
    return scale[:, None, None, None] if jnp.ndim(scale) else scale
