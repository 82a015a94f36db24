"""Captions from measured attributes of bright strokes on black, e.g. written digits."""

import numpy as np
from jaxtyping import Float, UInt8

_WORDS = (  # low, middle and high third of each attribute
    ("thin", "medium", "bold"),
    ("backward", "upright", "slanted"),
    ("small", "regular", "large"),
    ("left", "centred", "right"),
)


def attribute_captions(images: UInt8[np.ndarray, "N H W 3"]) -> list[str]:
    """Describes each image, e.g. `"bold slanted strokes, large, left"`.

    Thickness is the mean intensity, slant the shear of the second moments of the
    intensity, size its standard deviation, position its horizontal centre. Each
    attribute is cut at its terciles over all images, so the words are relative to
    `images`.
    """
    measures = np.stack([_measure(image) for image in images])
    terciles = np.quantile(measures, [1 / 3, 2 / 3], axis=0)
    levels = (measures[:, None] >= terciles).sum(axis=1)  # [N, 4] in 0..2
    template = "{} {} strokes, {}, {}"
    return [
        template.format(*(w[level] for w, level in zip(_WORDS, row, strict=True)))
        for row in levels
    ]


def _measure(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "4"]:
    """Thickness, slant, size and horizontal position of the strokes of one image."""
    ink = image.mean(axis=2) / 255.0 + 1e-6
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] / np.array(ink.shape)[:, None, None]
    weight = ink / ink.sum()
    centre_y, centre_x = (weight * y).sum(), (weight * x).sum()
    y, x = y - centre_y, x - centre_x
    slant = -(weight * x * y).sum() / (weight * y * y).sum()
    size = np.sqrt((weight * (x * x + y * y)).sum())
    return np.array([ink.mean(), slant, size, centre_x])
