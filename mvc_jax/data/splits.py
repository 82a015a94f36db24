"""The splits of a run: base pool, train and test, which are disjoint by id.

The stage `caption` writes these files; later stages read them and not the source:

- `splits.json`: the ids of each split;
- `images.npy`: uint8 [N, S, S, 3], all images of the run, decoded and resized, in the
  order pool, train, test, and validation where the source keeps images for it;
- `images.jsonl`: one row per image: id, split, label, original size, note;
- `dataset.json`: class names, whether all images are grey, name and remarks of the
  source, policy for duplicates.
"""

import dataclasses

import numpy as np
from etils import epath

from mvc_jax import files
from mvc_jax.data.order import generator
from mvc_jax.errors import UserError

SPLITS = ("pool", "train", "test")
VALIDATION = "validation"  # a fourth one, of sources that keep images for it
_LEAVE_OUT = "leave it out with config.data.classes"
FILES = ("splits.json", "images.npy", "images.jsonl", "dataset.json")


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split, memory-mapped where the disk is local.

    Attributes:
      images: uint8 [N, S, S, 3] in [0, 255].
      labels: int32 [N].
      ids: N strings.
      class_names: K strings, indexed by `labels`.
      grey: whether all images of the run, in all splits, have no colour.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    class_names: tuple[str, ...]
    grey: bool


@dataclasses.dataclass(frozen=True)
class SplitSizes:
    """How many images of each class each split gets.

    Attributes:
      pool: images of the base pool over all classes, in proportion to class sizes.
      per_class: training images per class; 0: use `fraction`.
      fraction: of a class's training images to use, in (0, 1].
      test: fraction of a class that is test, in [0, 1), if the source has no test
        images of its own; 0: all images that are left after training.
    """

    pool: int = 0
    per_class: int = 0
    fraction: float = 1.0
    test: float = 0.2

    def check(self) -> None:
        """Raises a `UserError` if two fields are in conflict."""
        if self.per_class and self.fraction != 1:
            raise UserError(
                "config.data.fraction",
                wanted="fraction=1 together with per_class, or per_class=0",
                got=f"fraction={self.fraction:g} and per_class={self.per_class}",
                fix="Set only one of the two.",
            )


