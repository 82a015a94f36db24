"""How far a reconstruction is from its image: terms of a loss, and measures.

Legend: B batch, H W pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

_EPSILON = 1e-10
_BLACK = 16  # of 255: darker pixels are background
_HIGHEST = 60.0  # dB, of an image without error


@dataclasses.dataclass(frozen=True)
class ReconstructionLoss:
    """Absolute error of pixels, and what else is asked for.

    Attributes:
      gradient_weight: of `gradient_error`; 0: it is left out.
      feature_weight: of `feature_error`; 0: it is left out.
      maps: (variables, images in [-1, 1]) -> feature maps; None: there are none.
    """

    gradient_weight: float = 0.0
    feature_weight: float = 0.0
    maps: Callable[[Any, Array], list[Array]] | None = None

    def __call__(
        self,
        decoded: Float[Array, "B H W 3"],
        images: Float[Array, "B H W 3"],
        variables: Any = None,
    ) -> Float[Array, " B"]:
        """The loss of each image; `variables` are those of `maps`."""
        error = jnp.mean(jnp.abs(decoded - images), axis=(1, 2, 3))
        if self.gradient_weight:
            error += self.gradient_weight * gradient_error(decoded, images)
        if self.feature_weight and self.maps is not None:
            ours, theirs = (self.maps(variables, x) for x in (decoded, images))
            error += self.feature_weight * feature_error(ours, theirs)
        return error


def gradient_error(
    decoded: Float[Array, "B H W 3"], images: Float[Array, "B H W 3"]
) -> Float[Array, " B"]:
    """Absolute error of the differences between neighbours, down and across.

    The gradient difference loss of Mathieu et al., arXiv 1511.05440, equation 6, with
    alpha = 1, but with the signs of the differences.
    """
    difference = decoded - images
    parts = [jnp.abs(jnp.diff(difference, axis=axis)) for axis in (1, 2)]
    return sum(part.mean(axis=(1, 2, 3)) for part in parts)


def feature_error(ours: list[Array], theirs: list[Array]) -> Float[Array, " B"]:
    """Squared distance of feature maps whose channels have unit length.

    Zhang et al., arXiv 1801.03924, equation 1, with all weights w_l = 1.
    """
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = _unit(a), _unit(b)
        total += jnp.square(a - b).sum(-1).mean(axis=(1, 2))
    return total


def _unit(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Channels of unit length; the gradient is finite where all are 0."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _EPSILON)


def psnr(
    decoded: UInt8[np.ndarray, "N H W 3"],
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    inside: bool = False,
) -> Float[np.ndarray, " N"]:
    """Peak signal-to-noise ratio of each image in dB, at most 60.

    Args:
      decoded: in [0, 255].
      images: the originals.
      inside: count only pixels of which a channel is at least 16, as the black around a
        scan is easily reconstructed; NaN for an image that has none.
    """
    squared = np.square(decoded.astype(np.float64) - images).mean(-1)
    weight = images.max(-1) >= _BLACK if inside else np.ones(images.shape[:3], bool)
    count = weight.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        error = (squared * weight).sum((1, 2)) / count
        found = 10 * np.log10(255.0**2 / error)
    return np.where(count > 0, np.minimum(found, _HIGHEST), np.nan)


def sharpness(
    decoded: UInt8[np.ndarray, "N H W 3"], images: UInt8[np.ndarray, "N H W 3"]
) -> float:
    """Mean absolute difference of neighbours, relative to that of the originals.

    Below 1 the reconstructions are smoother; NaN if the originals are constant.
    """

    def steps(x: np.ndarray) -> float:
        x = x.astype(np.float64)
        return sum(np.abs(np.diff(x, axis=axis)).mean() for axis in (1, 2))

    whole = steps(images)
    return steps(decoded) / whole if whole else float("nan")
