"""Who may see which image: base pool, few-shot train, test; disjoint by id."""

import dataclasses

import numpy as np
from etils import epath
from PIL import Image

from mvc_jax import files
from mvc_jax.data.order import generator
from mvc_jax.data.sources import Source, open_source
from mvc_jax.errors import UserError

SPLITS = ("pool", "train", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split in memory.

    Attributes:
      images: uint8 [N, H, W, 3] in [0, 255].
      labels: int32 [N].
      ids: N strings.
      class_names: K strings; `labels` index them.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    class_names: tuple[str, ...]


def make_splits(
    source: Source, *, pool: int, per_class: int, seed: int
) -> dict[str, np.ndarray]:
    """Cuts a source into base pool, few-shot train and test, class by class.

    Each class is shuffled by (seed, class); its share of the pool comes first, then
    `per_class` training images, and all that is left is test.

    Args:
      source: what to cut.
      pool: images of the base pool over all classes, shared out by class frequency.
      per_class: training images per class, at least 1.
      seed: of the shuffles.

    Returns:
      indices into `source`, int64, by split name; together each index once.

    Raises:
      UserError: a class has too few images for its share, training and one test image.
    """
    labels = np.asarray(source.labels)
    counts = np.bincount(labels, minlength=len(source.class_names))
    shares = _proportional(pool, counts)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for k, (share, name) in enumerate(zip(shares, source.class_names, strict=True)):
        _check_class(name, int(counts[k]), int(share), per_class)
        mine = np.flatnonzero(labels == k)
        mine = mine[generator(seed, "split", k).permutation(len(mine))]
        cut = np.split(mine, [share, share + per_class])
        for split, indices in zip(SPLITS, cut, strict=True):
            parts[split].append(indices)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def _proportional(total: int, counts: np.ndarray) -> np.ndarray:
    """Shares of `total` proportional to `counts`, by the largest remainder."""
    exact = total * counts / max(counts.sum(), 1)
    shares = np.floor(exact).astype(int)
    rest = total - shares.sum()
    shares[np.argsort(-(exact - shares), kind="stable")[:rest]] += 1
    return shares


def _check_class(name: str, count: int, share: int, per_class: int) -> None:
    if count == 0:
        raise UserError(
            f"class {name!r}",
            wanted="at least one image",
            got="none",
            fix="Add images of it or take the class out.",
        )
    if share + per_class + 1 > count:
        raise UserError(
            "config.data.per_class",
            wanted=f"{share} pool + per_class + at least 1 test image within the "
            f"{count} images of class {name!r}",
            got=f"per_class={per_class}, which needs {share + per_class + 1}",
            fix=_room_for_training(count - share - 1, name),
        )


def _room_for_training(most: int, name: str) -> str:
    if most < 1:
        return f"Add images of {name!r}, or lower config.data.pool."
    return f"Lower it to {most} or less, or lower config.data.pool."


def write_splits(
    path: epath.PathLike, source: Source, splits: dict[str, np.ndarray]
) -> None:
    """Writes the ids of each split as JSON: `{"train": ["digits/0001", ...], ...}`."""
    ids = {name: [source.ids[i] for i in indices] for name, indices in splits.items()}
    files.write_json(path, ids)


def read_split(path: epath.PathLike, name: str, *, source: str, size: int) -> Split:
    """Loads the images of split `name` by the ids that `write_splits` wrote.

    Args:
      path: the file of `write_splits`.
      name: one of `SPLITS`.
      source: as for `open_source`.
      size: images come back as `size` x `size` pixels.
    """
    ids = files.read_json(path)[name]
    opened = open_source(source)
    index_of = {id_: i for i, id_ in enumerate(opened.ids)}
    gone = [id_ for id_ in ids if id_ not in index_of]
    if gone:
        raise UserError(
            str(path),
            wanted=f"images of source {source!r}",
            got=f"{len(gone)} ids that it has not, e.g. {', '.join(gone[:3])}",
            fix="Bring the images back, or start a new --workdir.",
        )
    examples = [opened[index_of[id_]] for id_ in ids]
    shape = (len(examples), size, size, 3)
    images = np.empty(shape, np.uint8)
    for image, example in zip(images, examples, strict=True):
        image[...] = resize(example["image"], size)
    labels = np.asarray([example["label"] for example in examples], np.int32)
    return Split(images, labels, tuple(ids), opened.class_names)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], Lanczos with antialiasing."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized)
