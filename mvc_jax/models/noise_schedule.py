"""The noise schedule that a diffusion model was trained with."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def alphas_cumprod(config: Mapping[str, Any]) -> Float[np.ndarray, " T"]:
    """The product of 1 - beta up to each training timestep, float32.

    Computed by `jax.numpy`: NumPy multiplies in another order, which changes the last
    bits (by up to 4e-7), and with them every model that is trained on this schedule.

    Args:
      config: the fields of a `scheduler_config.json` that describe the noise:
        `num_train_timesteps`, and either `trained_betas` or a `beta_schedule` with its
        `beta_start` and `beta_end`.

    Raises:
      ValueError: the `beta_schedule` is unknown.
    """
    with jax.ensure_compile_time_eval():  # it may first be read inside a jit
        return np.asarray(jnp.cumprod(1.0 - _betas(config)))


def _betas(config: Mapping[str, Any]) -> Float[Array, " T"]:
    if config.get("trained_betas") is not None:
        return jnp.asarray(config["trained_betas"], jnp.float32)
    schedule, steps = config["beta_schedule"], config["num_train_timesteps"]
    if schedule == "squaredcos_cap_v2":
        return jnp.asarray(_cosine_betas(steps), jnp.float32)
    start, end = config["beta_start"], config["beta_end"]
    if schedule == "linear":  # Ho et al., arXiv 2006.11239
        return jnp.linspace(start, end, steps, dtype=jnp.float32)
    if schedule == "scaled_linear":  # Rombach et al., arXiv 2112.10752
        return jnp.linspace(start**0.5, end**0.5, steps, dtype=jnp.float32) ** 2
    raise ValueError(f"unknown beta_schedule {schedule!r}")


def _cosine_betas(steps: int) -> Float[np.ndarray, " T"]:
    """Nichol and Dhariwal, arXiv 2102.09672, equation 17; capped at 0.999."""
    fractions = np.arange(steps + 1) / steps
    alphas = np.cos((fractions + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alphas[1:] / alphas[:-1], 0.999)
