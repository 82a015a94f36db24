"""The splits of a run: base pool, train and test, which are disjoint by id.

The stage `caption` writes these files; later stages read them and not the source:

- `splits.json`: the ids of each split;
- `images.npy`: uint8 [N, S, S, 3], all images of the run, decoded and resized, in the
  order pool, train, test, and validation where the source keeps images for it;
- `images.jsonl`: one row per image: id, split, label, original size, note, and the
  group of `config.data.group`, if that is set;
- `dataset.json`: class names, their folders, whether all images are grey, name and
  remarks of the source, policy for duplicates.
"""

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Int

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
      groups: of each image, by `config.data.group`; None: they have none.
      class_folders: what the folder of each class is called; (): datasets that were
        read before this was recorded.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    class_names: tuple[str, ...]
    grey: bool
    groups: tuple[str, ...] | None = None
    class_folders: tuple[str, ...] = ()


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
    pool_seed: int | None = None,
    is_test: np.ndarray | None = None,
    is_validation: np.ndarray | None = None,
    usable: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Splits a source into base pool, train and test, class by class.

    Each class is shuffled by (seed, class) and cut in the order pool, test, train, so
    that test does not depend on `per_class` and `fraction`; if `sizes.test` is 0, test
    is what remains at the end. If the source has test images of its own, test is all of
    them, and the others are cut into pool and train. With a seed of its own, the pool
    is drawn first, so that it does not depend on `seed`.

    Args:
      labels: int [N], indices into `class_names`.
      class_names: K strings.
      sizes: of the splits.
      seed: of the shuffles.
      pool_seed: of the pool's; None: `seed`.
      is_test: bool [N], the source's own test images; None: it has none.
      is_validation: bool [N], images that are kept for validation; None: none.
      usable: bool [N], false for images to leave out; None: all are usable.
      copies: bool [N], images that are also in test: others take their places in pool
        and train, as far as there are any; None: none.
      groups: int [N], images of a group are in one split; None: each image is a group.

    Returns:
      ascending indices into the source, int64, by split name, each index at most once;
      `VALIDATION` is a name where `is_validation` is given.

    Raises:
      UserError: a class has too few images.
    """
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
    none = np.zeros(len(labels), bool)
    usable = ~none if usable is None else usable
    copies = none if copies is None else copies
    kept = none if is_validation is None else is_validation & usable
    usable = usable & ~kept
    own_test = none if is_test is None else is_test
    free = usable & ~own_test
    counts = np.bincount(labels[free], minlength=len(class_names))
    pools = proportional(sizes.pool, counts).tolist()
    sides = None
    if groups is not None:
        seeds = seed, pool_seed
        sides = _sides(labels, groups, free, sizes, pools, seeds, is_test is None)
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for k, name in enumerate(class_names):
        of_class = np.flatnonzero(~own_test & (labels == k))
        count = len(of_class)
        mine = of_class[generator(seed, "split", k).permutation(count)]
        mine = mine[usable[mine]]  # after the shuffle, so the others keep their order
        own = np.flatnonzero(usable & own_test & (labels == k))
        if not len(mine) + len(own):
            raise _too_few(name, wanted="at least one image", got="none")
        if is_test is not None and not len(own):
            wanted = "at least one image in the dataset's own test split"
            raise _too_few(name, wanted=wanted, got="none")
        if sides is None:
            if pool_seed is not None:
                pool = of_class[generator(pool_seed, "split", k).permutation(count)]
                pool = pool[usable[pool] & ~copies[pool]][: pools[k]]
                mine = np.append(pool, mine[~np.isin(mine, pool)])
            parts = _cut(mine, own, copies, sizes, name, pools[k])
        else:
            parts = _by_side(mine, own, copies, sides[mine], sizes, name)
        for split, indices in zip(SPLITS, parts, strict=True):
            chunks[split].append(indices)
    found = {name: np.sort(np.concatenate(parts)) for name, parts in chunks.items()}
    if is_validation is not None:
        found[VALIDATION] = np.flatnonzero(kept)
    return found


def proportional(total: int, counts: np.ndarray) -> np.ndarray:
    """Divides `total` in proportion to `counts`, by the largest remainder."""
    exact = total * counts / max(counts.sum(), 1)
    quotas = np.floor(exact).astype(int)
    rest = total - quotas.sum()
    quotas[np.argsort(-(exact - quotas), kind="stable")[:rest]] += 1
    return quotas


def _cut(
    mine: np.ndarray,
    own: np.ndarray,
    copies: np.ndarray,
    sizes: SplitSizes,
    name: str,
    pool_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts one shuffled class into pool, train and test; `own` is the source's test."""
    pool, rest = np.split(mine, [pool_size])
    pool = pool[~copies[pool]]
    if not len(own) and not sizes.test:
        rest = rest[~copies[rest]]
        train = _train(rest[:-1], copies, sizes, name, pool_size)
        return pool, train, rest[len(train) :]
    test = own
    if not len(own):
        if len(rest) < 2:
            raise _too_few(
                name,
                wanted="one image for training and one for test, besides the pool",
                got=f"{len(mine)} images, {pool_size} of them for the pool",
            )
        tests = min(max(round(sizes.test * len(rest)), 1), len(rest) - 1)
        rest, test = rest[tests:], rest[:tests]
    train = _train(rest, copies, sizes, name, pool_size)
    unused = rest[~copies[rest]][len(train) :]
    return np.append(pool, unused[: pool_size - len(pool)]), train, test


