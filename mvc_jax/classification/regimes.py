"""How real and synthetic images meet in a classifier's batches (supplement, section 2).

A regime is only an order of indices and weights: every regime runs the same training
step for the same number of steps. Learning rates are `fits.FitOptions.rates`.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from mvc_jax.data import order

REGIMES = (
    "real",
    "combined",
    "two_phase",
    "probabilistic",
    "synthetic_only",
    "replace_same_source",
    "replace_same_class",
    "replace_any",
)


@dataclasses.dataclass(frozen=True)
class Pools:
    """The images that a classifier may be trained on, as rows of one array.

    Attributes:
      real: rows of real images, int32 [N].
      synthetic: rows of synthetic images in the order they were drawn, int32 [M]; may
        be empty for the regimes `real` and `probabilistic`.
      sources: for each synthetic image the row of its source, a real image, int32 [M].
      labels: class of every row of the array, int32 [R].
    """

    real: Int[np.ndarray, " N"]
    synthetic: Int[np.ndarray, " M"]
    sources: Int[np.ndarray, " M"]
    labels: Int[np.ndarray, " R"]

    def per_real(self, ratio: float) -> "Pools":
        """Keeps the first `ratio` synthetic images per real one; 0 keeps all.

        The fractional part is taken evenly from all classes, from real images drawn at
        random, because rows are often sorted by class.
        """
        if not ratio:
            return self
        labels = self.labels[self.real]
        shuffled = order.generator(0, "classify/ratio").permutation(len(labels))
        rank = np.zeros(len(self.labels))  # of each real image in its class, in (0, 1)
        rank[self.real[shuffled]] = _occurrence(labels[shuffled]) + 0.5
        rank[self.real] /= np.bincount(labels)[labels]
        ordered = np.lexsort((rank[self.sources], _occurrence(self.sources)))
        chosen = np.sort(ordered[: round(ratio * len(self.real))])
        return dataclasses.replace(
            self, synthetic=self.synthetic[chosen], sources=self.sources[chosen]
        )

    def without(self, held_out: Int[np.ndarray, " V"], parents: list) -> "Pools":
        """Removes real images and every synthetic image that was made from one of them.

        Args:
          held_out: rows of `real` to remove.
          parents: for each synthetic image the rows of its source and its partners.
        """
        held = set(held_out.tolist())
        keep = np.array([held.isdisjoint(rows) for rows in parents], bool)
        return dataclasses.replace(
            self,
            real=self.real[~np.isin(self.real, held_out)],
            synthetic=self.synthetic[keep],
            sources=self.sources[keep],
        )


def _occurrence(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Numbers the occurrences of each value: [7, 5, 7, 7] -> [0, 0, 1, 2]."""
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    occurrence = np.empty(len(values), np.int64)
    occurrence[by_value] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return occurrence


def schedule(
    regime: str,
    pools: Pools,
    *,
    seed: int,
    repeat: int,
    steps: int,
    batch_size: int,
    probability: float,
    phase_two: float,
) -> dict[str, np.ndarray]:
    """Draws every batch of one fit.

    - `real`: real images.
    - `combined`: real and synthetic images as one dataset.
    - `two_phase`: `combined`, then real images only for fewer steps.
    - `probabilistic`: a real batch; each slot adds a synthetic image with probability
      p, or where the pools have none another real image: the control.
    - `replace_*`: a real batch; each slot is replaced with probability p by a synthetic
      image made from the same source, of the same class, or by any. A slot without such
      an image keeps its own.
    - `synthetic_only`: synthetic images, for the classification accuracy score
      (arXiv 1905.10887).

    Args:
      regime: one of `REGIMES`.
      pools: the images.
      seed: `config.seed`.
      repeat: number of the classifier. Its stream of real images is the same in all
        regimes.
      steps: number of steps.
      batch_size: B.
      probability: p, in [0, 1].
      phase_two: fraction of the steps in the second phase of `two_phase`.

    Returns:
      `index` int32 and `weight` float32, [steps, B]; [steps, 2B] for `probabilistic`,
      with weight 0 in a slot without an image.

    Raises:
      ValueError: the regime is unknown.
    """
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}; known: {', '.join(REGIMES)}")
    stream = {"seed": seed, "repeat": repeat, "batch_size": batch_size}
    batches = functools.partial(_batches, **stream)
    draw = order.generator(seed, f"classify/{repeat}/{regime}")
    if regime == "synthetic_only":
        index = batches(pools.synthetic, "synthetic", 0, steps)
    elif regime in ("combined", "two_phase"):
        first = first_phase(steps, phase_two) if regime == "two_phase" else steps
        both = np.concatenate([pools.real, pools.synthetic])
        combined = batches(both, "combined", 0, first)
        index = np.concatenate([combined, batches(pools.real, "real", first, steps)])
    else:
        index = batches(pools.real, "real", 0, steps)
    if regime.startswith("replace"):
        index = _replace(regime, index, pools, draw, probability)
    weight = np.ones(index.shape, np.float32)
    if regime == "probabilistic":
        added = draw.random(index.shape) < probability
        if len(pools.synthetic):
            extra = batches(pools.synthetic, "synthetic", 0, steps)
        else:
            extra = batches(pools.real, "more real", 0, steps)
        index = np.concatenate([index, extra], axis=1)
        weight = np.concatenate([weight, added.astype(np.float32)], axis=1)
    return {"index": index, "weight": weight}


def first_phase(steps: int, phase_two: float) -> int:
    """Number of steps of `two_phase` before its second phase."""
    return steps - round(steps * phase_two)


def _replace(
    regime: str,
    index: Int[np.ndarray, "S B"],
    pools: Pools,
    draw: np.random.Generator,
    probability: float,
) -> Int[np.ndarray, "S B"]:
    """Replaces some real rows of `index` by synthetic ones with the same match key."""
    match_keys = {  # of the synthetic images; of real rows
        "replace_same_source": (pools.sources, lambda rows: rows),
        "replace_same_class": (
            pools.labels[pools.synthetic],
            lambda rows: pools.labels[rows],
        ),
        "replace_any": (np.zeros_like(pools.synthetic), np.zeros_like),
    }
    keys, key_of = match_keys[regime]
    by_key = np.argsort(keys, kind="stable")
    wanted = key_of(index)
    first = np.searchsorted(keys[by_key], wanted, "left")
    count = np.searchsorted(keys[by_key], wanted, "right") - first
    chance, which = draw.random(index.shape), draw.random(index.shape)
    chosen = first + (which * count).astype(np.int64)
    replaced = (chance < probability) & (count > 0)
    if not replaced.any():
        return index
    synthetic = pools.synthetic[by_key][np.where(replaced, chosen, 0)]
    return np.where(replaced, synthetic, index).astype(np.int32)


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
    """Draws the batches of steps [first, last) from `pool`, int32 [steps, B]."""
    draw = functools.partial(
        order.batch_indices,
        seed,
        f"classify/{repeat}/{purpose}",
        batch_size=batch_size,
        size=len(pool),
    )
    rows = [pool[draw(step)] for step in range(first, last)]
    return np.asarray(rows, np.int32).reshape(last - first, batch_size)
