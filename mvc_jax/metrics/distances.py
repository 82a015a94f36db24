"""Distances between images: nearest ones, copies, means; by pixels or by features."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from mvc_jax.data.decode import fit
from mvc_jax.metrics.points import Block, Points, Stored, visit_blocks

MAX_SIZE = 32  # pixels along a side at which images are compared
_STEPS = 2**14  # quantisation of the coordinates of a unit vector
_PAIRS = 4096  # that are compared at once


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
    count = 3 * size**2
    small = [fit(image, size, resample="area").reshape(-1) for image in images]
    levels = np.stack(small) if small else np.empty((0, count), np.uint8)
    return pixel_points(levels)


def pixel_points(levels: Num[np.ndarray, "N P"] | Stored) -> Points:
    """Rows of P pixel values in [0, 255] as points, see `pixels`."""
    return Points(levels, 255 * float(np.sqrt(levels.shape[1])), 1 / 255)


def directions(embeddings: Num[np.ndarray, "N D"]) -> Points:
    """Returns embeddings as points whose distance is sqrt(2 - 2 cos), in [0, 2]."""
    embeddings = np.asarray(embeddings, np.float64)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(length, np.finfo(np.float64).tiny)
    levels = np.round(unit * _STEPS).astype(np.int16)
    return Points(levels, float(_STEPS), 1 / _STEPS)


class NearestSearch:
    """The nearest of some points to each query, found block by block.

    Attributes:
      squared: float64 [N], squared distances in levels to the nearest.
      index: int64 [N], of the nearest, the first of several.
      different: float64 [N], squared distance to the nearest that is not equal.
    """

    def __init__(self, count: int, *, columns: bool = False):
        """Starts a search without any point.

        Args:
          count: N.
          columns: the queries are the columns of a block, not its rows.
        """
        self._columns = columns
        self.squared, self.different = (np.full(count, np.inf) for _ in range(2))
        self.index = np.full(count, -1, np.int64)

    def visit(self, block: Block) -> list[tuple]:
        """The nearest in a block of those queries to which it has a nearer one."""
        if self._columns:
            sides: Iterator = iter([(block.columns, block.rows, block.squared.T)])
        else:
            sides = (
                (rows, block.columns if i == 0 else block.rows, squared)
                for i, (rows, squared) in enumerate(block.sides)
            )
        found = []
        for queries, points, squared in sides:
            best = squared.min(1)
            # Another thread may lower `squared` meanwhile, and `add` compares again.
            nearer = np.flatnonzero(best <= self.squared[queries])
            first = squared[nearer].argmin(1) + points.start
            different = best.astype(np.float64)
            for row in np.flatnonzero(best == 0):
                others = squared[row]
                different[row] = others[others > 0].min(initial=np.inf)
            found.append((queries, nearer, best[nearer], first, different))
        return found

    def add(self, found: list[tuple]) -> None:
        """Takes over what `visit` found."""
        for queries, nearer, best, first, different in found:
            rows = nearer + queries.start
            self._take(rows, best, first)
            part = self.different[queries]
            np.minimum(part, different, out=part)

    def merge(self, other: "NearestSearch") -> None:
        """Takes over what another search found among other points."""
        self._take(np.arange(len(self.squared)), other.squared, other.index)
        np.minimum(self.different, other.different, out=self.different)

    def _take(self, rows: np.ndarray, squared: np.ndarray, index: np.ndarray) -> None:
        mine, present = self.squared[rows], self.index[rows]
        equal = (squared == mine) & ((index < present) | (present < 0)) & (index >= 0)
        better = (squared < mine) | equal
        self.squared[rows] = np.where(better, squared, mine)
        self.index[rows] = np.where(better, index, present)

    def nearest(self, queries: Points, points: Points) -> Nearest:
        """The result: where distances are rounded, that to the nearest is not."""
        if queries.exact:
            distances = (np.sqrt(x) / queries.unit for x in self._squares())
            return Nearest(next(distances), self.index, next(distances))
        known = np.flatnonzero(self.index >= 0)
        distance = np.full(len(queries), np.inf)
        distance[known] = paired(queries, points, known, self.index[known])
        return Nearest(distance, self.index, np.where(distance > 0, distance, np.inf))

    def _squares(self) -> Iterator[np.ndarray]:
        yield self.squared
        yield self.different


def nearest(queries: Points, points: Points, *, skip_self: bool = False) -> Nearest:
    """Finds the nearest of `points` to each of `queries`.

    Args:
      queries: N points.
      points: M points of the same kind, at least one.
      skip_self: the two are the same, and no point is its own neighbour.
    """
    search = NearestSearch(len(queries))
    points = queries if skip_self else dataclasses.replace(points)
    for found in visit_blocks(queries, points, search.visit):
        search.add(found)
    return search.nearest(queries, points)


def paired(
    a: Points,
    b: Points,
    rows: Int[np.ndarray, " N"] | None = None,
    columns: Int[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, " N"]:
    """Returns the distances from each of `a` to the point of `b` at the same index.

    Args:
      a, b: points of the same kind.
      rows: of `a`, which are used; None: all.
      columns: of `b`, one for each of `rows`; None: all.
    """
    rows = np.arange(len(a)) if rows is None else rows
    columns = np.arange(len(b)) if columns is None else columns
    kind = np.int64 if a.exact else np.float64
    found = np.empty(len(rows))
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        difference = a.rows(rows[part]).astype(kind) - b.rows(columns[part])
        found[part] = np.sqrt((difference**2).sum(1))
    return found / a.unit


def mean_pairwise(points: Points) -> float:
    """Returns the mean distance between two different ones of at least two points."""

    def total(block: Block) -> float:
        block.squared[block.own] = 0
        both = 2 if block.mirrored else 1
        return both * float(np.sqrt(block.squared).sum(dtype=np.float64))

    pairs = len(points) * (len(points) - 1)
    return sum(visit_blocks(points, points, total)) / pairs / points.unit


def duplicate_groups(points: Points) -> Int[np.ndarray, " N"]:
    """Returns for each point the index of the first point that equals it."""
    levels = points.rows(slice(None))
    _, first, inverse = np.unique(
        levels, axis=0, return_index=True, return_inverse=True
    )
    return first[inverse.reshape(-1)].astype(np.int64)


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
