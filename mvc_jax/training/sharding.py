"""One mesh, ("data", "fsdp"); sharding rules as data."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mvc_jax.errors import UserError
from mvc_jax.training import runtime

BATCH_AXES = ("data", "fsdp")

# A rule is (regex over the parameter's path, what to do with it). The first match
# decides. "fsdp" splits the largest axis that the mesh's fsdp axis divides.
Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((r"/(kernel|embedding)$", "fsdp"), (r".*", "replicate"))


def make_mesh(
    data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, or over those given.

    Raises:
      UserError: the sizes do not match the number of devices.
    """
    if devices is None:
        runtime.start()
        devices = jax.devices()
    shape = mesh_shape(data, fsdp, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), BATCH_AXES)


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """Sizes of the mesh axes (data, fsdp); `data=-1` takes all devices that are left.

    Raises:
      UserError: their product is not the number of devices.
    """
    if data == -1 and fsdp > 0:
        data = devices // fsdp
    if data < 1 or fsdp < 1 or data * fsdp != devices:
        raise UserError(
            "config.mesh",
            wanted=f"data * fsdp = {devices} devices",
            got=f"data={data}, fsdp={fsdp}",
            fix="Set data to -1 and fsdp to a divisor of the number of devices.",
        )
    return data, fsdp


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits dimension `axis` of an array over every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def padded_size(size: int, mesh: Mesh) -> int:
    """`size`, rounded up to a multiple of the number of devices."""
    return -(-size // mesh.size) * mesh.size


def pad_rows(array: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    """Zero-pads dimension `axis` of a host array up to `size`."""
    missing = size - array.shape[axis]
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths)


def over_batches(
    function: Callable[[Any, Any], jax.Array], params: Any, *, size: int, mesh: Mesh
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Turns `function(params, batch)` into one from host batches to host results.

    It is compiled once, for `size` rows, a multiple of the number of devices: shorter
    batches are padded, and their results cut. Parameters are on every device; the next
    batch is sent before a result is fetched.
    """
    function = jax.jit(function)
    params = jax.device_put(params, replicated(mesh))

    def run(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        ahead = None
        for batch in batches:
            placed = jax.device_put(pad_rows(batch, size), batch_sharding(mesh))
            behind, ahead = ahead, (function(params, placed), len(batch))
            if behind is not None:
                yield np.asarray(behind[0])[: behind[1]]
        if ahead is not None:
            yield np.asarray(ahead[0])[: ahead[1]]

    return run


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A `NamedSharding` for each leaf (array or shape) of `tree`, by the rules.

    A leaf that its rule would split but that no axis allows is replicated, and the log
    says why.
    """

    def one(path, leaf):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next(rule for regex, rule in rules if re.search(regex, name))
        spec = PartitionSpec() if rule == "replicate" else _split(name, leaf, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def _split(name: str, leaf: Any, mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    if parts == 1:
        return PartitionSpec()
    fitting = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
    if not fitting:
        logging.info(
            "%s %s: no axis divides by %d, kept whole", name, leaf.shape, parts
        )
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*[None] * axis, "fsdp")
