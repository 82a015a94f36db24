"""The timesteps at which each sampler calls the network; known before compilation."""

import numpy as np
from jaxtyping import Int

from mvc_jax.diffusion.guidance_interval import segments

_BRANCHES = 3  # predictions of a guided step: `guidance.image_text_guidance`


def leading(num_train_timesteps: int, steps: int) -> Int[np.ndarray, " S"]:
    """From (S - 1) (T // S) + 1 down to 1: diffusers' `leading`, with offset 1."""
    spacing = num_train_timesteps // steps
    return (np.arange(steps) * spacing)[::-1].astype(np.int32) + np.int32(1)


def linspace(num_train_timesteps: int, steps: int) -> Int[np.ndarray, " S"]:
    """Evenly spaced from T - 1 down, without the final 0: diffusers' `linspace`."""
    timesteps = np.linspace(0, num_train_timesteps - 1, steps + 1).round()
    return timesteps[:0:-1].astype(np.int32)


TIMESTEPS = {"ddim": leading, "euler": leading, "dpmpp_2m": linspace}


def evaluations(
    sampler: str,
    steps: int,
    guidance_interval: tuple[float, float],
    num_train_timesteps: int = 1000,
) -> int:
    """Predictions of the UNet for one image, of all branches of guidance together.

    Args:
      sampler: a key of `TIMESTEPS`.
      steps: S.
      guidance_interval: as `segments` takes it; outside it there is one branch.
      num_train_timesteps: T; by default that of every Stable Diffusion.
    """
    timesteps = TIMESTEPS[sampler](num_train_timesteps, steps)
    parts = segments(timesteps, num_train_timesteps, guidance_interval)
    return sum(
        (stop - start) * (_BRANCHES if guided else 1) for start, stop, guided in parts
    )
