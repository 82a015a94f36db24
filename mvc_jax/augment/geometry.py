"""Shear, translation and rotation, sampled as by Pillow's `Image.transform`.

A map is six numbers (a, b, c, d, e, f): the output pixel (x, y) has the colour of the
input at (a x' + b y' + c, d x' + e y' + f), where (x', y') = (x + 1/2, y + 1/2) is the
pixel's centre. The host computes the numbers in double precision and rounds them to
Pillow's 16.16 fixed point, so that the device samples exactly the pixel that Pillow
samples, even on the border between two. Height and width sum to less than 16384.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float64, Int32, UInt8

from mvc_jax.augment import gathers

ONE = 1 << 16  # 1.0 in fixed point
RESAMPLINGS = ("nearest", "bilinear")
Grid = tuple[Int32[Array, "H W"], Int32[Array, "H W"]]

IDENTITY = np.array([1, 0, 0, 0, 1, 0], np.float64)


def shear_x(amount: float | int) -> Float64[np.ndarray, "6"]:
    """Shifts each row to the left by `amount` pixels per pixel down."""
    return np.array([1, amount, 0, 0, 1, 0], np.float64)


def shear_y(amount: float | int) -> Float64[np.ndarray, "6"]:
    """Shifts each column up by `amount` pixels per pixel to the right."""
    return np.array([1, 0, 0, amount, 1, 0], np.float64)


def translate_x(pixels: float | int) -> Float64[np.ndarray, "6"]:
    """Shifts to the left."""
    return np.array([1, 0, pixels, 0, 1, 0], np.float64)


def translate_y(pixels: float | int) -> Float64[np.ndarray, "6"]:
    """Shifts up."""
    return np.array([1, 0, 0, 0, 1, pixels], np.float64)


def rotate(degrees: float | int, height: int, width: int) -> Float64[np.ndarray, "6"]:
    """Rotates counterclockwise about the centre, as `Image.rotate` computes it."""
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
    """The map in 16.16 fixed point, with `c` and `f` at the centre of pixel (0, 0).

    For a pure translation Pillow finds the nearest pixel in floating point: the 1/2 is
    rounded there, not in fixed point.
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
    """First and last (exclusive) pixel of each line that samples inside the image.

    Computed in double precision, like Pillow's filters.
    """
    a, b, c, d, e, f = matrix.tolist()
    y, x = np.mgrid[:height, :width] + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    first = inside.argmax(axis=1)
    return np.stack([first, first + inside.sum(axis=1)], axis=1).astype(np.int32)


def grid(height: int, width: int) -> Grid:
    """Coordinates (y, x) of every pixel."""
    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.int32),
        jnp.arange(width, dtype=jnp.int32),
        indexing="ij",
    )
    return y, x


def positions(coefficients: Int32[Array, "6"], pixels: Grid) -> Grid:
    """Positions (y, x) in the input that `pixels` sample, in fixed point."""
    a, b, c, d, e, f = coefficients
    y, x = pixels
    return y * e + x * d + f, y * b + x * a + c


def inside(pixels: Grid, height: int, width: int) -> Bool[Array, "H W"]:
    """Whether each of `pixels` (y, x) is inside the image."""
    y, x = pixels
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


def pick(
    image: UInt8[Array, "H W C"], pixels: Grid, valid: Bool[Array, "H W"], fill: int
) -> UInt8[Array, "H W C"]:
    """The colours of `pixels` (y, x) where `valid`, else `fill`."""
    y, x = (jnp.where(valid, position, 0) for position in pixels)
    found = gathers.pixels(image, y, x)
    return jnp.where(valid[..., None], found, jnp.uint8(fill))


def nearest(
    image: UInt8[Array, "H W C"], maps: Int32[Array, "S 6"], fill: int
) -> UInt8[Array, "H W C"]:
    """Applies `maps` in order with nearest-neighbour sampling.

    Equals Pillow's result of one map after the other, but composes the pixel indices
    and reads the image once.
    """
    height, width, _ = image.shape
    pixels, valid = grid(height, width), jnp.ones((height, width), bool)
    for coefficients in maps[::-1]:
        y, x = positions(coefficients, pixels)
        pixels = (y >> 16, x >> 16)
        valid &= inside(pixels, height, width)
    return pick(image, pixels, valid, fill)


def bilinear(
    image: UInt8[Array, "H W C"],
    coefficients: Int32[Array, "6"],
    span: Int32[Array, "H 2"],
    fill: int,
) -> UInt8[Array, "H W C"]:
    """Applies one map with bilinear sampling; fractions are truncated, as in Pillow.

    Positions have 16 fractional bits, fewer than Pillow's: up to about 256 pixels the
    difference is at most one grey level.
    """
    height, width, _ = image.shape
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    valid = (columns >= span[:, :1]) & (columns < span[:, 1:])
    y, x = positions(coefficients, grid(height, width))
    y, x = y - ONE // 2, x - ONE // 2
    right, down = (((v & (ONE - 1)) / ONE)[..., None] for v in (x, y))

    def at(dy: int, dx: int):
        rows = jnp.clip((y >> 16) + dy, 0, height - 1)
        columns = jnp.clip((x >> 16) + dx, 0, width - 1)
        found = pick(image, (rows, columns), jnp.ones_like(valid), 0)
        return found.astype(jnp.float32)

    above = at(0, 0) + (at(0, 1) - at(0, 0)) * right
    below = at(1, 0) + (at(1, 1) - at(1, 0)) * right
    mixed = (above + (below - above) * down).astype(jnp.uint8)
    return jnp.where(valid[..., None], mixed, jnp.uint8(fill))
