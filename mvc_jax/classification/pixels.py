"""A classifier's images, real and synthetic, as rows of one array.

The rows are memory-mapped files or arrays; threads prefetch batches of them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from mvc_jax import files
from mvc_jax.digests import Digests


@dataclasses.dataclass(frozen=True)
class ConcatArray:
    """Arrays of images [n_i, H, W, 3] uint8, indexed as if they were concatenated."""

    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def all(self) -> UInt8[np.ndarray, "R H W 3"]:
        """Returns all rows as one array in memory."""
        return np.concatenate(self.parts)

    def take(self, index: Int[np.ndarray, "..."]) -> UInt8[np.ndarray, "... H W 3"]:
        """Returns the rows at `index`, of any shape; reads no others from the disk."""
        flat = np.asarray(index).reshape(-1)
        taken = np.empty((len(flat), *self.parts[0].shape[1:]), np.uint8)
        first = 0
        for part in self.parts:
            here = (flat >= first) & (flat < first + len(part))
            taken[here] = part[flat[here] - first]
            first += len(part)
        return taken.reshape(*np.shape(index), *taken.shape[1:])


def store(
    path: epath.PathLike,
    images: Iterable[np.ndarray],
    count: int,
    size: int,
    digests: Digests,
) -> UInt8[np.ndarray, "N S S 3"]:
    """Writes `count` images to an `.npy` file, unless it is intact, and maps it."""
    path = epath.Path(path)
    if not digests.intact(path):
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            file.write(files.image_array_header(count, size))
            for image in images:
                file.write(np.ascontiguousarray(image).tobytes())
        digests.add(path)
    return files.map_array(path)


class Prefetcher:
    """Calls `read(step)` in threads, a few steps ahead of consecutive requests.

    Further arguments are those of the first request from a step on.
    """

    def __init__(
        self, read: Callable[..., dict[str, Any]], steps: int, *, threads: int = 8
    ):
        self._read, self._steps, self._threads = read, steps, threads
        self._next, self._batches = -1, iter(())

    def __call__(self, step: int, *rows: Any) -> dict[str, Any]:
        if step != self._next:
            self._batches = self._from(step, rows)
        self._next = step + 1
        return next(self._batches)

    def _from(self, step: int, rows: tuple) -> Iterator[dict[str, Any]]:
        import grain  # takes 3 s to import, and most datasets fit in memory

        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=16)
        steps = grain.MapDataset.source(range(step, self._steps))
        read = steps.map(lambda step: self._read(step, *rows))
        return iter(read.to_iter_dataset(options))
