"""Convolutions with a fast kernel gradient on CPUs.

XLA's CPU backend convolves as fast as PyTorch, but takes two to four times as long for
the gradient with respect to the kernel. Here that gradient is one matrix product per
position in the kernel; on other platforms it is XLA's own. A 1x1 convolution is a
matrix product.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

NHWC = ("NHWC", "HWIO", "NHWC")

_CACHED = 1 << 18  # elements of an array that fits a processor's cache, with others
Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    inputs: Array, kernel: Array, strides, padding, *, feature_group_count=1, **options
) -> Array:
    """Replaces `jax.lax.conv_general_dilated` in `flax.linen.Conv`, for images.

    Args:
      inputs: [B, H, W, C].
      kernel: [h, w, C / groups, D].
      strides: two numbers.
      padding: (before, after) for each axis, or "SAME" or "VALID".
      feature_group_count: groups of channels.
      options: other arguments of linen; dilation is not supported.
    """
    assert not any(d != 1 for d in (*options["lhs_dilation"], *options["rhs_dilation"]))
    strides = tuple(strides)
    sides, window = inputs.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, window, strides, padding)
    padding = tuple(map(tuple, padding))
    if feature_group_count > 1:
        return _convolve(inputs, kernel, strides, padding, feature_group_count)
    if window == (1, 1) and not any(sum(padding, ())):
        rows, columns = strides
        return inputs[:, ::rows, ::columns] @ kernel[0, 0]
    return _with_fast_gradient(inputs, kernel, strides, padding)


def _convolve(x: Array, kernel: Array, strides, padding: Pads, groups=1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=NHWC,
        feature_group_count=groups,
    )


def _by_convolution(x: Array, kernel: Array, gradient: Array, strides, padding: Pads):
    """The kernel's gradient by XLA's own convolution."""
    transpose = jax.linear_transpose(lambda k: _plain(x, k, strides, padding), kernel)
    return transpose(gradient)[0]


def _by_products(x: Array, kernel: Array, gradient: Array, strides, padding: Pads):
    """The kernel's gradient: per position in it, the inputs there times `gradient`.

    It takes a few examples at a time, so that the slice for a product is still in the
    processor's cache when it is multiplied: this halves the time for large images.
    """
    batch, rows, columns, features = gradient.shape
    height, width, channels, _ = kernel.shape
    last = [(n - 1) * s for n, s in zip((rows, columns), strides, strict=True)]

    def products(x: Array, gradient: Array) -> Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        gradient = gradient.reshape(-1, features)

        def product(i: int, j: int) -> Array:
            stop = (len(x), i + last[0] + 1, j + last[1] + 1, channels)
            window = lax.slice(x, (0, i, j, 0), stop, (1, *strides, 1))
            return window.reshape(-1, channels).T @ gradient

        return jnp.stack([product(i, j) for i in range(height) for j in range(width)])

    limit = max(1, _CACHED // (rows * columns * max(channels, features)))
    part = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= limit)
    if part == batch:
        return products(x, gradient).reshape(kernel.shape)
    parts = [y.reshape(batch // part, part, *y.shape[1:]) for y in (x, gradient)]
    total = jnp.zeros((height * width, channels, features), gradient.dtype)
    total, _ = lax.scan(lambda sum_, pair: (sum_ + products(*pair), None), total, parts)
    return total.reshape(kernel.shape)


def _plain(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    return _convolve(x, kernel, strides, padding)


def _forward(x, kernel, strides, padding):
    return _plain(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, inputs, gradient):
    x, kernel = inputs
    transpose = jax.linear_transpose(lambda x: _plain(x, kernel, strides, padding), x)
    kernel_gradient = lax.platform_dependent(
        x,
        kernel,
        gradient,
        cpu=lambda *arrays: _by_products(*arrays, strides, padding),
        default=lambda *arrays: _by_convolution(*arrays, strides, padding),
    )
    return transpose(gradient)[0], kernel_gradient


_with_fast_gradient = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))
_with_fast_gradient.defvjp(_forward, _backward)
