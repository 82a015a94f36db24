"""The images that classifiers are trained and tested on, all at one size."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from mvc_jax.classification import duration
from mvc_jax.classification.pixels import ConcatArray, Prefetcher, store
from mvc_jax.classification.regimes import Pools
from mvc_jax.data import decode, order, splits
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """The classifiers' images.

    Attributes:
      rows: all training images: the real ones, then set by set the synthetic ones, then
        the source's own validation images, where they were kept.
      labels: class of each row, int32 [R].
      pools: by the name of a set, what may be trained on; "" for real images alone.
        Held-out images are in no pool, nor is any image that was made from one.
      validation: rows of the held-out real images, int32 [V].
      test: uint8 [T, S, S, 3].
      test_labels: int32 [T].
      class_names: K names, indexed by labels.
      soft_labels: probabilities of the classes of each row; None: all labels are hard.
    """

    rows: ConcatArray
    labels: Int[np.ndarray, " R"]
    pools: dict[str, Pools]
    validation: Int[np.ndarray, " V"]
    test: UInt8[np.ndarray, "T S S 3"]
    test_labels: Int[np.ndarray, " T"]
    class_names: tuple[str, ...]
    soft_labels: Float[np.ndarray, "R K"] | None = None

    @property
    def targets(self) -> np.ndarray:
        """What the loss compares with: `labels`, or `soft_labels` if there are any."""
        return self.labels if self.soft_labels is None else self.soft_labels

    def examples_seen(
        self, schedule: dict[str, np.ndarray], steps: int
    ) -> dict[str, int]:
        """Counts a fit's real and synthetic examples in its first `steps` steps."""
        index, weight = schedule["index"][:steps], schedule["weight"][:steps]
        seen = index[weight > 0]
        real = int((seen < len(self.rows.parts[0])).sum())
        return {"real_seen": real, "synthetic_seen": int(seen.size) - real}

    def reader(
        self, schedules: Sequence[dict[str, np.ndarray]], *, pixels: bool
    ) -> Callable[..., dict[str, np.ndarray]]:
        """Returns a function from a step to the batch of S fits side by side.

        Its second argument, an index of the batch, asks for these of its rows alone.

        Args:
          schedules: of each fit, by `regimes.schedule`.
          pixels: whether a batch holds pixels, prefetched from the disk, or indices
            into the array of all images.

        Returns:
          a function; its batches have `weight` [B, S], and either `index` [B, S] or
          `images` [B, S, H, W, 3] and `labels` [B, S].
        """

        def stacked(name: str, step: int, rows: Any) -> np.ndarray:
            return np.stack([each[name][step][rows] for each in schedules], axis=1)

        def indices(step: int, rows: Any = slice(None)) -> dict[str, np.ndarray]:
            return {name: stacked(name, step, rows) for name in ("index", "weight")}

        def images(step: int, rows: Any = slice(None)) -> dict[str, np.ndarray]:
            index = stacked("index", step, rows)
            return {
                "weight": stacked("weight", step, rows),
                "images": self.rows.take(index),
                "labels": self.targets[index],
            }

        return Prefetcher(images, len(schedules[0]["index"])) if pixels else indices


def read(
    workdir: epath.Path,
    folder: epath.Path,
    digests: Digests,
    *,
    sets: Sequence[str],
    size: int,
    data_size: int,
    resize: str,
    resample: str,
    ratio: float,
    validation: float,
    seed: int,
) -> TrainingSet:
    """Reads a run's images and scales them to the classifiers' size, once.

    Args:
      workdir: of the run; `caption` and `generate` are complete.
      folder: where images of another size are stored.
      digests: of the files there.
      sets: names of the synthetic sets.
      size: S, in pixels.
      data_size: `config.data.size`, to which synthetic images are brought first, as the
        real ones were.
      resize, resample: `config.data.resize` and `.resample`, how that is done.
      ratio: synthetic images per real one that are used (`Pools.per_real`); 0: all.
      validation: fraction of each class to hold out of training, unless the source's
        own validation images were kept.
      seed: `config.seed`.

    Raises:
      UserError: there is only one class, a class has no images, or a set has too few.
    """
    caption = workdir / "caption"
    train, test = (splits.read_split(caption, name) for name in ("train", "test"))
    _require_classes(train, test)
    real = np.arange(len(train.labels), dtype=np.int32)
    row_of = {id_: row for row, id_ in enumerate(train.ids)}
    parts = [_resized(train.images, size, folder / "train.npy", digests)]
    labels = [train.labels]
    synthetic_rows: dict[str, tuple[int, list[dict]]] = {}
    soft: dict[int, np.ndarray] = {}  # by the first row
    for name in sets:
        generated = workdir / "generate" / name
        rows = list(synthetic.read_rows(generated, ("label", "source", "partners")))
        cells = synthetic.read_rows(generated, ("image",))
        images = (
            decode.fit(row["image"], data_size, resize=resize, resample=resample)
            for row in cells
        )
        first = sum(map(len, labels))
        synthetic_rows[name] = first, rows
        own = synthetic.read_soft_labels(generated, len(train.class_names))
        if own is not None:
            soft[first] = own
        parts.append(_stored(images, len(rows), size, folder / f"{name}.npy", digests))
        labels.append(np.asarray([row["label"] for row in rows], np.int32))
    kept = splits.read_split(caption, splits.VALIDATION)
    if len(kept.ids):
        first = sum(map(len, labels))
        held_out = np.arange(first, first + len(kept.ids), dtype=np.int32)
        parts.append(_resized(kept.images, size, folder / "validation.npy", digests))
        labels.append(kept.labels)
    else:
        held_out = _hold_out(train, validation, seed)
    all_labels = np.concatenate(labels)
    pools = {"": Pools(real, real[:0], real[:0], all_labels).without(held_out, [])}
    for name, (first, rows) in synthetic_rows.items():
        indices = np.arange(first, first + len(rows), dtype=np.int32)
        sources = np.asarray([row_of[row["source"]] for row in rows], np.int32)
        pool = Pools(real, indices, sources, all_labels).per_real(ratio)
        used = [rows[row - first] for row in pool.synthetic]
        parents = [[row_of[i] for i in (r["source"], *r["partners"])] for r in used]
        pools[name] = pool.without(held_out, parents)
        _require_enough(name, pool, pools[name], ratio)
    return TrainingSet(
        ConcatArray(tuple(parts)),
        all_labels,
        pools,
        held_out,
        test=_resized(test.images, size, folder / "test.npy", digests),
        test_labels=test.labels,
        class_names=train.class_names,
        soft_labels=_soft_labels(all_labels, soft, len(train.class_names)),
    )


