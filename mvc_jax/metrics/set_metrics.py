"""All metrics of the sets of a run, against the training images, whole and by class.

The test images are a set like the synthetic ones: what they score is what images score
that are as real and as new as can be.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from etils import epath

from mvc_jax import files, processes
from mvc_jax.digests import Digests
from mvc_jax.metrics import compare, distances, domain_shift, other_class, points
from mvc_jax.metrics.compare import Wanted
from mvc_jax.metrics.distances import Nearest
from mvc_jax.metrics.image_features import ImageFeatures
from mvc_jax.metrics.points import Points

_CLOSEST = 24  # pairs of a synthetic and a real image that are listed
_NEW = 0.05  # fraction of test images that count as near to a training image
_TIMED = 1024  # points of each side of the block that is timed
Texts = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compute.

    Attributes:
      metrics: names, as in `config.evaluate.metrics`.
      neighbours: k of precision, recall, density and coverage, and of predicted labels.
      class_names: K names.
      class_texts: unit embeddings [K, P] of a text for each class; None without texts.
      embed_texts: texts -> unit embeddings; None without texts.
      confidence: of intervals.
    """

    metrics: Collection[str]
    neighbours: int
    class_names: Sequence[str]
    class_texts: np.ndarray | None = None
    embed_texts: Texts | None = None
    confidence: float = 0.95

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.metrics, self.neighbours)


