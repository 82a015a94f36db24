"""Safetensors in the PyTorch layout, in and out of Flax parameter trees.

One function, `torch_name`, maps a Flax path to its PyTorch name; reading and writing
both follow from it and from the shapes of the tree.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mvc_jax import files
from mvc_jax.errors import UserError

# diffusers' Flax autoencoder kept the attention names that its PyTorch twin gave up.
_VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_IGNORED = re.compile(r"(^|\.)position_ids$")  # a constant that older exports stored

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
    path: epath.PathLike, shapes: Mapping[str, Any], unused: str = r"(?!)"
) -> dict[str, Any]:
    """Reads a safetensors file into a Flax tree, fp32.

    Args:
      path: a `.safetensors` file of a PyTorch module.
      shapes: the tree of that module, leaves with `.shape` (from `jax.eval_shape`).
      unused: a pattern, found in the names of tensors that may be there although
        `shapes` has no place for them; without one there are none.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; all are named.
    """
    tensors = _renamed(_open(epath.Path(path)))
    tree, problems = {}, []
    for key, leaf in flax.traverse_util.flatten_dict(shapes).items():
        name = torch_name(key)
        if name not in tensors:
            problems.append(f"{name} is missing")
            continue
        tensor = _to_flax(key[-1], tensors.pop(name), len(leaf.shape))
        if tensor.shape != tuple(leaf.shape):
            problems.append(
                f"{name} makes {list(tensor.shape)}, not {list(leaf.shape)}"
            )
        tree[key] = np.ascontiguousarray(tensor, dtype=np.float32)
    surplus = [name for name in sorted(tensors) if not re.search(unused, name)]
    problems += [f"{name} is unexpected" for name in surplus]
    if problems:
        raise UserError(
            str(path),
            wanted="the tensors of the architecture in its config.json",
            got=f"{len(problems)} that differ: {'; '.join(problems)}",
            fix="Take weights and config.json from the same checkpoint.",
        )
    return flax.traverse_util.unflatten_dict(tree)


def write(path: epath.PathLike, params: Mapping[str, Any]) -> None:
    """Writes a Flax tree as the safetensors file that PyTorch's module would write."""
    tensors = {}
    for key, leaf in flax.traverse_util.flatten_dict(params).items():
        tensors[torch_name(key)] = _to_torch(key[-1], np.asarray(leaf))
    files.write_bytes(path, save(tensors, metadata={"format": "pt"}))


def _to_flax(leaf: str, tensor: np.ndarray, ndim: int) -> np.ndarray:
    if leaf != "kernel":
        return tensor
    if tensor.ndim == 4 and ndim == 2:  # a linear layer stored as a 1x1 convolution
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(leaf: str, tensor: np.ndarray) -> np.ndarray:
    if leaf == "kernel":
        tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return np.ascontiguousarray(tensor, dtype=np.float32)


def _renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops stored constants and gives old autoencoder attention its new names."""
    renamed = {}
    for name, tensor in tensors.items():
        if _IGNORED.search(name):
            continue
        *modules, module, leaf = name.split(".") if "." in name else ("", name)
        if "attentions" in modules and module in _VAE_ATTENTION:
            name = ".".join([*modules, _VAE_ATTENTION[module], leaf])
        renamed[name] = tensor
    return renamed


def _open(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return load(path.read_bytes())
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            str(path),
            wanted="a safetensors file",
            got=f"a damaged one ({error})" if path.exists() else "no such file",
            fix="Download it again; weights in .bin files are never opened.",
        ) from error
