"""The device mesh ("data", "fsdp"), and sharding rules as data."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from mvc_jax import processes
from mvc_jax.errors import UserError
from mvc_jax.training import runtime

BATCH_AXES = ("data", "fsdp")

# A rule is (regex for the parameter's path, "fsdp" or "replicate"); the first match is
# used. "fsdp" shards the largest axis that the size of the mesh's fsdp axis divides.
Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((r"/(kernel|embedding)$", "fsdp"), (r".*", "replicate"))


def make_mesh(
    data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over the devices of all processes, or over those given.

    Raises:
      UserError: the sizes do not match the number of devices.
    """
    if devices is None:
        runtime.start()
        # What the first process does alone has no help of others.
        devices = jax.devices() if processes.count() > 1 else jax.local_devices()
    shape = mesh_shape(data, fsdp, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), BATCH_AXES)


def local_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over the devices of this process, for work that is shared out by shards.

    Args:
      data: of the mesh of all processes.
      fsdp: of that mesh; here it is as large as the devices of a process allow.
    """
    runtime.start()
    if jax.process_count() == 1:
        return make_mesh(data, fsdp)
    devices = jax.local_devices()
    return make_mesh(-1, math.gcd(fsdp, len(devices)), devices)


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """Sizes of the mesh axes (data, fsdp); `data=-1` takes all devices that are left.

    Raises:
      UserError: their product is not the number of devices.
    """
    asked = data
    if data == -1 and fsdp > 0:
        data = devices // fsdp
    if data < 1 or fsdp < 1 or data * fsdp != devices:
        raise UserError(
            "config.mesh",
            wanted=f"data * fsdp = {devices} devices",
            got=f"data={asked}, fsdp={fsdp}",
            fix="Set data to -1 and fsdp to a divisor of the number of devices.",
        )
    return data, fsdp


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Shards dimension `axis` of an array over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays on the devices by `shardings`, like `jax.device_put`.

    Of several processes, which all have the same host arrays, each copies its own part.
    """
    if processes.count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)  # it is on all devices already
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, sharding, lambda index: host[index]
        )

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: one(leaf, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def own_rows(size: int, mesh: Mesh) -> Int[np.ndarray, " R"]:
    """The rows, of `size` that are sharded over the mesh, on this process's devices."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((size,))
    rows = (range(*index[0].indices(size)) for index in indices.values())
    return np.unique([row for each in rows for row in each])


def place_rows(
    array: np.ndarray, rows: Int[np.ndarray, " R"], size: int, mesh: Mesh
) -> jax.Array:
    """An array [size, ...] over the mesh of all processes, of which each has its rows.

    Args:
      array: this process's rows [R, ...].
      rows: their numbers, the result of `own_rows`.
      size: rows of all processes.
      mesh: the devices.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(size)
        return array[np.searchsorted(rows, np.arange(first, stop))]

    shape = (size, *array.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)


def readable(tree: Any) -> Any:
    """`tree` with leaves that this process can read as a whole; all call it together.

    With a single process, it is returned as it is.
    """
    if processes.count() == 1:
        return tree

    def one(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def to_host(tree: Any) -> Any:
    """Host copies of a tree of arrays; of several processes all call it together."""
    return jax.device_get(readable(tree))


def padded_size(size: int, mesh: Mesh) -> int:
    """`size` rounded up to a multiple of the number of devices."""
    return -(-size // mesh.size) * mesh.size


def pad_rows(array: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    """Zero-pads dimension `axis` of a host array up to `size`."""
    missing = size - array.shape[axis]
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths)


def over_batches(
    function: Callable[[Any, Any], jax.Array], params: Any, *, size: int, mesh: Mesh
) -> Callable[[Iterable[Any]], Iterator[np.ndarray]]:
    """Turns `function(params, batch)` into one from host batches to host results.

    It is compiled once, for `size` rows: shorter batches are padded, and the padding is
    removed from their results. The next batch is sent before a result is fetched.

    Args:
      function: to be jitted; maps an array [size, ...], or a tree of them, to an array
        [size, ...].
      params: replicated to every device.
      size: rows of a batch, a multiple of the number of devices.
      mesh: the devices.
    """
    function = jax.jit(function)
    params = place(params, replicated(mesh))

    def run(batches: Iterable[Any]) -> Iterator[np.ndarray]:
        pending = None
        for batch in batches:
            rows = len(jax.tree.leaves(batch)[0])
            padded = jax.tree.map(lambda array: pad_rows(array, size), batch)
            padded = place(padded, batch_sharding(mesh))
            finished, pending = pending, (function(params, padded), rows)
            if finished is not None:
                yield np.asarray(readable(finished[0]))[: finished[1]]
        if pending is not None:
            yield np.asarray(readable(pending[0]))[: pending[1]]

    return run


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A `NamedSharding` for each leaf (array or shape) of `tree`, by the rules.

    A leaf whose rule is "fsdp" but that has no divisible axis is replicated; the reason
    is logged.
    """

    def one(path, leaf):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next(rule for regex, rule in rules if re.search(regex, name))
        spec = PartitionSpec() if rule == "replicate" else _fsdp_spec(name, leaf, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def _fsdp_spec(name: str, leaf: Any, mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    if parts == 1:
        return PartitionSpec()
    fitting = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
    if not fitting:
        logging.info(
            "%s %s: no axis is divisible by %d, replicated", name, leaf.shape, parts
        )
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*[None] * axis, "fsdp")
