"""Captions from measured attributes: of strokes, photographs or scans.

What is measured as a number is cut at its terciles over all images, or the first of
them, so that those words are relative to these; the words of a kind are always in the
same order.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from mvc_jax.data import picture_attributes

_STROKES = (  # low, middle and high third of each attribute
    ("thin", "medium", "bold"),
    ("backward", "upright", "slanted"),
    ("small", "regular", "large"),
    ("left", "centred", "right"),
)
_BRIGHTNESS = ("dark", "mid-tone", "bright")
_CONTRAST = ("low contrast", "medium contrast", "high contrast")
_TEXTURE = ("smooth", "textured", "detailed")
_AREA = ("small", "medium-sized", "large")


def attribute_captions(
    images: UInt8[np.ndarray, "N H W 3"],
    kind: str = "strokes",
    *,
    relative_to: int | None = None,
) -> list[str]:
    """Describes each image.

    Args:
      images: of the run that have captions.
      kind: a key of `KINDS`.
      relative_to: over how many of the images, the first, terciles are taken; None:
        all.
    """
    return KINDS[kind](images, relative_to)


def strokes(
    images: UInt8[np.ndarray, "N H W 3"], relative_to: int | None = None
) -> list[str]:
    """Bright strokes on black, as in `"bold slanted strokes, large, left"`.

    Thickness is the mean intensity, slant the shear of the second moments of the
    intensity, size its standard deviation, position its horizontal centre.
    """
    measures = np.stack([_measure_strokes(image) for image in images])
    levels = _thirds(measures, relative_to)
    template = "{} {} strokes, {}, {}"
    return [
        template.format(*(w[level] for w, level in zip(_STROKES, row, strict=True)))
        for row in levels
    ]


def photos(
    images: UInt8[np.ndarray, "N H W 3"], relative_to: int | None = None
) -> list[str]:
    """Photographs, e.g. `"blue and white, bright, low contrast, smooth, horizontal
    lines, small object left"`."""
    return _pictures(images, relative_to, scan=False)


def scans(
    images: UInt8[np.ndarray, "N H W 3"], relative_to: int | None = None
) -> list[str]:
    """Scans, e.g. `"dark, high contrast, detailed, vertical lines, small bright region
    upper left"`."""
    return _pictures(images, relative_to, scan=True)


def _pictures(
    images: UInt8[np.ndarray, "N H W 3"], relative_to: int | None, *, scan: bool
) -> list[str]:
    found = [picture_attributes.measure(image, scan=scan) for image in images]
    measures = [(x.brightness, x.contrast, x.texture, x.area) for x in found]
    levels = _thirds(np.asarray(measures), relative_to)
    region = "bright region" if scan else "object"
    texts = []
    for each, (brightness, contrast, texture, area) in zip(found, levels, strict=True):
        words = [
            " and ".join(each.colours),
            _BRIGHTNESS[brightness],
            _CONTRAST[contrast],
            _TEXTURE[texture],
            f"{each.orientation} lines" if each.orientation else "",
            f"{_AREA[area]} {region} {each.position}",
        ]
        texts.append(", ".join(word for word in words if word))
    return texts


def _thirds(measures: Float[np.ndarray, "N A"], first: int | None) -> np.ndarray:
    """0, 1 or 2: in which third of the first images each measure is."""
    terciles = np.quantile(measures[:first], [1 / 3, 2 / 3], axis=0)
    return (measures[:, None] >= terciles).sum(axis=1)


def _measure_strokes(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "4"]:
    """Thickness, slant, size and horizontal position of the strokes of one image."""
    ink = image.mean(axis=2) / 255.0 + 1e-6
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] / np.array(ink.shape)[:, None, None]
    weight = ink / ink.sum()
    centre_y, centre_x = (weight * y).sum(), (weight * x).sum()
    y, x = y - centre_y, x - centre_x
    slant = -(weight * x * y).sum() / (weight * y * y).sum()
    size = np.sqrt((weight * (x * x + y * y)).sum())
    return np.array([ink.mean(), slant, size, centre_x])


KINDS: dict[str, Callable[[np.ndarray, int | None], list[str]]] = {
    "strokes": strokes,
    "photo": photos,
    "scan": scans,
}
