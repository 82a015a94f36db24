"""Loss curves of the training loops of a run."""

import math
import re

from etils import epath

from mvc_jax import pictures
from mvc_jax.training import metrics as metrics_log

_MAX_POINTS = 400  # of a curve


def plots(workdir: epath.Path) -> list[dict]:
    """Plots the loss of every training loop; seeds of a run share a plot."""
    loops: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metrics_log.read_rows(workdir):
        if "loss" in row:
            name = re.sub(r"/seed-[\d-]+$", "", row["stage"])
            lines = loops.setdefault(name, {})
            lines.setdefault(row["stage"], []).append((row["step"], row["loss"]))
    return [_curve(name, list(lines.values())) for name, lines in loops.items()]


def _curve(name: str, lines: list[list[tuple[int, float]]]) -> dict:
    """Returns a plot of lines of (step, loss), and what is written below it."""
    thinned, not_finite = [], 0
    for points in lines:
        finite = [point for point in points if math.isfinite(point[1])]
        thinned.append(finite[:: math.ceil(len(finite) / _MAX_POINTS) or 1])
        not_finite += len(points) - len(finite)
    ends = [points[-1] for points in lines]
    return {
        "name": name,
        "svg": pictures.line_plot_svg(
            thinned,
            salt=name,
            line_colour="var(--accent)",
            text_colour="var(--muted)",
            axis_colour="var(--line)",
        ),
        "lines": len(lines),
        "last_step": max(step for step, _ in ends),
        "last_loss": sum(loss for _, loss in ends) / len(ends),
        "not_finite": not_finite,
    }