class SetMetrics:
    """The metrics of sets, computed one after another and kept on disk.

    What is computed of a set is in the files `features/<set>.json`, which `evaluate`
    deletes at the end, and `nearest/<set>.parquet`, which stays: a row per image, with
    the training and test images that it is nearest to, its source, how near, and its
    predicted label. An interrupted run goes on with the next set, and many
    processes share sets out.

    Attributes:
      written: paths of the files to keep, relative to the stage's folder.
    """

    def __init__(
        self,
        train: ImageFeatures,
        test: ImageFeatures,
        options: Options,
        folder: epath.Path,
        digests: Digests,
        advance: Callable[[int], None],
    ):
        """Compares the training images with themselves.

        Args:
          train: to which sets are compared.
          test: as well.
          options: what to compute.
          folder: of the stage.
          digests: of its files.
          advance: called with the number of blocks that were just done.
        """
        self.train, self.test, self.written = train, test, []
        self._options, self._advance = options, advance
        self._folder, self._digests = folder, digests
        compare.require_finite(train.features, "train")
        own = advance if processes.is_first() else None  # which all compute
        self._own = compare.describe(train.features, options.wanted, own)
        self._among = self._own.nearest
        if not self._same_space:
            self._among = distances.nearest(train.pixels, train.pixels, skip_self=True)
        self._across = distances.nearest(test.pixels, train.pixels)
        self._copy_distance = distances.copy_distance(self._among.different)
        self._leak_distance = distances.copy_distance(self._across.different)
        self._new_distance = float(np.quantile(self._across.distance, _NEW))

    def describe(self, sets: Sequence[ImageFeatures]) -> dict[str, Any]:
        """Describes the training images and each set.

        Returns:
          as JSON values: `sets`, a short row for each, by pixels, and `images`, all
          metrics, where the test images are a set too; {} in processes but the first.
        """
        self._measure_missing([self.test, *sets])
        if not processes.is_first():
            return {}
        measured = {
            x.images.name: files.read_json(self._record(x)) for x in (self.test, *sets)
        }
        for name, distance in _unmixed_distances(sets).items():
            measured[name]["unmixed_distance"] = distance
        confidence, test = self._options.confidence, measured["test"]["other_class"]
        remarks: list[str] = []
        for name in [x.images.name for x in sets] if test else ():
            found = other_class.with_baseline(
                measured[name]["other_class"], test, confidence
            )
            measured[name]["other_class"] = found
            remarks += other_class.notes(name, found, confidence)
        rows: dict[str, Any] = {
            "real": {
                "images": len(self.train.images),
                "diversity": _diversity(self.train),
            }
        }
        if len(self.train.images) > 1:
            rows["real"]["nearest_real"] = float(self._among.distance.mean())
        for found in sets:
            row = measured[found.images.name]
            rows[found.images.name] = {
                "images": row["images"],
                "diversity": _diversity(found),
                "constant": found.constant,
                "nearest_real": row["nearest_train"],
                "copies": row["copies"],
                "leaks": row["leaks"],
            }
        dims = self.train.features.dims
        images = {
            "dims": dims,
            "neighbours": self._options.neighbours,
            "train_images": len(self.train.images),
            "copy_distance": self._copy_distance,
            "leak_distance": self._leak_distance,
            "near_distance": self._new_distance,
            "sets": measured,
            "notes": remarks + notes(measured, dims),
        }
        return {"sets": rows, "images": images}

    def _measure_missing(self, sets: Sequence[ImageFeatures]) -> None:
        """Measures sets whose metrics are not on the disk; each by one process."""

        def find_missing() -> list[int]:
            return [
                i
                for i, x in enumerate(sets)
                if not self._record(x).exists()
                or not self._digests.intact(self._folder / _table(x))
            ]

        missing = processes.on_first("the sets that are not measured", find_missing)
        a, lengths = len(self.train.images), [len(x.images) for x in sets]
        blocks = [compare.blocks_of(a, [b]) - compare.blocks_of(a, []) for b in lengths]
        if processes.is_first():
            self._advance(sum(blocks) - sum(blocks[i] for i in missing))
        for i in processes.share(missing, [blocks[i] for i in missing]):
            row, columns = self.measure(sets[i])
            self._write_nearest(self._folder / _table(sets[i]), columns)
            files.write_json(self._record(sets[i]), row)
        self.written += map(_table, sets)
        processes.barrier("the metrics of sets", processes.WORK_SECONDS)

    def _record(self, found: ImageFeatures) -> epath.Path:
        return self._folder / "features" / f"{found.images.name}.json"

    def _write_nearest(self, path: epath.Path, columns: dict[str, Any]) -> None:
        """Writes the columns, real images by their ids."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        train, test = (x.images.names for x in (self.train, self.test))
        ids = {"train": train, "train_by_features": train, "source": train}
        ids |= {"train_of_predicted": train, "train_of_own": train}
        ids["test"] = test
        named = {
            name: pa.array([ids[name][i] if i >= 0 else None for i in values])
            if name in ids
            else pa.array(values)
            for name, values in columns.items()
        }
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            pq.write_table(pa.table(named), file)
        self._digests.add(path)

    @property
    def _same_space(self) -> bool:
        return self.train.features is self.train.pixels

    def measure(self, found: ImageFeatures) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compares a set with the training and test images.

        Args:
          found: features of the set, with at least one image.

        Returns:
          its metrics, as JSON values; and columns of numbers and names for each of its
          images: what it is nearest to.
        """
        options = self._options
        images = found.images
        compare.require_finite(found.features, images.name)
        own = compare.describe(found.features, options.wanted, self._advance)
        search = other_class.LabelSearch(
            self.train.images.labels, images.labels, options.neighbours
        )
        metrics, nearest = compare.compare(
            self._own, own, options.wanted, self._advance, {"labels": search}
        )
        predictions = search.predictions()
        if options.embed_texts is not None and options.class_texts is not None:
            scores, zero_shot = _texts(found, options)
            metrics |= scores
            predictions = dataclasses.replace(predictions, zero_shot=zero_shot)
        if "shift" in options.metrics:
            a, b = self.train.statistics, found.statistics
            metrics["histogram_shift"] = domain_shift.histogram_shift(a, b)
            metrics["spectrum_shift"] = domain_shift.spectrum_shift(a, b)
        classes = self._classes(found)
        spread = [row["within_class"] for row in classes if row["within_class"]]
        metrics["within_class"] = float(np.mean(spread)) if spread else None
        columns = self._columns(found, nearest)
        described: dict[str, Any] = {"images": len(images), **metrics}
        described |= self._copies(columns)
        described["closest"] = self._closest(found, columns, "", self._among)
        if not self._same_space:
            described["closest_by_features"] = self._closest(
                found, columns, "_by_features", self._own.nearest
            )
        described["classes"] = classes
        described["other_class"] = self._other_class(found, predictions)
        if described["other_class"] is not None:
            columns |= predictions.columns()
        return described, columns

    def _other_class(
        self, found: ImageFeatures, predictions: other_class.Predictions
    ) -> dict[str, Any] | None:
        """Images that show another class; None if there is one class only."""
        images, real = found.images, self.train.images
        if len(np.unique(real.labels)) < 2:
            return None
        classes = len(self._options.class_names)
        return {
            "neighbours": min(self._options.neighbours, len(real)),
            **other_class.describe(predictions, images.labels, images.sources, classes),
            "most_certain": other_class.most_certain(
                predictions,
                images.labels,
                images.names,
                found.features,
                self.train.features,
                real.names,
            ),
        }

    def _classes(self, found: ImageFeatures) -> list[dict[str, Any]]:
        """A row per class; what needs images is None where there are none."""
        options = self._options
        rows = []
        for label, name in enumerate(options.class_names):
            real = np.flatnonzero(self.train.images.labels == label)
            mine = np.flatnonzero(found.images.labels == label)
            row: dict[str, Any] = {
                "name": name,
                "images": len(mine),
                "real_images": len(real),
                "within_class": None,
            }
            if len(mine) > 1:
                row["within_class"] = distances.mean_pairwise(found.features[mine])
            if "classes" in options.metrics and len(mine) and len(real):
                pair = [
                    compare.describe(each, options.wanted)
                    for each in (self.train.features[real], found.features[mine])
                ]
                row |= compare.compare(*pair, options.wanted)[0]
            rows.append(row)
        return rows

    def _columns(self, found: ImageFeatures, nearest: Nearest) -> dict[str, Any]:
        """For each image of a set what it is nearest to, and how near."""
        in_pixels = nearest
        if not self._same_space:
            in_pixels = distances.nearest(found.pixels, self.train.pixels)
        columns: dict[str, Any] = {
            "name": found.images.names,
            "label": found.images.labels,
            "train": in_pixels.index,
            "train_distance": in_pixels.distance,
        }
        if not self._same_space:
            columns["train_by_features"] = nearest.index
            columns["train_distance_by_features"] = nearest.distance
        if found.images.sources is None:
            return columns
        test = distances.nearest(found.pixels, self.test.pixels)
        columns |= {"test": test.index, "test_distance": test.distance}
        sources = found.images.sources
        known = np.flatnonzero(sources >= 0)
        spaces = [("", found.pixels, self.train.pixels)]
        if not self._same_space:
            spaces.append(("_by_features", found.features, self.train.features))
        for suffix, a, b in spaces:
            distance = np.full(len(sources), np.nan)
            distance[known] = distances.paired(a, b, known, sources[known])
            columns[f"source_distance{suffix}"] = distance
        columns["source"] = sources
        return columns

    def _copies(self, columns: dict[str, Any]) -> dict[str, Any]:
        """How near the images of a set are to real ones, in pixels."""
        train = columns["train_distance"]
        found: dict[str, Any] = {
            "nearest_train": float(train.mean()),
            "near_train": float((train < self._new_distance).mean()),
        }
        if "test" not in columns:
            return found
        test, source = columns["test_distance"], columns["source_distance"]
        known = source[np.isfinite(source)]
        return {
            **found,
            "nearest_test": float(test.mean()),
            "copies": int((train < self._copy_distance).sum()),
            "leaks": int((test < self._leak_distance).sum()),
            "source_distance": float(known.mean()) if len(known) else None,
        }

    def _closest(
        self, found: ImageFeatures, columns: dict[str, Any], space: str, among: Nearest
    ) -> list[dict[str, Any]]:
        """The pairs of a synthetic and a training image that are nearest.

        Beside each is how far the training images of its class are from their own
        nearest, the least and the median.

        Args:
          found: the set.
          columns: of its images.
          space: what follows the names of the columns; "": by pixels.
          among: the nearest other training image of each, in the same space.
        """
        rows = []
        real, labels = self.train.images, self.train.images.labels
        different = among.different
        nearest, distance = columns[f"train{space}"], columns[f"train_distance{space}"]
        for i in np.argsort(distance, kind="stable")[:_CLOSEST]:
            label = int(columns["label"][i])
            mine = different[(labels == label) & np.isfinite(different)]
            rows.append(
                {
                    "image": found.images.names[i],
                    "label": label,
                    "train": real.names[nearest[i]],
                    "distance": float(distance[i]),
                    "class_least": float(mine.min()) if len(mine) else None,
                    "class_median": float(np.median(mine)) if len(mine) else None,
                }
            )
        return rows


