"""Who may see which image: base pool, train, test; disjoint by id.

What `caption` writes and every later stage reads, whatever became of the source:

- `splits.json`: the ids of each split;
- `images.npy`: uint8 [N, S, S, 3], every image of the run, decoded and resized once, in
  the order pool, train, test;
- `images.jsonl`: a row for each of them: id, split, label, its size at the source;
- `dataset.json`: class names, counts, what was found on the way.
"""

import dataclasses

import numpy as np
from etils import epath

from mvc_jax import files
from mvc_jax.data.order import generator
from mvc_jax.errors import require

SPLITS = ("pool", "train", "test")
_LEAVE_OUT = "leave it out by config.data.classes"
FILES = ("splits.json", "images.npy", "images.jsonl", "dataset.json")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split; on a local disk they are mapped, not loaded.

    Attributes:
      images: uint8 [N, S, S, 3] in [0, 255].
      labels: int32 [N].
      ids: N strings.
      class_names: K strings; `labels` index them.
      grey: every image of the run, in whatever split, is without colour.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    class_names: tuple[str, ...]
    grey: bool


@dataclasses.dataclass(frozen=True)
class Shares:
    """How much of each class goes where.

    Attributes:
      pool: images of the base pool over all classes, shared out by class frequency.
      per_class: training images per class; 0: by `fraction`.
      fraction: share of a class's training images that is used, in (0, 1].
      test: share of a class that is test, in [0, 1), where the source has no test
        images of its own; 0: all that training leaves.
    """

    pool: int = 0
    per_class: int = 0
    fraction: float = 1.0
    test: float = 0.2

    def check(self) -> None:
        """Raises a `UserError` if a field is out of range or two contradict."""
        for field, value, good, wanted in (
            ("pool", self.pool, self.pool >= 0, "at least 0"),
            ("per_class", self.per_class, self.per_class >= 0, "at least 0 (0: all)"),
            ("fraction", self.fraction, 0 < self.fraction <= 1, "a share in (0, 1]"),
            ("test_fraction", self.test, 0 <= self.test < 1, "a share in [0, 1)"),
        ):
            require(
                good,
                f"config.data.{field}",
                wanted=wanted,
                got=value,
                fix="configs/common.py says what it means.",
            )
        require(
            not self.per_class or self.fraction == 1,
            "config.data.fraction",
            wanted="1 beside config.data.per_class, or per_class of 0",
            got=f"fraction={self.fraction:g} and per_class={self.per_class}",
            fix="Choose by one of the two.",
        )


