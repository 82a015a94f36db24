"""Shear, translation and rotation, as Pillow's `Image.transform` samples them.

A map is six numbers (a, b, c, d, e, f): the output's pixel (x, y) shows what the input
holds at (a x' + b y' + c, d x' + e y' + f), where x' = x + 1/2 and y' = y + 1/2 are the
pixel's centre. The numbers are made on the host in double precision and rounded to
Pillow's 16.16 fixed point, so that the device picks the very pixel that Pillow picks,
on the border between two as well. Two sides together are below 16384 pixels.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float64, Int32, UInt8

ONE = 1 << 16  # of the fixed point
RESAMPLINGS = ("nearest", "bilinear")
Grid = tuple[Int32[Array, "H W"], Int32[Array, "H W"]]

IDENTITY = np.array([1, 0, 0, 0, 1, 0], np.float64)


def shear_x(amount: float | int) -> Float64[np.ndarray, "6"]:
    """Pixels to the left for each pixel down."""
    return np.array([1, amount, 0, 0, 1, 0], np.float64)


def shear_y(amount: float | int) -> Float64[np.ndarray, "6"]:
    """Pixels up for each pixel to the right."""
    return np.array([1, 0, 0, amount, 1, 0], np.float64)


def translate_x(pixels: float | int) -> Float64[np.ndarray, "6"]:
    """To the left."""
    return np.array([1, 0, pixels, 0, 1, 0], np.float64)


def translate_y(pixels: float | int) -> Float64[np.ndarray, "6"]:
    """Up."""
    return np.array([1, 0, 0, 0, 1, pixels], np.float64)


def rotate(degrees: float | int, height: int, width: int) -> Float64[np.ndarray, "6"]:
    """Counterclockwise about the middle, by the arithmetic of `Image.rotate`."""
    if degrees % 360.0 == 0:
        return IDENTITY
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    a, b, d, e = cos, sin, round(-math.sin(angle), 15), cos
    return np.array([a, b, a * -x + b * -y + x, d, e, d * -x + e * -y + y], np.float64)


def fixed_point(
    matrix: Float64[np.ndarray, "6"], resampling: str = "nearest"
) -> Int32[np.ndarray, "6"]:
    """The map at 16 binary places, `c` and `f` for the centre of the pixel (0, 0).

    Pillow takes the nearest pixel of an unsheared image in floating point: a
    translation's 1/2 is rounded there and not in fixed point.
    """
    a, b, c, d, e, f = matrix.tolist()
    start_x, start_y = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
    if resampling == "nearest" and (a, b, d, e) == (1, 0, 0, 1):
        start_x, start_y = math.floor(start_x) + 0.5, math.floor(start_y) + 0.5
    numbers = (a, b, start_x, d, e, start_y)
    return np.array([math.floor(n * ONE + 0.5) for n in numbers], np.int32)


def spans(
    matrix: Float64[np.ndarray, "6"], height: int, width: int
) -> Int32[np.ndarray, "H 2"]:
    """The pixels of each line, from the first to before the second, whose colours lie
    inside the image; in double precision, as Pillow's filters decide it."""
    a, b, c, d, e, f = matrix.tolist()
    y, x = np.mgrid[:height, :width] + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    kept = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    first = kept.argmax(axis=1)
    return np.stack([first, first + kept.sum(axis=1)], axis=1).astype(np.int32)


def grid(height: int, width: int) -> Grid:
    """(y, x) of every pixel."""
    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.int32),
        jnp.arange(width, dtype=jnp.int32),
        indexing="ij",
    )
    return y, x


def positions(coefficients: Int32[Array, "6"], pixels: Grid) -> Grid:
    """Where the pixels' colours come from, (y, x) in fixed point."""
    a, b, c, d, e, f = coefficients
    y, x = pixels
    return y * e + x * d + f, y * b + x * a + c


def inside(pixels: Grid, height: int, width: int) -> Bool[Array, "H W"]:
    y, x = pixels
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


def pick(
    image: UInt8[Array, "H W C"], pixels: Grid, kept: Bool[Array, "H W"], fill: int
) -> UInt8[Array, "H W C"]:
    """The colours of `pixels` (y, x), which are inside where `kept`; else `fill`."""
    height, width, channels = image.shape
    y, x = pixels
    index = jnp.where(kept, y * width + x, 0)
    flat = image.reshape(height * width, channels)
    found = flat.at[index].get(mode="promise_in_bounds")
    return jnp.where(kept[..., None], found, jnp.uint8(fill))


def nearest(
    image: UInt8[Array, "H W C"], maps: list[Int32[Array, "6"]], fill: int
) -> UInt8[Array, "H W C"]:
    """The image after one map, then the next, sampled as Pillow would, one by one:
    the maps of pixels are composed, the image is read once."""
    height, width, _ = image.shape
    pixels, kept = grid(height, width), jnp.ones((height, width), bool)
    for coefficients in reversed(maps):
        y, x = positions(coefficients, pixels)
        pixels = (y >> 16, x >> 16)
        kept &= inside(pixels, height, width)
    return pick(image, pixels, kept, fill)


def bilinear(
    image: UInt8[Array, "H W C"],
    coefficients: Int32[Array, "6"],
    span: Int32[Array, "H 2"],
    fill: int,
) -> UInt8[Array, "H W C"]:
    """The image after one map, between its pixels; fractions are cut, as in Pillow.

    Positions have 16 binary places, Pillow's more: up to some 256 pixels it makes no
    more than one grey level.
    """
    height, width, _ = image.shape
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    kept = (columns >= span[:, :1]) & (columns < span[:, 1:])
    y, x = positions(coefficients, grid(height, width))
    y, x = y - ONE // 2, x - ONE // 2
    right, down = (((v & (ONE - 1)) / ONE)[..., None] for v in (x, y))

    def at(dy: int, dx: int):
        rows = jnp.clip((y >> 16) + dy, 0, height - 1)
        columns = jnp.clip((x >> 16) + dx, 0, width - 1)
        found = pick(image, (rows, columns), jnp.ones_like(kept), 0)
        return found.astype(jnp.float32)

    above = at(0, 0) + (at(0, 1) - at(0, 0)) * right
    below = at(1, 0) + (at(1, 1) - at(1, 0)) * right
    mixed = (above + (below - above) * down).astype(jnp.uint8)
    return jnp.where(kept[..., None], mixed, jnp.uint8(fill))