def _table(found: ImageFeatures) -> str:
    return f"nearest/{found.images.name}.parquet"


def _texts(
    found: ImageFeatures, options: Options
) -> tuple[dict[str, float | None], np.ndarray]:
    """CLIP's agreement of images with texts, and the class of each image's nearest.

    `clip_score`: 100 times the cosine of an image and its prompt, at least 0; Hessel et
    al., arXiv 2104.08718, equation 1, with the weight 100 as is usual. It is None where
    prompts are unknown. `label_agreement`: how often the text of the image's class is
    the nearest of those of all classes, by arXiv 2103.00020.
    """
    images = found.images
    unique = {text: i for i, text in enumerate(dict.fromkeys(images.prompts))}
    texts = options.embed_texts([*unique]) if unique else None
    which = np.asarray([unique[text] for text in images.prompts], np.int64)
    zero_shot = np.empty(len(images), np.int64)
    total, start = 0.0, 0
    for batch in found.features.features():
        rows = slice(start, start + len(batch))
        start = rows.stop
        zero_shot[rows] = (batch @ options.class_texts.T).argmax(1)
        if texts is not None:
            cosine = np.einsum("nd,nd->n", batch, texts[which[rows]])
            total += float(np.maximum(cosine, 0).sum())
    score = 100 * total / len(images) if texts is not None else None
    agreement = float((zero_shot == images.labels).mean())
    return {"clip_score": score, "label_agreement": agreement}, zero_shot


