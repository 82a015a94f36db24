"""What a sweep found: accuracies at each value, and differences that hold.

Every interval is for other classifier seeds and other test images, of the one split and
the one generator that a point has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import stage
from mvc_jax.command import document, vary
from mvc_jax.configs import common
from mvc_jax.errors import UserError
from mvc_jax.reporting import tables
from mvc_jax.reporting.tables import Cell, Table

with epy.lazy_imports():
    from mvc_jax.classification import comparisons, runs, tested
    from mvc_jax.reporting import value_plot

_MAX_LINES = 7  # of a plot, which has as many colours
_MAX_PANELS = 6


@dataclasses.dataclass(frozen=True)
class _Found:
    """The points of a sweep with their results.

    Attributes:
      axes: what was varied.
      points: with their values.
      results: of each point, by its name.
      reference: name of the point that others are compared with.
      confidence: of the intervals.
    """

    axes: Sequence[vary.Axis]
    points: Sequence[vary.Point]
    results: Mapping[str, "tested.Tested"]
    reference: str
    confidence: float

    @property
    def runs(self) -> list[str]:
        """Names of all runs, in the order of the config."""
        return [*dict.fromkeys(x for r in self.results.values() for x in r.correct)]

    def differs(self, run: str, name: str, other: str) -> bool:
        """Whether a run has other results at another point, on the same images."""
        ours, theirs = (self.results[x].correct.get(run) for x in (name, other))
        return ours is not None and theirs is not None and not _equal(ours, theirs)

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

    def is_affected(self, run: str) -> bool:
        """Whether the values change a run's results, or on what they are tested."""
        first, *others = self.points
        return any(
            run not in self.results[name].correct
            or not self.same_images(first.name, name)
            or self.differs(run, first.name, name)
            for name in [first.name, *(point.name for point in others)]
        )


def write(
    axes: Sequence[vary.Axis],
    points: Sequence[vary.Point],
    config: ConfigDict,
    workdir: epath.Path,
) -> None:
    """Compares the points of a finished sweep; prints and writes what was found.

    Args:
      axes: what was varied.
      points: their runs, in the order of the values.
      config: of the sweep, without the values.
      workdir: of the sweep.

    Raises:
      UserError: a field changed nothing.
    """
    folders = {point.name: workdir / point.name for point in points}
    without = [n for n, f in folders.items() if not stage.is_complete(f, "classify")]
    if without:
        print(f"no comparison: the stage classify was not run at {', '.join(without)}")
        return
    results = {name: _read(folder) for name, folder in folders.items()}
    reference = next((p for p in points if _is_own(p, config)), points[0]).name
    confidence = config.evaluate.confidence
    found = _Found(axes, points, results, reference, confidence)
    for axis in axes:
        _require_change(axis, found)
    summary = summarise(found)
    panels = _panels(found, summary)
    picture = value_plot.png(
        panels,
        [
            vary.label(value) if not _is_number(value) else value
            for value in axes[0].values
        ],
        x_label=_title(axes[0]),
        y_label="test accuracy, %",
    )
    document.write(
        workdir / "sweep",
        _document(found, summary),
        summary,
        picture=(f"test accuracy by {axes[0].field}", picture),
    )


def _read(folder: epath.Path) -> "tested.Tested":
    settings = stage.read_manifest(folder, "classify")["settings"]
    return tested.read(folder, settings["classify"]["runs"])


def _is_own(point: vary.Point, config: ConfigDict) -> bool:
    """Whether a point has the config's own values."""
    flat = common.FIELDS.flat()
    return all(
        _get(config, name) == value
        for name, value in point.values.items()
        if name in flat
    )


