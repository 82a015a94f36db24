"""Which synthetic images to leave out: wrong label, copy, outlier; all optional.

A judgement is a function of the image, its recipe and the real training images alone:
distances are exact (`screening/distances.py`) and classifiers see one image at a time,
so neither batch nor shard nor an interruption changes it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import logging
from jaxtyping import Float

from mvc_jax.data.splits import Split
from mvc_jax.errors import require, require_one_of, require_within
from mvc_jax.screening import distances, folds
from mvc_jax.screening.distances import Points

FIELD = "config.generate.filter"
NAMES = ("label", "copies", "outliers")
_CHOICES = {
    "label": ("", "folds", "clip"),
    "copies": ("", "any", "source"),
    "features": ("auto", "pixels", "clip"),
}
_ASKED = 1000  # real images, at most, that the label filter is tried on
Embed = Callable[[Iterable[np.ndarray]], Float[np.ndarray, "N D"]]
ZeroShot = Callable[[Float[np.ndarray, "N D"]], Float[np.ndarray, "N K"]]


@dataclasses.dataclass(frozen=True)
class Filters:
    """The section `generate.filter`; as it is by default, nothing is removed.

    Attributes:
      label: "folds": a classifier trained on real images must find the label in the
        image, one that saw neither its source nor its partners; "clip": CLIP must,
        which saw no image of ours, among the texts of the classes; "": any will do.
      label_folds: parts into which the real images are cut for that.
      label_threshold: the label's probability from which an image stays, in [0, 1].
      label_top: an image stays, too, if its label is among so many likeliest ones;
        0: by `label_threshold` alone.
      copies: "any": no image may be too close to a real training image, its source
        or another; "source": to its source alone; "": may be.
      copies_quantile: too close is what is nearer than this quantile of the distances
        from a real image to the nearest that differs, in [0, 1]; 0: their least.
      outliers: no image may be too far from the real images of its class.
      outliers_quantile: too far is what is farther from the nearest of them than this
        quantile of their own distances to the nearest other, in [0, 1].
      features: what outliers and the classifier of "folds" look at: "pixels", "clip"
        (image embeddings), or "auto": the latter where there is a CLIP.
    """

    label: str = ""
    label_folds: int = 5
    label_threshold: float = 0.5
    label_top: int = 1
    copies: str = ""
    copies_quantile: float = 0.0
    outliers: bool = False
    outliers_quantile: float = 0.99
    features: str = "auto"

    def check(self, *, partners: int, has_clip: bool) -> None:
        """Raises a `UserError` for a field that is out of range or cannot be met.

        Args:
          partners: at most so many real images are mixed into one, besides its source.
          has_clip: there is a CLIP to ask.
        """
        fields = dataclasses.asdict(self)
        require_one_of(FIELD, fields, _CHOICES)
        shares = ("label_threshold", "copies_quantile", "outliers_quantile")
        ranges = dict.fromkeys(shares, (0, 1, "Set it within this range."))
        ranges["label_top"] = (0, np.inf, "0 switches it off.")
        require_within(FIELD, fields, ranges)
        asked = [name for name in ("label", "features") if fields[name] == "clip"]
        require(
            has_clip or not asked,
            f"{FIELD}.{' and '.join(asked)}",
            wanted="a CLIP to ask, or another value",
            got="'clip', and neither config.generate.clip nor an image_encoder in the "
            "base model",
            fix="Name a CLIP checkpoint by config.generate.clip.",
        )
        require(
            self.label != "folds" or self.label_folds >= partners + 2,
            f"{FIELD}.label_folds",
            wanted=f"at least {partners + 2}: the folds of an image's source and of "
            f"its {partners} partners are left out, and one must be left to learn from",
            got=self.label_folds,
            fix="Raise it.",
        )

    @property
    def any(self) -> bool:
        return bool(self.label or self.copies or self.outliers)

    @property
    def asks_images(self) -> bool:
        """Whether image embeddings are of use, where there is a CLIP."""
        by_features = self.label == "folds" or self.outliers
        return self.label == "clip" or (by_features and self.features != "pixels")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Why one filter removes one image.

    Attributes:
      filter: "label", "copies" or "outliers".
      reason: in words.
      score: of the image: the label's probability, or a distance.
      threshold: the score would have had to be at least this; for outliers at most.
      real: id of the real image that it was compared with; "": with none.
    """

    filter: str
    reason: str
    score: float
    threshold: float
    real: str = ""