def _train(
    mine: np.ndarray, copies: np.ndarray, sizes: SplitSizes, name: str, pool: int
) -> np.ndarray:
    """The training images of a class, taken from those that are available."""
    if not len(mine):
        raise UserError(
            f"class {name!r}",
            wanted=f"a training image besides {pool} for the pool and those for test",
            got="none",
            fix=f"Add images of it, or {_LEAVE_OUT}, or lower config.data.pool.",
        )
    free = mine[~copies[mine]]
    if not len(free):
        raise UserError(
            "config.data.duplicates",
            wanted="at least one training image per class that is not also in test",
            got=f"none in class {name!r}",
            fix="Fix the dataset's split, or use --config.data.duplicates=keep.",
        )
    if sizes.per_class > len(free):
        removed = " and the copies of those" if len(free) < len(mine) else ""
        raise UserError(
            "config.data.per_class",
            wanted=f"at most the {len(free)} training images that class {name!r} has "
            f"besides {pool} for the pool and those for test{removed}",
            got=f"per_class={sizes.per_class}",
            fix=f"Lower it to {len(free)} or less, or lower config.data.pool.",
        )
    count = sizes.per_class or max(round(sizes.fraction * len(mine)), 1)
    return free[:count]


def _sides(
    labels: np.ndarray,
    groups: np.ndarray,
    free: np.ndarray,
    sizes: SplitSizes,
    pools: list[int],
    seeds: tuple[int, int | None],
    draws_test: bool,
) -> np.ndarray:
    """Assigns whole groups to pool, train or test, by a shuffle; str [N].

    A group goes where it fills more than it exceeds, class by class; the last side
    takes the rest. Each class gets a group of each side that it needs, if it has one.
    """
    classes = len(pools)
    names, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), classes), int)
    np.add.at(counts, (group[free], labels[free]), 1)
    total = counts.sum(0)
    need = {"pool": np.asarray(pools)}
    rest = "train"
    if draws_test and sizes.test:
        tests = np.maximum(np.round(sizes.test * (total - need["pool"])), 1)
        need = {"test": tests.astype(int)} | need
    elif draws_test:
        trains = np.round(sizes.fraction * (total - need["pool"])).astype(int)
        need["train"] = np.maximum(sizes.per_class or trains, 1)
        need["train"] = np.broadcast_to(need["train"], classes)
        rest = "test"
    wanted = [side for side in ("train", "test") if side == rest or side in need]
    side_of = np.full(len(names), rest, dtype="<U5")
    seed, pool_seed = seeds
    order = generator(seed, "split/groups").permutation(len(names))
    left = order
    if pool_seed is not None:  # then nothing that `seed` draws may change the pool
        first = generator(pool_seed, "split/groups").permutation(len(names))
        _fill(side_of, first, counts, {"pool": need.pop("pool")})
        for k in range(classes):
            mine = first[counts[first, k] > 0]
            pool = [g for g in mine if side_of[g] == "pool"]
            missing = min(len(wanted), len(mine)) - (len(mine) - len(pool))
            smallest = sorted(pool, key=lambda g: counts[g].sum())
            side_of[smallest[: max(missing, 0)]] = rest
        left = order[side_of[order] != "pool"]
    _fill(side_of, left, counts, need)
    for k in range(classes):
        for side in wanted:
            mine = left[counts[left, k] > 0]
            others = mine[side_of[mine] != side]
            if len(others) == len(mine) and len(mine) > 1:
                spare = [g for g in others if (side_of[others] == side_of[g]).sum() > 1]
                if spare:
                    side_of[min(spare, key=lambda g: counts[g].sum())] = side
    return side_of[group]


