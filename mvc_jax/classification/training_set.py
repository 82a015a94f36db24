"""What classifiers are trained and tested on: all images, at one size."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from mvc_jax.classification.pixels import ConcatArray, Prefetcher, store
from mvc_jax.classification.regimes import Pools
from mvc_jax.data import decode, order, splits
from mvc_jax.errors import require
from mvc_jax.generation import synthetic


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

    rows: ConcatArray
    labels: Int[np.ndarray, " R"]
    pools: dict[str, Pools]
    validation: Int[np.ndarray, " V"]
    test: UInt8[np.ndarray, "T S S 3"]
    test_labels: Int[np.ndarray, " T"]
    class_names: tuple[str, ...]

    def examples_seen(
        self, schedule: dict[str, np.ndarray], steps: int
    ) -> dict[str, int]:
        """How many of a fit's examples are real, and how many synthetic, in `steps`."""
        index, weight = schedule["index"][:steps], schedule["weight"][:steps]
        counted = index[weight > 0]
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

        return Prefetcher(images, len(schedules[0]["index"])) if pixels else indices


def read(
    workdir: epath.Path,
    folder: epath.Path,
    *,
    sets: Sequence[str],
    size: int,
    stored: dict[str, Any],
    ratio: float,
    validation: float,
    seed: int,
) -> TrainingSet:
    """Brings the images of a run to the classifiers' size, once.

    Args:
      workdir: with what `caption` and `generate` wrote.
      folder: for images of another size.
      sets: names of the synthetic sets.
      size: S, pixels.
      stored: arguments of `decode.fit` that made real images, and first make others.
      ratio: synthetic images a real one that are used (`Pools.per_real`); 0: all.
      validation: share of each class that is held out of training.
      seed: of the run.

    Raises:
      UserError: one class only, one without images, or a set with too few.
    """
    caption = workdir / "caption"
    train, test = (splits.read_split(caption, name) for name in ("train", "test"))
    _require_classes(train, test)
    real = np.arange(len(train.labels), dtype=np.int32)
    row_of = {id_: row for row, id_ in enumerate(train.ids)}
    parts, labels = [_sized(train.images, size, folder / "train.npy")], [train.labels]
    made: dict[str, tuple[int, list[dict]]] = {}
    for name in sets:
        generated = workdir / "generate" / name
        rows = list(synthetic.read_rows(generated, ("label", "source", "partners")))
        cells = synthetic.read_rows(generated, ("image",))
        images = (decode.fit(row["image"], **stored) for row in cells)
        made[name] = sum(map(len, labels)), rows
        parts.append(_stored(images, len(rows), size, folder / f"{name}.npy"))
        labels.append(np.asarray([row["label"] for row in rows], np.int32))
    every_label, held_out = np.concatenate(labels), _held_out(train, validation, seed)
    pools = {"": Pools(real, real[:0], real[:0], every_label).without(held_out, [])}
    for name, (first, rows) in made.items():
        drawn = np.arange(first, first + len(rows), dtype=np.int32)
        sources = np.asarray([row_of[row["source"]] for row in rows], np.int32)
        pool = Pools(real, drawn, sources, every_label).per_real(ratio)
        used = [rows[row - first] for row in pool.synthetic]
        parents = [[row_of[i] for i in (r["source"], *r["partners"])] for r in used]
        pools[name] = pool.without(held_out, parents)
        _require_enough(name, pool, pools[name], ratio)
    return TrainingSet(
        ConcatArray(tuple(parts)),
        every_label,
        pools,
        held_out,
        test=_sized(test.images, size, folder / "test.npy"),
        test_labels=test.labels,
        class_names=train.class_names,
    )


def _require_classes(train: splits.Split, test: splits.Split) -> None:
    require(
        len(train.class_names) > 1,
        "classify",
        wanted="at least two classes to tell apart",
        got=f"{len(train.class_names)}: {', '.join(train.class_names)}",
        fix="Sort the images by class, or name others in config.data.classes; or stop "
        "at --config.stages=generate.",
    )
    for split, name in ((train, "training"), (test, "test")):
        counts = np.bincount(split.labels, minlength=len(train.class_names))
        missing = [train.class_names[k] for k in np.flatnonzero(counts == 0)]
        require(
            not missing,
            f"class {missing[0]!r}" if missing else "",
            wanted=f"at least one {name} image of each class",
            got=f"none of {', '.join(missing)}",
            fix="Add images, or leave the class out by config.data.classes.",
        )


def _require_enough(name: str, pool: Pools, used: Pools, ratio: float) -> None:
    wanted = round(ratio * len(pool.real))
    require(
        len(pool.synthetic) >= wanted,
        "config.classify.ratio",
        wanted=f"at most {len(pool.synthetic) / len(pool.real):.3g}: the set {name!r} "
        f"has {len(pool.synthetic)} images to {len(pool.real)} real ones",
        got=ratio,
        fix="Lower it, raise config.mix.per_image, or filter less.",
    )
    require(
        len(used.synthetic) > 0,
        "config.classify.validation" if len(pool.synthetic) else f"set {name!r}",
        wanted="synthetic images to train on",
        got=f"none that is left of {len(pool.synthetic)}",
        fix="An image goes with the real ones it was made from: lower "
        "config.classify.validation, raise config.mix.per_image, or filter less.",
    )


def _sized(images: np.ndarray, size: int, path: epath.Path) -> np.ndarray:
    if images.shape[1] == size:
        return images
    return _stored(images, len(images), size, path)


def _stored(
    images: Iterable[np.ndarray], count: int, size: int, path: epath.Path
) -> np.ndarray:
    small = (decode.fit(image, size, resample="area") for image in images)
    return store(path, small, count, size)


def _held_out(train: splits.Split, share: float, seed: int) -> np.ndarray:
    """`share` of the rows of each class; one at least stays in training."""
    labels = train.labels
    held: list[int] = []
    for label in np.unique(labels) if share else ():
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        draw = order.generator(seed, "classify/validation", int(label))
        held += draw.permutation(members)[:count].tolist()
    return np.asarray(sorted(held), np.int32)
