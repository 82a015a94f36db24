"""Exact distances between images, by their pixels or by embeddings.

Images become points with integer coordinates, whose squared distances float64 holds
without rounding. A distance is thus a function of its two images alone, whatever the
batch, and that of an image to itself is zero.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Num

from mvc_jax.data.decode import fit

MAX_SIZE = 32  # pixels along a side at which images are compared
_STEPS = 2**14  # quantisation of the coordinates of a unit vector
_BLOCK = 1024  # points of one side that are compared at once


@dataclasses.dataclass(frozen=True)
class Points:
    """Images as points `levels / unit`.

    Attributes:
      levels: integers [N, P].
      unit: levels in a distance of 1.
    """

    levels: Integer[np.ndarray, "N P"]
    unit: float

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(
        self, rows: Bool[np.ndarray, " N"] | Int[np.ndarray, " M"]
    ) -> "Points":
        return Points(self.levels[rows], self.unit)


class Nearest(NamedTuple):
    """The nearest neighbours of N points.

    `distance` float64 [N], to the nearest; `index` int64 [N], of the nearest, the first
    of several; `different` float64 [N], distance to the nearest point that is not
    equal, infinite if there is none.
    """

    distance: np.ndarray
    index: np.ndarray
    different: np.ndarray


def pixels(images: Iterable[np.ndarray], size: int) -> Points:
    """Returns images as points whose distance is the RMS pixel difference in [0, 1].

    Args:
      images: N of uint8 [H, W, 3].
      size: pixels along a side at which they are compared, at most `MAX_SIZE`; images
        of other sizes are resampled by area.
    """
    size = min(size, MAX_SIZE)
    small = [fit(image, size, resample="area").reshape(-1) for image in images]
    count = 3 * size**2
    levels = np.stack(small) if small else np.empty((0, count), np.uint8)
    return Points(levels, 255 * float(np.sqrt(count)))


def directions(embeddings: Num[np.ndarray, "N D"]) -> Points:
    """Returns embeddings as points whose distance is sqrt(2 - 2 cos), in [0, 2]."""
    embeddings = np.asarray(embeddings, np.float64)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(length, np.finfo(np.float64).tiny)
    return Points(np.round(unit * _STEPS).astype(np.int16), float(_STEPS))


def nearest(queries: Points, points: Points, *, skip_self: bool = False) -> Nearest:
    """Finds the nearest of `points` to each of `queries`.

    Args:
      queries: N points.
      points: M points of the same kind, at least one.
      skip_self: the two are the same, and no point is its own neighbour.
    """
    distance, different = (np.full(len(queries), np.inf) for _ in range(2))
    index = np.zeros(len(queries), np.int64)
    for start, first, block in _blocks(queries, points):
        rows = slice(start, start + len(block))
        if skip_self and start == first:
            np.fill_diagonal(block, np.inf)
        best = block.argmin(1)
        found = block[np.arange(len(block)), best]
        nearer = found < distance[rows]
        index[rows] = np.where(nearer, first + best, index[rows])
        distance[rows] = np.minimum(found, distance[rows])
        others = np.where(block > 0, block, np.inf).min(1)
        different[rows] = np.minimum(others, different[rows])
    return Nearest(distance, index, different)


def paired(a: Points, b: Points) -> Float[np.ndarray, " N"]:
    """Returns the distances from each of `a` to the point of `b` at the same index."""
    difference = a.levels.astype(np.int64) - b.levels
    return np.sqrt((difference**2).sum(1)) / a.unit


def mean_pairwise(points: Points) -> float:
    """Returns the mean distance between two different ones of at least two points."""
    total = sum(float(block.sum()) for _, _, block in _blocks(points, points))
    return total / (len(points) * (len(points) - 1))


def duplicate_groups(points: Points) -> Int[np.ndarray, " N"]:
    """Returns for each point the index of the first point that equals it."""
    _, first, inverse = np.unique(
        points.levels, axis=0, return_index=True, return_inverse=True
    )
    return first[inverse.reshape(-1)].astype(np.int64)


def _blocks(a: Points, b: Points) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (start in a, start in b, distances of a block of each)."""
    for start in range(0, len(a), _BLOCK):
        x = a.levels[start : start + _BLOCK].astype(np.float64)
        for first in range(0, len(b), _BLOCK):
            y = b.levels[first : first + _BLOCK].astype(np.float64)
            squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
            yield start, first, np.sqrt(squares) / a.unit


def copy_distance(different: Float[np.ndarray, " N"], quantile: float = 0.0) -> float:
    """Returns the distance to a real image below which an image is its copy.

    Args:
      different: N distances from a real image to the nearest different one.
      quantile: of these, in [0, 1]; 0: no two different real images are nearer.

    Returns:
      a positive distance; if all real images are equal, the smallest positive number,
      so that only an equal image is a copy.
    """
    finite = different[np.isfinite(different)]
    if not len(finite):
        return float(np.finfo(np.float64).tiny)
    return float(np.quantile(finite, quantile))