def make_splits(
    labels: np.ndarray,
    class_names: tuple[str, ...],
    sizes: SplitSizes,
    *,
    seed: int,
    is_test: np.ndarray | None = None,
    is_validation: np.ndarray | None = None,
    usable: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Splits a source into base pool, train and test, class by class.

    Each class is shuffled by (seed, class) and cut in the order pool, test, train, so
    that test does not depend on `per_class` and `fraction`; if `sizes.test` is 0, test
    is what remains at the end. If the source has test images of its own, test is all of
    them, and the others are cut into pool and train.

    Args:
      labels: int [N], indices into `class_names`.
      class_names: K strings.
      sizes: of the splits.
      seed: of the shuffles.
      is_test: bool [N], the source's own test images; None: it has none.
      is_validation: bool [N], images that are kept for validation; None: none.
      usable: bool [N], false for images to leave out; None: all are usable.

    Returns:
      ascending indices into the source, int64, by split name, each index at most once;
      `VALIDATION` is a name where `is_validation` is given.

    Raises:
      UserError: a class has too few images.
    """
    if is_validation is not None:
        others = ~is_validation if usable is None else usable & ~is_validation
        kept = is_validation if usable is None else usable & is_validation
        parts = make_splits(
            labels, class_names, sizes, seed=seed, is_test=is_test, usable=others
        )
        return parts | {VALIDATION: np.flatnonzero(kept)}
    trains_on_all = sizes.per_class == 0 and sizes.fraction == 1
    if is_test is None and sizes.test <= 0 and trains_on_all:
        raise UserError(
            "config.data.test_fraction",
            wanted="a number above 0, since the source has no test images of its own "
            "and training would use them all",
            got="0",
            fix="Write e.g. --config.data.test_fraction=0.2, or set "
            "config.data.per_class.",
        )
    usable = np.ones(len(labels), bool) if usable is None else usable
    own_test = np.zeros(len(labels), bool) if is_test is None else is_test
    counts = np.bincount(labels[usable & ~own_test], minlength=len(class_names))
    pools = _proportional(sizes.pool, counts).tolist()
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for k, name in enumerate(class_names):
        mine = np.flatnonzero(~own_test & (labels == k))
        mine = mine[generator(seed, "split", k).permutation(len(mine))]
        mine = mine[usable[mine]]  # after the shuffle, so the others keep their order
        own = np.flatnonzero(usable & own_test & (labels == k))
        if not len(mine) + len(own):
            raise _too_few(name, wanted="at least one image", got="none")
        pool, rest = np.split(mine, [pools[k]])
        if is_test is None:
            train, test = _train_and_test(rest, sizes, name, pools[k])
        else:
            train, test = _train(rest, sizes, name, pools[k]), own
            if not len(own):
                wanted = "at least one image in the dataset's own test split"
                raise _too_few(name, wanted=wanted, got="none")
        for split, indices in zip(SPLITS, (pool, train, test), strict=True):
            chunks[split].append(indices)
    return {name: np.sort(np.concatenate(parts)) for name, parts in chunks.items()}


def _proportional(total: int, counts: np.ndarray) -> np.ndarray:
    """Divides `total` in proportion to `counts`, by the largest remainder."""
    exact = total * counts / max(counts.sum(), 1)
    quotas = np.floor(exact).astype(int)
    rest = total - quotas.sum()
    quotas[np.argsort(-(exact - quotas), kind="stable")[:rest]] += 1
    return quotas


def _train_and_test(
    mine: np.ndarray, sizes: SplitSizes, name: str, pool: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts one shuffled class, without its images of the pool, into train and test."""
    if sizes.test:
        if len(mine) < 2:
            raise _too_few(
                name,
                wanted="one image for training and one for test, besides the pool",
                got=f"{len(mine) + pool} images, {pool} of them for the pool",
            )
        tests = min(max(round(sizes.test * len(mine)), 1), len(mine) - 1)
        return _train(mine[tests:], sizes, name, pool), mine[:tests]
    train = _train(mine[:-1], sizes, name, pool)
    return train, mine[len(train) :]


def _train(mine: np.ndarray, sizes: SplitSizes, name: str, pool: int) -> np.ndarray:
    """The training images of a class, taken from those that are available."""
    if not len(mine):
        raise UserError(
            f"class {name!r}",
            wanted=f"a training image besides {pool} for the pool and those for test",
            got="none",
            fix=f"Add images of it, or {_LEAVE_OUT}, or lower config.data.pool.",
        )
    if sizes.per_class > len(mine):
        raise UserError(
            "config.data.per_class",
            wanted=f"at most the {len(mine)} training images that class {name!r} has "
            f"besides {pool} for the pool and those for test",
            got=f"per_class={sizes.per_class}",
            fix=f"Lower it to {len(mine)} or less, or lower config.data.pool.",
        )
    count = sizes.per_class or max(round(sizes.fraction * len(mine)), 1)
    return mine[:count]


def _too_few(name: str, *, wanted: str, got: str) -> UserError:
    fix = f"Add images of it, or {_LEAVE_OUT}."
    return UserError(f"class {name!r}", wanted=wanted, got=got, fix=fix)


def read_split(folder: epath.PathLike, name: str) -> Split:
    """Reads one of `SPLITS`, or `VALIDATION`, from the folder of the stage `caption`.

    Raises:
      UserError: a file is missing, or the files do not belong together.
    """
    folder = epath.Path(folder)
    for file in FILES:
        if not (folder / file).exists():
            raise UserError(
                str(folder / file),
                wanted="the images and splits that the stage caption wrote",
                got="no such file",
                fix="Run the stage caption again; it restores missing files.",
            )
    dataset = files.read_json(folder / "dataset.json")
    rows = files.read_jsonl(folder / "images.jsonl")
    images = files.map_array(folder / "images.npy")
    if len(images) != len(rows):
        raise UserError(
            str(folder / "images.npy"),
            wanted=f"the {len(rows)} images of images.jsonl",
            got=f"{len(images)}",
            fix=f"Delete {folder} and the stages after it to make them again.",
        )
    mine = [i for i, row in enumerate(rows) if row["split"] == name]
    first = mine[0] if mine else 0
    return Split(
        images=images[first : first + len(mine)],
        labels=np.asarray([rows[i]["label"] for i in mine], np.int32),
        ids=tuple(rows[i]["id"] for i in mine),
        class_names=tuple(dataset["class_names"]),
        grey=dataset["grey"],
    )
