"""Labels -> same-class index pairs: (source, target), with replacement.

Reads: `encode/prompts.jsonl` for the labels. Writes: `pairs.npy` [P, 2] int32, indices
into the training images. Only indices are stored, as in the supplement.
"""

from __future__ import annotations

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import order
from mvc_jax.stage import Spec, open_stage
from mvc_jax.work import Sizes, Work


def check(config: ConfigDict) -> None:
    """Nothing: no field depends on another one, or on a file."""


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """How many pairs there are to draw."""
    pairs = config.pairs.rounds * sizes.images
    size = 2 * 4 * pairs  # int32
    # Twice in memory: the rounds, and all of them in one array.
    return Work(
        {"pairs": pairs},
        unit="pairs",
        disk={"pairs": size},
        host={"the pairs": 2 * size},
        lower=("pairs.rounds",),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the pairs depend on."""
    settings = {"seed": config.seed, "pairs": config.pairs.to_dict()}
    return Spec("pairs", settings, inputs=("encode",), restores=("pairs.npy",))


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws the pairs of every round."""
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    rows = files.read_jsonl(epath.Path(workdir) / "encode" / "prompts.jsonl")
    labels = np.asarray([row["label"] for row in rows], np.int32)
    rounds = range(config.pairs.rounds)
    pairs = np.concatenate([make_pairs(labels, config.seed, r) for r in rounds])
    files.write_array(stage.folder / "pairs.npy", pairs)
    logging.info("%d pairs of %d images", len(pairs), len(labels))
    stage.finish(["pairs.npy"], pairs=len(pairs))


def make_pairs(
    labels: Int[np.ndarray, " N"], seed: int, round_: int
) -> Int[np.ndarray, "N 2"]:
    """Draws one round of pairs, class by class.

    Per class two independent index lists, each as long as the class, are drawn with
    replacement and zipped (supplement, Dataset Preparation). An image may be paired
    with itself; the only image of a class always is.

    Args:
      labels: class of each image.
      seed: of the run.
      round_: index of the round; rounds are independent.

    Returns:
      rows (source, target), both of one class, int32.
    """
    rng = order.generator(seed, "pairs", round_)
    pairs = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        source, target = rng.integers(len(members), size=(2, len(members)))
        pairs.append(np.stack([members[source], members[target]], axis=1))
    return np.concatenate(pairs).astype(np.int32)
