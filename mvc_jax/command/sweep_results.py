"""What a sweep found: accuracies at each value, and differences that hold.

Every interval is for other classifier seeds and other test images, of the one split and
the one generator that a point has.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epy

from mvc_jax.command import vary
from mvc_jax.configs import common
from mvc_jax.errors import UserError

with epy.lazy_imports():
    from mvc_jax.classification import comparisons, tested


@dataclasses.dataclass(frozen=True)
class Found:
    """The points of a sweep with their results.

    Attributes:
      axes: what was varied.
      points: with their values.
      results: of each point, by its name.
      reference: name of the point that others are compared with.
      confidence: of the intervals.
      links: name of a point -> its report.
    """

    axes: Sequence[vary.Axis]
    points: Sequence[vary.Point]
    results: Mapping[str, "tested.Tested"]
    reference: str
    confidence: float
    links: Mapping[str, str]

    @property
    def runs(self) -> list[str]:
        """Names of all runs, in the order of the config."""
        return [*dict.fromkeys(x for r in self.results.values() for x in r.correct)]

    def differs(self, run: str, name: str, other: str) -> bool:
        """Whether a run has other results at another point, on the same images."""
        ours, theirs = (self.results[x].correct.get(run) for x in (name, other))
        return (
            ours is not None and theirs is not None and not np.array_equal(ours, theirs)
        )

    def same_images(self, name: str, other: str) -> bool:
        """Whether two points were tested on the same images."""
        ours, theirs = self.results[name], self.results[other]
        if ours.class_names != theirs.class_names:
            return False
        source = [
            point.config.data.source
            for point in self.points
            if point.name in (name, other)
        ]
        return not ours.difference_of_images(theirs, len({*source}) == 1)

    @functools.cached_property
    def alike(self) -> set[str]:
        """The points that were tested on the same images as the reference."""
        return {name for name in self.results if self.same_images(name, self.reference)}

    def is_affected(self, run: str) -> bool:
        """Whether the values change a run's results, or on what they are tested."""
        return any(
            run not in results.correct
            or name not in self.alike
            or self.differs(run, name, self.reference)
            for name, results in self.results.items()
        )


def require_change(axis: vary.Axis, found: Found) -> None:
    """Checks that some run differs between the values of a field.

    Raises:
      UserError: none does.
    """
    groups: dict[tuple, list[str]] = {}
    for point in found.points:
        others = tuple(v for k, v in point.values.items() if k != axis.field)
        groups.setdefault(others, []).append(point.name)
    for first, *names in groups.values():
        for name in names:
            runs_ = [found.results[x].correct.keys() for x in (first, name)]
            if runs_[0] != runs_[1] or not found.same_images(first, name):
                return
            if any(found.differs(run, first, name) for run in runs_[0]):
                return
    raise UserError(
        f"--vary {axis.field}",
        wanted="a field that changes what classifiers are trained on, or how",
        got=f"the same predictions of every classifier at {_values(axis)}",
        fix="Vary another field, or train on images that it changes "
        "(config.classify.runs).",
    )


def summarise(found: Found) -> dict[str, Any]:
    """All numbers of a sweep, as JSON.

    Returns:
      `fields`: of each its name, what it is and its values; `reference`; `confidence`;
      `points`: of each its values, test images and runs with `accuracy`, `low`, `high`;
      `same`: runs that no value changes; `differences`: of the others from the
      reference, and `added`: by the synthetic images, both as `comparisons.compared`
      describes them.
    """
    affected = [run for run in found.runs if found.is_affected(run)]
    return {
        "fields": [
            {
                "field": axis.field,
                "about": common.FIELDS.find(axis.field).help,
                "values": list(axis.values),
            }
            for axis in found.axes
        ],
        "reference": found.reference,
        "confidence": found.confidence,
        "points": [
            {
                "name": point.name,
                "values": point.values,
                "test_images": len(found.results[point.name].ids),
                "same_test_images": point.name in found.alike,
                "runs": {
                    run: comparisons.accuracy(correct, found.confidence)
                    for run, correct in found.results[point.name].correct.items()
                },
            }
            for point in found.points
        ],
        "affected": affected,
        "same": [run for run in found.runs if run not in affected],
        "differences": _differences(found, affected),
        "added": _added(found, affected),
    }


def _differences(found: Found, affected: Sequence[str]) -> list[dict[str, Any]]:
    """Every run at every other point, over the same run at the reference."""
    about = [
        {"run": run, "point": point.name, "against": found.reference}
        for run in affected
        for point in found.points
        if point.name != found.reference
        and found.differs(run, point.name, found.reference)
        and point.name in found.alike
    ]
    pairs = [
        tuple(found.results[x[key]].correct[x["run"]] for key in ("point", "against"))
        for x in about
    ]
    answered = comparisons.compared(pairs, found.confidence)
    return [x | each for x, each in zip(about, answered, strict=True)]


def _added(found: Found, affected: Sequence[str]) -> list[dict[str, Any]]:
    """Every run with synthetic images, over real ones with the same augmentation."""
    about, pairs = [], []
    for run in affected:
        for point in found.points:
            correct = found.results[point.name].correct
            real = comparisons.without_synthetic(run, correct)
            if run in correct and real is not None:
                about.append({"run": run, "point": point.name, "against": real})
                pairs.append((correct[run], correct[real]))
    answered = comparisons.compared(pairs, found.confidence)
    return [x | each for x, each in zip(about, answered, strict=True)]


def _values(axis: vary.Axis) -> str:
    return f"{axis.field}={','.join(map(vary.label, axis.values))}"
