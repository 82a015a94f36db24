"""Flips, crops and Cutout; images are uint8 [H, W, C] and keep their size."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key, UInt8

from mvc_jax.augment import color, gathers

Image = UInt8[Array, "H W C"]
ATTEMPTS = 10  # of random_resized_crop, as in torchvision


def flip(key: Key[Array, ""], image: Image) -> Image:
    """Flips left and right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def pad_crop(
    key: Key[Array, ""], image: Image, *, padding: int, fill: int = 0
) -> Image:
    """Pads by `padding` and crops at one of the (2 padding + 1)^2 positions."""
    height, width, _ = image.shape
    shift = jax.random.randint(key, (2,), -padding, padding + 1)
    y, x = jnp.arange(height) + shift[0], jnp.arange(width) + shift[1]
    rows, columns = (y >= 0) & (y < height), (x >= 0) & (x < width)
    y, x = jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)
    valid = (rows[:, None] & columns[None])[..., None]
    return jnp.where(valid, gathers.crop(image, y, x), jnp.uint8(fill))


def random_resized_crop(
    key: Key[Array, ""],
    image: Image,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image:
    """Crops a random part of the image and resizes it to the full size (bilinear).

    As in Inception's training (arXiv 1409.4842) and torchvision: the first of ten draws
    that fits, or else the whole image.

    Args:
      key: of this image.
      image: in [0, 255].
      scale: range of the crop's fraction of the area, uniform.
      ratio: range of its width / height, log-uniform.
    """
    return enlarge(image, *draw_crop(key, *image.shape[:2], scale, ratio))


def draw_crop(
    key: Key[Array, ""],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Int32[Array, "2"], Int32[Array, "2"]]:
    """Draws the crop of `random_resized_crop`: its (y, x) and (height, width)."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    fraction = jax.random.uniform(area_key, (ATTEMPTS,), jnp.float32, *scale)
    low, high = (math.log(side) for side in ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_key, (ATTEMPTS,), jnp.float32, low, high))
    area, sides = height * width * fraction, jnp.array([height, width])
    drawn = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=1))
    drawn = jnp.round(drawn).astype(jnp.int32)
    fits = ((drawn > 0) & (drawn <= sides[None])).all(axis=1)
    sizes = jnp.where(fits.any(), drawn[jnp.argmax(fits)], sides)
    stop = sides - sizes + 1
    return jax.random.randint(place_key, (2,), jnp.zeros_like(stop), stop), sizes


def enlarge(image: Image, starts: Int32[Array, "2"], sizes: Int32[Array, "2"]) -> Image:
    """Resizes the crop of `sizes` (height, width) at `starts` (y, x) to the full size.

    Equals `Image.crop(...).resize(..., BILINEAR)` within one grey level: horizontally,
    rounded, then vertically.
    """
    height, width, _ = image.shape
    left, right, weight = _neighbours(starts[1], sizes[1], width)
    wide = image.astype(jnp.float32)
    across = _interpolate(wide, left, right, weight[None, :, None], axis=1)
    above, below, weight = _neighbours(starts[0], sizes[0], height)
    down = _interpolate(jnp.round(across), above, below, weight[:, None, None], axis=0)
    return jnp.round(down).astype(jnp.uint8)


def _neighbours(start, size, count: int):
    """Of `count` pixels the two neighbours in the crop, and the second's weight."""
    centres = (jnp.arange(count) + 0.5) * (size / count) - 0.5
    before = jnp.floor(centres).astype(jnp.int32)
    weight = centres - before
    last = size - 1
    return (
        start + jnp.clip(before, 0, last),
        start + jnp.clip(before + 1, 0, last),
        weight,
    )


def _interpolate(image, first, second, weight, *, axis: int):
    near, far = (gathers.along(image, index, axis) for index in (first, second))
    return near + (far - near) * weight


def cutout(key: Key[Array, ""], image: Image, *, side: int, fill: int = 128) -> Image:
    """Fills a square around a random pixel, clipped at the border (arXiv 1708.04552).

    Args:
      key: of this image.
      image: in [0, 255].
      side: in pixels; an odd side loses a pixel, as in the authors' code.
      fill: level of the square. 128 is the level nearest to the zero that the authors
        write into images in [-1, 1].
    """
    height, width, _ = image.shape
    centre = jax.random.randint(
        key, (2,), jnp.zeros(2, int), jnp.array([height, width])
    )
    half = side // 2
    return color.paint(image, centre - half, centre + half, fill)
