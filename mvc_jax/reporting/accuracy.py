"""Accuracies: of every run with its difference, of every class; what is confused."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mvc_jax.reporting import interval_axis

MAX_CONFUSED = 20  # classes of which a confusion is a table, not a picture
_WORST, _BEST = 12, 4  # classes that are shown of many
_PAIRS = 10  # of confused classes
_BLUE, _RED = (64, 126, 190), (196, 84, 66)  # seen on white and on black


def table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the section shows beside `metrics["runs"]`.

    Returns:
      `axis` of the differences; `against`, the name of the reference that most rows
      have; `interval`, its name; `has_intervals`; `caveats`, sentences; `least_steps`.
    """
    found = [run["difference"] for run in metrics["runs"] if run["difference"]]
    names = [each["against"] for each in found]
    confidence = metrics.get("confidence")  # not in older metrics
    return {
        "axis": interval_axis.axis(found),
        "against": max(dict.fromkeys(names), key=names.count, default=""),
        "interval": f"{100 * confidence:g}% interval" if confidence else "interval",
        "has_intervals": any(each["low"] is not None for each in found),
        "caveats": caveats(metrics, "accuracy"),
        "least_steps": metrics.get("least_steps", metrics["steps"]),
    }


def caveats(metrics: Mapping[str, Any], claim: str) -> list[str]:
    """Sentences that limit a claim; older metrics have them in one list, for all."""
    if "caveats" in metrics:
        return metrics["caveats"].get(claim, [])
    return metrics.get("notes", []) if claim == "accuracy" else []


def by_class(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of every run that has a reference, and the confusion of it.

    Returns:
      `runs`, for each its `differences` (rows that lost the most first), their `axis`,
      how many rows are `hidden` between the `worst` and the best, and its `confusion`;
      `chosen`, the index of the one that is shown first; `plain`, the confusion of
      `real`, None without it; `of_many`, whether confusions are pictures.
    """
    names, confused = metrics["class_names"], confusion(metrics)
    accuracies = {run["name"]: run["per_class"] for run in metrics["runs"]}
    runs = []
    for run in metrics["runs"]:
        if not run["difference"]:
            continue
        rows = _differences(run, accuracies[run["difference"]["against"]], names)
        hidden = max(len(rows) - _WORST - _BEST, 0) if len(rows) > MAX_CONFUSED else 0
        runs.append(
            {
                "name": run["name"],
                "title": run["title"],
                "against": run["difference"]["against"],
                "axis": interval_axis.axis(rows),
                "worst": rows[:_WORST] if hidden else rows,
                "hidden": hidden,
                "best": rows[-_BEST:] if hidden else [],
                "confusion": shown_confusion(confused.get(run["name"]), names),
            }
        )
    preferred = [i for i, run in enumerate(runs) if run["name"] == "combined"]
    return {
        "runs": runs,
        "chosen": (preferred or [0])[0],
        "plain": shown_confusion(confused.get("real"), names),
        "of_many": len(names) > MAX_CONFUSED,
    }


def _differences(run: Mapping, reference: list, names: list[str]) -> list[dict]:
    """A row per class, that which lost the most first."""
    known = run.get("difference_by_class")  # not in older metrics
    rows = []
    for k, name in enumerate(names):
        mine, theirs = run["per_class"][k], reference[k]
        row = {"mean": mine - theirs, "low": None, "high": None, "images": None}
        row |= known[k] if known else {}
        rows.append({"name": name, "accuracy": mine, "reference": theirs, **row})
    rows = [
        row for row in rows if row["mean"] is not None and row["mean"] == row["mean"]
    ]
    return sorted(rows, key=lambda row: row["mean"])


def confusion(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run -> counts, int [K, K], of predictions (columns) by class (rows).

    Older metrics have the matrix itself, or none.
    """
    count, found = len(metrics["class_names"]), {}
    for row in metrics["runs"]:
        if "confusion_counts" in row:
            matrix = np.zeros((count, count), np.int64)
            for label, counts in enumerate(row["confusion_counts"]):
                for other, n in counts.items():
                    matrix[label, int(other)] = n
            found[row["name"]] = matrix
        elif row.get("confusion"):
            found[row["name"]] = np.asarray(row["confusion"])
    return found


def shown_confusion(counts: np.ndarray | None, names: list[str]) -> dict | None:
    """A heat map: rows of shares of each class; of many classes a picture.

    Returns:
      None without counts; else `rows`, for each class its name and the shares, or
      `uri` of a picture with a pixel for each; and `pairs`, what is confused most.
    """
    if counts is None:
        return None
    total = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    wrong = np.where(np.eye(len(names), dtype=bool), 0, shares)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [np.unravel_index(i, wrong.shape) for i in order]
    found: dict[str, Any] = {
        "pairs": [
            {
                "name": names[k],
                "other": names[n],
                "share": float(wrong[k, n]),
                "count": int(counts[k, n]),
                "total": int(total[k, 0]),
            }
            for k, n in pairs
            if wrong[k, n]
        ]
    }
    if len(names) <= MAX_CONFUSED:
        rows = zip(names, shares.tolist(), strict=True)
        return found | {"rows": [{"name": name, "shares": row} for name, row in rows]}
    return found | {"uri": _heat_map(shares)}


def _heat_map(shares: np.ndarray) -> str:
    """A PNG of a pixel per share, the more opaque the larger: see `shown_confusion`."""
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = _RED
    diagonal = np.arange(len(shares))
    pixels[diagonal, diagonal, :3] = _BLUE
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
