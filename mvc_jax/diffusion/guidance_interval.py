"""Guidance in a limited interval of noise levels (arXiv 2404.07724).

The paper's interval is one of noise levels sigma; this one is of their order, t / T.
Imports no JAX: a stage checks its fields before anything slow is loaded.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mvc_jax.errors import UserError

ALWAYS = (0.0, 1.0)


def check(interval: Sequence[float]) -> None:
    """Refuses a `config.generate.guidance_interval` that `segments` cannot take.

    Raises:
      UserError: it is not two ascending numbers from 0 to 1.
    """
    interval = tuple(interval)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(
            "config.generate.guidance_interval",
            wanted="two ascending fractions of the training timesteps, from 0 to 1",
            got=f"{interval}",
            fix="(0.0, 1.0) guides at every step.",
        )


def segments(
    timesteps: Int[np.ndarray, " S"],
    num_train_timesteps: int,
    interval: tuple[float, float],
) -> list[tuple[int, int, bool]]:
    """Splits sampling steps where they enter and where they leave the interval.

    Args:
      timesteps: of the steps, in their order.
      num_train_timesteps: T.
      interval: (low, high); a step is guided where low <= t / T <= high.

    Returns:
      (start, stop, guided) of each segment, in order: steps start to stop - 1.
    """
    low, high = interval
    level = timesteps / num_train_timesteps
    guided = (low <= level) & (level <= high)
    starts = [0, *np.flatnonzero(np.diff(guided)) + 1]
    stops = [*starts[1:], len(guided)]
    return [
        (int(start), int(stop), bool(guided[start]))
        for start, stop in zip(starts, stops, strict=True)
    ]
