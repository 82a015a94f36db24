"""Pixels and levels by index: gathers, or on a TPU products with one-hot matrices.

For each index of a gather or scatter a TPU reads at least one tile of memory (2 to 17
KB for a pixel's three bytes), and a gather of single levels compiles for half a minute.
A product with a one-hot matrix is exact: levels have 8 bits, as many as a bfloat16.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int32, Integer, Real, UInt8

Image = UInt8[Array, "H W C"]
SPLIT = 16  # a level is 16 times its high half plus its low half


def pixels(
    image: Image, y: Int32[Array, "H W"], x: Int32[Array, "H W"]
) -> UInt8[Array, "H W C"]:
    """The colours of the pixels (y, x), which are inside the image."""
    return jax.lax.platform_dependent(
        image, y, x, tpu=pixels_by_product, default=_pixels_by_gather
    )


def _pixels_by_gather(image, y, x):
    height, width, channels = image.shape
    flat = image.reshape(height * width, channels)
    return flat.at[y * width + x].get(mode="promise_in_bounds")


def pixels_by_product(image, y, x):
    """`pixels`: for each the product of its column and the image, then of its row."""
    height, width, _ = image.shape
    columns, rows = one_hot(x.reshape(-1), width), one_hot(y.reshape(-1), height)
    found = jnp.einsum("pw,hwc->phc", columns, image.astype(jnp.bfloat16))
    return jnp.einsum("ph,phc->pc", rows, found).astype(jnp.uint8).reshape(image.shape)


def crop(
    image: Image, y: Int32[Array, " H"], x: Int32[Array, " W"]
) -> UInt8[Array, "H W C"]:
    """The colours where rows `y` and columns `x`, which are inside the image, cross."""
    return jax.lax.platform_dependent(
        image, y, x, tpu=crop_by_product, default=_crop_by_gather
    )


def _crop_by_gather(image, y, x):
    return _pixels_by_gather(image, y[:, None], x[None])


def crop_by_product(image, y, x):
    """`crop`, by one product an axis."""
    return along_by_product(along_by_product(image, y, 0), x, 1)


def along(
    image: Real[Array, "H W C"], index: Int32[Array, " N"], axis: int
) -> Real[Array, "..."]:
    """The rows (axis 0) or columns (axis 1) `index`, in range, of integer levels."""
    return jax.lax.platform_dependent(
        image,
        index,
        tpu=lambda image, index: along_by_product(image, index, axis),
        default=lambda image, index: jnp.take(image, index, axis, mode="clip"),
    )


def along_by_product(image, index, axis: int):
    """`along`, by one product."""
    equation = ("ih,hwc->iwc", "iw,hwc->hic")[axis]
    chosen = one_hot(index, image.shape[axis])
    return jnp.einsum(equation, chosen, image.astype(jnp.bfloat16)).astype(image.dtype)


def histogram(image: Image) -> Int32[Array, "C 256"]:
    """Counts the pixels of each level, per channel."""
    return jax.lax.platform_dependent(
        image, tpu=histogram_by_product, default=_histogram_by_scatter
    )


def _histogram_by_scatter(image):
    channels = image.shape[-1]
    counts = jnp.zeros(channels * 256, jnp.int32)
    counts = counts.at[_cells(image).reshape(-1)].add(1, mode="promise_in_bounds")
    return counts.reshape(channels, 256)


def histogram_by_product(image):
    """`histogram`: the product of the levels' high and low halves."""
    high, low = _halves(image)
    counts = jnp.einsum("pch,pcl->chl", high, low, preferred_element_type=jnp.float32)
    return counts.astype(jnp.int32).reshape(image.shape[-1], 256)


def look_up(table: UInt8[Array, "C 256"], image: Image) -> Image:
    """Maps each channel's levels by its row of `table`."""
    return jax.lax.platform_dependent(
        table, image, tpu=look_up_by_product, default=_look_up_by_gather
    )


def _look_up_by_gather(table, image):
    return table.reshape(-1).at[_cells(image)].get(mode="promise_in_bounds")


def look_up_by_product(table, image):
    """`look_up`: the table's columns by the low half, then the row by the high half."""
    high, low = _halves(image)
    table = table.reshape(-1, SPLIT, SPLIT).astype(jnp.bfloat16)
    found = jnp.einsum("pcl,chl->pch", low, table)
    return jnp.einsum("pch,pch->pc", high, found).astype(jnp.uint8).reshape(image.shape)


def _cells(image) -> Int32[Array, "H W C"]:
    """Each level's index in an array [C, 256] that is flat."""
    start = 256 * jnp.arange(image.shape[-1], dtype=jnp.int32)
    return image.astype(jnp.int32) + start[None, None]


def _halves(image) -> tuple[BFloat16[Array, "P C 16"], BFloat16[Array, "P C 16"]]:
    levels = image.reshape(-1, image.shape[-1])
    return one_hot(levels // SPLIT, SPLIT), one_hot(levels % SPLIT, SPLIT)


def one_hot(index: Integer[Array, "..."], size: int) -> BFloat16[Array, "... K"]:
    """One-hot rows of `size`."""
    return jax.nn.one_hot(index, size, dtype=jnp.bfloat16)
