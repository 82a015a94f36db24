"""Rows of images of a run: every class, the sets beside each other, captions."""

from mvc_jax.mixing.recipes import MODES
from mvc_jax.reporting.run_images import RunImages

MAX_CLASSES = 20  # in the grid
_EXAMPLES = 6  # rows of the comparison, and captions


def grid(images: RunImages, columns: int) -> list[dict]:
    """Returns a row per class: a real image and `columns` images of each mode from it.

    The real image is the first of those of its class with the most synthetic images.
    """
    made: dict[tuple[str, str], list[dict]] = {}
    for row in images.sets.get("mixed", {}).values():
        made.setdefault((row["source"], row["mode"]), []).append(row)
    modes = [mode for mode in MODES if any(key[1] == mode for key in made)]
    members: dict[int, list[str]] = {}
    for id_, label in zip(images.real.ids, images.real.labels.tolist(), strict=True):
        members.setdefault(label, []).append(id_)
    rows = []
    for label in sorted(members)[:MAX_CLASSES]:
        shown = {
            id_: [made.get((id_, mode), [])[:columns] for mode in modes]
            for id_ in members[label]
        }
        source = max(shown, key=lambda id_: sum(map(len, shown[id_])))
        cells = [images.real_cell(source, label, "real")]
        for mode, found in zip(modes, shown[source], strict=True):
            cells += [images.cell("mixed", row, mode) for row in found]
            cells += [{"heading": mode, "image": None}] * (columns - len(found))
        name = images.class_names[label]
        rows.append({"name": name, "number": label, "cells": cells})
    return rows


def comparison(images: RunImages) -> list[dict]:
    """Returns rows of one index in every set: same source, same noise.

    There is one row per class, and the modes alternate between classes.
    """
    common = [
        row
        for index, row in images.sets.get("mixed", {}).items()
        if len(images.sets) > 1 and all(index in rows for rows in images.sets.values())
    ]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in common)]
    last = {(row["label"], row["mode"]): row for row in common}
    compared = []
    for i, label in enumerate(sorted({row["label"] for row in common})[:_EXAMPLES]):
        turns = (modes[(i + k) % len(modes)] for k in range(len(modes)))
        row = next(last[label, mode] for mode in turns if (label, mode) in last)
        cells = [images.real_cell(row["source"], label, "source")]
        for name, rows in images.sets.items():
            heading = row["mode"] if name == "mixed" else name
            cells.append(images.cell(name, rows[row["index"]], heading))
        compared.append(
            {
                "name": images.class_names[label],
                "mixed": images.mixed(row),
                "mixed_cell": next(x for x in cells if x.get("set") == "mixed"),
                "cells": cells,
            }
        )
    return compared


def captions(images: RunImages) -> list[dict]:
    """Returns the captions of the first image of each class, then of each second."""
    rank: dict[int, int] = {}
    order = []
    for id_, label in zip(images.real.ids, images.real.labels.tolist(), strict=True):
        rank[label] = rank.get(label, 0) + 1
        order.append((rank[label], label, id_))
    return [
        {
            **images.captions[id_],
            "name": images.class_names[label],
            "cell": images.real_cell(id_, label, "training"),
        }
        for _, label, id_ in sorted(order)[:_EXAMPLES]
        if id_ in images.captions
    ]
