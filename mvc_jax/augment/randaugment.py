"""RandAugment and TrivialAugment: operations drawn uniformly, without a search.

RandAugment: Cubuk et al., arXiv 1909.13719. TrivialAugment: Müller and Hutter,
arXiv 2103.10158.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key, UInt8

from mvc_jax.augment import magnitudes, operations

DRAWN = (  # both papers' 14 operations
    "Identity",
    "AutoContrast",
    "Equalize",
    "Rotate",
    "Solarize",
    "Color",
    "Posterize",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
# TrivialAugment's wide space, from the authors' aug_lib.py.
WIDE = magnitudes.Magnitudes(
    levels=30,
    translate=1.0,
    translate_pixels=32.0,
    shear=0.99,
    rotate=135.0,
    bits=(8, 2),
    factors=(0.01, 2.0),
)


@functools.lru_cache
def _table(
    scale: magnitudes.Magnitudes,
    levels: tuple[float | int, ...],
    height: int,
    width: int,
    resampling: str,
) -> operations.Table:
    """Row 1 + 2 (i L + l) + k is operation i of DRAWN at level l in direction k."""
    rows = [
        value
        for name in DRAWN
        for level in levels
        for value in scale.values(name, level, height, width)
    ]
    return operations.table(rows, height, width, resampling)


def draw(key: Key[Array, ""], steps: int, rows: int) -> Int32[Array, " S"]:
    """Draws a row for each step, uniformly from all but row 0."""
    return jax.random.randint(key, (steps,), 1, rows)


def _perform(key, image, table, steps: int, fill: int, resampling: str):
    return operations.perform(
        table,
        draw(key, steps, len(table.rows.factor)),
        jnp.zeros((steps, 2)),  # Cutout is not among them
        image,
        fill=fill,
        paint=(fill, fill, fill),
        resampling=resampling,
    )


def randaugment(
    key: Key[Array, ""],
    image: UInt8[Array, "H W C"],
    *,
    count: int = 2,
    magnitude: float | int = 9,
    highest: int = 30,
    fill: int = 128,
    resampling: str = "nearest",
) -> UInt8[Array, "H W C"]:
    """Applies to one image `count` of 14 operations, at one magnitude.

    The paper calls these N and M; its ResNet-50 has N = 2, M = 9. A larger magnitude is
    a stronger change for every operation: a lower threshold of inversion, fewer bits
    (down to 4), blend factors further from 1 in either direction (up to 0.9), as in
    torchvision; and translations of up to 150/331 of the side.

    Args:
      key: of this image.
      image: in [0, 255].
      count: N, at least 1.
      magnitude: M, from 0 to `highest`.
      highest: the magnitude at which AutoAugment's ranges end: 30 in torchvision and in
        most results, 10 in the paper's text.
      fill: level of pixels from outside the image.
      resampling: "nearest" or "bilinear".

    Raises:
      ValueError: a value is out of range.
    """
    if count < 1 or highest < 1:
        raise ValueError(f"count and highest: at least 1, not {count} and {highest}")
    if not 0 <= magnitude <= highest:
        raise ValueError(f"magnitude: in [0, {highest}], not {magnitude}")
    height, width, _ = image.shape
    scale = magnitudes.Magnitudes(
        levels=highest, translate=150 / 331, factors=(1.0, 1.9), mirrored=True
    )
    table = _table(scale, (magnitude,), height, width, resampling)
    return _perform(key, image, table, count, fill, resampling)


def trivialaugment(
    key: Key[Array, ""],
    image: UInt8[Array, "H W C"],
    *,
    fill: int = 0,
    resampling: str = "nearest",
) -> UInt8[Array, "H W C"]:
    """Applies to one image one of 14 operations at one of 31 levels of the wide space.

    Translations are up to 32 pixels, as published, or the side if that is shorter.

    Args:
      key: of this image.
      image: in [0, 255].
      fill: level of pixels from outside the image; black in the authors' code.
      resampling: "nearest" or "bilinear".
    """
    height, width, _ = image.shape
    levels = tuple(range(WIDE.levels + 1))
    table = _table(WIDE, levels, height, width, resampling)
    return _perform(key, image, table, 1, fill, resampling)
