"""InstructPix2Pix (arXiv 2211.09800): what its UNet is trained on.

Legend: B batch, h w latent grid, c latent channels, L text tokens, D their width.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mvc_jax.diffusion import loss


def examples(
    batch: dict[str, Array],
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
