"""Reads the cache that `encode` writes, and the batches of pairs from it."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from mvc_jax import files
from mvc_jax.data import order
from mvc_jax.data.shards import Shards

# What the cache of a Stable Diffusion XL has besides.
TIME_IDS, POOLED = "time_ids.npy", "pooled"


@dataclasses.dataclass(frozen=True)
class Cache:
    """VAE moments and text states of the N training images, read row by row as fp32.

    A Stable Diffusion XL is also given pooled embeddings and time ids; others have
    None.

    Attributes:
      moments: [V N, h, w, 2c]; if V is 2, row N + i is the mirror image of image i.
      text_states: [P, L, D], row 0 for the empty prompt.
      rows: of `prompts.jsonl`, one per image.
      state_of: int32 [N], row of `text_states` for each image's prompt.
      pooled: [P, Dp], pooled embeddings of the prompts.
      time_ids: int32 [N, 6], sizes of the images (`data/time_ids.py`).
    """

    moments: Shards
    text_states: Shards
    rows: list[dict]
    state_of: np.ndarray
    pooled: Shards | None = None
    time_ids: np.ndarray | None = None

    @property
    def flipped(self) -> bool:
        """Whether the cache includes mirror images."""
        return len(self.moments) > len(self.rows)

    @property
    def null_states(self) -> Float[np.ndarray, "L D"] | dict[str, np.ndarray]:
        """Text states of the empty prompt; of XL with its pooled embedding, by name."""
        states = _fp32(self.text_states.take(np.zeros(1, np.int32)))[0]
        if self.pooled is None:
            return states
        return {"states": states, "pooled": _fp32(self.pooled.row(0))}

    def moments_of(
        self, images: Int[np.ndarray, " B"], flip: Bool[np.ndarray, " B"] | bool = False
    ) -> Float[np.ndarray, "B h w c2"]:
        """Moments of the images at these indices; mirrored where `flip`."""
        return _fp32(self.moments.take(images + len(self.rows) * np.int32(flip)))

    def states_of(self, images: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B L D"]:
        """Text states of the prompts of the images at these indices."""
        return _fp32(self.text_states.take(self.state_of[images]))

    def pooled_of(self, images: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B Dp"]:
        """Pooled embeddings of the prompts of the images at these indices; of XL."""
        return _fp32(self.pooled.take(self.state_of[images]))

    def conditions_of(
        self, images: Int[np.ndarray, " B"]
    ) -> Float[np.ndarray, "B L D"] | dict[str, np.ndarray]:
        """What the UNet is given for the images at these indices and their prompts."""
        if self.pooled is None:
            return self.states_of(images)
        return self.conditions(images, self.states_of(images), self.pooled_of(images))

    def conditions(
        self, images: Int[np.ndarray, " B"], states: Any, pooled: Any
    ) -> Any:
        """What a UNet is given for these text states and the sizes of these images."""
        if self.pooled is None:
            return states
        sizes = self.time_ids[images].astype(np.float32)
        return {"states": states, "pooled": pooled, "time_ids": sizes}

    def verify(self) -> None:
        """Compares all checksums, which takes a minute for 26 GB.

        Raises:
          UserError: a shard differs from what was written.
        """
        self.moments.verify()
        self.text_states.verify()
        if self.pooled is not None:
            self.pooled.verify()


def open_cache(folder: epath.PathLike) -> Cache:
    """Opens the cache in the folder of the stage `encode`.

    Raises:
      UserError: a shard is missing or has the wrong size.
    """
    folder = epath.Path(folder)
    rows = files.read_jsonl(folder / "prompts.jsonl")
    more = {}
    if (folder / TIME_IDS).exists():
        more["time_ids"] = files.read_array(folder / TIME_IDS)
        more["pooled"] = Shards(folder / POOLED)
    return Cache(
        moments=Shards(folder / "moments"),
        text_states=Shards(folder / "text_states"),
        rows=rows,
        state_of=np.asarray([row["state"] for row in rows], np.int32),
        **more,
    )


def pair_rows(
    pairs: Int[np.ndarray, "M 2"],
    step: int,
    *,
    seed: int,
    batch_size: int,
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """Draws the pairs of the batch at `step`, a function of (seed, step).

    Args:
      pairs: source and target of each pair, as image indices.
      step: of fine-tuning, from 0.
      seed: of the run.
      batch_size: B.
      flip: whether to mirror images at random.

    Returns:
      `source` and `target`, int32 [B]; `source_flip` and `target_flip`, bool [B], which
      are independent and true with probability 1/2 if `flip`, else false.
    """
    chosen = pairs[
        order.batch_indices(
            seed, "finetune", step, batch_size=batch_size, size=len(pairs)
        )
    ]
    flips = order.generator(seed, "finetune/flip", step).random((2, batch_size)) < 0.5
    return {
        "source": chosen[:, 0],
        "target": chosen[:, 1],
        "source_flip": flips[0] & flip,
        "target_flip": flips[1] & flip,
    }


def pairs_of_all_classes(
    pairs: Int[np.ndarray, "M 2"], labels: Int[np.ndarray, " N"], count: int
) -> Int[np.ndarray, "P 2"]:
    """Returns the first `count` pairs, taking one of each class before a second."""
    seen: dict[int, int] = {}
    turns = []
    for label in labels[pairs[:, 0]].tolist():
        seen[label] = seen.get(label, -1) + 1
        turns.append(seen[label])
    return pairs[np.argsort(turns, kind="stable")[:count]]


def read_pairs(
    cache: Cache,
    pairs: Int[np.ndarray, "M 2"],
    step: int,
    rows: Any = slice(None),
    *,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Reads the inputs of fine-tuning for the batch at `step`; mirrored if cached so.

    `rows`, an index of the batch, asks for these of its rows alone.

    Returns:
      `source_moments`, `target_moments` [B, h, w, 2c] and the target's `text_states`
      [B, L, D], or all its `Cache.conditions_of`.
    """
    drawn = pair_rows(pairs, step, seed=seed, batch_size=batch_size, flip=cache.flipped)
    drawn = {name: array[rows] for name, array in drawn.items()}
    return {
        "source_moments": cache.moments_of(drawn["source"], drawn["source_flip"]),
        "target_moments": cache.moments_of(drawn["target"], drawn["target_flip"]),
        "text_states": cache.conditions_of(drawn["target"]),
    }


def _fp32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, copy=False)
