"""Operations on colours, in the arithmetic of Pillow's ImageOps and ImageEnhance.

Images are uint8 [H, W, C] with C = 3 (RGB) or 1 (grey, Pillow's mode L).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Integer, UInt8

Image = UInt8[Array, "H W C"]
Number = Float32[Array, ""] | float
Whole = Int32[Array, ""] | int

LEVELS = 256


def seldom(function: Callable[[Image], Image]) -> Callable[..., Image]:
    """`(wanted, image) -> function(image) if wanted else image`; dear, seldom wanted.

    A batch on a CPU is walked image by image, and only through those that want it; an
    accelerator computes all at once and chooses.
    """

    @jax.custom_batching.custom_vmap
    def apply(wanted, image):
        return jax.lax.cond(wanted, function, lambda x: x, image)

    def walk(wanted, images):
        order = jnp.argsort(~wanted)  # stable: those that want it come first

        def body(i, images):
            row = order[i]
            return images.at[row].set(function(images[row]))

        return jax.lax.fori_loop(0, wanted.sum(), body, images)

    def choose(wanted, images):
        done = jax.vmap(function)(images)
        return jnp.where(wanted[:, None, None, None], done, images)

    @jax.custom_batching.custom_vmap
    def apply_batch(wanted, images):
        return jax.lax.platform_dependent(wanted, images, cpu=walk, default=choose)

    def spread(size, batched, *values):
        return tuple(
            value if is_batched else jnp.broadcast_to(value, (size, *value.shape))
            for value, is_batched in zip(values, batched, strict=True)
        )

    @apply.def_vmap
    def _(size, batched, wanted, image):
        return apply_batch(*spread(size, batched, wanted, image)), True

    @apply_batch.def_vmap
    def _(size, batched, wanted, images):  # a batch of batches is one batch
        wanted, images = spread(size, batched, wanted, images)
        shape = images.shape
        images = images.reshape(shape[0] * shape[1], *shape[2:])
        return apply_batch(wanted.reshape(-1), images).reshape(shape), True

    return apply


def grey(image: Image) -> Int32[Array, "H W 1"]:
    """Luma of ITU-R BT.601 in Pillow's fixed point."""
    wide = image.astype(jnp.int32)
    if image.shape[-1] == 1:
        return wide
    red, green, blue = wide[..., 0], wide[..., 1], wide[..., 2]
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma[..., None]


def smooth(image: Image) -> Image:
    """`ImageFilter.SMOOTH`: nine pixels, the middle one five times; borders stay."""
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    wide = image.astype(jnp.int32)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    rounded = (2 * total + 13) // 26  # the sum is 13
    return image.at[1:-1, 1:-1].set(rounded.astype(jnp.uint8))


def blend(degenerate: Int32[Array, "..."], image: Image, factor: Number) -> Image:
    """`Image.blend`: 0 is the degenerate, 1 the image; fractions are cut."""
    difference = (image - degenerate).astype(jnp.float32)
    # The clip changes nothing: it keeps a compiler from fusing the product into the
    # sum, which rounds once where Pillow rounds twice.
    product = jnp.clip(factor * difference, -1e6, 1e6)
    mixed = degenerate.astype(jnp.float32) + product
    return jnp.clip(mixed, 0.0, 255.0).astype(jnp.uint8)


def brightness(image: Image, factor: Number) -> Image:
    """Blends with black."""
    return blend(jnp.zeros((1, 1, 1), jnp.int32), image, factor)


def mean(levels: Int32[Array, "H W 1"]) -> Int32[Array, "1 1 1"]:
    """Rounded to the nearest whole level."""
    count = levels.shape[0] * levels.shape[1]
    return (levels.sum(axis=(0, 1), keepdims=True) + count // 2) // count


def contrast(image: Image, factor: Number) -> Image:
    """Blends with the mean grey."""
    return blend(mean(grey(image)), image, factor)


def color(image: Image, factor: Number) -> Image:
    """Blends with the grey image."""
    return blend(grey(image), image, factor)


def sharpness(image: Image, factor: Number) -> Image:
    """Blends with the smoothed image."""
    return blend(smooth(image).astype(jnp.int32), image, factor)


def solarize(image: Image, threshold: Whole) -> Image:
    """Inverts every level from `threshold` on: all at 0, none at 256."""
    return jnp.where(image.astype(jnp.int32) < threshold, image, 255 - image)


def invert(image: Image) -> Image:
    return 255 - image


def posterize(image: Image, mask: Whole) -> Image:
    """Keeps the bits of `mask`: `posterize_mask(bits)`."""
    return image & jnp.asarray(mask).astype(jnp.uint8)


def posterize_mask(bits: int) -> int:
    """The mask that keeps the `bits` highest of 8."""
    return 255 & ~(2 ** (8 - bits) - 1)


def histogram(image: Image) -> Int32[Array, "C 256"]:
    """How often each channel has each level."""
    channels = image.shape[-1]
    index = (
        image.astype(jnp.int32)
        + 256 * jnp.arange(channels, dtype=jnp.int32)[None, None]
    )
    counts = jnp.zeros(channels * 256, jnp.int32)
    counts = counts.at[index.reshape(-1)].add(1, mode="promise_in_bounds")
    return counts.reshape(channels, 256)


def autocontrast(image: Image) -> Image:
    """Stretches each channel over all levels; one of a single level stays.

    Pillow's double precision cuts an exact whole number to the one below now and then
    (12,094 of the 2,828,800 triples of lowest, highest and own level).
    """
    counts = histogram(image)
    levels = jnp.arange(256, dtype=jnp.int32)[None]
    lowest = jnp.where(counts > 0, levels, 256).min(axis=1, keepdims=True)
    highest = jnp.where(counts > 0, levels, -1).max(axis=1, keepdims=True)
    span = jnp.maximum(highest - lowest, 1)
    table = jnp.where(highest > lowest, (levels - lowest) * 255 // span, levels)
    return look_up(table, image)


def equalize(image: Image) -> Image:
    """Spreads the levels of each channel evenly."""
    counts = histogram(image)
    levels = jnp.arange(256, dtype=jnp.int32)[None]
    highest = jnp.where(counts > 0, levels, -1).max(axis=1, keepdims=True)
    last = jnp.where(levels == highest, counts, 0).sum(axis=1, keepdims=True)
    total = image.shape[0] * image.shape[1]
    step = (total - last) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    table = (step // 2 + below) // jnp.maximum(step, 1)
    return look_up(jnp.where(step > 0, table, levels), image)


def look_up(table: Int32[Array, "C 256"], image: Image) -> Image:
    channels = image.shape[-1]
    index = (
        image.astype(jnp.int32)
        + 256 * jnp.arange(channels, dtype=jnp.int32)[None, None]
    )
    levels = jnp.clip(table, 0, 255).astype(jnp.uint8).reshape(-1)
    return levels.at[index].get(mode="promise_in_bounds")


def paint(
    image: Image,
    start: Int32[Array, "2"],
    end: Int32[Array, "2"],
    fill: Integer[Array, "1 1 C"] | int,
) -> Image:
    """A rectangle of one colour from (y, x) `start` to `end`, which is not included."""
    height, width, _ = image.shape
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    rows, columns = (y >= start[0]) & (y < end[0]), (x >= start[1]) & (x < end[1])
    return jnp.where(rows & columns, jnp.asarray(fill, jnp.uint8), image)
