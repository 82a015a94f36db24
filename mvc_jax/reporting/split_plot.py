"""A plot of each run's accuracies over several splits."""

import io
from collections.abc import Sequence

import numpy as np

_DOT, _MEAN, _LINE = "#56b4e9", "#000000", "#dddddd"
_ROW = 0.26  # inches


def png(titles: Sequence[str], accuracies: Sequence[Sequence[float]]) -> bytes:
    """Draws a row for each run: a dot for each split, and a bar at their mean.

    Args:
      titles: of the runs, from above.
      accuracies: of each run, in [0, 1], one for each split.
    """
    import matplotlib
    from matplotlib import figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc has no effect
        matplotlib.rcParams.update({"font.size": 9, "axes.edgecolor": "#888888"})
        size = (8.4, 0.9 + _ROW * len(titles))
        drawing = figure.Figure(figsize=size, layout="constrained", facecolor="white")
        axes = drawing.subplots()
        for place, values in enumerate(accuracies):
            percent = 100 * np.asarray(values, np.float64)
            places = np.full(len(percent), place)
            axes.plot(percent, places, "o", color=_DOT, markersize=4.5, alpha=0.8)
            axes.plot(percent.mean(), place, "|", color=_MEAN, markersize=10)
        axes.set_yticks(range(len(titles)), titles)
        axes.set_ylim(len(titles) - 0.4, -0.6)  # the first above
        axes.set_xlabel("test accuracy, %: each split, and their mean")
        axes.grid(axis="both", color=_LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
