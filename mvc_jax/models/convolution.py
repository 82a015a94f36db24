"""Convolutions and max pooling that are fast on CPUs, with their gradients.

XLA's CPU backend is fast at them, with these exceptions. On other platforms all are
XLA's own (benchmarks/RESULTS.md has the measurements).

- The gradient with respect to the kernel takes it up to four times as long, and so it
  does by Eigen (`training/runtime.py`) where convolutions have strides. Here it is one
  product per position in the kernel.
- Images of fewer pixels than the kernel has, such as the 2x2 of a UNet's lowest level,
  take it 10 to 60 times as long as larger ones of as many pixels in all, and so does
  the gradient with respect to an image of which a stride leaves so few. Here they are
  the product of their patches.
- Depthwise convolutions take it 50 to 70 times as long as the sum that they are here:
  of shifted images times numbers of the kernel.
- The gradient of max pooling takes it ten times as long as the pooling. Here it is a
  sum over the positions in the window.

A 1x1 convolution is a matrix product everywhere.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mvc_jax import devices

NHWC = ("NHWC", "HWIO", "NHWC")

# Elements of arrays that fit a core's cache, and the last one, together with others.
_CACHED = 1 << 18
_CACHED_PATCHES = 1 << 21
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
      feature_group_count: groups of channels, C if the convolution is depthwise.
      options: other arguments of linen; dilation is not supported.
    """
    assert not any(d != 1 for d in (*options["lhs_dilation"], *options["rhs_dilation"]))
    strides = tuple(strides)
    sides, window = inputs.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, window, strides, padding)
    padding = tuple(map(tuple, padding))
    if feature_group_count > 1 and not _is_depthwise(inputs, kernel):
        return _convolve(inputs, kernel, strides, padding)
    return _with_fast_gradient(inputs, kernel, strides, padding)


def small_images_convolved(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Context in which `nn.Conv` convolves by `convolve` where images are small.

    Small before or after its strides. It is for networks that we did not build. `mesh`
    are the devices, None: the default one; on others than CPUs it changes nothing.
    """
    cpu = devices.platform(mesh) == "cpu"

    def intercept(next_call, args, kwargs, context):
        layer = context.module
        called = isinstance(layer, nn.Conv) and context.method_name == "__call__"
        if cpu and called and _leaves_few(args[0], layer.kernel_size, layer.strides):
            object.__setattr__(layer, "conv_general_dilated", convolve)
        return next_call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def _is_small(x: Array, window: tuple[int, ...]) -> bool:
    return math.prod(x.shape[1:3]) < math.prod(window)


def _leaves_few(x: Array, window: tuple[int, ...], strides) -> bool:
    strides = strides or 1
    rows, columns = (strides,) * 2 if isinstance(strides, int) else strides
    return _is_small(x[:, ::rows, ::columns], window)


def _is_depthwise(x: Array, kernel: Array) -> bool:
    return kernel.shape[2] == 1 < x.shape[-1] == kernel.shape[3]


def _is_product(x: Array, kernel: Array, padding: Pads) -> bool:
    whole = kernel.shape[2] == x.shape[-1]
    return whole and kernel.shape[:2] == (1, 1) and not any(sum(padding, ()))


def _convolve(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    if _is_product(x, kernel, padding):
        rows, columns = strides
        return x[:, ::rows, ::columns] @ kernel[0, 0]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=NHWC,
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _by_products(x: Array, kernel: Array, gradient: Array, strides, padding: Pads):
    """The kernel's gradient: products of shifted inputs and `gradient`.

    It takes a few examples at a time, so that the factors of a product are still in the
    processor's cache when they are multiplied: this halves the time for large images.
    Where the patches of several examples fit, all positions in the kernel are one
    product, else each is its own.
    """
    batch, rows, columns, features = gradient.shape
    height, width, channels, _ = kernel.shape
    patches = rows * columns * height * width * channels  # of an example
    fit = batch if _is_product(x, kernel, padding) else _CACHED_PATCHES // patches
    at_once = fit > 1
    if not at_once:
        fit = max(1, _CACHED // (rows * columns * max(channels, features)))
    part = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fit)

    def products(x: Array, gradient: Array) -> Array:
        """The sum over some examples: [D, h w C]."""
        shifted = _shifted(x, (height, width), strides, padding)
        left = gradient.reshape(-1, features).T
        if at_once:
            return left @ jnp.concatenate(shifted, -1).reshape(left.shape[1], -1)
        each = [left @ one.reshape(-1, channels) for one in shifted]
        return jnp.concatenate(each, -1)

    if part == batch:
        total = products(x, gradient)
    else:
        parts = [y.reshape(batch // part, part, *y.shape[1:]) for y in (x, gradient)]
        total = jnp.zeros((features, height * width * channels), gradient.dtype)
        total, _ = lax.scan(
            lambda sum_, pair: (sum_ + products(*pair), None), total, parts
        )
    return total.T.reshape(kernel.shape)


def _by_patches(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    """The convolution as one product: of each patch, as a row, and the kernel."""
    shifted = _shifted(x, kernel.shape[:2], strides, padding)
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _by_shifts(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    """A depthwise convolution as a sum over the positions in the kernel."""
    numbers = kernel.reshape(-1, 1, 1, 1, x.shape[-1])
    shifted = _shifted(x, kernel.shape[:2], strides, padding)
    return sum(part * number for part, number in zip(shifted, numbers, strict=True))


def _shifted(x: Array, window, strides, padding: Pads, fill=0.0) -> list[Array]:
    """What each position in a kernel is multiplied by: [B, h, w, C], for each."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    ends = [n - k for n, k in zip(x.shape[1:3], window, strict=True)]
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (len(x), i + ends[0] + 1, j + ends[1] + 1, x.shape[-1]),
            (1, *strides, 1),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]


