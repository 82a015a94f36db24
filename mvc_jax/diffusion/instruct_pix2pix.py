"""InstructPix2Pix (arXiv 2211.09800): its training examples, and sampling.

Legend: B batch, h w latent grid, c latent channels, L text tokens, D their width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mvc_jax.diffusion import loss
from mvc_jax.diffusion.guidance import (
    Conditions,
    Denoise,
    Scale,
    conditional,
    image_text_guidance,
    without_text,
)
from mvc_jax.diffusion.guidance_interval import ALWAYS
from mvc_jax.diffusion.samplers import Sampler


def examples(
    batch: dict[str, Any],
    draws: dict[str, Array],
    *,
    alphas_cumprod: Float[np.ndarray, " T"],
    prediction_type: str,
    scaling_factor: float,
    drop_rate: float,
) -> dict[str, Array]:
    """Makes the UNet's inputs and targets from a batch of pairs.

    The inputs are the noisy scaled *sample* of the target's posterior and, on the
    channel axis, the unscaled *mode* of the source's (section 3.2); text and source are
    dropped as in section 3.2.1.

    Args:
      batch: `source_moments` and `target_moments` [B, h, w, 2c], `weight` [B];
        `text_states` [B, L, D] and `null_states` [L, D], or all `guidance.Conditions`.
      draws: standard normal `posterior` and `noise` [B, h, w, c], `timesteps` int32
        [B], `dropout` uniform in [0, 1) [B].
      alphas_cumprod: of the noise schedule.
      prediction_type: of the UNet.
      scaling_factor: of the latents.
      drop_rate: p of `loss.drop_conditions`.

    Returns:
      `inputs` [B, h, w, 2c], `timesteps` [B], `text_states` as in `batch`, `target`
      [B, h, w, c], `weight` [B].
    """
    noise, timesteps = draws["noise"], draws["timesteps"]
    latents = loss.posterior_sample(batch["target_moments"], draws["posterior"])
    latents = latents * scaling_factor
    noisy = loss.add_noise(latents, noise, timesteps, alphas_cumprod)
    cond_latents = loss.posterior_mode(batch["source_moments"])
    no_text, no_image = loss.drop_conditions(draws["dropout"], drop_rate)
    cond_latents = jnp.where(no_image[:, None, None, None], 0.0, cond_latents)
    text = batch["text_states"]

    def dropped(null, given):
        return jnp.where(jnp.expand_dims(no_text, range(1, given.ndim)), null, given)

    null = without_text(text, batch["null_states"])
    return {
        "inputs": jnp.concatenate([noisy, cond_latents], axis=-1),
        "timesteps": timesteps,
        "text_states": jax.tree.map(dropped, null, text),
        "target": loss.prediction_target(
            latents, noise, timesteps, alphas_cumprod, prediction_type
        ),
        "weight": batch["weight"],
    }


def draw(
    denoise: Denoise,
    noise: Float[Array, "B h w c"],
    source_moments: Float[Array, "B h w c2"],
    text_states: Conditions,
    null_states: Conditions,
    *,
    sampler: Sampler,
    text_scale: Scale,
    image_scale: Scale,
    guidance_interval: tuple[float, float] = ALWAYS,
    guidance_rescale: float = 0.0,
    start: Float[Array, "B h w c"] | None = None,
    strength: float = 1.0,
) -> Float[Array, "B h w c"]:
    """Samples scaled latents, guided by texts and source images.

    Args:
      denoise: the UNet's prediction, as `guidance.image_text_guidance` takes it.
      noise: standard normal.
      source_moments: of the source images; zeros where an image has no source.
      text_states: of their texts.
      null_states: of the empty prompt.
      sampler: of `samplers.make`.
      text_scale: s_T, one for all images or one for each.
      image_scale: s_I.
      guidance_interval: as `guidance_interval.segments` takes it. Outside it the UNet
        sees text and source image, but their effect is not amplified.
      guidance_rescale: phi of `guidance.rescaled`.
      start: scaled latents that are noised to begin with; None: begin with noise.
      strength: of that noise, as the samplers take it.
    """
    cond_latents = loss.posterior_mode(source_moments)
    guided = image_text_guidance(
        denoise,
        text_states=text_states,
        null_states=null_states,
        cond_latents=cond_latents,
        text_scale=text_scale,
        image_scale=image_scale,
        rescale=guidance_rescale,
    )
    unguided = conditional(denoise, text_states=text_states, cond_latents=cond_latents)
    return sampler(
        guided,
        noise,
        unguided=unguided,
        guidance_interval=guidance_interval,
        source=start,
        strength=strength,
    )
