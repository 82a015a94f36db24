"""Layers on several devices: whole weights, on each device's part of the batch.

Where weights are sharded, XLA chooses for each layer what to send: weights, the
activations of all examples, or parts of either in rings of permutations; and it sums
gradients in the dtype of the layer, on all devices. Here each layer with a kernel is a
`shard_map` that says what is sent (FSDP, arXiv 2304.11277): a kernel is gathered in the
dtype of the layer, once in a pass; its gradient is summed in the dtype of the
parameter, each device receiving its shard.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mvc_jax import devices

_WHOLE = PartitionSpec()
# Of `psum_scatter`, one sum after another: groups of places on the axis; None: all.
Stages = tuple[tuple[tuple[int, ...], ...] | None, ...]
_AT_ONCE: Stages = (None,)


def mapped(
    batch: NamedSharding | None,
    weights: Any,
    recomputed: Callable[[tuple[str, ...]], bool],
) -> contextlib.AbstractContextManager:
    """Context in which each layer works on the examples of its device.

    It has to be entered after others that intercept methods, which then see the whole
    layer and not its part of the batch.

    Args:
      batch: sharding of the first axis of activations; None changes nothing.
      weights: shardings of the network's parameters; None: whole on each device.
      recomputed: whether the backward pass recomputes the layer of a path. It then
        gathers its kernel anyway; other layers drop theirs and gather them again.
    """
    shardings = flax.traverse_util.flatten_dict(weights or {})
    stages = _AT_ONCE if batch is None else summing_stages(batch.mesh)
    within = False  # a layer: its copy is intercepted again

    def intercept(next_call, args, kwargs, context):
        nonlocal within
        layer = context.module
        alone = batch is None or batch.mesh.size == 1
        if alone or within or context.method_name != "__call__":
            return next_call(*args, **kwargs)
        if isinstance(layer, nn.GroupNorm):
            output = next_call(*args, **kwargs)
            return jax.lax.with_sharding_constraint(output, batch)
        if not isinstance(layer, nn.Dense | nn.Conv):
            return next_call(*args, **kwargs)
        params = layer.variables["params"]
        specs = {name: _spec(shardings.get((*layer.path, name))) for name in params}
        alike = layer.clone(parent=None, name=None)
        call = functools.partial(_call, alike, specs, stages)
        if specs["kernel"] != _WHOLE and not recomputed(layer.path):
            call = jax.checkpoint(call)
        within = True
        try:
            return jax.shard_map(
                call,
                mesh=batch.mesh,
                in_specs=(specs, batch.spec),
                out_specs=batch.spec,
            )(params, *args)
        finally:
            within = False

    return nn.intercept_methods(intercept)


def _spec(sharding: NamedSharding | None) -> PartitionSpec:
    return _WHOLE if sharding is None else sharding.spec


def summing_stages(mesh: Mesh) -> Stages:
    """How gradients are summed over the devices that share the weights.

    On TPUs over rows of chips and then over columns: of one sum over a whole square
    slice (4x4, 8x8) or all three axes of one, of which each chip keeps a part, libtpu
    makes a sum of which each keeps all, twice the bytes (docs/scaling.md).
    """
    size = mesh.shape["fsdp"]
    if devices.platform(mesh) != "tpu" or size < 8:
        return _AT_ONCE
    first = min(n for n in range(1, size + 1) if size % n == 0 and n * n >= size)
    return two_stages(first, size // first)


def two_stages(first: int, second: int) -> Stages:
    """Sums over `first` parts and then over `second`, in the order of a single one."""
    places = [range(i * second, (i + 1) * second) for i in range(first)]
    return tuple(zip(*places, strict=True)), tuple(map(tuple, places))


def _call(layer, specs, stages, shards, inputs):
    dtype = layer.dtype or inputs.dtype
    params = {
        name: gather(leaf, specs[name], dtype, stages) for name, leaf in shards.items()
    }
    return layer.apply({"params": params}, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(
    shard: Array, spec: PartitionSpec, dtype: Any, stages: Stages = _AT_ONCE
) -> Array:
    """The whole parameter in `dtype`, of which each device of a `shard_map` has a part.

    Its gradient is the sum over all devices, in the dtype of the shard.

    Args:
      shard: the part of this device.
      spec: how the parameter is sharded: one axis at most, over one of the mesh's.
      dtype: of the result.
      stages: of the sum; see `summing_stages`.
    """
    whole = shard.astype(dtype)
    for place, name in _sharded(spec):
        whole = jax.lax.all_gather(whole, name, axis=place, tiled=True)
    return jax.lax.pcast(whole, _others(spec), to="varying")


def _gather_forward(shard, spec, dtype, stages):
    return gather(shard, spec, dtype, stages), shard.dtype.type(0)


def _gather_backward(spec, dtype, stages, like, gradient):
    gradient = gradient.astype(like.dtype)
    for (place, name), groups in itertools.product(_sharded(spec), stages):
        gradient = jax.lax.psum_scatter(
            gradient,
            name,
            scatter_dimension=place,
            axis_index_groups=groups,
            tiled=True,
        )
    return (jax.lax.psum(gradient, _others(spec)),)


gather.defvjp(_gather_forward, _gather_backward)


def _sharded(spec: PartitionSpec) -> list[tuple[int, str]]:
    """The array's axes that are sharded, and over which axis of the mesh."""
    return [(place, name) for place, name in enumerate(spec) if name is not None]


def _others(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of the mesh over which the array is not sharded."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in names if name not in spec)
