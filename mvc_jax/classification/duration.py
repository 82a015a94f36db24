"""How many steps a classifier is trained, by the number of real images."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mvc_jax.errors import UserError


def steps(images: int, *, epochs: float, steps: int, batch_size: int) -> int:
    """Optimiser steps of `epochs` over this many real images; `steps` if it is 0."""
    return math.ceil(epochs * images / batch_size) or steps


def held_out(images: int, fraction: float) -> int:
    """How many images of a class are held out; at least one stays in training."""
    if not fraction:
        return 0
    return min(max(round(fraction * images), 1), images - 1)


def check_warmup(section: Mapping[str, Any], labels: Int[np.ndarray, " N"]) -> None:
    """Checks that the warm-up ends, where the steps depend on the number of images.

    Args:
      section: `config.classify`.
      labels: of the real training images, including those that will be held out.

    Raises:
      UserError: it does not.
    """
    if not section["epochs"]:
        return  # `classify.check` knows the steps
    fields = {name: section[name] for name in ("epochs", "steps", "batch_size")}
    counts = np.unique(labels, return_counts=True)[1].tolist()
    held = sum(held_out(count, section["validation"]) for count in counts)
    require_warmup(section["warmup"], steps(len(labels) - held, **fields))


def require_warmup(warmup: int, steps: int) -> None:
    """Raises a `UserError` unless a warm-up ends within this many steps."""
    if warmup > steps:
        raise UserError(
            "config.classify.warmup",
            wanted=f"at most the {steps} steps that are trained",
            got=f"{warmup}",
            fix="Lower it, or raise config.classify.epochs.",
        )
