"""Images that show another class than their own, by a predicted label of each.

`nearest`: the class of most of the k nearest training images; of several such classes,
that of the nearest image. `zero_shot`: the class whose text is nearest, by CLIP. Such
rules err: how often they do is measured on the real test images.

Legend: M images, k neighbours, K classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mvc_jax.metrics import distances, statistics
from mvc_jax.metrics.points import Block, Points

RULES = ("nearest", "zero_shot")
_LISTED = 24
_AT_ONCE = 4096  # images whose votes are counted


class LabelSearch:
    """The training images that tell the label of others, found block by block.

    Attributes:
      squared: float64 [M, k], squared distances in levels to the k nearest, ascending.
      index: int64 [M, k], of these, the first of several; -1: there are fewer.
      own_squared: float64 [M], to the nearest of its own class.
      own_index: int64 [M], of it; -1: its class has none.
    """

    def __init__(
        self, train: Int[np.ndarray, " N"], labels: Int[np.ndarray, " M"], k: int
    ):
        """Starts a search without any block, whose rows are training images.

        Args:
          train: labels of the rows.
          labels: of the columns.
          k: neighbours.
        """
        self._train, self._labels, count = train, labels, len(labels)
        self.squared, self.own_squared = (
            np.full((count, k), np.inf),
            np.full(count, np.inf),
        )
        self.index, self.own_index = np.full((count, k), -1), np.full(count, -1)

    def visit(self, block: Block) -> tuple:
        """What a block has that is nearer."""
        # Another thread may lower `squared` meanwhile, and `add` compares again.
        nearer = np.flatnonzero(block.squared.min(0) < self.squared[block.columns, -1])
        left = np.ascontiguousarray(block.squared[:, nearer].T)
        k = min(self.squared.shape[1], left.shape[1])
        index = np.empty((len(nearer), k), np.int64)
        squared = np.empty((len(nearer), k), left.dtype)
        rows = np.arange(len(nearer))
        for n in range(k):  # faster than a partition, and the first of several is kept
            index[:, n] = left.argmin(1)
            squared[:, n] = left[rows, index[:, n]]
            left[rows, index[:, n]] = np.inf
        own = self._own(block)
        return block, nearer, squared, index + block.rows.start, *own

    def _own(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of its own class to each column: squared, index."""
        train, labels = self._train[block.rows], self._labels[block.columns]
        squared, index = np.full(len(labels), np.inf), np.full(len(labels), -1)
        for label in np.intersect1d(train, labels):
            rows, mine = np.flatnonzero(train == label), np.flatnonzero(labels == label)
            some = block.squared[np.ix_(rows, mine)]
            first = some.argmin(0)
            squared[mine] = some[first, np.arange(len(mine))]
            index[mine] = rows[first] + block.rows.start
        return squared, index

    def add(self, found: tuple) -> None:
        """Takes over what `visit` found."""
        block, nearer, squared, index, own_squared, own_index = found
        start = block.columns.start
        self._take(nearer + start, squared, index)
        self._take_own(start + np.arange(len(own_squared)), own_squared, own_index)

    def merge(self, other: "LabelSearch") -> None:
        """Takes over what another search found among other training images."""
        rows = np.arange(len(self.squared))
        self._take(rows, other.squared, other.index)
        self._take_own(rows, other.own_squared, other.own_index)

    def _take(self, rows: np.ndarray, squared: np.ndarray, index: np.ndarray) -> None:
        squared = np.concatenate([self.squared[rows], squared], axis=1)
        index = np.concatenate([self.index[rows], index], axis=1)
        order = np.lexsort((index, squared), axis=1)[:, : self.squared.shape[1]]
        self.squared[rows] = np.take_along_axis(squared, order, axis=1)
        self.index[rows] = np.take_along_axis(index, order, axis=1)

    def _take_own(
        self, rows: np.ndarray, squared: np.ndarray, index: np.ndarray
    ) -> None:
        mine, present = self.own_squared[rows], self.own_index[rows]
        first = (squared == mine) & (index < present) & (index >= 0)
        better = (squared < mine) | first
        self.own_squared[rows] = np.where(better, squared, mine)
        self.own_index[rows] = np.where(better, index, present)

    def predictions(self) -> "Predictions":
        """The label that the neighbours of each image have."""
        classes = int(self._train.max()) + 1
        count = len(self.index)
        label, votes, nearest = (np.empty(count, np.int64) for _ in range(3))
        for start in range(0, count, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            index = self.index[part]
            rows = np.arange(len(index))
            # Where there are fewer neighbours, the last of all classes is no class.
            labels = np.where(index >= 0, self._train[index], classes)
            cells = rows[:, None] * (classes + 1) + labels
            counts = np.bincount(cells.ravel(), minlength=len(rows) * (classes + 1))
            mine = np.where(index >= 0, counts[cells], 0)
            best = mine.argmax(1)  # the first: that of the nearest
            label[part], votes[part] = labels[rows, best], mine[rows, best]
            nearest[part] = index[rows, best]
        return Predictions(label, votes, nearest, self.own_index)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the nearest training images say of M images.

    Attributes:
      label: int [M], predicted class.
      votes: int [M], how many of the neighbours are of this class.
      train: int [M], the nearest training image of this class.
      own: int [M], the nearest training image of the image's own class; -1: none.
      zero_shot: int [M], the class whose text is nearest; None without texts.
    """

    label: Int[np.ndarray, " M"]
    votes: Int[np.ndarray, " M"]
    train: Int[np.ndarray, " M"]
    own: Int[np.ndarray, " M"]
    zero_shot: Int[np.ndarray, " M"] | None = None

    def differs(self, labels: Int[np.ndarray, " M"]) -> dict[str, np.ndarray]:
        """Rule -> bool [M], whether it predicts another class than `labels`."""
        found = {"nearest": self.label != labels}
        if self.zero_shot is not None:
            found["zero_shot"] = self.zero_shot != labels
        return found

    def columns(self) -> dict[str, np.ndarray]:
        """For a table of the images; training images by their rows."""
        found = {
            "predicted": self.label,
            "votes": self.votes,
            "train_of_predicted": self.train,
            "train_of_own": self.own,
        }
        if self.zero_shot is not None:
            found["zero_shot"] = self.zero_shot
        return found


def describe(
    found: Predictions,
    labels: Int[np.ndarray, " M"],
    sources: Int[np.ndarray, " M"] | None,
    classes: int,
) -> dict[str, Any]:
    """Counts the images that show another class.

    Args:
      found: of the set.
      labels: of its images.
      sources: what each was made of; images of one source are not independent. -1:
        unknown; None: real images.
      classes: K.

    Returns:
      `{"rules": {RULE: {"images", "count", "fraction", "effective"}}, "classes":
      [{"images", RULE: count}]}`; `effective` is the number of independent images that
      would be as informative.
    """
    totals = np.bincount(labels, minlength=classes)
    rows: list[dict[str, int]] = [{"images": int(n)} for n in totals]
    rules = {}
    for rule, differs in found.differs(labels).items():
        rules[rule] = {
            "images": len(labels),
            "count": int(differs.sum()),
            "fraction": float(differs.mean()),
            "effective": statistics.effective_count(differs, _groups(sources, labels)),
        }
        counts = np.bincount(labels[differs], minlength=classes)
        for row, count in zip(rows, counts.tolist(), strict=True):
            row[rule] = count
    return {"rules": rules, "classes": rows}


def _groups(
    sources: Int[np.ndarray, " M"] | None, labels: Int[np.ndarray, " M"]
) -> Int[np.ndarray, " M"]:
    """The source of each image; itself, where it is unknown."""
    rows = np.arange(len(labels))
    if sources is None:
        return rows
    return np.where(sources >= 0, sources, sources.max(initial=-1) + 1 + rows)


def most_certain(
    found: Predictions,
    labels: Int[np.ndarray, " M"],
    names: Sequence[str | int],
    features: Points,
    train: Points,
    train_names: Sequence[str],
) -> list[dict[str, Any]]:
    """The images that most clearly show another class, by their neighbours.

    Those with the most neighbours of that class first, then those with the smallest
    `ratio` of the distances to the nearest training image of that and of its own class.

    Args:
      found: of the set.
      labels: of its images.
      names: of its images.
      features: of its images.
      train: features of the training images.
      train_names: their ids.

    Returns:
      up to 24 rows `{"image", "label", "predicted", "votes", "ratio", "nearest":
      {"train", "distance"}, "own": the same of its own class}`, with `zero_shot` where
      that is known. `own` and `ratio` are None where the class has no training image.
    """
    rows = np.flatnonzero(found.label != labels)
    other = distances.paired(features, train, rows, found.train[rows])
    has_own = found.own[rows] >= 0
    own = np.full(len(rows), np.inf)
    own[has_own] = distances.paired(
        features, train, rows[has_own], found.own[rows[has_own]]
    )
    with np.errstate(invalid="ignore"):  # 0 / 0: equal images of both classes
        ratio = np.nan_to_num(other / own, nan=1.0)
    order = np.lexsort((rows, ratio, -found.votes[rows]))[:_LISTED]
    listed = []
    for n in order:
        i = rows[n]
        row = {
            "image": names[i],
            "label": int(labels[i]),
            "predicted": int(found.label[i]),
            "votes": int(found.votes[i]),
            "ratio": float(ratio[n]) if has_own[n] else None,
            "nearest": {
                "train": train_names[found.train[i]],
                "distance": float(other[n]),
            },
            "own": {
                "train": train_names[found.own[i]],
                "distance": float(own[n]),
            }
            if has_own[n]
            else None,
        }
        if found.zero_shot is not None:
            row["zero_shot"] = int(found.zero_shot[i])
        listed.append(row)
    return listed


def with_baseline(
    measured: Mapping[str, Any], test: Mapping[str, Any], confidence: float
) -> dict[str, Any]:
    """Adds how often the rules err on real test images.

    Args:
      measured: from `describe`, of a synthetic set.
      test: the same of the test images.
      confidence: of the interval.

    Returns:
      `measured`, where each rule also has `test` (`images`, `count`, and `fraction`, in
      which classes count as much as in the set), and the `difference` of the fractions
      with `low` and `high`; None where no class has images in both. Each class has
      `test_images` and `test_RULE`.
    """
    classes = [
        row | {f"test_{key}": value for key, value in other.items()}
        for row, other in zip(measured["classes"], test["classes"], strict=True)
    ]
    rules = {}
    for rule, row in measured["rules"].items():
        mine, real = (
            np.asarray([[x["images"], x[rule]] for x in each["classes"]], float)
            for each in (measured, test)
        )
        rules[rule] = row | _compared(mine, real, row["effective"], confidence)
    return {**measured, "rules": rules, "classes": classes}


def _compared(
    mine: np.ndarray, real: np.ndarray, effective: float, confidence: float
) -> dict[str, Any]:
    """`test`, `difference`, `low`, `high` of rows (images, count) of each class."""
    images, count = real.sum(0).tolist()
    test = {"images": int(images), "count": int(count), "fraction": None}
    both = (mine[:, 0] > 0) & (real[:, 0] > 0)
    if not both.any():
        return {"test": test, "difference": None, "low": None, "high": None}
    share = mine[both, 0] / mine[both, 0].sum()
    fraction = float(mine[both, 1].sum() / mine[both, 0].sum())
    test["fraction"] = float(share @ (real[both, 1] / real[both, 0]))
    # Kish's effective number of images that count differently.
    informative = float(1 / (share**2 / real[both, 0]).sum())
    low, high = statistics.difference_of_fractions(
        (fraction, effective), (test["fraction"], informative), confidence
    )
    difference = fraction - test["fraction"]
    return {"test": test, "difference": difference, "low": low, "high": high}


def notes(name: str, measured: Mapping[str, Any], confidence: float) -> list[str]:
    """A sentence for each rule by which a set clearly shows other classes.

    Args:
      name: of the set.
      measured: from `with_baseline`.
      confidence: of its intervals.
    """
    by = {
        "nearest": "have nearest training images of another class than their own",
        "zero_shot": "look to CLIP like another class than their own",
    }
    found = []
    for rule, row in measured["rules"].items():
        if row["low"] is None or row["low"] <= 0:
            continue
        ours, theirs = (100 * x["fraction"] for x in (row, row["test"]))
        difference, low, high = (100 * row[x] for x in ("difference", "low", "high"))
        found.append(
            f"{name}: {ours:.1f} % of {row['images']} images {by[rule]}, against "
            f"{theirs:.1f} % of test images: {difference:+.1f} points "
            f"({100 * confidence:g} % interval {low:+.1f} to {high:+.1f}). They may "
            "show another class; the clearest are listed."
        )
    return found
