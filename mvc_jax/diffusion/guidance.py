"""Classifier-free guidance; all branches of a step are one batch."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Denoise = Callable[[Array, Array, Array], Array]  # (latents, timesteps, text) -> pred


def image_text_guidance(
    denoise: Denoise,
    *,
    text_states: Float[Array, "B L D"],
    null_states: Float[Array, "L D"],
    cond_latents: Float[Array, "B h w c"],
    text_scale: Float[Array, " B"] | float,
    image_scale: Float[Array, " B"] | float,
) -> Callable[[Array, Array], Array]:
    """Two-scale guidance of InstructPix2Pix (arXiv 2211.09800, equation 3).

    e = e(0,0) + s_I (e(0,I) - e(0,0)) + s_T (e(T,I) - e(0,I))

    Args:
      denoise: takes latents [3B, h, w, 2c]: noisy ones, then source latents.
      text_states: T.
      null_states: text states of the empty prompt.
      cond_latents: I, the unscaled mode of the source's posterior.
      text_scale: s_T, of all or of each.
      image_scale: s_I.

    Returns:
      `(latents [B, h, w, c], timesteps [B]) -> prediction [B, h, w, c]`.
    """
    text_scale, image_scale = (
        jnp.reshape(scale, (-1, 1, 1, 1)) for scale in (text_scale, image_scale)
    )
    null = jnp.broadcast_to(null_states, text_states.shape)
    states = jnp.concatenate([null, null, text_states])
    zeros = jnp.zeros_like(cond_latents)
    images = jnp.concatenate([zeros, cond_latents, cond_latents])

    def guided(latents, timesteps):
        noisy = jnp.concatenate([latents] * 3)
        stacked = jnp.concatenate([noisy, images], axis=-1)
        out = denoise(stacked, jnp.concatenate([timesteps] * 3), states)
        none, image, both = jnp.split(out, 3)
        return none + image_scale * (image - none) + text_scale * (both - image)

    return guided
