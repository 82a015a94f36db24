"""Sampling as one scan over the timesteps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sample(
    denoise: Callable[[Array, Array], Array],
    step: Callable[[Array, Array, Array], Array],
    timesteps: Int[Array | np.ndarray, " S"],
    noise: Float[Array, "B h w c"],
) -> Float[Array, "B h w c"]:
    """Walks from noise to latents.

    Args:
      denoise: `(latents, timesteps [B]) -> prediction`, guidance included.
      step: `(latents, prediction, timestep) -> latents`, one step of a solver.
      timesteps: from the noisiest to the cleanest.
      noise: standard normal.
    """

    def body(latents, timestep):
        batch = jnp.broadcast_to(timestep, latents.shape[:1])
        return step(latents, denoise(latents, batch), timestep), None

    return jax.lax.scan(body, noise, jnp.asarray(timesteps))[0]
