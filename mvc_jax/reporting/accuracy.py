"""Accuracies of the runs, by class."""

from typing import Any

MAX_CONFUSED = 20  # classes of a confusion matrix that is shown


def confusion(metrics: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Run -> its confusion matrix, of up to `MAX_CONFUSED` classes.

    Older metrics have the matrix itself, or none.
    """
    classes = range(len(metrics["class_names"]))
    found = {}
    for row in metrics["runs"] if len(classes) <= MAX_CONFUSED else ():
        if "confusion_counts" in row:
            counts = row["confusion_counts"]
            found[row["name"]] = [[x.get(str(k), 0) for k in classes] for x in counts]
        elif row.get("confusion"):
            found[row["name"]] = row["confusion"]
    return found
