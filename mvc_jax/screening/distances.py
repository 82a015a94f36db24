"""How far images are from each other: by their pixels, or by an embedding of them.

Images become points with whole numbers as coordinates, whose distances float64 holds
without rounding: a distance is a function of its two images alone, whatever else was
computed beside it, and that of an image to itself is zero.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Num

from mvc_jax.data.decode import fit

LOOK = 32  # pixels along a side, at most, at which images are compared
_STEPS = 2**14  # of an embedding's unit vector
_BLOCK = 1024  # points of one side that are compared at once


@dataclasses.dataclass(frozen=True)
class Points:
    """Images as points, `levels / unit`.

    Attributes:
      levels: integers [N, P].
      unit: levels in a distance of 1.
    """

    levels: Integer[np.ndarray, "N P"]
    unit: float

    def __len__(self) -> int:
        return len(self.levels)

    def of(self, rows: Bool[np.ndarray, " N"] | Int[np.ndarray, " M"]) -> "Points":
        return Points(self.levels[rows], self.unit)


class Nearest(NamedTuple):
    """Of each of N points: how far the nearest others are.

    `distance` float64 [N], to the nearest; `index` int64 [N], which that is, of several
    the first; `different` float64 [N], to the nearest that is not the same, infinite
    where there is none.
    """

    distance: np.ndarray
    index: np.ndarray
    different: np.ndarray


def pixels(images: Sequence[np.ndarray] | np.ndarray, size: int) -> Points:
    """Images by their pixels; distances are root mean squared differences in [0, 1].

    Args:
      images: N of uint8 [H, W, 3].
      size: pixels along a side at which they are compared, at most `LOOK`; images of
        another size are brought to it by area.
    """
    size = min(size, LOOK)
    small = [fit(image, size, resample="area").reshape(-1) for image in images]
    count = 3 * size**2
    levels = np.stack(small) if small else np.empty((0, count), np.uint8)
    return Points(levels, 255 * float(np.sqrt(count)))


def directions(embeddings: Num[np.ndarray, "N D"]) -> Points:
    """Embeddings by their direction; distances are sqrt(2 - 2 cos), in [0, 2]."""
    embeddings = np.asarray(embeddings, np.float64)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(length, np.finfo(np.float64).tiny)
    return Points(np.round(unit * _STEPS).astype(np.int16), float(_STEPS))


def nearest(ours: Points, theirs: Points, *, skip_self: bool = False) -> Nearest:
    """The nearest of `theirs` to each of `ours`.

    Args:
      ours: N points.
      theirs: M points of the same kind, at least one.
      skip_self: the two are the same, and no point is its own neighbour.
    """
    distance, different = (np.full(len(ours), np.inf) for _ in range(2))
    index = np.zeros(len(ours), np.int64)
    for start, first, block in _blocks(ours, theirs):
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


def aligned(ours: Points, theirs: Points) -> Float[np.ndarray, " N"]:
    """The distance from each of `ours` to the one of `theirs` in the same place."""
    apart = ours.levels.astype(np.int64) - theirs.levels
    return np.sqrt((apart**2).sum(1)) / ours.unit


def mean_within(points: Points) -> float:
    """Mean distance of two different ones of at least two points."""
    total = sum(float(block.sum()) for _, _, block in _blocks(points, points))
    return total / (len(points) * (len(points) - 1))


def same(points: Points) -> Int[np.ndarray, " N"]:
    """A number for each point, equal where points are: of its first occurrence."""
    _, first, inverse = np.unique(
        points.levels, axis=0, return_index=True, return_inverse=True
    )
    return first[inverse.reshape(-1)].astype(np.int64)


def _blocks(ours: Points, theirs: Points) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (start of ours, start of theirs, distances of a block of each)."""
    for start in range(0, len(ours), _BLOCK):
        a = ours.levels[start : start + _BLOCK].astype(np.float64)
        for first in range(0, len(theirs), _BLOCK):
            b = theirs.levels[first : first + _BLOCK].astype(np.float64)
            squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
            yield start, first, np.sqrt(squares) / ours.unit


def copy_distance(different: Float[np.ndarray, " N"], quantile: float = 0.0) -> float:
    """What is nearer than this to a real image is its copy.

    Args:
      different: of N real images, the distance to the nearest that is not the same.
      quantile: of these, in [0, 1]; 0: no two different real images are nearer.

    Returns:
      a positive distance; where no two images differ, what only the same is below.
    """
    finite = different[np.isfinite(different)]
    if not len(finite):
        return float(np.finfo(np.float64).tiny)
    return float(np.quantile(finite, quantile))
