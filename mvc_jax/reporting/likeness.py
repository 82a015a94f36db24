"""Images that are too near to a real one, or that show another class than their own."""

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from mvc_jax.reporting import interval_axis
from mvc_jax.reporting.accuracy import caveats
from mvc_jax.reporting.run_images import RunImages

_SHOWN = 6  # of each set
SPACES = {
    "pixels": "pixels",
    "clip": "CLIP",
    "dinov2": "DINOv2",
    "inception": "Inception",
}
_RULES = {
    "nearest": "The class of most of the {} nearest training images",
    "zero_shot": "The class whose text is nearest, by CLIP",
}


def copies(metrics: Mapping[str, Any], images: RunImages) -> dict[str, Any] | None:
    """The pairs of a synthetic and a training image that are closest, of every set.

    Returns:
      None where older metrics have none; else `sets`, for each its `name`, numbers
      `images`, `copies` and `leaks`, and `lists`: in which `space`, and `pairs` with a
      cell `drawn` and one `real`, and distances; `threshold`, None in older metrics;
      `test`, how many test images there are and how near the closest one is.
    """
    found = (metrics.get("images") or {}).get("sets", {})
    sets = []
    for name in images.sets:
        lists = [
            {"space": space, "pixels": key == "closest", "pairs": pairs}
            for key, space in (
                ("closest", "pixels"),
                ("closest_by_features", _space(metrics)),
            )
            if (pairs := _pairs(found.get(name, {}).get(key, ()), name, images))
        ]
        if lists:
            numbers = {key: found[name][key] for key in ("images", "copies", "leaks")}
            sets.append({"name": name, "lists": lists, **numbers})
    if not sets:
        return None
    closest = found.get("test", {}).get("closest") or [{"distance": None}]
    return {
        "sets": sets,
        "threshold": metrics["images"].get("copy_distance"),
        "test": {
            "images": metrics["counts"]["test"],
            "distance": closest[0]["distance"],
        },
        "caveats": caveats(metrics, "copies"),
    }


def _pairs(rows: Any, name: str, images: RunImages) -> list[dict]:
    pairs = []
    for row in rows:
        drawn = images.sets[name].get(row["image"])
        if drawn is None or row["train"] not in images.places:
            continue
        label = int(images.real.labels[images.places[row["train"]]])
        pairs.append(
            {
                **row,
                "name": images.class_names[row["label"]],
                "drawn": _drawn(images, name, drawn),
                "real": images.real_cell(row["train"], label, "training"),
            }
        )
    return pairs[:_SHOWN]


def _drawn(images: RunImages, name: str, row: Mapping[str, Any]) -> dict:
    number = f"image {row['index']}"
    return images.cell(name, row, number, f"{number} of {name}")


def other_class(metrics: Mapping[str, Any], images: RunImages) -> dict[str, Any] | None:
    """How many images show another class, by each rule, and the clearest of them.

    Returns:
      None where that was not measured; else `rules`, for each its `title`, `rows` by
      set with their `axis`; `sets`, each with rows of three cells: the image, and the
      nearest training images of the predicted and of its own class; `classes`, counts.
    """
    measured = (metrics.get("images") or {}).get("sets", {})
    found = {
        name: measured[name]["other_class"]
        for name in images.sets
        if measured.get(name, {}).get("other_class")
    }
    if not found:
        return None
    first = next(iter(found.values()))
    rules = []
    for rule in first["rules"]:
        rows = [{"name": name, **x["rules"][rule]} for name, x in found.items()]
        for row in rows:
            row["mean"] = row["difference"]
        title = _RULES.get(rule, rule).format(first["neighbours"])
        axis = interval_axis.axis(rows)
        rules.append({"rule": rule, "title": title, "rows": rows, "axis": axis})
    sets = [
        {"name": name, "rows": rows}
        for name, x in found.items()
        if (rows := _clearest(x["most_certain"], name, images))
    ]
    classes = [
        {"name": name, "cells": [x["classes"][k] for x in found.values()]}
        for k, name in enumerate(images.class_names)
    ]
    return {
        "rules": rules,
        "sets": sets,
        "names": [*found],
        "classes": classes,
        "neighbours": first["neighbours"],
        "space": _space(metrics),
    }


def _clearest(rows: Any, name: str, images: RunImages) -> list[dict]:
    """The images of a set that most clearly show another class, with what they are."""
    clearest = []
    for row in rows:
        drawn = images.sets[name].get(row["image"])
        if drawn is None:
            continue
        cells = [_drawn(images, name, drawn)]
        for key, label in (("nearest", row["predicted"]), ("own", row["label"])):
            if row[key] and row[key]["train"] in images.places:
                heading = f"real {images.class_names[label]}"
                cells.append(
                    images.real_cell(
                        row[key]["train"], label, heading, "training image"
                    )
                )
        clearest.append(
            {
                **row,
                "name": images.class_names[row["label"]],
                "predicted_name": images.class_names[row["predicted"]],
                "cells": cells,
            }
        )
    return clearest[:_SHOWN]


def flag(cells: list[dict], evaluate: epath.Path, images: RunImages) -> None:
    """Flags the cells of synthetic images whose predicted label is another class.

    Args:
      cells: which get a `flag`, the name of the predicted class.
      evaluate: folder of the stage; older ones predict nothing.
      images: of the run.
    """
    for name in images.sets:
        mine = {cell["index"]: cell for cell in cells if cell.get("set") == name}
        path = evaluate / "nearest" / f"{name}.parquet"
        if not mine or not path.exists():
            continue
        with path.open("rb") as file:
            if "predicted" not in pq.read_schema(file).names:
                continue
            columns = ["name", "label", "predicted"]
            table = pq.read_table(
                file, columns=columns, filters=pc.field("name").isin([*mine])
            )
        differs = {
            row["name"]: images.class_names[row["predicted"]]
            for row in table.to_pylist()
            if row["predicted"] != row["label"]
        }
        for cell in cells:
            if cell.get("set") == name and cell["index"] in differs:
                cell["flag"] = differs[cell["index"]]


def _space(metrics: Mapping[str, Any]) -> str:
    name = (metrics.get("images") or {}).get("features", "pixels")
    return SPACES.get(name, name)
