"""Feature maps of a classifier at several scales, to compare images by."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

_LAYERS = (nn.Conv, nn.BatchNorm, nn.Dense)


def feature_maps(
    network: nn.Module,
) -> Callable[[Any, Float[Array, "B H W 3"]], list[Array]]:
    """Returns (variables, normalised images) -> maps [B, h, w, C].

    One for each resolution that the network's blocks have: that of the last block, from
    the finest on.
    """

    def is_block(module: nn.Module, method: str) -> bool:
        is_layer = isinstance(module, _LAYERS)
        return method == "__call__" and len(module.path) == 1 and not is_layer

    def run(variables: Any, images: Array) -> list[Array]:
        _, found = network.apply(
            variables, images, capture_intermediates=is_block, mutable=["intermediates"]
        )
        blocks = found["intermediates"]
        by_side = {}
        for name in sorted(blocks, key=_natural):
            (output,) = blocks[name]["__call__"]
            by_side[output.shape[1]] = output
        return list(by_side.values())

    return run


def _natural(name: str) -> list[int]:
    """Sort key by which block 10 comes after block 2."""
    return [int(number) for number in re.findall(r"\d+", name)]
