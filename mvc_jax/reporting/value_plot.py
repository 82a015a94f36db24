"""A plot of accuracies against the values of a field, with their intervals."""

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np

# Colours that people with any colour vision tell apart: Okabe and Ito, without yellow.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
)
_MARKERS = "osD^vPX"
_DODGE = 0.012  # between lines, as a fraction of the axis


@dataclasses.dataclass(frozen=True)
class Line:
    """Accuracies in [0, 1] at each value; None where there is none.

    Attributes:
      label: in the legend.
      means: one for each value.
      lows, highs: ends of the intervals.
    """

    label: str
    means: Sequence[float | None]
    lows: Sequence[float | None]
    highs: Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines in one pair of axes.

    Attributes:
      title: above it; "": none.
      lines: with a colour each.
      levels: label -> accuracy of what is the same at all values, drawn dashed.
    """

    title: str
    lines: Sequence[Line]
    levels: dict[str, float] = dataclasses.field(default_factory=dict)


def png(
    panels: Sequence[Panel], values: Sequence[object], *, x_label: str, y_label: str
) -> bytes:
    """Draws panels side by side, at most two in a row.

    Args:
      panels: with the same values.
      values: numbers, or texts, which are evenly spaced.
      x_label: title of the x axes.
      y_label: title of the y axes, in percent.
    """
    import matplotlib
    from matplotlib import figure

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    longest = max(len(p.lines) + len(p.levels) for p in panels)
    below = 0.22 * math.ceil(longest / (2 if columns == 1 else 1))
    size = (7.2 if columns == 1 else 5.4 * columns, (3.6 + below) * rows)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc has no effect
        matplotlib.rcParams.update({"font.size": 10, "axes.edgecolor": "#888888"})
        drawing = figure.Figure(figsize=size, layout="constrained", facecolor="white")
        every = drawing.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(every, panels, strict=False):
            _draw(axes, panel, values)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                ncols=2 if columns == 1 else 1,
                frameon=False,
                fontsize=9,
            )
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def is_logarithmic(values: Sequence[object]) -> bool:
    """Whether numbers are spaced more evenly by their ratios, as 1, 2, 4, 8."""
    if len(values) < 3 or not _are_numbers(values) or min(values) <= 0:
        return False
    ordered = np.sort(np.asarray(values, np.float64))
    gaps = [np.diff(each) for each in (ordered, np.log(ordered))]
    linear, logarithmic = (float(gap.std() / gap.mean()) for gap in gaps)
    return logarithmic < linear


def _are_numbers(values: Sequence[object]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _draw(axes, panel: Panel, values: Sequence[object]) -> None:
    from matplotlib import ticker

    at = np.asarray(values if _are_numbers(values) else range(len(values)), np.float64)
    if is_logarithmic(values):
        axes.set_xscale("log")
        shown = np.log(at)
    else:
        shown = at
    width = max(float(shown.max() - shown.min()), 1e-9)
    for number, line in enumerate(panel.lines):
        there = [i for i, mean in enumerate(line.means) if mean is not None]
        offset = (number - (len(panel.lines) - 1) / 2) * _DODGE * width
        x = shown[there] + offset
        order = np.argsort(x)
        x = np.exp(x) if is_logarithmic(values) else x
        means, lows, highs = (
            100 * np.asarray([each[i] for i in there], np.float64)
            for each in (line.means, *_ends(line))
        )
        axes.errorbar(
            x[order],
            means[order],
            yerr=[(means - lows)[order], (highs - means)[order]],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="-" if _are_numbers(values) else "none",
            linewidth=1.2,
            markersize=4.5,
            capsize=2.5,
            label=line.label,
        )
    for number, (label, level) in enumerate(panel.levels.items()):
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(
            100 * level, color="#555555", linewidth=1.1, linestyle=style, label=label
        )
    axes.set_xticks(at, [str(value) for value in values])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.title:
        axes.set_title(panel.title, fontsize=10, loc="left")


def _ends(line: Line) -> tuple[list, list]:
    """The ends of the intervals; the mean itself where there is no interval."""
    lows, highs = (
        [
            mean if end is None else end
            for mean, end in zip(line.means, ends, strict=True)
        ]
        for ends in (line.lows, line.highs)
    )
    return lows, highs