def _soft_labels(
    labels: Int[np.ndarray, " R"], soft: dict[int, np.ndarray], classes: int
) -> Float[np.ndarray, "R K"] | None:
    """Probabilities of all rows: `soft` has those of some, by the first row."""
    if not soft:
        return None
    found = np.eye(classes, dtype=np.float32)[labels]
    for first, own in soft.items():
        found[first : first + len(own)] = own
    return found


def require_several(class_names: Sequence[str]) -> None:
    """Raises a `UserError` if there is only one class."""
    if len(class_names) < 2:
        raise UserError(
            "classify",
            wanted="at least two classes",
            got=f"{len(class_names)}: {', '.join(class_names)}",
            fix="Sort the images by class, or name other classes in "
            "config.data.classes; or stop before classify with "
            "--config.stages=generate.",
        )


def _require_classes(train: splits.Split, test: splits.Split) -> None:
    require_several(train.class_names)
    for split, name in ((train, "training"), (test, "test")):
        counts = np.bincount(split.labels, minlength=len(train.class_names))
        missing = [train.class_names[k] for k in np.flatnonzero(counts == 0)]
        if missing:
            raise UserError(
                f"class {missing[0]!r}",
                wanted=f"at least one {name} image of each class",
                got=f"none of {', '.join(missing)}",
                fix="Add images, or leave the class out of config.data.classes.",
            )


def _require_enough(name: str, pool: Pools, used: Pools, ratio: float) -> None:
    count, real = len(pool.synthetic), len(pool.real)
    if count < round(ratio * real):
        raise UserError(
            "config.classify.ratio",
            wanted=f"at most {count / real:.3g}: the set {name!r} has {count} images "
            f"for {real} real ones",
            got=f"{ratio}",
            fix="Lower it, raise config.mix.per_image, or filter less.",
        )
    if len(used.synthetic) == 0:
        raise UserError(
            "config.classify.validation" if count else f"set {name!r}",
            wanted="synthetic images to train on",
            got=f"none left of {count}",
            fix="A synthetic image is held out with the real images it was made from: "
            "lower config.classify.validation, raise config.mix.per_image, or filter "
            "less.",
        )


def _resized(
    images: np.ndarray, size: int, path: epath.Path, digests: Digests
) -> np.ndarray:
    if images.shape[1] == size:
        return images
    return _stored(images, len(images), size, path, digests)


def _stored(
    images: Iterable[np.ndarray],
    count: int,
    size: int,
    path: epath.Path,
    digests: Digests,
) -> np.ndarray:
    small = (decode.fit(image, size, resample="area") for image in images)
    return store(path, small, count, size, digests)


def _hold_out(train: splits.Split, fraction: float, seed: int) -> np.ndarray:
    """Draws `fraction` of the rows of each class; at least one stays in training.

    Images of a group are drawn together.
    """
    labels = train.labels
    if fraction and train.groups is not None:
        return _hold_out_groups(labels, train.groups, fraction, seed)
    held: list[int] = []
    for label in np.unique(labels) if fraction else ():
        members = np.flatnonzero(labels == label)
        count = duration.held_out(len(members), fraction)
        draw = order.generator(seed, "classify/validation", int(label))
        held += draw.permutation(members)[:count].tolist()
    return np.asarray(sorted(held), np.int32)


def _hold_out_groups(
    labels: np.ndarray, groups: Sequence[str], fraction: float, seed: int
) -> np.ndarray:
    names, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1), int)
    np.add.at(counts, (group, labels), 1)
    missing = np.maximum(np.round(fraction * counts.sum(0)), 1).astype(int)
    left, held = counts.sum(0), np.zeros(len(names), bool)
    draw = order.generator(seed, "classify/validation")
    for g in draw.permutation(len(names)).tolist():
        useful = np.minimum(counts[g], missing).sum()
        is_last = ((counts[g] > 0) & (left == counts[g])).any()
        if not is_last and useful > np.maximum(counts[g] - missing, 0).sum():
            held[g] = True
            left = left - counts[g]
            missing = np.maximum(missing - counts[g], 0)
    return np.flatnonzero(held[group]).astype(np.int32)
