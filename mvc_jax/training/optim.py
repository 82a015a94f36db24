"""Optimisers and learning-rate schedules from plain numbers."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

SCHEDULES = ("constant", "cosine", "multistep")
OPTIMIZERS = ("adam", "sgd")


def schedule(
    name: str,
    peak: float,
    *,
    warmup: int,
    steps: int,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> optax.Schedule:
    """A learning rate by step, after a linear warm-up from 0.

    Args:
      name: `constant`; `cosine`, which falls to 0 at `steps`; or `multistep`, which is
        multiplied by `gamma` at each of the `milestones`.
      peak: after the warm-up.
      warmup: steps of it.
      steps: of the whole.
      milestones: shares of `steps`, in (0, 1).
      gamma: of `multistep`.
    """
    if name == "cosine":
        return warmup_cosine(peak, warmup=warmup, steps=steps)
    # Not the library's warm-up to a constant: without a warm-up it would stay at 0.
    shares = milestones if name == "multistep" else ()
    turns = {round(share * steps) - warmup: gamma for share in shares}
    falling = optax.piecewise_constant_schedule(peak, turns)
    rising = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rising, falling], [warmup])


def warmup_cosine(peak: float, *, warmup: int, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then a half cosine to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def adam(
    schedule: optax.Schedule | float, *, max_norm: float = 0.0, weight_decay: float = 0
) -> optax.GradientTransformation:
    """Adam with the library's defaults.

    Args:
      schedule: the learning rate.
      max_norm: above 0 it clips the global norm first.
      weight_decay: decoupled (arXiv 1711.05101), of kernels.
    """
    clip = [optax.clip_by_global_norm(max_norm)] if max_norm > 0 else []
    if weight_decay:
        return optax.chain(
            *clip,
            optax.adamw(schedule, weight_decay=weight_decay, mask=_kernels),
        )
    return optax.chain(*clip, optax.adam(schedule))


def sgd(
    schedule: optax.Schedule | float, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum; `weight_decay` of kernels is part of the loss."""
    decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
    return optax.chain(decay, optax.sgd(schedule, momentum, nesterov=momentum > 0))


def optimizer(
    name: str, schedule: optax.Schedule | float, *, weight_decay: float, momentum: float
) -> optax.GradientTransformation:
    """One of `OPTIMIZERS`; `momentum` is sgd's alone."""
    if name == "adam":
        return adam(schedule, weight_decay=weight_decay)
    return sgd(schedule, momentum=momentum, weight_decay=weight_decay)


def _kernels(params: Any) -> Any:
    """True for weights that multiply, False for biases and scales of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: getattr(path[-1], "key", None) == "kernel", params
    )


def ema_update(ema, params, step: jax.Array, decay: float):
    """Exponential moving average with the usual warm-up min(decay, (1+t)/(10+t))."""
    rate = jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e * rate + p * (1.0 - rate), ema, params)
