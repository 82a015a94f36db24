"""Captions that measure bright strokes on dark ground, such as handwritten digits."""

import numpy as np
from jaxtyping import Float, UInt8


def attributes(images: UInt8[np.ndarray, "N H W 3"]) -> list[str]:
    """Captions that measure each image: `"bold slanted strokes, large, left"`.

    Thickness is the mean ink, slant the shear of the ink's second moments, size its
    spread, position its horizontal centre. Each is cut at the terciles of all images,
    so that the words mean "among these".
    """
    words = (
        ("thin", "medium", "bold"),
        ("backward", "upright", "slanted"),
        ("small", "regular", "large"),
        ("left", "centred", "right"),
    )
    measures = np.stack([_measure(image) for image in images])
    terciles = np.quantile(measures, [1 / 3, 2 / 3], axis=0)
    levels = (measures[:, None] >= terciles).sum(axis=1)  # [N, 4] in 0..2
    template = "{} {} strokes, {}, {}"
    return [
        template.format(*(w[level] for w, level in zip(words, row, strict=True)))
        for row in levels
    ]


def _measure(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "4"]:
    """Thickness, slant, size and position of the ink (bright on dark) of one image."""
    ink = image.mean(axis=2) / 255.0 + 1e-6
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] / np.array(ink.shape)[:, None, None]
    share = ink / ink.sum()
    centre_y, centre_x = (share * y).sum(), (share * x).sum()
    y, x = y - centre_y, x - centre_x
    slant = -(share * x * y).sum() / (share * y * y).sum()
    size = np.sqrt((share * (x * x + y * y)).sum())
    return np.array([ink.mean(), slant, size, centre_x])
