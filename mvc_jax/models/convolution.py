"""Convolutions that are fast on CPUs: of small images, and the kernel's gradient.

XLA's CPU backend convolves as fast as PyTorch, with two exceptions, which are matrix
products here; on other platforms both are XLA's own.

- The gradient with respect to the kernel takes it two to four times as long. Here it is
  one product per position in the kernel.
- Images of fewer pixels than the kernel has, such as the 2x2 of a UNet's lowest level,
  take it 10 to 60 times as long as larger ones of as many pixels in all. Here they are
  the product of their patches (benchmarks/RESULTS.md).

A 1x1 convolution is a matrix product everywhere.
"""

import contextlib
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from mvc_jax import devices

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


def small_images_convolved(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Context in which `nn.Conv` convolves by `convolve` where images are small.

    It is for networks that we did not build. `mesh` are the devices, None: the default
    one; on others than CPUs it changes nothing.
    """
    cpu = devices.platform(mesh) == "cpu"

    def intercept(next_call, args, kwargs, context):
        layer = context.module
        called = isinstance(layer, nn.Conv) and context.method_name == "__call__"
        if cpu and called and _is_small(args[0], layer.kernel_size):
            object.__setattr__(layer, "conv_general_dilated", convolve)
        return next_call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def _is_small(x: Array, window: tuple[int, ...]) -> bool:
    return math.prod(x.shape[1:3]) < math.prod(window)


def _convolve(x: Array, kernel: Array, strides, padding: Pads, groups=1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=NHWC,
        feature_group_count=groups,
    )


def _by_products(x: Array, kernel: Array, gradient: Array, strides, padding: Pads):
    """The kernel's gradient: per position in it, the inputs there times `gradient`.

    It takes a few examples at a time, so that the slice for a product is still in the
    processor's cache when it is multiplied: this halves the time for large images.
    """
    batch, rows, columns, features = gradient.shape
    height, width, channels, _ = kernel.shape

    def products(x: Array, gradient: Array) -> Array:
        shifted = _shifted(x, (height, width), (rows, columns), strides, padding)
        gradient = gradient.reshape(-1, features)
        return jnp.stack([part.reshape(-1, channels).T @ gradient for part in shifted])

    limit = max(1, _CACHED // (rows * columns * max(channels, features)))
    part = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= limit)
    if part == batch:
        return products(x, gradient).reshape(kernel.shape)
    parts = [y.reshape(batch // part, part, *y.shape[1:]) for y in (x, gradient)]
    total = jnp.zeros((height * width, channels, features), gradient.dtype)
    total, _ = lax.scan(lambda sum_, pair: (sum_ + products(*pair), None), total, parts)
    return total.reshape(kernel.shape)


def _by_patches(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    """The convolution as one product: of each patch, as a row, and the kernel."""
    window = kernel.shape[:2]
    shape = zip(x.shape[1:3], padding, window, strides, strict=True)
    output = tuple((n + sum(p) - k) // s + 1 for n, p, k, s in shape)
    patches = jnp.concatenate(_shifted(x, window, output, strides, padding), axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _shifted(x: Array, window, output, strides, padding: Pads) -> list[Array]:
    """What each position in the kernel is multiplied by: [B, *output, C], for each."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((n - 1) * s + 1 for n, s in zip(output, strides, strict=True))
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (len(x), i + rows, j + columns, x.shape[-1]),
            (1, *strides, 1),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]


def _plain(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    if not _is_small(x, kernel.shape[:2]):
        return _convolve(x, kernel, strides, padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _by_patches(x, kernel, strides, padding),
        default=lambda x, kernel: _convolve(x, kernel, strides, padding),
    )


def _forward(x, kernel, strides, padding):
    return _plain(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, inputs, gradient):
    x, kernel = inputs

    def by_convolution(x: Array, kernel: Array, gradient: Array):
        return (
            _transposed(lambda x: _convolve(x, kernel, strides, padding), x, gradient),
            _transposed(lambda k: _convolve(x, k, strides, padding), kernel, gradient),
        )

    def by_products(x: Array, kernel: Array, gradient: Array):
        forward = _by_patches if _is_small(x, kernel.shape[:2]) else _convolve
        return (
            _transposed(lambda x: forward(x, kernel, strides, padding), x, gradient),
            _by_products(x, kernel, gradient, strides, padding),
        )

    return lax.platform_dependent(
        x, kernel, gradient, cpu=by_products, default=by_convolution
    )


def _transposed(linear: Callable[[Array], Array], like: Array, gradient: Array):
    return jax.linear_transpose(linear, like)(gradient)[0]


_with_fast_gradient = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))
_with_fast_gradient.defvjp(_forward, _backward)
