"""Reads and writes Flax parameter trees as safetensors files in the PyTorch layout.

One function maps a Flax path to its PyTorch name (`torch_name`, unless the caller
passes another); it and the shapes of the tree determine how files are read and written.
Both need memory for the tree and one or two tensors.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np
from etils import epath

from mvc_jax.checkpoints import tensor_file
from mvc_jax.errors import UserError

# diffusers' Flax autoencoder has names of attention that PyTorch's used to have.
_VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_IGNORED = re.compile(r"(^|\.)position_ids$")  # a constant in older exports

Path = tuple[str, ...]


def torch_name(path: Path) -> str:
    """The PyTorch name of a parameter of diffusers' and transformers' Flax modules.

    `("down_blocks_0", "resnets_1", "conv1", "kernel")` ->
    `"down_blocks.0.resnets.1.conv1.weight"`.
    """
    *modules, leaf = path
    attends = any(module.startswith("attentions_") for module in modules)
    names = []
    for module in modules:
        if not module.startswith(("linear_", "ln_")):
            module = re.sub(r"_(\d+)$", r".\1", module)
        names.append(_VAE_ATTENTION.get(module, module) if attends else module)
    return ".".join([*names, _LEAVES.get(leaf, leaf)])


def read(
    path: epath.PathLike,
    shapes: Mapping[str, Any],
    unused: str = r"(?!)",
    *,
    name_of: Callable[[Path], str] = torch_name,
) -> dict[str, Any]:
    """Reads a PyTorch module's tensors into a Flax tree, in their stored precision.

    The leaves are NumPy's float32 or float16, or ml_dtypes' bfloat16: a checkpoint in
    half precision takes half the memory. fp32 modules promote it exactly; training
    casts it to fp32 master weights first. Only embeddings are always fp32: Flax's CLIP
    looks them up in their own precision, and would round the sum of token and position.

    Args:
      path: a `.safetensors` file, or the JSON index of its shards.
      shapes: the tree of that module, leaves with `.shape` (from `jax.eval_shape`).
      unused: pattern (`re.search`) of names of tensors that are ignored where `shapes`
        has no leaf for them; by default there are none.
      name_of: Flax path -> name in the file.

    Raises:
      UserError: a file is damaged, or tensors are missing, unexpected, or of another
        shape or precision; all are listed, before any is read. Or one is not finite.
    """
    found, leaves = _match(path, shapes, unused, name_of)
    names = {found[name][0]: name for name in leaves}  # by the name in the file
    tree = {}
    for stored, tensor in tensor_file.tensors(
        {stored: found[name][1] for stored, name in names.items()}
    ):
        key, shape = leaves[names[stored]]
        dtype = np.float32 if key[-1] == "embedding" else tensor.dtype
        tree[key] = np.array(_to_flax(key[-1], tensor, len(shape)), dtype, order="C")
    return flax.traverse_util.unflatten_dict(tree)


def _match(
    path: epath.PathLike,
    shapes: Mapping[str, Any],
    unused: str,
    name_of: Callable[[Path], str],
) -> tuple[dict, dict[str, tuple[Path, tuple[int, ...]]]]:
    """Matches the tensors of a file with the leaves of a tree, see `read`.

    Returns:
      what `_with_current_names` found; (Flax path, shape) by the name in it.
    """
    found, problems = _with_current_names(tensor_file.entries(path))
    leaves = {}
    for key, leaf in flax.traverse_util.flatten_dict(shapes).items():
        name = name_of(key)
        if name not in found:
            problems.append(f"{name} is missing")
            continue
        leaves[name] = key, tuple(leaf.shape)
        shape = _flax_shape(key[-1], found[name][1].shape, len(leaf.shape))
        if shape != tuple(leaf.shape):
            problems.append(f"{name} has shape {list(shape)}, not {list(leaf.shape)}")
    unexpected = sorted(found.keys() - leaves.keys())
    problems += [f"{x} is unexpected" for x in unexpected if not re.search(unused, x)]
    if problems:
        got, details = tensor_file.listed(problems)
        raise UserError(
            str(path),
            wanted="the tensors of the architecture in its config.json",
            got=f"{len(problems)} that differ: {got}",
            fix="Use weights and config.json of the same checkpoint.",
            details=details,
        )
    _check_precision(path, {name: found[name][1] for name in leaves})
    return found, leaves


def check_tensors(
    path: epath.PathLike,
    shapes: Mapping[str, Any],
    unused: str = r"(?!)",
    *,
    name_of: Callable[[Path], str] = torch_name,
) -> None:
    """Raises the errors of `read` that need no tensor, but only the files' headers."""
    _match(path, shapes, unused, name_of)


