"""Filters that find wrong labels, near-copies and outliers among synthetic images.

A finding is a function of the image, its recipe and the real training images alone:
distances are exact (`metrics/distances.py`) and classifiers see one image at a time,
so it does not depend on batches, shards or interruptions.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import logging
from jaxtyping import Float

from mvc_jax.data.splits import Split
from mvc_jax.errors import UserError
from mvc_jax.metrics import distances
from mvc_jax.metrics.distances import Points
from mvc_jax.screening import folds
from mvc_jax.screening.settings import FIELD, FilterSettings

_MAX_REAL = 1000  # real images that the label filter is evaluated on
Embed = Callable[[Iterable[np.ndarray]], Float[np.ndarray, "N D"]]
ZeroShot = Callable[[Float[np.ndarray, "N D"]], Float[np.ndarray, "N K"]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Why one filter removes one image.

    Attributes:
      filter: "label", "copies" or "outliers".
      reason: for people.
      score: probability of the label, or a distance.
      threshold: minimum score of an image that is kept; of "outliers" the maximum.
      real: id of the real image that it was compared with; "": none.
    """

    filter: str
    reason: str
    score: float
    threshold: float
    real: str = ""


class FittedFilters:
    """The filters that are on, fitted on real images.

    Attributes:
      facts: by filter, as plain JSON values: thresholds, and the effect on real images;
        `features`, their input.
    """

    def __init__(
        self,
        settings: FilterSettings,
        train: Split,
        *,
        seed: int,
        embed: Embed | None = None,
        zero_shot: ZeroShot | None = None,
    ):
        """Fits thresholds and classifiers.

        Args:
          settings: checked.
          train: the real training images.
          seed: of the folds.
          embed: uint8 images [H, W, 3] -> CLIP embeddings, each a function of its image
            alone; None: no CLIP is available.
          zero_shot: image embeddings -> class probabilities; needed if
            `settings.label` is "clip".

        Raises:
          UserError: there are too few images or classes for `settings`.
        """
        self._size = train.images.shape[1]
        self._by_clip = embed is not None and settings.features != "pixels"
        self._embed = embed if settings.use_embeddings else None
        self._filters: list[_Filter] = []
        self.facts: dict = {}
        if not settings.enabled:
            return
        real = self._views(train.images)
        if settings.label or settings.outliers:
            self.facts["features"] = "clip" if self._by_clip else "pixels"
        if settings.label:
            self._filters.append(_LabelFilter(settings, train, real, zero_shot, seed))
        if settings.copies:
            self._filters.append(_CopyFilter(settings, train, real))
        if settings.outliers:
            self._filters.append(_OutlierFilter(settings, train, real))
        for filter_ in self._filters:
            self.facts[filter_.name] = filter_.facts

    def __call__(
        self, images: Sequence[np.ndarray] | np.ndarray, rows: Sequence[Mapping]
    ) -> list[list[Finding]]:
        """Returns the findings of each image; none for an image to keep.

        Args:
          images: n of uint8 [H, W, 3], in [0, 255].
          rows: n of `label`, a class index, and `source` and `partners`, ids of real
            images.
        """
        found: list[list[Finding]] = [[] for _ in rows]
        if self._filters and rows:
            views = self._views(images)
            for filter_ in self._filters:
                for mine, finding in zip(found, filter_(views, rows), strict=True):
                    if finding is not None:
                        mine.append(finding)
        return found

    def _views(self, images: Sequence[np.ndarray] | np.ndarray) -> "_Views":
        pixels = distances.pixels(images, self._size)
        embeddings = None
        if self._embed is not None:
            embeddings = distances.directions(self._embed(images))
        features = embeddings if self._by_clip and embeddings is not None else pixels
        return _Views(pixels, embeddings, features)


@dataclasses.dataclass(frozen=True)
class _Views:
    """Images as points; `features` is one of the other two."""

    pixels: Points
    embeddings: Points | None
    features: Points


class _Filter(Protocol):
    name: str
    facts: dict

    def __call__(
        self, views: _Views, rows: Sequence[Mapping]
    ) -> list[Finding | None]: ...


