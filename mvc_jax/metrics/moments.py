"""Means and covariances of features; the Fréchet distance and the Vendi score of them.

Legend: N points, P dims.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from mvc_jax.metrics.points import Points


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of points, which can be merged.

    Attributes:
      count: N.
      mean: [P].
      scatter: [P, P], the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, batches: Iterable[Float[np.ndarray, "b P"]], dims: int) -> "Moments":
        """Those of all rows of some batches."""
        found = cls(0, np.zeros(dims), np.zeros((dims, dims)))
        for batch in batches:
            mean = batch.mean(0)
            centred = batch - mean
            found = found.merge(cls(len(batch), mean, centred.T @ centred))
        return found

    def merge(self, other: "Moments") -> "Moments":
        """Those of the points of both: Chan et al., "Updating formulae", 1979."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        weight = self.count * other.count / count
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + weight * np.outer(delta, delta),
        )

    @property
    def covariance(self) -> Float[np.ndarray, "P P"]:
        """The unbiased one, as in the published code of FID."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Points, b: Points) -> float:
    """The Fréchet distance of two Gaussians with the moments of the features.

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    Heusel et al., arXiv 1706.08500, equation 6: of Inception's features it is the FID.
    It is biased upwards, the more the fewer images there are (arXiv 1911.07023).

    Args:
      a, b: at least two points each.
    """
    few, many = sorted((a, b), key=len)
    if len(few) <= few.dims:
        return _of_few(few, many)
    of_a, of_b = (Moments.of(x.features(), x.dims) for x in (a, b))
    distance = ((of_a.mean - of_b.mean) ** 2).sum()
    covariances = of_a.covariance, of_b.covariance
    values, vectors = np.linalg.eigh(covariances[0])
    # C_a^(1/2) C_b C_a^(1/2) has the eigenvalues of C_a C_b, and is symmetric.
    root = vectors * np.sqrt(np.maximum(values, 0))
    product = root.T @ covariances[1] @ root
    return _total(distance, *map(np.trace, covariances), product)


def _of_few(few: Points, many: Points) -> float:
    """The same where `few` span less than the space: with matrices of their number.

    C_a = A^T A for centred rows A, so that C_a C_b has the eigenvalues of A C_b A^T.
    """
    rows = np.concatenate(list(few.features()))
    mean, other = rows.mean(0), _mean(many)
    rows = (rows - mean) / np.sqrt(len(few) - 1)
    product, trace = np.zeros((len(few), len(few))), 0.0
    for batch in many.features():
        batch = (batch - other) / np.sqrt(len(many) - 1)
        trace += (batch**2).sum()
        across = rows @ batch.T
        product += across @ across.T
    return _total(((mean - other) ** 2).sum(), (rows**2).sum(), trace, product)


def _mean(points: Points) -> Float[np.ndarray, " P"]:
    return sum(batch.sum(0) for batch in points.features()) / len(points)


def _total(mean: float, a: float, b: float, product: np.ndarray) -> float:
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0))
    return max(float(mean + a + b - 2 * roots.sum()), 0.0)


def vendi_score(points: Points) -> float:
    """The effective number of different images, between 1 and N.

    The exponential of the entropy of the eigenvalues of K / N, where K holds the cosine
    similarities: Friedman & Dieng, arXiv 2210.02410, definition 3.1. They are those of
    the mean of x x^T, which is a sum over images.

    Args:
      points: at least one; a zero vector is similar to nothing but itself.
    """
    if len(points) <= points.dims:
        rows = np.concatenate([_unit(batch) for batch in points.features()])
        similarities = rows @ rows.T
    else:
        similarities = np.zeros((points.dims, points.dims))
        for batch in points.features():
            rows = _unit(batch)
            similarities += rows.T @ rows
    values = np.linalg.eigvalsh(similarities) / len(points)
    values = values[values > np.finfo(np.float64).eps]
    return float(np.exp(-(values * np.log(values)).sum()))


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, np.finfo(np.float64).tiny)
