"""All metrics of two sets of features, in one pass over their distances."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mvc_jax.errors import UserError
from mvc_jax.metrics import kernel_means, moments
from mvc_jax.metrics.distances import Nearest, NearestSearch
from mvc_jax.metrics.kernel_means import KernelSums
from mvc_jax.metrics.neighbourhoods import Balls, NearestSquares
from mvc_jax.metrics.points import Block, Points, count_blocks, visit_blocks

Advance = Callable[[int], None]
KID_IMAGES = 10_000  # below which a Fréchet distance says more of their number


@runtime_checkable
class Accumulator(Protocol):
    """What is found in the blocks of a matrix of distances, and can be merged."""

    def visit(self, block: Block) -> Any: ...

    def add(self, found: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which metrics to compute.

    Attributes:
      names: of `kid`, `cmmd`, `frechet`, `prdc`, `vendi`.
      neighbours: k of precision, recall, density and coverage.
    """

    names: Collection[str]
    neighbours: int = 5


@dataclasses.dataclass(frozen=True)
class Own:
    """What is known of a set by itself.

    Attributes:
      points: N.
      polynomial, gaussian: float64 [N], sums of the kernels over the others.
      radii: float64 [N], squared distances to the k-th nearest other, in levels.
      nearest: nearest others.
    """

    points: Points
    polynomial: np.ndarray | None
    gaussian: np.ndarray | None
    radii: np.ndarray | None
    nearest: Nearest


def describe(points: Points, wanted: Wanted, advance: Advance | None = None) -> Own:
    """Compares a set with itself.

    Args:
      points: of the set.
      wanted: which metrics.
      advance: called with the number of blocks that were just done.
    """
    search = NearestSearch(len(points))
    found: dict[str, Accumulator] = {"nearest": search}
    kernels = _kernels(points, points, wanted)
    sums = {k: KernelSums(v, len(points), len(points)) for k, v in kernels.items()}
    squares = NearestSquares(len(points), wanted.neighbours)
    if "prdc" in wanted.names and len(points) > wanted.neighbours:
        found["squares"] = squares
    _run(points, points, {**found, **sums}, advance)
    return Own(
        points,
        sums["kid"].rows if "kid" in sums else None,
        sums["cmmd"].rows if "cmmd" in sums else None,
        squares.squared[:, -1] if "squares" in found else None,
        search.nearest(points, points),
    )


def compare(
    real: Own,
    other: Own,
    wanted: Wanted,
    advance: Advance | None = None,
    also: Mapping[str, Accumulator] = MappingProxyType({}),
) -> tuple[dict[str, float | None], Nearest]:
    """Compares a set with a real one.

    Args:
      real: from `describe`, N images.
      other: M images.
      wanted: which metrics.
      advance: called with the number of blocks that were just done.
      also: are shown the same blocks, whose rows are the real images.

    Returns:
      the metrics by name, None where there are too few images for one; and of each of
      `other` the nearest real image.
    """
    a, b = real.points, dataclasses.replace(other.points)  # also of a set and itself
    search = NearestSearch(len(b), columns=True)
    kernels = _kernels(a, b, wanted)
    sums = {k: KernelSums(v, len(a), len(b)) for k, v in kernels.items()}
    balls = None
    if real.radii is not None and other.radii is not None:
        balls = Balls(real.radii, other.radii)
    found: dict[str, Accumulator] = {"nearest": search, **sums, **also}
    if balls is not None:
        found["balls"] = balls
    _run(a, b, found, advance)
    several = min(len(a), len(b)) > 1
    metrics: dict[str, float | None] = {}
    if "kid" in sums:
        metrics["kid"] = metrics["kid_error"] = None
        if several:
            across = sums["kid"].rows, sums["kid"].columns
            metrics["kid"], metrics["kid_error"] = kernel_means.kid(
                real.polynomial, other.polynomial, *across
            )
    if "frechet" in wanted.names:
        distance = moments.frechet_distance(a, b) if several else None
        metrics["frechet_distance"] = distance
    if "cmmd" in sums:
        across = sums["cmmd"].rows
        metrics["cmmd"] = kernel_means.cmmd(real.gaussian, other.gaussian, across)
    if "prdc" in wanted.names:
        names = ("precision", "recall", "density", "coverage")
        scores = balls.scores(wanted.neighbours) if balls else dict.fromkeys(names)
        metrics |= scores
    if "vendi" in wanted.names:
        metrics["vendi"] = moments.vendi_score(b)
    return metrics, search.nearest(b, a)


def blocks_of(real: int, others: Collection[int]) -> int:
    """How many blocks `describe` and `compare` visit for sets of these sizes."""
    a = Points(np.empty((real, 0), np.uint8))
    found = count_blocks(a, a)
    for count in others:
        b = Points(np.empty((count, 0), np.uint8))
        found += count_blocks(b, b) + count_blocks(a, b)
    return found


def require_finite(points: Points, name: str) -> None:
    """Raises a `UserError` if a feature is NaN or infinite.

    Args:
      points: of a set.
      name: of the set, for the message.
    """
    if points.exact:
        return
    start = 0
    for batch in points.features():
        bad = np.flatnonzero(~np.isfinite(batch).all(1))
        if len(bad):
            raise UserError(
                f"features of {name}",
                wanted="finite numbers",
                got=f"NaN or infinite ones, of image {start + int(bad[0])} first",
                fix="The feature model is damaged, or its weights are of another "
                "network: choose another by config.evaluate.weights.",
            )
        start += len(batch)


def _kernels(a: Points, b: Points, wanted: Wanted) -> dict[str, kernel_means.Kernel]:
    kernels = {}
    if "kid" in wanted.names:
        kernels["kid"] = kernel_means.polynomial(a, b)
    if "cmmd" in wanted.names:
        kernels["cmmd"] = kernel_means.one_minus_gaussian(a.scale)
    return kernels


def _run(
    a: Points, b: Points, found: dict[str, Accumulator], advance: Advance | None
) -> None:
    """Shows every block to every accumulator."""

    def visit(block: Block) -> list:
        return [x.visit(block) for x in found.values()]

    for results in visit_blocks(a, b, visit):
        for accumulator, result in zip(found.values(), results, strict=True):
            accumulator.add(result)
        if advance is not None:
            advance(1)