class Judge:
    """What the filters find in images: `judge(images, rows)`.

    Attributes:
      facts: of the filters themselves, as plain JSON values: what they look at, where
        their thresholds lie, what they would do to real images.
    """

    def __init__(
        self,
        fields: Filters,
        train: Split,
        *,
        seed: int,
        embed: Embed | None = None,
        zero_shot: ZeroShot | None = None,
    ):
        """Learns from the real images what is usual.

        Args:
          fields: which filters, and how strict; checked.
          train: the real training images.
          seed: of the folds.
          embed: uint8 images [H, W, 3] -> their embeddings by a CLIP, each a function
            of its image alone; None: there is none.
          zero_shot: for a `label` of "clip": image embeddings -> probabilities of the
            texts of the classes.

        Raises:
          UserError: there are too few images, or classes, for what is asked.
        """
        self._size = train.images.shape[1]
        self._by_clip = embed is not None and fields.features != "pixels"
        self._embed = embed if fields.asks_images else None
        self._filters: list[_Filter] = []
        self.facts: dict = {}
        if not fields.any:
            return
        real = self._look(train.images)
        if fields.label or fields.outliers:
            self.facts["features"] = "clip" if self._by_clip else "pixels"
        if fields.label:
            self._filters.append(_Labels(fields, train, real, zero_shot, seed))
        if fields.copies:
            self._filters.append(_Copies(fields, train, real))
        if fields.outliers:
            self._filters.append(_Outliers(fields, train, real))
        for filter_ in self._filters:
            self.facts[filter_.name] = filter_.facts

    def __call__(
        self, images: Sequence[np.ndarray] | np.ndarray, rows: Sequence[Mapping]
    ) -> list[list[Finding]]:
        """What is wrong with each image; of one that may stay, nothing.

        Args:
          images: n of uint8 [H, W, 3], in [0, 255].
          rows: of each, `label`, an index of the classes, and `source` and `partners`,
            ids of the real images that it was made from.
        """
        found: list[list[Finding]] = [[] for _ in rows]
        if self._filters and rows:
            views = self._look(images)
            for filter_ in self._filters:
                for mine, finding in zip(found, filter_(views, rows), strict=True):
                    mine += [finding] if finding else []
        return found

    def _look(self, images: Sequence[np.ndarray] | np.ndarray) -> "_Views":
        pixels = distances.pixels(images, self._size)
        embeddings = None
        if self._embed is not None:
            embeddings = distances.directions(self._embed(images))
        features = embeddings if self._by_clip and embeddings is not None else pixels
        return _Views(pixels, embeddings, features)


@dataclasses.dataclass(frozen=True)
class _Views:
    """Images as the filters see them; `features` is one of the other two."""

    pixels: Points
    embeddings: Points | None
    features: Points


class _Filter(Protocol):
    name: str
    facts: dict

    def __call__(
        self, views: _Views, rows: Sequence[Mapping]
    ) -> list[Finding | None]: ...


class _Labels:
    """Removes what does not look like its label."""

    name = "label"

    def __init__(
        self, fields: Filters, train: Split, real: _Views, zero_shot, seed: int
    ):
        self._names, self._zero_shot = train.class_names, zero_shot
        self._threshold, self._top = fields.label_threshold, fields.label_top
        require(
            len(self._names) > 1,
            f"{FIELD}.label",
            wanted="two classes or more to tell apart",
            got=f"one, {self._names[0]!r}",
            fix="Switch it off.",
        )
        self._folds = None
        if fields.label == "folds":
            copies = distances.same(real.pixels)
            _require_images(train, copies, fields.label_folds)
            self._folds = folds.Classifiers(
                real.features,
                copies,
                train.labels.astype(np.int64),
                train.ids,
                folds=fields.label_folds,
                seed=seed,
            )
        self.facts = self._of_real(train, real)

    def _of_real(self, train: Split, real: _Views) -> dict:
        """What the rule does to real images; each counts as made from itself."""
        count = len(train.ids)
        some = np.unique(np.linspace(0, count - 1, min(count, _ASKED)).astype(int))
        views = dataclasses.replace(
            real,
            features=real.features.of(some),
            embeddings=real.embeddings.of(some) if real.embeddings else None,
        )
        rows = [
            {"label": int(train.labels[i]), "source": train.ids[i], "partners": []}
            for i in some
        ]
        removed = sum(finding is not None for finding in self(views, rows))
        return {"real_images": len(some), "real_removed": removed}

    def __call__(self, views: _Views, rows: Sequence[Mapping]) -> list[Finding | None]:
        found: list[Finding | None] = []
        labels = [row["label"] for row in rows]
        for p, label in zip(self._probabilities(views, rows), labels, strict=True):
            own = float(p[label])
            keep = own >= self._threshold or int((p > own).sum()) < self._top
            best = int(p.argmax())
            reason = f"looks like {self._names[best]} ({p[best]:.2f})"
            finding = Finding(self.name, reason, own, self._threshold)
            found.append(None if keep else finding)
        return found

    def _probabilities(self, views: _Views, rows: Sequence[Mapping]) -> np.ndarray:
        if self._folds is not None:
            made_from = [{row["source"], *row["partners"]} for row in rows]
            return self._folds.probabilities(views.features, made_from)
        levels = views.embeddings.levels[:, None] / views.embeddings.unit
        return np.concatenate([self._zero_shot(one) for one in levels])  # as the folds


