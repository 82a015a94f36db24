"""Low-rank adapters of the UNet (LoRA, arXiv 2106.09685).

An adapted layer computes W x + B A x: W is frozen, A and B are trained. The paper's
scale, alpha / rank, is 1: alpha is the rank, as in diffusers' own training scripts.
Adapters are a flat tree, one entry a layer, under its Flax path:

    {"down_blocks_0/attentions_0/.../to_q": {"a": [in, r], "b": [r, out]}, ...}

In a convolution `a` is a kernel [kh, kw, in, r] and `b` the 1x1 one [1, 1, r, out].
Both are far smaller than what they adapt, and replicated by the sharding rules.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from etils import epath
from safetensors.numpy import save

from mvc_jax import files
from mvc_jax.checkpoints import weights
from mvc_jax.errors import require

FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

Adapters = Mapping[str, Mapping[str, Any]]


def init(
    unet: Mapping[str, Any],
    *,
    rank: int,
    targets: Sequence[str] = ATTENTION,
    rng: np.random.Generator,
) -> dict[str, dict[str, np.ndarray]]:
    """Adapters that change nothing yet: A normal with variance 1 / fan-in, B zero.

    `conv_in` is adapted always: the input channels that `widened` adds start at zero,
    and without an adapter the UNet could never learn to look at the source.

    Args:
      unet: the tree of the widened UNet's parameters, or of their shapes.
      rank: r, the same for every layer.
      targets: layers by the end of their PyTorch name: `to_q` is every query
        projection, `attn2.to_q` that of cross-attention. Linear layers and
        convolutions alike.
      rng: draws A on the host, in the order of the layers' paths.

    Raises:
      UserError: the rank is below 1, or a target names no layer.
    """
    require(
        rank >= 1,
        "the rank of LoRA",
        wanted="at least 1",
        got=rank,
        fix="4 to 64 are usual.",
    )
    kernels = _kernels(unet)
    names = {path: _torch_module(path) for path in kernels}
    targets = ("conv_in", *targets)
    for target in targets:
        require(
            any(_is_target(name, target) for name in names.values()),
            f"target {target!r} of LoRA",
            wanted="the end of the name of a linear layer or a convolution in the UNet",
            got="one that fits none",
            fix=f"There are {', '.join(_last_words(names.values()))}.",
        )
    adapters = {}
    for path in sorted(kernels):
        if not any(_is_target(names[path], target) for target in targets):
            continue
        *window, fan_in, fan_out = kernels[path].shape
        std = float(np.prod([*window, fan_in])) ** -0.5
        down = rng.normal(0.0, std, (*window, fan_in, rank)).astype(np.float32)
        up = np.zeros((*[1] * len(window), rank, fan_out), np.float32)
        adapters[path] = {"a": down, "b": up}
    return adapters


def frozen(unet: Mapping[str, Any], dtype: str) -> Any:
    """The UNet's parameters as they lie under adapters: kernels in `dtype`.

    What is not trained needs no fp32 master weights; norms and biases are small.
    """
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, unet
    )


@contextlib.contextmanager
def adapted(adapters: Adapters) -> Iterator[None]:
    """Within it, `apply` of the UNet adds every adapter to its layer's output.

    Neither merged weights nor their gradients are formed; A and B are cast to the
    layer's dtype.

    Raises:
      ValueError: a layer with an adapter was not called.
    """
    called = set()

    def add(next_call, args, kwargs, context):
        output = next_call(*args, **kwargs)
        layer = context.module
        if context.method_name != "__call__" or not isinstance(
            layer, nn.Dense | nn.Conv
        ):
            return output
        path = "/".join(layer.path)
        if path not in adapters:
            return output
        called.add(path)
        down, up = adapters[path]["a"], adapters[path]["b"]
        # The layer itself but for its kernel: the same strides, padding and dtype.
        to_rank = layer.clone(
            features=down.shape[-1], use_bias=False, parent=None, name=None
        )
        hidden = to_rank.apply({"params": {"kernel": down}}, *args, **kwargs)
        return output + hidden @ up.reshape(up.shape[-2:]).astype(hidden.dtype)

    with nn.intercept_methods(add):
        yield
    if missed := sorted(set(adapters) - called):
        raise ValueError(f"adapters of layers that were not called: {missed}")


def merge(unet: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """The UNet's parameters with W + A B in place of every adapted W, in fp32.

    Args:
      unet: host or device arrays; those without an adapter come back as they are.
      adapters: host or device arrays.
    """
    flat = dict(flax.traverse_util.flatten_dict(unet))
    with jax.default_matmul_precision("highest"):
        for path, pair in adapters.items():
            key = (*path.split("/"), "kernel")
            # matmul treats the window of a convolution as batch axes, which is right
            # since B is 1x1.
            flat[key] = flat[key] + pair["a"] @ pair["b"]
    return flax.traverse_util.unflatten_dict(flat)


def write(folder: epath.PathLike, adapters: Adapters) -> list[str]:
    """Writes the file that diffusers' `load_lora_weights(folder)` reads.

    PEFT's names and layout, fp32, with PEFT's configuration in the metadata.

    Returns:
      the files written, relative to `folder`.
    """
    tensors = {}
    for path, pair in adapters.items():
        name = f"unet.{_torch_module(path)}"
        tensors[f"{name}.lora_A.weight"] = _to_torch(pair["a"])
        tensors[f"{name}.lora_B.weight"] = _to_torch(pair["b"])
    rank = next(iter(adapters.values()))["a"].shape[-1]
    config = {
        "unet.r": rank,
        "unet.lora_alpha": rank,
        "unet.target_modules": [_torch_module(path) for path in adapters],
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    files.write_bytes(epath.Path(folder) / FILE, save(tensors, metadata=metadata))
    return [FILE]


def _kernels(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of all linear layers and convolutions, by the layer's Flax path."""
    return {
        "/".join(path[:-1]): leaf
        for path, leaf in flax.traverse_util.flatten_dict(unet).items()
        if path[-1] == "kernel"
    }


def _torch_module(path: str) -> str:
    return weights.torch_name((*path.split("/"), "kernel")).removesuffix(".weight")


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _last_words(names: Iterable[str]) -> list[str]:
    """What the names end in, with the word before where that is a number."""
    return sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in names})


def _to_torch(kernel: Any) -> np.ndarray:
    kernel = np.asarray(kernel, np.float32)
    kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    return np.ascontiguousarray(kernel)
