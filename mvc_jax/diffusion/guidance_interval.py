"""Guidance in a limited interval of noise levels (arXiv 2404.07724).

The paper's interval is one of noise levels sigma; this one is of their order, t / T.
"""

import numpy as np
from jaxtyping import Float, Int

ALWAYS = (0.0, 1.0)


def segments(
    timesteps: Int[np.ndarray, " S"] | Float[np.ndarray, " S"],
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