class _Copies:
    """Removes what is too close to a real image."""

    name = "copies"

    def __init__(self, fields: Filters, train: Split, real: _Views):
        self._real, self._ids = real.pixels, train.ids
        self._row_of = {id_: i for i, id_ in enumerate(train.ids)}
        self._source_alone = fields.copies == "source"
        among = distances.nearest(self._real, self._real, skip_self=True)
        quantile = fields.copies_quantile
        self._threshold = distances.copy_distance(among.different, quantile)
        self.facts = {"threshold": self._threshold}

    def __call__(self, views: _Views, rows: Sequence[Mapping]) -> list[Finding | None]:
        sources = np.asarray([self._row_of[row["source"]] for row in rows])
        if self._source_alone:
            index = sources
            distance = distances.aligned(views.pixels, self._real.of(sources))
        else:
            distance, index, _ = distances.nearest(views.pixels, self._real)
        found: list[Finding | None] = []
        for row, d, i in zip(rows, distance.tolist(), index, strict=True):
            id_ = self._ids[i]
            what = "its source" if id_ == row["source"] else f"the real image {id_}"
            finding = Finding(
                self.name, f"too close to {what}", d, self._threshold, id_
            )
            found.append(finding if d < self._threshold else None)
        return found


class _Outliers:
    """Removes what is too far from every real image of its class."""

    name = "outliers"

    def __init__(self, fields: Filters, train: Split, real: _Views):
        self._ids, self._names = train.ids, train.class_names
        self._members = [
            np.flatnonzero(train.labels == k) for k in range(len(self._names))
        ]
        self._points = [real.features.of(members) for members in self._members]
        apart = [
            distances.nearest(points, points, skip_self=True).different
            for points in self._points
        ]
        usual = [values[np.isfinite(values)] for values in apart]
        every = np.concatenate(usual)
        require(
            len(every) > 0,
            f"{FIELD}.outliers",
            wanted="a class with two different images, to see how far apart they are",
            got="none",
            fix="Switch it off.",
        )
        lone = [self._names[k] for k, values in enumerate(usual) if not len(values)]
        if lone:
            logging.warning(
                "the filter outliers judges %d classes of one image (%s) by how far "
                "apart those of the others are",
                len(lone),
                ", ".join(lone[:5]),
            )
        self._thresholds = [
            float(
                np.quantile(values if len(values) else every, fields.outliers_quantile)
            )
            for values in usual
        ]
        named = zip(self._names, self._thresholds, strict=True)
        self.facts = {"thresholds": dict(named)}

    def __call__(self, views: _Views, rows: Sequence[Mapping]) -> list[Finding | None]:
        labels = np.asarray([row["label"] for row in rows])
        found: list[Finding | None] = [None] * len(rows)
        for k in np.unique(labels).tolist():
            mine = np.flatnonzero(labels == k)
            distance, index, _ = distances.nearest(
                views.features.of(mine), self._points[k]
            )
            for i, d, nearest in zip(mine, distance.tolist(), index, strict=True):
                if d > self._thresholds[k]:
                    id_ = self._ids[self._members[k][nearest]]
                    reason = f"too far from every real {self._names[k]}"
                    finding = (self.name, reason, d, self._thresholds[k], id_)
                    found[i] = Finding(*finding)
        return found


def _require_images(train: Split, copies: np.ndarray, count: int) -> None:
    """Requires as many different images in each class as there are folds."""
    different = np.unique(copies, return_index=True)[1]
    counts = np.bincount(train.labels[different], minlength=len(train.class_names))
    least = int(counts.argmin())
    require(
        int(counts[least]) >= count,
        f"{FIELD}.label_folds",
        wanted=f"{count} different training images or more in each class, one a fold",
        got=f"{counts[least]} in class {train.class_names[least]!r}",
        fix=f"Lower it to {counts[least]}, or ask CLIP by {FIELD}.label=clip.",
    )