def make_splits(
    labels: np.ndarray,
    class_names: tuple[str, ...],
    shares: Shares,
    *,
    seed: int,
    is_test: np.ndarray | None = None,
    usable: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Cuts a source into base pool, train and test, class by class.

    Each class is shuffled by (seed, class) and cut in the order pool, test, train, so
    that test is the same at every `per_class` and `fraction`; with `shares.test` of 0
    test is what is left at the end. Where the source has test images of its own, all of
    them are test and the rest is cut into pool and train.

    Args:
      labels: int [N], indices of `class_names`.
      class_names: K strings.
      shares: how much goes where.
      seed: of the shuffles.
      is_test: bool [N], the source's own test images; None: it has none.
      usable: bool [N], images to leave out; None: all may be used.

    Returns:
      ascending indices into the source, int64, by split name, each index at most once.

    Raises:
      UserError: a class has too few images.
    """
    all_would_train = shares.per_class == 0 and shares.fraction == 1
    require(
        is_test is not None or shares.test > 0 or not all_would_train,
        "config.data.test_fraction",
        wanted="a share above 0, since the source has no test images of its own and "
        "training would take them all",
        got="0",
        fix="0.2 is usual; or set config.data.per_class.",
    )
    usable = np.ones(len(labels), bool) if usable is None else usable
    own_test = np.zeros(len(labels), bool) if is_test is None else is_test
    counts = np.bincount(labels[usable & ~own_test], minlength=len(class_names))
    pools = _proportional(shares.pool, counts).tolist()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for k, name in enumerate(class_names):
        mine = np.flatnonzero(~own_test & (labels == k))
        mine = mine[generator(seed, "split", k).permutation(len(mine))]
        mine = mine[usable[mine]]  # after the shuffle: the others keep their order
        theirs = np.flatnonzero(usable & own_test & (labels == k))
        _require_some(name, len(mine) + len(theirs))
        pool, left = np.split(mine, [pools[k]])
        if is_test is None:
            train, test = _train_and_test(left, shares, name, pools[k])
        else:
            train, test = _some(left, shares, name, pools[k]), theirs
            _require_test(name, len(test))
        for split, indices in zip(SPLITS, (pool, train, test), strict=True):
            parts[split].append(indices)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def _proportional(total: int, counts: np.ndarray) -> np.ndarray:
    """Shares of `total` proportional to `counts`, by the largest remainder."""
    exact = total * counts / max(counts.sum(), 1)
    shares = np.floor(exact).astype(int)
    rest = total - shares.sum()
    shares[np.argsort(-(exact - shares), kind="stable")[:rest]] += 1
    return shares


def _train_and_test(mine: np.ndarray, shares: Shares, name: str, pool: int):
    """Cuts one shuffled class, without its share of the pool, into train and test."""
    if shares.test:
        require(
            len(mine) >= 2,
            f"class {name!r}",
            wanted="an image for training and one for test, beside the pool",
            got=f"{len(mine) + pool} images, {pool} of them for the pool",
            fix=f"Add images of it, or {_LEAVE_OUT}.",
        )
        tests = min(max(round(shares.test * len(mine)), 1), len(mine) - 1)
        return _some(mine[tests:], shares, name, pool), mine[:tests]
    train = _some(mine[:-1], shares, name, pool)
    return train, mine[len(train) :]


def _some(mine: np.ndarray, shares: Shares, name: str, pool: int) -> np.ndarray:
    """The training images of a class, out of those that may be."""
    require(
        len(mine) > 0,
        f"class {name!r}",
        wanted=f"a training image beside {pool} for the pool and those for test",
        got="none",
        fix=f"Add images of it, or {_LEAVE_OUT}, or lower config.data.pool.",
    )
    require(
        shares.per_class <= len(mine),
        "config.data.per_class",
        wanted=f"training images within the {len(mine)} that class {name!r} has "
        f"beside {pool} for the pool and those for test",
        got=f"per_class={shares.per_class}",
        fix=f"Lower it to {len(mine)} or less, or lower config.data.pool.",
    )
    count = shares.per_class or max(round(shares.fraction * len(mine)), 1)
    return mine[:count]


def _require_some(name: str, count: int) -> None:
    require(
        count > 0,
        f"class {name!r}",
        wanted="at least one image",
        got="none",
        fix=f"Add images of it, or {_LEAVE_OUT}.",
    )


def _require_test(name: str, count: int) -> None:
    require(
        count > 0,
        f"class {name!r}",
        wanted="at least one image in the dataset's own test part",
        got="none",
        fix=f"Add images of it, or {_LEAVE_OUT}.",
    )


def read_split(folder: epath.PathLike, name: str) -> Split:
    """Split `name` of what `caption` wrote into `folder`.

    Raises:
      UserError: its files are not there, or do not belong together.
    """
    folder = epath.Path(folder)
    for file in FILES:
        require(
            (folder / file).exists(),
            str(folder / file),
            wanted="the images and splits that the stage caption wrote",
            got="no such file",
            fix="Run the stage caption again; it fills in what is gone.",
        )
    dataset = files.read_json(folder / "dataset.json")
    rows = files.read_jsonl(folder / "images.jsonl")
    images = files.map_array(folder / "images.npy")
    require(
        len(images) == len(rows),
        str(folder / "images.npy"),
        wanted=f"the {len(rows)} images of images.jsonl",
        got=len(images),
        fix=f"Delete {folder} and the stages after it to make them anew.",
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
