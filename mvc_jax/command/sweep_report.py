"""What a sweep found, as sentences, tables and a plot."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import stage
from mvc_jax.command import document, run_config, sweep_results, vary
from mvc_jax.command.sweep_results import Found
from mvc_jax.configs import common
from mvc_jax.reporting import tables
from mvc_jax.reporting.tables import Cell, Table

with epy.lazy_imports():
    from mvc_jax.classification import comparisons, runs
    from mvc_jax.reporting import value_plot

_MAX_LINES = 7  # of a plot, which has as many colours
_MAX_PANELS = 6


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
    results = {name: document.read(folder) for name, folder in folders.items()}
    reference = next((p for p in points if _is_own(p, config)), points[0]).name
    confidence = config.evaluate.confidence
    links = {
        name: f"{name}/report/report.html"
        for name, folder in folders.items()
        if stage.is_complete(folder, "report")
    }
    found = Found(axes, points, results, reference, confidence, links)
    for axis in axes:
        sweep_results.require_change(axis, found)
    summary = sweep_results.summarise(found)
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


def _is_own(point: vary.Point, config: ConfigDict) -> bool:
    """Whether a point has the config's own values."""
    return all(run_config.value(config, k) == v for k, v in point.values.items())


def _document(found: Found, summary: Mapping[str, Any]) -> tables.Document:
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


def _lead(found: Found, summary: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    lead, asked = [], summary["differences"]
    clear = [each for each in asked if each["verdict"] != "unclear"]
    several = len(asked) > 1
    corrected = f", after a correction for {len(asked)} differences" if several else ""
    if clear:
        said = "; ".join(
            f"{comparisons.lower_title(each['run'])} at {each['point']}: "
            f"{document.points(each)}"
            for each in clear
        )
        lead.append(f"Compared with {found.reference}{corrected}: {said}.")
    elif asked:
        kinds = document.counted(len({x["run"] for x in asked}), "kind")
        lead.append(
            f"No difference from {found.reference} is seen at any other value, in "
            f"{kinds} of training that the values change{corrected}."
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
        asked = document.counted(len(added), "comparison")
        lead.append(
            f"Of {asked} with real images alone and the same augmentation, synthetic "
            f"images help in {counts['yes']} and lower the accuracy in "
            f"{counts['no']}; in {counts['unclear']} no difference is clear."
        )
    return lead


def _notes(found: Found, summary: Mapping[str, Any]) -> list[str]:
    images = {point["test_images"] for point in summary["points"]}
    seeds = {
        run["seeds"] for point in summary["points"] for run in point["runs"].values()
    }
    names = {run for point in summary["points"] for run in point["runs"]}
    once = runs.drawn_once(map(runs.parse, names))
    few = [min(seeds), *([] if min(seeds) == max(seeds) else [max(seeds)])]
    shown = [min(images), *([] if min(images) == max(images) else [max(images)])]
    return [
        f"An interval ({found.confidence:.0%}) is for other seeds of the classifiers "
        f"({' to '.join(map(str, few))} here) and other test images "
        f"({' to '.join(map(str, shown))} here), of {once} at each value. Another "
        "split changes every number: `mvc-jax repeat` shows how much.",
        "A verdict is corrected for how often its question is asked (Holm); an "
        "interval is of each difference by itself.",
        "The value with the highest accuracy on test images is not thereby the best "
        "one: of several that are alike, one is the highest by chance.",
    ]


def _accuracies(found: Found, summary: Mapping[str, Any]) -> list[Table]:
    """The accuracy of each run at each value: for two fields a table for each run."""
    by_name = {point["name"]: point["runs"] for point in summary["points"]}
    unit = f"Test accuracy in percent, with its {found.confidence:.0%} interval."
    constant = [
        [
            Cell(runs.parse(run).title),
            document.accuracy_cell(by_name[found.reference][run]),
        ]
        for run in summary["same"]
    ]
    made = []
    if len(found.axes) == 2:
        made += [_grid(found, run, by_name, unit) for run in summary["affected"]]
    else:
        heads = [
            Cell(_short(found, point), link=found.links.get(point.name, ""))
            for point in found.points
        ]
        rows = [
            [
                Cell(runs.parse(run).title),
                *(
                    document.accuracy_cell(by_name[point.name].get(run))
                    for point in found.points
                ),
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


def _grid(found: Found, run: str, by_name: Mapping[str, Any], unit: str) -> Table:
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
                    document.accuracy_cell(at[value, other]),
                    shade=shades.get((value, other), 0.0),
                )
                for other in across.values
            ),
        ]
        for value in down.values
    ]
    note = f"{unit} Darker is higher."
    return Table(f"Accuracy: {comparisons.lower_title(run)}", columns, rows, note)


def _difference_table(found: Found, summary: Mapping[str, Any]) -> list[Table]:
    if not summary["differences"]:
        return []
    rows = [
        (runs.parse(each["run"]).title, each["point"], each)
        for each in summary["differences"]
    ]
    table = document.difference_table(
        f"Differences from {found.reference}",
        f"The accuracy at a value minus that at {found.reference}, with the same test "
        "images and seeds.",
        rows,
        place="at",
        words={"yes": "higher", "no": "lower"},
        confidence=found.confidence,
    )
    return [table]


def _added_table(found: Found, summary: Mapping[str, Any]) -> list[Table]:
    if not summary["added"]:
        return []
    rows = [
        (
            f"{runs.parse(each['run']).title}, over "
            f"{comparisons.lower_title(each['against'])}",
            each["point"],
            each,
        )
        for each in summary["added"]
    ]
    table = document.difference_table(
        "What the synthetic images add",
        "The accuracy with them minus that without, with the same augmentation.",
        rows,
        place="at",
        words={"yes": "they help", "no": "they lower it"},
        confidence=found.confidence,
    )
    return [table]


def _panels(found: Found, summary: Mapping[str, Any]) -> list[Any]:
    """One with a line for each run; for several fields one for each run."""
    by_name = {point["name"]: point["runs"] for point in summary["points"]}
    first, *rest = found.axes
    levels = {
        f"{runs.parse(run).title}, at every value": by_name[found.reference][run][
            "accuracy"
        ]
        for run in summary["same"]
        if run in {each["against"] for each in summary["added"]}
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


def _short(found: Found, point: vary.Point) -> str:
    """A point's name in a heading: its values alone."""
    return ", ".join(vary.label(point.values[axis.field]) for axis in found.axes)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
