"""Flips, crops and Cutout; images are uint8 [H, W, C], and keep their size."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key, UInt8

from mvc_jax.augment import color, geometry

Image = UInt8[Array, "H W C"]
ATTEMPTS = 10  # of random_resized_crop, as in torchvision


def flip(key: Key[Array, ""], image: Image) -> Image:
    """Left and right change places in half of all images."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def pad_crop(
    key: Key[Array, ""], image: Image, *, padding: int, fill: int = 0
) -> Image:
    """One of the (2 padding + 1)^2 crops of the image with a border of `padding`."""
    height, width, _ = image.shape
    shift = jax.random.randint(key, (2,), -padding, padding + 1)
    y, x = geometry.grid(height, width)
    pixels = (y + shift[0], x + shift[1])
    return geometry.pick(image, pixels, geometry.inside(pixels, height, width), fill)


def random_resized_crop(
    key: Key[Array, ""],
    image: Image,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image:
    """A part of the image, enlarged to all of it (bilinear).

    As in Inception's training (arXiv 1409.4842) and torchvision: of ten draws the first
    that fits, or else the whole image.

    Args:
      scale: the part's share of the area, uniform.
      ratio: its width by its height, log-uniform.
    """
    return enlarge(image, *draw_part(key, *image.shape[:2], scale, ratio))


def draw_part(
    key: Key[Array, ""],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Int32[Array, "2"], Int32[Array, "2"]]:
    """(y, x) where `random_resized_crop` starts, and its (height, width)."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    shares = jax.random.uniform(area_key, (ATTEMPTS,), jnp.float32, *scale)
    low, high = (math.log(side) for side in ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_key, (ATTEMPTS,), jnp.float32, low, high))
    area, sides = height * width * shares, jnp.array([height, width])
    drawn = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=1))
    drawn = jnp.round(drawn).astype(jnp.int32)
    fits = ((drawn > 0) & (drawn <= sides[None])).all(axis=1)
    sizes = jnp.where(fits.any(), drawn[jnp.argmax(fits)], sides)
    most = sides - sizes + 1
    return jax.random.randint(place_key, (2,), jnp.zeros_like(most), most), sizes


def enlarge(image: Image, starts: Int32[Array, "2"], sizes: Int32[Array, "2"]) -> Image:
    """The part of `sizes` (height, width) from `starts` (y, x), at the image's size.

    `Image.crop(...).resize(..., BILINEAR)` within one grey level: across, rounded, then
    down.
    """
    height, width, _ = image.shape
    left, right, share = _between(starts[1], sizes[1], width)
    wide = image.astype(jnp.float32)
    across = jnp.round(_mix(wide[:, left], wide[:, right], share[None, :, None]))
    above, below, share = _between(starts[0], sizes[0], height)
    down = _mix(across[above], across[below], share[:, None, None])
    return jnp.round(down).astype(jnp.uint8)


def _between(start, size, count: int):
    """For each of `count` pixels its two neighbours in the part, the second's share."""
    centres = (jnp.arange(count) + 0.5) * (size / count) - 0.5
    before = jnp.floor(centres).astype(jnp.int32)
    share = centres - before
    last = size - 1
    return (
        start + jnp.clip(before, 0, last),
        start + jnp.clip(before + 1, 0, last),
        share,
    )


def _mix(first, second, share):
    return first + (second - first) * share


def cutout(key: Key[Array, ""], image: Image, *, side: int, fill: int = 128) -> Image:
    """A square of one colour about a pixel drawn from all, cut at the image's border
    (arXiv 1708.04552).

    Args:
      side: in pixels; an odd one loses a pixel, as in the authors' code.
      fill: 128 is the nearest level to zero once images lie in [-1, 1], where the
        authors' code writes a zero.
    """
    height, width, _ = image.shape
    centre = jax.random.randint(
        key, (2,), jnp.zeros(2, int), jnp.array([height, width])
    )
    half = side // 2
    return color.paint(image, centre - half, centre + half, fill)