class _LabelFilter:
    """Removes images in which a classifier does not recognise the label."""

    name = "label"

    def __init__(
        self,
        settings: FilterSettings,
        train: Split,
        real: _Views,
        zero_shot: ZeroShot | None,
        seed: int,
    ):
        self._names, self._zero_shot = train.class_names, zero_shot
        self._threshold, self._top = settings.label_threshold, settings.label_top
        if len(self._names) < 2:
            raise UserError(
                f"{FIELD}.label",
                wanted="at least two classes",
                got=f"one, {self._names[0]!r}",
                fix="Switch it off.",
            )
        self._folds = None
        if settings.label == "folds":
            groups = distances.duplicate_groups(real.pixels)
            groups = folds.joined(groups, train.groups)
            _require_images(train, groups, settings.label_folds)
            self._folds = folds.FoldClassifiers(
                real.features,
                groups,
                train.labels.astype(np.int64),
                train.ids,
                folds=settings.label_folds,
                seed=seed,
            )
        self.facts = self._evaluate_on_real(train, real)

    def _evaluate_on_real(self, train: Split, real: _Views) -> dict:
        """Counts the real images that the filter would remove.

        A real image is treated as its own source.
        """
        count = len(train.ids)
        chosen = np.unique(np.linspace(0, count - 1, min(count, _MAX_REAL)).astype(int))
        views = dataclasses.replace(
            real,
            features=real.features[chosen],
            embeddings=None if real.embeddings is None else real.embeddings[chosen],
        )
        rows = [
            {"label": int(train.labels[i]), "source": train.ids[i], "partners": []}
            for i in chosen
        ]
        removed = sum(finding is not None for finding in self(views, rows))
        return {"real_images": len(chosen), "real_removed": removed}

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
            related = [{row["source"], *row["partners"]} for row in rows]
            return self._folds.probabilities(views.features, related)
        # One at a time, so that the rounding does not depend on the batch.
        embeddings = views.embeddings.levels[:, None] / views.embeddings.unit
        return np.concatenate([self._zero_shot(one) for one in embeddings])


class _CopyFilter:
    """Removes images that are too close to a real image."""

    name = "copies"

    def __init__(self, settings: FilterSettings, train: Split, real: _Views):
        self._real, self._ids = real.pixels, train.ids
        self._row_of = {id_: i for i, id_ in enumerate(train.ids)}
        self._source_only = settings.copies == "source"
        among = distances.nearest(self._real, self._real, skip_self=True)
        quantile = settings.copies_quantile
        self._threshold = distances.copy_distance(among.different, quantile)
        self.facts = {"threshold": self._threshold}

    def __call__(self, views: _Views, rows: Sequence[Mapping]) -> list[Finding | None]:
        sources = np.asarray([self._row_of[row["source"]] for row in rows])
        if self._source_only:
            index = sources
            distance = distances.paired(views.pixels, self._real[sources])
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


class _OutlierFilter:
    """Removes images that are too far from all real images of their class."""

    name = "outliers"

    def __init__(self, settings: FilterSettings, train: Split, real: _Views):
        self._ids, self._names = train.ids, train.class_names
        self._members = [
            np.flatnonzero(train.labels == k) for k in range(len(self._names))
        ]
        self._points = [real.features[members] for members in self._members]
        self._thresholds = self._fit(settings.outliers_quantile)
        self.facts = {
            "thresholds": dict(zip(self._names, self._thresholds, strict=True))
        }

    def _fit(self, quantile: float) -> list[float]:
        """Returns the threshold of each class; of all together where it has one image.

        It is a quantile of the distances from each real image of the class to the
        nearest different one.
        """
        nearest = [
            distances.nearest(points, points, skip_self=True).different
            for points in self._points
        ]
        by_class = [values[np.isfinite(values)] for values in nearest]
        pooled = np.concatenate(by_class)
        if not len(pooled):
            raise UserError(
                f"{FIELD}.outliers",
                wanted="a class with two different images, to measure their distance",
                got="none",
                fix="Switch it off.",
            )
        single = [
            name
            for name, values in zip(self._names, by_class, strict=True)
            if not len(values)
        ]
        if single:
            logging.warning(
                "the filter outliers uses the distances of all classes for %d classes "
                "with one image (%s)",
                len(single),
                ", ".join(single[:5]),
            )
        return [
            float(np.quantile(values if len(values) else pooled, quantile))
            for values in by_class
        ]

    def __call__(self, views: _Views, rows: Sequence[Mapping]) -> list[Finding | None]:
        labels = np.asarray([row["label"] for row in rows])
        found: list[Finding | None] = [None] * len(rows)
        for k in np.unique(labels).tolist():
            mine = np.flatnonzero(labels == k)
            distance, index, _ = distances.nearest(
                views.features[mine], self._points[k]
            )
            for i, d, nearest in zip(mine, distance.tolist(), index, strict=True):
                if d > self._thresholds[k]:
                    found[i] = Finding(
                        filter=self.name,
                        reason=f"too far from every real {self._names[k]}",
                        score=d,
                        threshold=self._thresholds[k],
                        real=self._ids[self._members[k][nearest]],
                    )
        return found


def _require_images(train: Split, groups: np.ndarray, count: int) -> None:
    """Requires as many different images in each class as there are folds."""
    different = np.unique(groups, return_index=True)[1]
    counts = np.bincount(train.labels[different], minlength=len(train.class_names))
    smallest = int(counts.argmin())
    if counts[smallest] < count:
        raise UserError(
            f"{FIELD}.label_folds",
            wanted=f"at least {count} different training images in each class, one per "
            "fold",
            got=f"{counts[smallest]} in class {train.class_names[smallest]!r}",
            fix=f"Lower it to {counts[smallest]}, or set {FIELD}.label=clip.",
        )
