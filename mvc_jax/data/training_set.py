"""What classifiers are trained and tested on: all images, at one size."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from mvc_jax.data import decode, order, splits, synthetic
from mvc_jax.data.pixels import Ahead, Rows, store
from mvc_jax.data.regimes import Pools


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """The images of the classifiers.

    Attributes:
      rows: all training images, real ones first, then set after set.
      labels: int32, of these rows.
      pools: by set, `""` for real images alone; validation images are in none of them,
        nor is what was made from one.
      validation: rows of real images that were held out, int32.
      test: uint8 [T, S, S, 3].
      test_labels: int32 [T].
      class_names: K strings; labels index them.
    """

    rows: Rows
    labels: Int[np.ndarray, " R"]
    pools: dict[str, Pools]
    validation: Int[np.ndarray, " V"]
    test: UInt8[np.ndarray, "T S S 3"]
    test_labels: Int[np.ndarray, " T"]
    class_names: tuple[str, ...]

    def examples_seen(self, schedule: dict[str, np.ndarray]) -> dict[str, int]:
        """How many of one fit's examples are real, and how many synthetic."""
        counted = schedule["index"][schedule["weight"] > 0]
        real = int((counted < len(self.rows.parts[0])).sum())
        return {"real_seen": real, "synthetic_seen": int(counted.size) - real}

    def reader(
        self, schedules: Sequence[dict[str, np.ndarray]], *, pixels: bool
    ) -> Callable[[int], dict[str, np.ndarray]]:
        """From a step to the batches of S fits side by side, by `regimes.schedule`.

        They are `weight` [B, S], and either `index` [B, S], for who holds all images;
        or `images` [B, S, H, W, 3] and `labels` [B, S], read ahead from the disk.
        """

        def stacked(name: str, step: int) -> np.ndarray:
            return np.stack([each[name][step] for each in schedules], axis=1)

        def indices(step: int) -> dict[str, np.ndarray]:
            return {name: stacked(name, step) for name in ("index", "weight")}

        def images(step: int) -> dict[str, np.ndarray]:
            batch = indices(step)
            index = batch.pop("index")
            return batch | {
                "images": self.rows.take(index),
                "labels": self.labels[index],
            }

        return Ahead(images, len(schedules[0]["index"])) if pixels else indices


def read(
    workdir: epath.Path,
    folder: epath.Path,
    *,
    sets: Sequence[str],
    size: int,
    ratio: float,
    validation: float,
    seed: int,
) -> TrainingSet:
    """Brings the images of a run to the classifiers' size, once.

    Args:
      workdir: with what `caption` and `generate` wrote.
      folder: for images that are not of this size already.
      sets: names of the synthetic sets.
      size: S, pixels.
      ratio: synthetic images a real one that are used, the first; 0: all.
      validation: share of each class that is held out of training.
      seed: of the run.
    """
    train, test = (
        splits.read_split(workdir / "caption", name) for name in ("train", "test")
    )
    real = np.arange(len(train.labels), dtype=np.int32)
    row_of = {id_: row for row, id_ in enumerate(train.ids)}
    parts, labels = [_sized(train.images, size, folder / "train.npy")], [train.labels]
    made: dict[str, tuple[int, list[dict]]] = {}
    for name in sets:
        generated = workdir / "generate" / name
        rows = list(synthetic.read_rows(generated, ("label", "source", "partners")))
        images = (row["image"] for row in synthetic.read_rows(generated, ("image",)))
        made[name] = sum(map(len, labels)), rows
        parts.append(_stored(images, len(rows), size, folder / f"{name}.npy"))
        labels.append(np.asarray([row["label"] for row in rows], np.int32))
    every_label = np.concatenate(labels)
    held_out = _held_out(train.labels, validation, seed)
    pools = {"": Pools(real, real[:0], real[:0], every_label).without(held_out, [])}
    for name, (first, rows) in made.items():
        drawn = np.arange(first, first + len(rows), dtype=np.int32)
        sources = np.asarray([row_of[row["source"]] for row in rows], np.int32)
        parents = [[row_of[i] for i in (r["source"], *r["partners"])] for r in rows]
        pool = Pools(real, drawn, sources, every_label).per_real(ratio)
        pools[name] = pool.without(held_out, parents[: len(pool.synthetic)])
    return TrainingSet(
        rows=Rows(tuple(parts)),
        labels=every_label,
        pools=pools,
        validation=held_out,
        test=_sized(test.images, size, folder / "test.npy"),
        test_labels=test.labels,
        class_names=train.class_names,
    )


def _sized(images: np.ndarray, size: int, path: epath.Path) -> np.ndarray:
    if images.shape[1] == size:
        return images
    return _stored(images, len(images), size, path)


def _stored(images, count: int, size: int, path: epath.Path) -> np.ndarray:
    small = (decode.fit(image, size, resample="area") for image in images)
    return store(path, small, count, size)


def _held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """`share` of the rows of each class; one at least stays in training."""
    held: list[int] = []
    for label in np.unique(labels) if share else ():
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        draw = order.generator(seed, "classify/validation", int(label))
        held += draw.permutation(members)[:count].tolist()
    return np.asarray(sorted(held), np.int32)