def _get(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _require_change(axis: vary.Axis, found: _Found) -> None:
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


def summarise(found: _Found) -> dict[str, Any]:
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
                "same_test_images": found.same_images(point.name, found.reference),
                "runs": {
                    run: _accuracy(correct, found.confidence)
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


def _accuracy(correct: np.ndarray, confidence: float) -> dict[str, Any]:
    interval = comparisons.accuracy(correct, confidence)
    return {
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "seeds": len(correct),
    }


def _differences(found: _Found, affected: Sequence[str]) -> list[dict[str, Any]]:
    """Every run at every other point, over the same run at the reference."""
    about = [
        {"run": run, "point": point.name, "against": found.reference}
        for run in affected
        for point in found.points
        if point.name != found.reference
        and found.differs(run, point.name, found.reference)
        and found.same_images(point.name, found.reference)
    ]
    pairs = [
        tuple(found.results[x[key]].correct[x["run"]] for key in ("point", "against"))
        for x in about
    ]
    answered = comparisons.compared(pairs, found.confidence)
    return [x | each for x, each in zip(about, answered, strict=True)]


def _added(found: _Found, affected: Sequence[str]) -> list[dict[str, Any]]:
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


def _document(found: _Found, summary: Mapping[str, Any]) -> tables.Document:
    fields = " and ".join(axis.field for axis in found.axes)
    return tables.Document(
        title=f"Sweep over {fields}",
        lead=_lead(found, summary),
        notes=_notes(found, summary),
        tables=[
            *_accuracies(found, summary),
            *_difference_table(found, summary),
            *_added_table(found, summary),
        ],
    )


def _lead(found: _Found, summary: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    lead, asked = [], summary["differences"]
    clear = [each for each in asked if each["verdict"] != "unclear"]
    several = len(asked) > 1
    corrected = f", after a correction for {len(asked)} differences" if several else ""
    if clear:
        said = "; ".join(
            f"{_lower(each['run'])} at {each['point']}: {_points(each)}"
            for each in clear
        )
        lead.append(f"Compared with {found.reference}{corrected}: {said}.")
    elif asked:
        lead.append(
            f"No difference from {found.reference} is seen at any other value, in "
            f"{_counted(len({x['run'] for x in asked}), 'kind')} of training that the "
            f"values change{corrected}."
        )
    if not all(point["same_test_images"] for point in summary["points"]):
        lead.append(
            "The values have different test images, so that accuracies are not "
            "compared pair by pair: their intervals are all that can be compared."
        )
    if added := summary["added"]:
        counts = {
            verdict: sum(x["verdict"] == verdict for x in added)
            for verdict in ("yes", "no", "unclear")
        }
        lead.append(
            f"Of {_counted(len(added), 'comparison')} with real images alone and the "
            f"same augmentation, synthetic images help in {counts['yes']} and lower "
            f"the accuracy in {counts['no']}; in {counts['unclear']} no difference is "
            "seen."
        )
    return lead


def _notes(found: _Found, summary: Mapping[str, Any]) -> list[str]:
    images = {point["test_images"] for point in summary["points"]}
    seeds = {
        run["seeds"] for point in summary["points"] for run in point["runs"].values()
    }
    few = [min(seeds), *([] if min(seeds) == max(seeds) else [max(seeds)])]
    shown = [min(images), *([] if min(images) == max(images) else [max(images)])]
    return [
        f"An interval ({found.confidence:.0%}) is for other seeds of the classifiers "
        f"({' to '.join(map(str, few))} here) and other test images "
        f"({' to '.join(map(str, shown))} here), of one split of the data and one "
        "generator at each value. Another split changes every number: `mvc-jax repeat` "
        "shows how much.",
        "A verdict is corrected for how often its question is asked (Holm); an "
        "interval is of each difference by itself.",
        "The value with the highest accuracy on test images is not thereby the best "
        "one: of several that are alike, one is the highest by chance.",
    ]


def _accuracies(found: _Found, summary: Mapping[str, Any]) -> list[Table]:
    """The accuracy of each run at each value: for two fields a table for each run."""
    by_name = {point["name"]: point["runs"] for point in summary["points"]}
    unit = f"Test accuracy in percent, with its {found.confidence:.0%} interval."
    constant = [
        [Cell(runs.parse(run).title), _percent(by_name[found.reference][run])]
        for run in summary["same"]
    ]
    made = []
    if len(found.axes) == 2:
        made += [_grid(found, run, by_name, unit) for run in summary["affected"]]
    else:
        heads = [
            Cell(_short(found, point), link=_report(point)) for point in found.points
        ]
        rows = [
            [
                Cell(runs.parse(run).title),
                *(_percent(by_name[point.name].get(run)) for point in found.points),
            ]
            for run in summary["affected"]
        ]
        fields = ", ".join(axis.field for axis in found.axes)
        made.append(Table("Accuracy", [Cell(fields), *heads], rows, unit))
    if constant:
        columns = tables.headings("training", "accuracy")
        note = "Runs that no value changes. " + unit
        made.append(Table("The same at every value", columns, constant, note))
    return made


def _grid(found: _Found, run: str, by_name: Mapping[str, Any], unit: str) -> Table:
    """Rows of the first field and columns of the second, darker where higher."""
    down, across = found.axes
    at = {
        (point.values[down.field], point.values[across.field]): by_name[point.name].get(
            run
        )
        for point in found.points
    }
    there = {key: cell["accuracy"] for key, cell in at.items() if cell}
    shades = tables.shaded(there)
    columns = [
        Cell(f"{down.field} \\ {across.field}"),
        *(Cell(vary.label(value)) for value in across.values),
    ]
    rows = [
        [
            Cell(vary.label(value)),
            *(
                dataclasses.replace(
                    _percent(at[value, other]), shade=shades.get((value, other), 0.0)
                )
                for other in across.values
            ),
        ]
        for value in down.values
    ]
    note = f"{unit} Darker is higher."
    return Table(f"Accuracy: {_lower(run)}", columns, rows, note)


def _difference_table(found: _Found, summary: Mapping[str, Any]) -> list[Table]:
    if not summary["differences"]:
        return []
    words = {"yes": "higher", "no": "lower"}
    columns = document.difference_columns("training", "at", confidence=found.confidence)
    rows = [
        [
            Cell(runs.parse(each["run"]).title),
            Cell(each["point"], is_word=True),
            *document.difference_cells(each, words),
        ]
        for each in summary["differences"]
    ]
    note = (
        f"The accuracy at a value minus that at {found.reference}, with the same test "
        "images and seeds."
    )
    return [Table(f"Differences from {found.reference}", columns, rows, note)]


def _added_table(found: _Found, summary: Mapping[str, Any]) -> list[Table]:
    if not summary["added"]:
        return []
    words = {"yes": "they help", "no": "they lower it"}
    columns = document.difference_columns("training", "at", confidence=found.confidence)
    rows = [
        [
            Cell(f"{runs.parse(each['run']).title}, over {_lower(each['against'])}"),
            Cell(each["point"], is_word=True),
            *document.difference_cells(each, words),
        ]
        for each in summary["added"]
    ]
    note = "The accuracy with them minus that without, with the same augmentation."
    return [Table("What the synthetic images add", columns, rows, note)]


def _panels(found: _Found, summary: Mapping[str, Any]) -> list[Any]:
    """One with a line for each run; for several fields one for each run."""
    by_name = {point["name"]: point["runs"] for point in summary["points"]}
    first, *rest = found.axes
    levels = {
        f"{runs.parse(run).title}, at every value": by_name[found.reference][run][
            "accuracy"
        ]
        for run in summary["same"]
        if runs.parse(run).regime == "real"
    }

    def line(label: str, run: str, others: tuple) -> value_plot.Line:
        mine = {
            point.values[first.field]: by_name[point.name].get(run) or {}
            for point in found.points
            if tuple(point.values[axis.field] for axis in rest) == others
        }
        at = [mine[value] for value in first.values]
        parts = [[x.get(key) for x in at] for key in ("accuracy", "low", "high")]
        return value_plot.Line(label, *parts)

    if not rest:
        lines = [line(runs.parse(x).title, x, ()) for x in summary["affected"]]
        return [value_plot.Panel("", lines[:_MAX_LINES], levels)]
    combinations = dict.fromkeys(
        tuple(point.values[axis.field] for axis in rest) for point in found.points
    )
    return [
        value_plot.Panel(
            runs.parse(run).title,
            [
                line(
                    ", ".join(
                        f"{axis.field}={vary.label(value)}"
                        for axis, value in zip(rest, others, strict=True)
                    ),
                    run,
                    others,
                )
                for others in combinations
            ][:_MAX_LINES],
            levels,
        )
        for run in summary["affected"][:_MAX_PANELS]
    ]


def _title(axis: vary.Axis) -> str:
    """The title of an axis: the field, and what it is, as far as that is short."""
    about = common.FIELDS.find(axis.field).help
    about = about if len(about) <= 60 else about.split(";")[0].split(":")[0]
    return f"{axis.field} ({about})" if len(about) <= 70 else axis.field


def _percent(accuracy: Mapping[str, Any] | None) -> Cell:
    if accuracy is None:
        return Cell("–")
    low, high = accuracy["low"], accuracy["high"]
    small = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return Cell(f"{100 * accuracy['accuracy']:.1f}", small)


def _points(each: Mapping[str, Any]) -> str:
    return (
        f"{100 * each['mean']:+.1f} points ({100 * each['low']:+.1f} to "
        f"{100 * each['high']:+.1f})"
    )


def _short(found: _Found, point: vary.Point) -> str:
    """A point's name in a heading: its values alone."""
    return ", ".join(vary.label(point.values[axis.field]) for axis in found.axes)


def _report(point: vary.Point) -> str:
    return f"{point.name}/report/report.html"


def _values(axis: vary.Axis) -> str:
    return f"{axis.field}={','.join(map(vary.label, axis.values))}"


def _lower(run: str) -> str:
    title = runs.parse(run).title
    return title[0].lower() + title[1:]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool((ours == theirs).all())