def _unmixed_distances(sets: Sequence[ImageFeatures]) -> dict[str, float]:
    """Mean distance of an image and the unmixed one of its recipe and noise, by pixels.

    By set, of the sets that have such images; {} without the set `unmixed`.
    """
    unmixed = next((x for x in sets if x.images.name == "unmixed"), None)
    if unmixed is None:
        return {}
    row_of = {k: i for i, k in enumerate(unmixed.images.names)}
    found = {}
    for each in sets:
        pairs = [(i, row_of.get(k, -1)) for i, k in enumerate(each.images.names)]
        rows, columns = (
            np.asarray([x for x in pairs if x[1] >= 0], int).reshape(-1, 2).T
        )
        if each is not unmixed and len(rows):
            distance = distances.paired(each.pixels, unmixed.pixels, rows, columns)
            found[each.images.name] = float(distance.mean())
    return found


def _diversity(found: ImageFeatures) -> float:
    """The mean distance of two images of the same class, by pixels."""
    labels = found.images.labels
    members = [found.pixels[labels == label] for label in np.unique(labels)]
    within = [distances.mean_pairwise(mine) for mine in members if len(mine) > 1]
    return float(np.mean(within)) if within else 0.0


def cost(train: Points, sizes: Sequence[int]) -> str:
    """What comparing sets of these sizes with the training images costs, in words.

    One block of the real features is timed.
    """
    some = train[np.arange(min(_TIMED, len(train)))]
    began = time.perf_counter()
    compare.describe(some, Wanted(("kid", "prdc")))
    seconds = time.perf_counter() - began
    pairs = sum(n * n // 2 + n * len(train) for n in sizes) + len(train) ** 2 // 2
    seconds *= pairs / max(len(some) ** 2, 1) / points.workers()
    about = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"{pairs:.2g} pairs of images with {train.dims} dims: about {about}"


def notes(described: dict[str, dict[str, Any]], dims: int) -> list[str]:
    """What to know about the numbers of some sets, as sentences.

    Args:
      described: set -> its metrics.
      dims: of the features.
    """
    found = []
    for name, row in described.items():
        if row.get("copies") == row["images"]:
            found.append(
                f"{name}: every image is a copy of a training image; its metrics say "
                "how well it copies."
            )
        empty = [x["name"] for x in row["classes"] if not x["images"]]
        if empty and name != "test":
            found.append(
                f"{name} has no image of {len(empty)} classes "
                f"({', '.join(empty[:10])}), of which there are no numbers."
            )
    few = {name: row["images"] for name, row in described.items()}
    small = [f"{name} ({n})" for name, n in few.items() if n <= dims]
    if small:
        found.append(
            f"Fewer images than the {dims} dims of a feature: {', '.join(small)}. The "
            "Fréchet distance then says more about their number than about the images; "
            "use KID."
        )
    elif min(few.values(), default=compare.KID_IMAGES) < compare.KID_IMAGES:
        found.append(
            f"Below {compare.KID_IMAGES:,} images the Fréchet distance is too large, "
            "the more so the fewer they are; KID is not."
        )
    return found
