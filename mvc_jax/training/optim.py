"""Optimisers and learning-rate schedules from plain numbers."""

import jax
import optax


def schedule(name: str, peak: float, *, warmup: int, steps: int) -> optax.Schedule:
    """`constant` or `cosine` learning rate, after a linear warm-up from 0.

    The cosine falls to 0 at `steps`.
    """
    if name == "cosine":
        return warmup_cosine(peak, warmup=warmup, steps=steps)
    return optax.warmup_constant_schedule(0.0, peak, warmup)


def warmup_cosine(peak: float, *, warmup: int, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then a half cosine to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def adam(
    schedule: optax.Schedule | float, *, max_norm: float = 0.0
) -> optax.GradientTransformation:
    """Adam with the library's defaults; `max_norm` > 0 clips the global norm first."""
    clip = [optax.clip_by_global_norm(max_norm)] if max_norm > 0 else []
    return optax.chain(*clip, optax.adam(schedule))


def ema_update(ema, params, step: jax.Array, decay: float):
    """Exponential moving average with the usual warm-up min(decay, (1+t)/(10+t))."""
    rate = jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e * rate + p * (1.0 - rate), ema, params)
