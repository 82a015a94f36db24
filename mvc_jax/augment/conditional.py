"""Functions that few images of a batch go through: on CPUs only those images do.

An accelerator computes every function for the whole batch and selects the results. On a
CPU that takes as long as all functions for all images.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

Image = UInt8[Array, "H W C"]


def one_by_one(function: Callable[..., Image], pixels: int) -> Callable[..., Image]:
    """Returns `function`, whose batches of large images a CPU loops over.

    In the loop `apply_where` is a branch, and an image stays in the processor's cache
    from one operation to the next.

    Args:
      function: (image, *arguments) -> an image of the same shape.
      pixels: of an image, from which on it is large.
    """
    batched = jax.vmap(function)

    def loop(*rows):
        return jax.lax.map(lambda row: function(*row), rows)

    def batch(images, *arguments):
        large = images.shape[1] * images.shape[2] >= pixels
        return jax.lax.platform_dependent(
            images, *arguments, cpu=loop if large else batched, default=batched
        )

    return _with_batch_rule(function, batch)


def apply_where(
    function: Callable[..., Image], *, neutral: bool = False
) -> Callable[..., Image]:
    """Returns `(condition, image, *arguments) -> image`, changed where `condition`.

    It is meant for costly functions with conditions that are mostly False. On a CPU a
    vmapped batch is a loop over the images whose condition is True; on an accelerator
    `function` is computed for all, and the results are selected.

    Args:
      function: (image, *arguments) -> an image of the same shape.
      neutral: whether it returns an image whose condition is False as it is. A batch
        goes through it as a whole then.
    """

    def apply(condition, image, *arguments):
        return jax.lax.cond(
            condition, function, lambda image, *_: image, image, *arguments
        )

    def loop(condition, images, *arguments):
        order = jnp.argsort(~condition)  # stable: images with a True condition first

        def body(i, images):
            row = order[i]
            changed = function(images[row], *(rows[row] for rows in arguments))
            return images.at[row].set(changed)

        return jax.lax.fori_loop(0, condition.sum(), body, images)

    def select(condition, images, *arguments):
        changed = jax.vmap(function)(images, *arguments)
        return jnp.where(condition[:, None, None, None], changed, images)

    def batch(condition, images, *arguments):
        if neutral:
            return jax.vmap(function)(images, *arguments)
        return jax.lax.platform_dependent(
            condition, images, *arguments, cpu=loop, default=select
        )

    return _with_batch_rule(apply, batch)


def _with_batch_rule(
    function: Callable[..., Any], batch: Callable[..., Any]
) -> Callable[..., Any]:
    """`function`, whose `jax.vmap` is `batch`; a batch of batches is one batch."""
    function = jax.custom_batching.custom_vmap(function)
    of_batch = jax.custom_batching.custom_vmap(batch)

    @function.def_vmap
    def _(size, batched, *values):
        return of_batch(*_broadcast(size, batched, values)), True

    @of_batch.def_vmap
    def _(size, batched, *values):
        values = _broadcast(size, batched, values)
        rows = values[0].shape[:2]
        joined = (value.reshape(-1, *value.shape[2:]) for value in values)
        result = of_batch(*joined)
        return result.reshape(*rows, *result.shape[1:]), True

    return function


def _broadcast(size: int, batched, values) -> tuple[Array, ...]:
    return tuple(
        value if is_batched else jnp.broadcast_to(value, (size, *value.shape))
        for value, is_batched in zip(values, batched, strict=True)
    )