def _on_cpu(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    if _is_depthwise(x, kernel):
        return _by_shifts(x, kernel, strides, padding)
    by = _by_patches if _is_small(x, kernel.shape[:2]) else _convolve
    return by(x, kernel, strides, padding)


def _everywhere(x: Array, kernel: Array, strides, padding: Pads) -> Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _on_cpu(x, kernel, strides, padding),
        default=lambda x, kernel: _convolve(x, kernel, strides, padding),
    )


def _forward(x, kernel, strides, padding):
    return _everywhere(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, inputs, gradient):
    x, kernel = inputs

    def transposed(forward: Callable, x: Array, kernel: Array, gradient: Array):
        """The gradients of `forward`, which is linear in either array."""
        of_x = jax.linear_transpose(lambda x: forward(x, kernel, strides, padding), x)
        of_kernel = jax.linear_transpose(
            lambda kernel: forward(x, kernel, strides, padding), kernel
        )
        return of_x(gradient)[0], of_kernel(gradient)[0]

    def on_cpu(x: Array, kernel: Array, gradient: Array):
        if _is_depthwise(x, kernel):
            return transposed(_by_shifts, x, kernel, gradient)
        by = _by_patches if _is_small(gradient, kernel.shape[:2]) else _on_cpu
        of_x, _ = transposed(by, x, kernel, gradient)
        return of_x, _by_products(x, kernel, gradient, strides, padding)

    return lax.platform_dependent(
        x,
        kernel,
        gradient,
        cpu=on_cpu,
        default=functools.partial(transposed, _convolve),
    )


_with_fast_gradient = jax.custom_vjp(_everywhere, nondiff_argnums=(2, 3))
_with_fast_gradient.defvjp(_forward, _backward)


def max_pool(
    x: Float[Array, "B H W C"], window: tuple[int, int], strides, padding: Pads
) -> Float[Array, "B h w C"]:
    """`flax.linen.max_pool`: of a window's equal pixels, the first has the gradient."""
    return _max_pool(x, tuple(window), tuple(strides), padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window, strides, padding: Pads) -> Array:
    return nn.max_pool(x, window, strides, padding)


def _max_pool_forward(x, window, strides, padding):
    pooled = _max_pool(x, window, strides, padding)
    return pooled, (x, pooled)


def _max_pool_backward(window, strides, padding, inputs, gradient):
    def on_cpu(x: Array, pooled: Array, gradient: Array) -> Array:
        shifted = functools.partial(_shifted, window=window, strides=strides)
        free, parts = jnp.ones(pooled.shape, bool), []
        for part in shifted(x, padding=padding, fill=-jnp.inf):
            largest = free & (part == pooled)
            free &= ~largest
            parts.append(jnp.where(largest, gradient, 0))
        return jax.linear_transpose(lambda x: shifted(x, padding=padding), x)(parts)[0]

    def default(x: Array, pooled: Array, gradient: Array) -> Array:
        pool = functools.partial(
            nn.max_pool, window_shape=window, strides=strides, padding=padding
        )
        return jax.vjp(pool, x)[1](gradient)[0]

    of_x = lax.platform_dependent(*inputs, gradient, cpu=on_cpu, default=default)
    return (of_x,)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
