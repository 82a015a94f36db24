"""Low-rank adapters of the UNet (LoRA, arXiv 2106.09685).

An adapted layer computes W x + B A x: W is frozen, A and B are trained. The paper's
scale, alpha / rank, is 1: alpha is the rank, as in diffusers' own training scripts.
Adapters are a flat tree, one entry a layer, under its Flax path:

    {"down_blocks_0/attentions_0/.../to_q": {"a": [in, r], "b": [r, out]}, ...}

In a convolution `a` is a kernel [kh, kw, in, r] and `b` a 1x1 kernel [1, 1, r, out].
Both are far smaller than the layer's kernel; the sharding rules replicate them.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from mvc_jax.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

Adapters = Mapping[str, Mapping[str, Any]]


def init(
    unet: Mapping[str, Any],
    *,
    rank: int,
    targets: Sequence[str] = ATTENTION,
    name_of: Callable[[str], str],
    rng: np.random.Generator,
) -> dict[str, dict[str, np.ndarray]]:
    """Initial adapters: A is normal with variance 1 / fan-in, B zero.

    `conv_in` always has an adapter: the input channels that `widened` adds start at
    zero, and without an adapter the UNet could never learn to use the source.

    Args:
      unet: the tree of the widened UNet's parameters, or of their shapes.
      rank: r, the same for every layer.
      targets: suffixes of the layers' PyTorch names: `to_q` selects every query
        projection, `attn2.to_q` those of cross-attention. Linear layers and
        convolutions can be selected.
      name_of: a layer's Flax path -> its PyTorch name.
      rng: draws A on the host, in the order of the layers' paths.

    Raises:
      UserError: the rank is below 1, or a target matches no layer.
    """
    if rank < 1:
        raise UserError(
            "the rank of LoRA",
            wanted="at least 1",
            got=f"{rank}",
            fix="4 to 64 are typical.",
        )
    check_targets(unet, targets, name_of)
    kernels = _kernels(unet)
    names = {path: name_of(path) for path in kernels}
    targets = ("conv_in", *targets)
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


def check_targets(
    unet: Mapping[str, Any], targets: Sequence[str], name_of: Callable[[str], str]
) -> None:
    """Raises the `UserError` of `init` for a target that matches no layer."""
    names = [name_of(path) for path in _kernels(unet)]
    for target in targets:
        if not any(_is_target(name, target) for name in names):
            raise UserError(
                f"target {target!r} of LoRA",
                wanted="a suffix of the name of a linear layer or a convolution",
                got="one that matches none",
                fix=f"There are {', '.join(_last_words(names))}.",
            )


def frozen(unet: Mapping[str, Any], dtype: str) -> Any:
    """The UNet's parameters for training adapters: frozen kernels, cast to `dtype`.

    Parameters that are not trained need no fp32 master weights; norms and biases are
    small, and are not cast.
    """
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, unet
    )


@contextlib.contextmanager
def adapted(adapters: Adapters) -> Iterator[None]:
    """Context in which the UNet's `apply` adds each adapter to its layer's output.

    Neither merged weights nor their gradients are computed; A and B are cast to the
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
        # A copy of the layer with another kernel: the same strides, padding and dtype.
        to_rank = layer.clone(
            features=down.shape[-1], use_bias=False, parent=None, name=None
        )
        hidden = to_rank.apply({"params": {"kernel": down}}, *args, **kwargs)
        from_rank = nn.Dense(
            up.shape[-1], use_bias=False, dtype=hidden.dtype, parent=None
        )
        kernel = up.reshape(up.shape[-2:])
        return output + from_rank.apply({"params": {"kernel": kernel}}, hidden)

    with nn.intercept_methods(add):
        yield
    if missed := sorted(set(adapters) - called):
        raise ValueError(f"adapters of layers that were not called: {missed}")


def merge(unet: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """Replaces the kernel W of every adapted layer by W + A B, in fp32.

    Args:
      unet: host or device arrays; those without an adapter are returned unchanged.
      adapters: host or device arrays.
    """
    flat = dict(flax.traverse_util.flatten_dict(unet))
    with jax.default_matmul_precision("highest"):
        for path, pair in adapters.items():
            key = (*path.split("/"), "kernel")
            # matmul treats a convolution's window as batch axes, as B is 1x1.
            flat[key] = flat[key] + pair["a"] @ pair["b"]
    return flax.traverse_util.unflatten_dict(flat)


def _kernels(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of all linear layers and convolutions, by the layer's Flax path."""
    return {
        "/".join(path[:-1]): leaf
        for path, leaf in flax.traverse_util.flatten_dict(unet).items()
        if path[-1] == "kernel"
    }


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _last_words(names: Iterable[str]) -> list[str]:
    """The last parts of the names, with the part before if the last is a number."""
    return sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in names})