def _fill(
    side_of: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    need: dict[str, np.ndarray],
) -> None:
    """Gives each group, in this order, to the first side that it fills.

    Args:
      side_of: str [G], the sides of groups; is changed.
      order: of groups.
      counts: [G, K], images by group and class.
      need: images of each class, by side.
    """
    for g in order.tolist():
        for side, missing in need.items():
            filled = np.minimum(counts[g], missing).sum()
            if filled > np.maximum(counts[g] - missing, 0).sum():
                side_of[g] = side
                need[side] = np.maximum(missing - counts[g], 0)
                break


def _by_side(
    mine: np.ndarray,
    own: np.ndarray,
    copies: np.ndarray,
    sides: np.ndarray,
    sizes: SplitSizes,
    name: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool, train and test of one shuffled class whose groups have their sides."""
    pool, train, test = (mine[sides == side] for side in SPLITS)
    test = own if len(own) else test
    for part, what in ((train, "training"), (test, "test")):
        if not len(part):
            raise UserError(
                "config.data.group",
                wanted=f"groups of class {name!r} for each split",
                got=f"too few of them, so that none is left for {what}",
                fix=f"Choose smaller groups, lower config.data.pool, or {_LEAVE_OUT}.",
            )
    pool = pool[~copies[pool]]
    if not sizes.per_class and not len(own) and not sizes.test:
        return pool, train[~copies[train]], test  # `sides` has the fraction
    return pool, _train(train, copies, sizes, name, len(pool)), test


def _too_few(name: str, *, wanted: str, got: str) -> UserError:
    fix = f"Add images of it, or {_LEAVE_OUT}."
    return UserError(f"class {name!r}", wanted=wanted, got=got, fix=fix)


def count_images(folder: epath.PathLike) -> dict[str, Int[np.ndarray, " K"]]:
    """Images of each class by split, in the folder of the stage `caption`."""
    folder = epath.Path(folder)
    classes = len(class_names(folder))
    rows = files.read_jsonl(folder / "images.jsonl")
    labels = {name: [r["label"] for r in rows if r["split"] == name] for name in SPLITS}
    return {
        name: np.bincount(np.asarray(mine, np.int64), minlength=classes)
        for name, mine in labels.items()
    }


def class_names(folder: epath.PathLike) -> list[str]:
    """Names of the classes, indexed by label, in the folder of the stage `caption`."""
    return files.read_json(epath.Path(folder) / "dataset.json")["class_names"]


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
            fix="Add --redo=caption to make them, and what depends on them, again.",
        )
    mine = [i for i, row in enumerate(rows) if row["split"] == name]
    first = mine[0] if mine else 0
    return Split(
        images=images[first : first + len(mine)],
        labels=np.asarray([rows[i]["label"] for i in mine], np.int32),
        ids=tuple(rows[i]["id"] for i in mine),
        class_names=tuple(dataset["class_names"]),
        grey=dataset["grey"],
        groups=tuple(rows[i]["group"] for i in mine)
        if mine and "group" in rows[mine[0]]
        else None,
        class_folders=tuple(dataset.get("class_folders", ())),
    )
