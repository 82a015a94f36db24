"""Features of images as points, and the blocks of the matrix of their distances.

Integer levels, as pixels and quantised directions have, give squared distances without
any rounding: a distance is then a function of its two images alone, whatever the batch,
and that of an image to itself is zero. Distances between floating-point features are
computed in float32.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Num

# A task has _ROWS x _COLUMNS pairs and takes _STRIP rows at a time, so that what is
# computed for each pair is computed in a processor's cache.
_ROWS = _COLUMNS = 2048
_STRIP = 256
_EXACT = 1024  # products of two bytes around zero, whose sum float32 holds: 2^24 / 2^14
_READ = 4096  # rows of features that are converted at once
_Result = TypeVar("_Result")


@runtime_checkable
class Stored(Protocol):
    """Rows on a disk, as `data/shards.py` reads them."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def take(self, indices: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Points:
    """Images as points.

    Attributes:
      levels: [N, P], integers or floats; in memory, mapped, or `Stored`.
      unit: levels in a distance of 1.
      scale: `levels * scale` are the features of the metrics that are no distance.
    """

    levels: np.ndarray | Stored
    unit: float = 1.0
    scale: float = 1.0

    def __len__(self) -> int:
        return self.levels.shape[0]

    @property
    def dims(self) -> int:
        """P."""
        return self.levels.shape[1]

    @property
    def exact(self) -> bool:
        """Whether distances are computed without rounding."""
        return np.issubdtype(self.levels.dtype, np.integer)

    def rows(self, rows: Int[np.ndarray, " M"] | slice) -> Num[np.ndarray, "M P"]:
        """The levels of some points, in memory."""
        if isinstance(self.levels, np.ndarray):
            return np.asarray(self.levels[rows])
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        return self.levels.take(rows)

    def __getitem__(
        self, rows: Bool[np.ndarray, " N"] | Int[np.ndarray, " M"]
    ) -> "Points":
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return dataclasses.replace(self, levels=self.rows(rows))

    def features(self) -> Iterator[Float[np.ndarray, "b P"]]:
        """Yields the features of all points in order, a few thousand in a float64."""
        for start in range(0, len(self), _READ):
            yield self.rows(slice(start, start + _READ)) * np.float64(self.scale)

    def square_norms(self) -> Float[np.ndarray, " N"]:
        """|x|^2 of the features x."""
        norms = [np.einsum("nd,nd->n", x, x) for x in self.features()]
        return np.concatenate([np.zeros(0), *norms])


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the matrix of squared distances.

    Attributes:
      rows: the points of the one side.
      columns: the points of the other side.
      squared: [r, c], squared distances in levels; float64 if they are exact. The
        distance of a point to itself is infinite.
      own: positions (rows, columns) of these in `squared`.
      mirrored: whether the two sides are the same points, and the transposed block is
        not visited: what is said of a row also has to be said of a column.
    """

    rows: slice
    columns: slice
    squared: np.ndarray
    own: tuple[np.ndarray, np.ndarray]
    mirrored: bool

    @property
    def sides(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(points, [points, neighbours]), also transposed if `mirrored`."""
        yield self.rows, self.squared
        if self.mirrored:
            yield self.columns, self.squared.T


def visit_blocks(
    a: Points,
    b: Points,
    visit: Callable[[Block], _Result],
    *,
    part: tuple[int, int] = (0, 1),
) -> Iterator[_Result]:
    """Yields what `visit` returns for the blocks of the distances from `a` to `b`.

    Blocks are visited in threads, and yielded in their order. Memory is that of a few
    blocks, whatever the number of points.

    Args:
      a: N points.
      b: M points of the same kind. Where it is `a` itself, points are no neighbours of
        themselves, and blocks beside the diagonal are visited once, `mirrored`.
      visit: may be called in several threads.
      part: (i, n), the i-th of n parts of the work, e.g. of host i.
    """
    same = a is b
    tasks = [
        (start, first)
        for start in range(part[0] * _ROWS, len(a), part[1] * _ROWS)
        for first in range(start if same else 0, len(b), _COLUMNS)
    ]
    center = _center(b)

    def work(task: tuple[int, int]) -> list[_Result]:
        return [visit(x) for x in _strips(a, b, center, *task)]

    threads = min(workers(), len(tasks))
    if threads < 2:
        for task in tasks:
            yield from work(task)
        return
    import threadpoolctl

    waiting: collections.deque = collections.deque()
    with (
        threadpoolctl.threadpool_limits(1),
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def workers() -> int:
    """How many threads visit blocks."""
    return os.cpu_count() or 1


def count_blocks(a: Points, b: Points) -> int:
    """How many results `visit_blocks` yields."""
    strips = (
        -(-min(_ROWS, len(a) - start) // _STRIP) for start in range(0, len(a), _ROWS)
    )
    columns = -(-len(b) // _COLUMNS)
    return sum(n * (columns - i * (a is b)) for i, n in enumerate(strips))


def _center(points: Points) -> np.ndarray:
    """A point amid the others: float32 loses less where norms are small."""
    if points.exact:
        return np.full(1, 128 if points.levels.dtype == np.uint8 else 0)
    some = points.rows(slice(0, _READ))
    return some.mean(0, keepdims=True, dtype=np.float64)


def _strips(
    a: Points, b: Points, center: np.ndarray, start: int, first: int
) -> Iterator[Block]:
    """The blocks of a task, `_STRIP` rows each."""
    same = a is b
    square = _exact_squares if a.exact else _squares
    columns = slice(first, min(first + _COLUMNS, len(b)))
    y = square.prepare(b.rows(columns) - center)
    for row in range(start, min(start + _ROWS, len(a)), _STRIP):
        rows = slice(row, min(row + _STRIP, start + _ROWS, len(a)))
        squared = square(square.prepare(a.rows(rows) - center), y)
        own = (np.zeros(0, np.int64),) * 2
        if same and start == first:
            own = np.arange(rows.stop - row), np.arange(row - first, rows.stop - first)
            squared[own] = np.inf
        yield Block(rows, columns, squared, own, same and start != first)


class _Squares:
    """Squared distances in float32: |x|^2 and |y|^2 are two more columns."""

    @staticmethod
    def prepare(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x.astype(np.float32), np.einsum("nd,nd->n", x, x)

    def __call__(self, x: tuple, y: tuple) -> np.ndarray:
        (x, x_norms), (y, y_norms) = x, y
        squared = (-2 * x) @ y.T
        squared += x_norms.astype(np.float32)[:, None]
        squared += y_norms.astype(np.float32)[None]
        return np.maximum(squared, 0, out=squared)


class _ExactSquares:
    """Squared distances of integers in float64, without rounding.

    Of bytes, float32 sums `_EXACT` products without rounding, in half the time.
    """

    @staticmethod
    def prepare(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = x.astype(np.int64)
        small = len(x) == 0 or np.abs(x).max() <= 128
        return x.astype(np.float32 if small else np.float64), (x**2).sum(1)

    def __call__(self, x: tuple, y: tuple) -> np.ndarray:
        (x, x_norms), (y, y_norms) = x, y
        squared = np.add.outer(x_norms, y_norms).astype(np.float64)
        if x.dtype == y.dtype == np.float32:
            for start in range(0, x.shape[1], _EXACT):
                part = slice(start, start + _EXACT)
                squared -= 2 * (x[:, part] @ y[:, part].T)
        else:
            squared -= 2 * (x.astype(np.float64) @ y.astype(np.float64).T)
        return squared


_squares, _exact_squares = _Squares(), _ExactSquares()
