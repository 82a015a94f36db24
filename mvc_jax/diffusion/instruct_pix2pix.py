"""InstructPix2Pix (arXiv 2211.09800): what its UNet is trained on, how it draws.

Legend: B batch, h w latent grid, c latent channels, L text tokens, D their width.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mvc_jax.diffusion import loss
from mvc_jax.diffusion.guidance import (
    Denoise,
    Scale,
    conditional,
    image_text_guidance,
)
from mvc_jax.diffusion.samplers import WHOLE, Solver, sample


def examples(
    batch: dict[str, Any],
    draws: dict[str, Array],
    *,
    alphas_cumprod: Float[np.ndarray, " T"],
    prediction_type: str,
    scaling_factor: float,
    drop_rate: float,
) -> dict[str, Array]:
    """What the UNet sees of a batch of pairs, and what it should say.

    The noisy scaled *sample* of the target's posterior, with the unscaled *mode* of the
    source's on the channel axis (section 3.2); text and source dropped as in section
    3.2.1.

    Args:
      batch: `source_moments` and `target_moments` [B, h, w, 2c], `text_states`
        [B, L, D], `null_states` [L, D], `weight` [B].
      draws: standard normal `posterior` and `noise` [B, h, w, c], `timesteps` int32
        [B], `dropout` uniform in [0, 1) [B].
      alphas_cumprod: of the noise schedule.
      prediction_type: of the UNet.
      scaling_factor: of the latents.
      drop_rate: p of `loss.drop_conditions`.

    Returns:
      `inputs` [B, h, w, 2c], `timesteps` [B], `text_states` [B, L, D], `target`
      [B, h, w, c], `weight` [B].
    """
    noise, timesteps = draws["noise"], draws["timesteps"]
    latents = loss.posterior_sample(batch["target_moments"], draws["posterior"])
    latents = latents * scaling_factor
    noisy = loss.add_noise(latents, noise, timesteps, alphas_cumprod)
    cond_latents = loss.posterior_mode(batch["source_moments"])
    no_text, no_image = loss.drop_conditions(draws["dropout"], drop_rate)
    cond_latents = jnp.where(no_image[:, None, None, None], 0.0, cond_latents)
    null = batch["null_states"][None]
    return {
        "inputs": jnp.concatenate([noisy, cond_latents], axis=-1),
        "timesteps": timesteps,
        "text_states": jnp.where(no_text[:, None, None], null, batch["text_states"]),
        "target": loss.prediction_target(
            latents, noise, timesteps, alphas_cumprod, prediction_type
        ),
        "weight": batch["weight"],
    }


def draw(
    denoise: Denoise,
    noise: Float[Array, "B h w c"],
    source_moments: Float[Array, "B h w c2"],
    text_states: Float[Array, "B L D"],
    null_states: Float[Array, "L D"],
    *,
    solver: Solver,
    text_scale: Scale,
    image_scale: Scale,
    guidance_interval: tuple[float, float] = WHOLE,
    guidance_rescale: float = 0.0,
) -> Float[Array, "B h w c"]:
    """Scaled latents from noise, guided by texts and source images.

    Args:
      denoise: the UNet's prediction, as `guidance.image_text_guidance` takes it.
      noise: standard normal.
      source_moments: of the source images; zeros where an image has no source.
      text_states: of their texts.
      null_states: of the empty prompt.
      solver: as `samplers.sample` takes it.
      text_scale: s_T, one for all images or one for each.
      image_scale: s_I.
      guidance_interval: of `samplers.stretches`; outside it the text and the image
        condition as in training, and are not guided.
      guidance_rescale: phi of `guidance.rescaled`.
    """
    conditions = {
        "text_states": text_states,
        "cond_latents": loss.posterior_mode(source_moments),
    }
    guided = image_text_guidance(
        denoise,
        **conditions,
        null_states=null_states,
        text_scale=text_scale,
        image_scale=image_scale,
        rescale=guidance_rescale,
    )
    return sample(
        guided,
        solver,
        noise,
        unguided=conditional(denoise, **conditions),
        guidance_interval=guidance_interval,
    )
