"""Host randomness and batch order as functions of (seed, purpose, index).

No generator outlives one call, so resuming an interrupted run needs nothing but the
step.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int32


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A new generator for one (seed, purpose, index), independent of all others."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, purpose: str, epoch: int, size: int) -> np.ndarray:
    return generator(seed, purpose, epoch).permutation(size)


def batch_indices(
    seed: int, purpose: str, step: int, *, batch_size: int, size: int
) -> Int32[np.ndarray, " B"]:
    """Indices of the batch at `step`: every example once per epoch, reshuffled.

    Batches cross the boundary between epochs, so `batch_size` may exceed `size`.

    Args:
      seed: of the run.
      purpose: names the stream; streams of different purposes are independent.
      step: of training, from 0.
      batch_size: B.
      size: number of examples.

    Returns:
      indices in [0, size).
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty(batch_size, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch(seed, purpose, int(epoch), size)[offsets[here]]
    return indices


def reader(
    seed: int, purpose: str, arrays: dict[str, np.ndarray], *, batch_size: int
) -> Callable[..., dict[str, np.ndarray]]:
    """Returns a function from step to the rows of `arrays` [N, ...] in its batch.

    Its second argument, an index of the batch, asks for these of its rows alone.
    """
    size = len(next(iter(arrays.values())))

    def read(step: int, rows: Any = slice(None)) -> dict[str, np.ndarray]:
        indices = batch_indices(seed, purpose, step, batch_size=batch_size, size=size)
        return {name: array[indices[rows]] for name, array in arrays.items()}

    return read
