"""What `encode` wrote, opened and not loaded; and the pairs of a batch."""

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from mvc_jax import files
from mvc_jax.data import order
from mvc_jax.data.shards import Shards


@dataclasses.dataclass(frozen=True)
class Cache:
    """VAE moments and text states of the N training images, read row by row, fp32.

    Attributes:
      moments: [V N, h, w, 2c]; with V = 2 the mirror image of image i is row N + i.
      text_states: [P, L, D], of the empty prompt first.
      rows: of `prompts.jsonl`, one for each image.
      state_of: int32 [N], the text states of each image's prompt.
    """

    moments: Shards
    text_states: Shards
    rows: list[dict]
    state_of: np.ndarray

    @property
    def flipped(self) -> bool:
        """Whether there are mirror images."""
        return len(self.moments) > len(self.rows)

    @property
    def null_states(self) -> Float[np.ndarray, "L D"]:
        """Text states of the empty prompt."""
        return _fp32(self.text_states.take(np.zeros(1, np.int32)))[0]

    def moments_of(
        self, images: Int[np.ndarray, " B"], flip: Bool[np.ndarray, " B"] | bool = False
    ) -> Float[np.ndarray, "B h w c2"]:
        """Moments of images by index; of their mirror images where `flip`."""
        return _fp32(self.moments.take(images + len(self.rows) * np.int32(flip)))

    def states_of(self, images: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B L D"]:
        """Text states of the prompts of images by index."""
        return _fp32(self.text_states.take(self.state_of[images]))

    def verify(self) -> None:
        """Compares all checksums: a minute for 26 GB, before hours on them.

        Raises:
          UserError: a shard is not what was written.
        """
        self.moments.verify()
        self.text_states.verify()


def open_cache(folder: epath.PathLike) -> Cache:
    """The cache in the folder of `encode`.

    Raises:
      UserError: a shard is missing, or not of its size.
    """
    folder = epath.Path(folder)
    rows = files.read_jsonl(folder / "prompts.jsonl")
    return Cache(
        moments=Shards(folder / "moments"),
        text_states=Shards(folder / "text_states"),
        rows=rows,
        state_of=np.asarray([row["state"] for row in rows], np.int32),
    )


def pair_rows(
    pairs: Int[np.ndarray, "M 2"],
    step: int,
    *,
    seed: int,
    batch_size: int,
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """The pairs of the batch at `step`, a function of (seed, step).

    Returns:
      `source` and `target`, int32 [B]; `source_flip` and `target_flip`, bool [B]: which
      of them are mirrored, each with probability 1/2 where `flip`, independently.
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
    """The first `count` pairs, one of each class before a second of any."""
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
    *,
    seed: int,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """What fine-tuning takes of the pairs of the batch at `step`.

    Returns:
      `source_moments`, `target_moments` [B, h, w, 2c] and the target's `text_states`
      [B, L, D].
    """
    rows = pair_rows(pairs, step, seed=seed, batch_size=batch_size, flip=cache.flipped)
    return {
        "source_moments": cache.moments_of(rows["source"], rows["source_flip"]),
        "target_moments": cache.moments_of(rows["target"], rows["target_flip"]),
        "text_states": cache.states_of(rows["target"]),
    }


def _fp32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, copy=False)
