"""How real and synthetic images meet in a classifier's batches (supplement, section 2).

A regime is nothing but an order of indices, weights and learning rates, so that every
regime runs the same training step for the same number of steps.
"""

import functools

import numpy as np

from mvc_jax.data import order

REGIMES = ("real", "combined", "two_phase", "probabilistic")


def schedule(
    regime: str,
    real: tuple[int, int],
    synthetic: tuple[int, int],
    *,
    seed: int,
    repeat: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    probability: float,
    phase_two: float,
    phase_two_rate: float,
) -> dict[str, np.ndarray]:
    """Every batch of one fit.

    `real`: real images. `combined`: real and synthetic as one dataset. `two_phase`:
    `combined`, then real only, with fewer steps and a smaller rate. `probabilistic`: a
    real batch, and beside each slot a synthetic image with probability p.

    Args:
      regime: one of `REGIMES`.
      real: first index and last + 1 of the real images.
      synthetic: likewise; unused by `real`.
      seed: of the run.
      repeat: which classifier. The real stream of a repeat is the same in all regimes.
      steps, batch_size: of the fit.
      learning_rate: the peak; a half cosine takes it to 0.
      probability: p of `probabilistic`, in [0, 1].
      phase_two: share of `two_phase`'s steps that its second phase takes.
      phase_two_rate: times the learning rate in them.

    Returns:
      `index` int32, `weight` float32 [steps, B] ([steps, 2B] if probabilistic, where a
      slot without an image weighs 0) and `rate` float32 [steps].
    """
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}; known: {', '.join(REGIMES)}")
    real_pool = np.arange(*real, dtype=np.int32)
    drawn_pool = np.arange(*synthetic, dtype=np.int32)
    stream = {"seed": seed, "repeat": repeat, "batch_size": batch_size}
    batches = functools.partial(_batches, **stream)
    turn = steps - round(steps * phase_two) if regime == "two_phase" else steps
    if regime in ("real", "probabilistic"):
        index = batches(real_pool, "real", 0, steps)
    else:
        everything = np.concatenate([real_pool, drawn_pool])
        together = batches(everything, "combined", 0, turn)
        index = np.concatenate([together, batches(real_pool, "real", turn, steps)])
    weight = np.ones(index.shape, np.float32)
    if regime == "probabilistic":
        draw = order.generator(seed, f"classify/{repeat}/probabilistic")
        extra = draw.random(index.shape) < probability
        beside = batches(drawn_pool, "synthetic", 0, steps)
        index = np.concatenate([index, beside], axis=1)
        weight = np.concatenate([weight, extra.astype(np.float32)], axis=1)
    first = half_cosine(learning_rate, turn)
    second = half_cosine(learning_rate * phase_two_rate, steps - turn)
    rate = np.concatenate([first, second])
    return {"index": index, "weight": weight, "rate": rate}


def half_cosine(peak: float, steps: int) -> np.ndarray:
    """From `peak` down to almost 0 in `steps` steps, float32 [steps]."""
    turn = np.arange(steps) / max(steps, 1)
    return (peak * 0.5 * (1 + np.cos(np.pi * turn))).astype(np.float32)


def _batches(
    pool: np.ndarray,
    purpose: str,
    first: int,
    last: int,
    *,
    seed: int,
    repeat: int,
    batch_size: int,
) -> np.ndarray:
    """Batches of steps [first, last) of a stream over `pool`, int32 [steps, B]."""
    draw = functools.partial(
        order.batch_indices,
        seed,
        f"classify/{repeat}/{purpose}",
        batch_size=batch_size,
        size=len(pool),
    )
    rows = [pool[draw(step)] for step in range(first, last)]
    return np.asarray(rows, np.int32).reshape(last - first, batch_size)
