"""Host randomness and batch order as functions of (seed, purpose, index).

No generator lives longer than one call, so an interrupted run needs to remember
nothing but its step.
"""

import functools
import zlib
from collections.abc import Callable

import numpy as np


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A fresh generator for one (seed, purpose, index), independent of all others."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, purpose: str, epoch: int, size: int) -> np.ndarray:
    return generator(seed, purpose, epoch).permutation(size)


def batch_indices(
    seed: int, purpose: str, step: int, *, batch_size: int, size: int
) -> np.ndarray:
    """Indices of the batch at `step`: every example once an epoch, then reshuffled.

    Batches run on across the epochs' borders, so `batch_size` may exceed `size`.

    Returns:
      int32 [batch_size], values in [0, size).
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
) -> Callable[[int], dict[str, np.ndarray]]:
    """Step -> the rows of `arrays` [N, ...] that its batch has."""
    size = len(next(iter(arrays.values())))

    def read(step: int) -> dict[str, np.ndarray]:
        indices = batch_indices(seed, purpose, step, batch_size=batch_size, size=size)
        return {name: array[indices] for name, array in arrays.items()}

    return read
