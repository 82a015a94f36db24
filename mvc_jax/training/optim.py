"""Optimisers, learning-rate schedules and averaged parameters, by name and number."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    """A learning-rate schedule with a linear warm-up from 0.

    Args:
      name: `constant`; `cosine`, which decays to 0 at `steps`; or `multistep`, which is
        multiplied by `gamma` at each of the `milestones`, those that round to one step
        included.
      peak: the learning rate after the warm-up.
      warmup: number of warm-up steps.
      steps: number of training steps.
      milestones: fractions of `steps`, in (0, 1).
      gamma: the factor of `multistep`.
    """
    if name == "cosine":
        return warmup_cosine(peak, warmup=warmup, steps=steps)
    # Not `optax.warmup_constant_schedule`, which stays at 0 without warm-up steps.
    fractions = milestones if name == "multistep" else ()
    at_step = Counter(round(fraction * steps) - warmup for fraction in fractions)
    scales = {step: gamma**count for step, count in at_step.items()}
    after = optax.piecewise_constant_schedule(peak, scales)
    before = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([before, after], [warmup])


def warmup_cosine(peak: float, *, warmup: int, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def adam(
    schedule: optax.Schedule | float, *, max_norm: float = 0.0, weight_decay: float = 0
) -> optax.GradientTransformation:
    """Adam with optax's defaults.

    Args:
      schedule: the learning rate.
      max_norm: gradients are clipped to this global norm; 0: not clipped.
      weight_decay: decoupled (arXiv 1711.05101), applied to kernels only.
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
    """SGD with Nesterov momentum and L2 regularisation (`weight_decay`) of kernels."""
    decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
    return optax.chain(decay, optax.sgd(schedule, momentum, nesterov=momentum > 0))


def optimizer(
    name: str, schedule: optax.Schedule | float, *, weight_decay: float, momentum: float
) -> optax.GradientTransformation:
    """One of `OPTIMIZERS`; `momentum` applies to sgd only."""
    if name == "adam":
        return adam(schedule, weight_decay=weight_decay)
    return sgd(schedule, momentum=momentum, weight_decay=weight_decay)


def _kernels(params: Any) -> Any:
    """A mask: True for kernels, False for biases and the scales of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: getattr(path[-1], "key", None) == "kernel", params
    )


def ema_update(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Exponential moving average `rate * ema + (1 - rate) * params`.

    `rate` is min(decay, (1 + step) / (10 + step)), the warm-up of TensorFlow's
    ExponentialMovingAverage, so that the average soon forgets the initial parameters.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    # `ema` as the new tensor: the other way round, 1 - (1 - rate) would be rounded.
    return optax.incremental_update(ema, params, rate)