def check(path: epath.PathLike) -> str:
    """Checks the headers of a file, or of the shards of an index; reads no tensor.

    Returns:
      the precision of the tensors: `float32`, `float16` or `bfloat16`.

    Raises:
      UserError: a file is missing, truncated or damaged, or the precision is mixed or
        not one of these three.
    """
    found, _ = _with_current_names(tensor_file.entries(path))
    return _check_precision(path, {name: entry for name, (_, entry) in found.items()})


def require_finite(path: epath.PathLike) -> None:
    """Reads the tensors of a file, or of all shards, one at a time.

    Raises:
      UserError: one is not finite.
    """
    for _ in tensor_file.tensors(tensor_file.entries(path)):
        pass


def write(
    path: epath.PathLike,
    params: Mapping[str, Any],
    *,
    name_of: Callable[[Path], str] = torch_name,
    counters: Sequence[str] = (),
) -> None:
    """Writes a Flax tree, in fp32, as the file that PyTorch's module would write.

    Leaves are NumPy or JAX arrays, sharded or not, and are fetched one at a time.

    Args:
      path: of the new file.
      params: the tree.
      name_of: Flax path -> name in the file.
      counters: names of further integers in PyTorch's module; they are written as 0.
    """
    leaves = flax.traverse_util.flatten_dict(params)
    keys = {name_of(key): key for key in leaves}

    def fetch(name):
        if name in counters:
            return np.zeros((), np.int64)
        leaf = leaves[keys[name]]
        if not isinstance(leaf, np.ndarray):
            leaf = leaf.copy()  # a JAX array caches the host copy that NumPy fetches
        return _to_torch(keys[name][-1], np.asarray(leaf))

    tensor_file.write(
        path,
        {name: _torch_shape(key[-1], leaves[key].shape) for name, key in keys.items()}
        | dict.fromkeys(counters, ()),
        fetch,
        dtypes=dict.fromkeys(counters, "I64"),
    )


def _flax_shape(leaf: str, shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    if leaf != "kernel":
        return shape
    if len(shape) == 4 and ndim == 2 and shape[2:] == (1, 1):
        shape = shape[:2]  # a linear layer that is stored as a 1x1 convolution
    return (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape[::-1]


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if leaf != "kernel":
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _to_flax(leaf: str, tensor: np.ndarray, ndim: int) -> np.ndarray:
    if leaf != "kernel":
        return tensor
    if tensor.ndim == 4 and ndim == 2:
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(leaf: str, tensor: np.ndarray) -> np.ndarray:
    if leaf == "kernel":
        tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return np.asarray(tensor, np.float32, order="C")


def _with_current_names(
    entries: Mapping[str, tensor_file.Entry],
) -> tuple[dict[str, tuple[str, tensor_file.Entry]], list[str]]:
    """Drops stored constants and renames the attention of old autoencoders.

    Returns:
      (name in the file, entry) by the current name, and a line per duplicate name.
    """
    renamed, problems = {}, []
    for stored, entry in entries.items():
        if _IGNORED.search(stored):
            continue
        name = stored
        *modules, module, leaf = name.split(".") if "." in name else ("", name)
        if "attentions" in modules and module in _VAE_ATTENTION:
            name = ".".join([*modules, _VAE_ATTENTION[module], leaf])
        if name in renamed:
            problems.append(f"{name} appears twice, once as {stored}")
        renamed[name] = stored, entry
    return renamed, problems


def _check_precision(
    path: epath.PathLike, entries: Mapping[str, tensor_file.Entry]
) -> str:
    """Returns the NumPy name of the precision, which must be one for all tensors."""
    counts = Counter(entry.dtype for entry in entries.values())
    known = [dtype for dtype in counts if dtype in tensor_file.DTYPES]
    if len(counts) == len(known) == 1:
        return tensor_file.DTYPES[known[0]].name
    majority = max(known, key=counts.__getitem__, default=None)
    lines = [
        f"{k} is {e.dtype}" for k, e in sorted(entries.items()) if e.dtype != majority
    ]
    got, details = tensor_file.listed(lines)
    tally = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    raise UserError(
        str(path),
        wanted=f"tensors of one precision ({', '.join(tensor_file.DTYPES)})",
        got=f"{tally or 'no tensors'}" + (f": {got}" if got else ""),
        fix="Use the checkpoint in one precision, not quantised; `torch_dtype` of "
        "from_pretrained and save_pretrained convert it.",
        details=details,
    )
