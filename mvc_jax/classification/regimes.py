"""How real and synthetic images meet in a classifier's batches (supplement, section 2).

A regime is nothing but an order of indices and weights, so that every regime runs the
same training step for the same number of steps. Learning rates are in `rates.py`.
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
WITH_PROBABILITY = ("probabilistic", *(r for r in REGIMES if r.startswith("replace")))


@dataclasses.dataclass(frozen=True)
class Pools:
    """The images that a classifier may be trained on, as rows of one array.

    Attributes:
      real: rows of real images, int32 [N].
      synthetic: rows of synthetic ones in the order they were drawn, int32 [M]; M may
        be 0 where the regime is `real`.
      sources: int32 [M], the row of the real image that each was made from.
      labels: int32, of every row of the array.
    """

    real: Int[np.ndarray, " N"]
    synthetic: Int[np.ndarray, " M"]
    sources: Int[np.ndarray, " M"]
    labels: Int[np.ndarray, " R"]

    def per_real(self, ratio: float) -> "Pools":
        """With the first `ratio` synthetic images of each real one; 0: with all.

        What a ratio has above a whole number is taken from all classes alike, of real
        images drawn at random: rows often lie class by class.
        """
        if not ratio:
            return self
        labels = self.labels[self.real]
        shuffled = order.generator(0, "classify/ratio").permutation(len(labels))
        place = np.zeros(len(self.labels))  # in (0, 1), of each real one in its class
        place[self.real[shuffled]] = _earlier(labels[shuffled]) + 0.5
        place[self.real] /= np.bincount(labels)[labels]
        ordered = np.lexsort((place[self.sources], _earlier(self.sources)))
        chosen = np.sort(ordered[: round(ratio * len(self.real))])
        return dataclasses.replace(
            self, synthetic=self.synthetic[chosen], sources=self.sources[chosen]
        )

    def without(self, held_out: Int[np.ndarray, " V"], parents: list) -> "Pools":
        """Without the real rows `held_out`, and without what was made of them.

        Args:
          held_out: of `real`.
          parents: for each synthetic image the rows of all real images that went into
            it, source and partners.
        """
        held = set(held_out.tolist())
        keep = np.array([held.isdisjoint(rows) for rows in parents], bool)
        return dataclasses.replace(
            self,
            real=self.real[~np.isin(self.real, held_out)],
            synthetic=self.synthetic[keep],
            sources=self.sources[keep],
        )


def _earlier(kinds: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many of its own kind stand before each."""
    by_kind = np.argsort(kinds, kind="stable")
    before = np.empty(len(kinds), np.int64)
    ordered = kinds[by_kind]
    before[by_kind] = np.arange(len(kinds)) - np.searchsorted(ordered, ordered)
    return before


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
    """Every batch of one fit.

    `real`: real images. `combined`: real and synthetic as one dataset. `two_phase`:
    `combined`, then real only, with fewer steps. `probabilistic`: a real batch, and
    beside each slot a synthetic image with probability p. `replace_*`: a real batch, of
    which each slot gives way with probability p to a synthetic image made from that
    very image, of its class, or of any; a slot that has no such image keeps its own.
    `synthetic_only`: synthetic images, for the classification accuracy score
    (arXiv 1905.10887).

    Args:
      regime: one of `REGIMES`.
      pools: the images.
      seed: of the run.
      repeat: which classifier. The real stream of a repeat is the same in all regimes.
      steps, batch_size: of the fit.
      probability: p, in [0, 1].
      phase_two: share of `two_phase`'s steps that its second phase takes.

    Returns:
      `index` int32 and `weight` float32, [steps, B] ([steps, 2B] if probabilistic,
      where a slot without an image weighs 0).
    """
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}; known: {', '.join(REGIMES)}")
    stream = {"seed": seed, "repeat": repeat, "batch_size": batch_size}
    batches = functools.partial(_batches, **stream)
    draw = order.generator(seed, f"classify/{repeat}/{regime}")
    if regime == "synthetic_only":
        index = batches(pools.synthetic, "synthetic", 0, steps)
    elif regime in ("combined", "two_phase"):
        turn = first_phase(steps, phase_two) if regime == "two_phase" else steps
        everything = np.concatenate([pools.real, pools.synthetic])
        together = batches(everything, "combined", 0, turn)
        index = np.concatenate([together, batches(pools.real, "real", turn, steps)])
    else:
        index = batches(pools.real, "real", 0, steps)
    if regime.startswith("replace"):
        index = _replaced(regime, index, pools, draw, probability)
    weight = np.ones(index.shape, np.float32)
    if regime == "probabilistic":
        extra = draw.random(index.shape) < probability
        beside = batches(pools.synthetic, "synthetic", 0, steps)
        index = np.concatenate([index, beside], axis=1)
        weight = np.concatenate([weight, extra.astype(np.float32)], axis=1)
    return {"index": index, "weight": weight}


def first_phase(steps: int, phase_two: float) -> int:
    """Steps of `two_phase` before its second phase."""
    return steps - round(steps * phase_two)


def _replaced(
    regime: str,
    index: Int[np.ndarray, "S B"],
    pools: Pools,
    draw: np.random.Generator,
    probability: float,
) -> Int[np.ndarray, "S B"]:
    """`index` with synthetic images in place of some."""
    kin = {
        "replace_same_source": (pools.sources, lambda rows: rows),
        "replace_same_class": (
            pools.labels[pools.synthetic],
            lambda rows: pools.labels[rows],
        ),
        "replace_any": (np.zeros_like(pools.synthetic), np.zeros_like),
    }
    kinds, kind_of = kin[regime]
    by_kind = np.argsort(kinds, kind="stable")
    wanted = kind_of(index)
    first = np.searchsorted(kinds[by_kind], wanted, "left")
    count = np.searchsorted(kinds[by_kind], wanted, "right") - first
    chance, which = draw.random(index.shape), draw.random(index.shape)
    chosen = first + (which * count).astype(np.int64)
    swap = (chance < probability) & (count > 0)
    instead = pools.synthetic[by_kind][np.where(swap, chosen, 0)] if swap.any() else 0
    return np.where(swap, instead, index).astype(np.int32)


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
