"""Colour operations, in the arithmetic of Pillow's ImageOps and ImageEnhance.

Images are uint8 [H, W, C] with C = 3 (RGB) or 1 (grey, Pillow's mode L).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Integer, UInt8

from mvc_jax.augment import gathers

Image = UInt8[Array, "H W C"]
Number = Float32[Array, ""] | float
Whole = Int32[Array, ""] | int

LEVELS = 256


def grey(image: Image) -> Int32[Array, "H W 1"]:
    """Luma by ITU-R BT.601, in Pillow's fixed point."""
    wide = image.astype(jnp.int32)
    if image.shape[-1] == 1:
        return wide
    red, green, blue = wide[..., 0], wide[..., 1], wide[..., 2]
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma[..., None]


def smooth(image: Image) -> Image:
    """`ImageFilter.SMOOTH`: 3x3, weight 5 in the middle; border pixels are kept."""
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    wide = image.astype(jnp.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    rounded = (2 * total + 13) // 26  # the weights sum to 13
    return image.at[1:-1, 1:-1].set(rounded.astype(jnp.uint8))


def blend(degenerate: Int32[Array, "..."], image: Image, factor: Number) -> Image:
    """`Image.blend`: factor 0 is `degenerate`, 1 is `image`; truncates fractions."""
    difference = (image - degenerate).astype(jnp.float32)
    # The clip changes no value. It keeps the compiler from a fused multiply-add, which
    # rounds once where Pillow rounds twice.
    product = jnp.clip(factor * difference, -1e6, 1e6)
    mixed = degenerate.astype(jnp.float32) + product
    return jnp.clip(mixed, 0.0, 255.0).astype(jnp.uint8)


def mean(levels: Int32[Array, "H W 1"]) -> Int32[Array, "1 1 1"]:
    """Mean level, rounded to the nearest integer."""
    count = levels.shape[0] * levels.shape[1]
    return (levels.sum(axis=(0, 1), keepdims=True) + count // 2) // count


def solarize(image: Image, threshold: Whole) -> Image:
    """Inverts levels at or above `threshold`: all at 0, none at 256."""
    return jnp.where(image.astype(jnp.int32) < threshold, image, 255 - image)


def posterize(image: Image, mask: Whole) -> Image:
    """Keeps the bits of `mask`: `posterize_mask(bits)`."""
    return image & jnp.asarray(mask).astype(jnp.uint8)


def posterize_mask(bits: int) -> int:
    """The mask that keeps the `bits` highest of 8."""
    return 255 & ~(2 ** (8 - bits) - 1)


def autocontrast(image: Image) -> Image:
    """Stretches each channel to all levels; a channel of a single level is kept.

    Pillow's double precision sometimes truncates an exact integer to the one below (for
    12,094 of the 2,828,800 triples of lowest, highest and own level).
    """
    levels = image.astype(jnp.int32)
    lowest = _by_channel(jnp.min, levels)
    span = _by_channel(jnp.max, levels) - lowest
    # The 1/2 keeps the quotients away from integers, whichever way they are rounded.
    numerator = ((levels - lowest) * 255).astype(jnp.float32) + 0.5
    stretched = numerator / jnp.maximum(span, 1).astype(jnp.float32)
    return jnp.where(span > 0, stretched.astype(jnp.uint8), image)


def equalize(image: Image) -> Image:
    """Equalises the histogram of each channel."""
    levels = jnp.arange(256, dtype=jnp.int32)[None]
    counts = gathers.histogram(image)
    highest = jnp.where(counts > 0, levels, 0).max(axis=1, keepdims=True)
    last = jnp.where(levels == highest, counts, 0).sum(axis=1, keepdims=True)
    total = image.shape[0] * image.shape[1]
    step = (total - last) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    table = (step // 2 + below) // jnp.maximum(step, 1)
    table = jnp.clip(jnp.where(step > 0, table, levels), 0, 255).astype(jnp.uint8)
    # It ascends already. On a CPU what is not sorted is fused with the look-up, where
    # each pixel would divide again.
    table = jax.lax.platform_dependent(
        table, cpu=functools.partial(jnp.sort, axis=1), default=lambda table: table
    )
    return gathers.look_up(table, image)


def _by_channel(
    reduce: Callable, levels: Int32[Array, "H W C"]
) -> Int32[Array, "1 1 C"]:
    """`reduce` over all pixels; by columns first, many numbers at a time on a CPU."""
    height, width, channels = levels.shape
    columns = reduce(levels.reshape(height, width * channels), axis=0)
    return reduce(columns.reshape(width, channels), axis=0)[None, None]


def paint(
    image: Image,
    start: Int32[Array, "2"],
    end: Int32[Array, "2"],
    fill: Integer[Array, "1 1 C"] | int,
) -> Image:
    """Fills a rectangle, from (y, x) `start` to `end`, exclusive."""
    height, width, _ = image.shape
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    rows, columns = (y >= start[0]) & (y < end[0]), (x >= start[1]) & (x < end[1])
    return jnp.where(rows & columns, jnp.asarray(fill, jnp.uint8), image)
