"""What the filters took out of a set: its list, its pictures, a sheet to look at.

    removed.jsonl          a row for each image and filter that removed it
    removed/00000012.png   those images, as they were drawn
    removed.png            some of them, beside what they were compared with

An image that two filters remove has two rows.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data.splits import Split
from mvc_jax.screening.filters import FIELD, Finding

LIST, SHEET = "removed.jsonl", "removed.png"
FACTS = "filters.json"  # beside the sets: of the judge
_SHOWN = 24  # images of the sheet
_TILE = 48  # pixels along a side of one
_SHEET_BYTES = 400_000
_MOST = 0.5  # of a set's images; a filter that removes more is set wrongly
_LONGEST = 44  # characters of a name in the sheet
_CURES = {
    "label": "lower {0}.label_threshold or raise {0}.label_top",
    "copies": "lower {0}.copies_quantile, or draw images less like their sources by a "
    "lower config.generate.image_scale",
    "outliers": "raise {0}.outliers_quantile",
}


def rows(
    recipe: Mapping[str, Any], findings: Iterable[Finding], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of `removed.jsonl` for one image, whose `recipe` holds its label's index."""
    head = {"index": recipe["index"], "source": recipe["source"]}
    head["label"] = class_names[recipe["label"]]
    return [head | dataclasses.asdict(finding) for finding in findings]


def picture(folder: epath.Path, index: int) -> epath.Path:
    """Where in a set's folder a removed image lies."""
    return folder / "removed" / f"{index:08d}.png"


def keep_picture(
    folder: epath.Path, index: int, image: UInt8[np.ndarray, "H W 3"]
) -> None:
    """Keeps a removed image for the eye."""
    content = pictures.png(Image.fromarray(image))
    files.write_bytes(picture(folder, index), content)


def write(
    folder: epath.Path, found: Sequence[Mapping[str, Any]], train: Split
) -> list[str]:
    """Writes list and sheet.

    Args:
      folder: of the set; the pictures are there.
      found: what `rows` gave for each image that was removed.
      train: the real training images.

    Returns:
      the files written, relative to `folder`; without an image there is no sheet.
    """
    files.write_jsonl(folder / LIST, [dict(row) for row in found])
    if not found:
        return [LIST]
    files.write_bytes(folder / SHEET, _sheet(folder, _some(found), train))
    return [LIST, SHEET]


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The list of a set; [] where there is none."""
    path = folder / LIST
    return files.read_jsonl(path) if path.exists() else []


def count(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Images removed: in all (`images`), and by each filter that removed any."""
    by_filter = collections.Counter(row["filter"] for row in found)
    return {"images": len({row["index"] for row in found}), **by_filter}


def reasons(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Images by the filters that removed them, each once: "copies and label"."""
    filters_of: dict[int, list[str]] = {}
    for row in found:
        filters_of.setdefault(row["index"], []).append(row["filter"])
    said = (" and ".join(sorted(names)) for names in filters_of.values())
    return dict(collections.Counter(said))


def complaints(
    found: Sequence[Mapping[str, Any]], drawn: int, facts: Mapping[str, Any]
) -> list[str]:
    """What to say of filters that remove most of the `drawn` images of a set.

    Args:
      found: rows of `removed.jsonl`.
      drawn: images that were judged.
      facts: of the judge.
    """
    said = []
    for name, number in count(found).items():
        if name == "images" or number <= _MOST * drawn:
            continue
        scores = sorted(row["score"] for row in found if row["filter"] == name)
        line = (
            f"the filter {name} removed {number} of {drawn} images "
            f"(scores {scores[0]:.3g} to {scores[-1]:.3g}, half of them below "
            f"{scores[len(scores) // 2]:.3g}); look at {SHEET}. If they are good, "
            + _CURES[name].format(FIELD)
        )
        real = facts.get(name, {})
        if "real_removed" in real:
            line += (
                f"; it would remove {real['real_removed']} of {real['real_images']} "
                "real images as well"
            )
        said.append(line)
    return said


def _some(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of different images, in order: each filter's share, evenly over its own."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        by_filter.setdefault(row["filter"], []).append(row)
    chosen: dict[int, Mapping[str, Any]] = {}
    fewest_first = sorted(by_filter.values(), key=len)
    for place, mine in enumerate(fewest_first):
        new = [row for row in mine if row["index"] not in chosen]
        left = _SHOWN - len(chosen)
        share = min(left // (len(fewest_first) - place), len(new))
        at = np.linspace(0, len(new) - 1, share).round().astype(int)
        chosen |= {new[i]["index"]: new[i] for i in at}
    return sorted(chosen.values(), key=lambda row: (row["filter"], row["index"]))


def _sheet(
    folder: epath.Path, chosen: Sequence[Mapping[str, Any]], train: Split
) -> bytes:
    row_of = {id_: i for i, id_ in enumerate(train.ids)}

    def real(id_: str) -> Image.Image | None:
        return Image.fromarray(train.images[row_of[id_]]) if id_ else None

    grid = []
    for row in chosen:
        name = f"{row['label']}: {row['reason']}"
        name = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        path, removed = picture(folder, row["index"]), None
        if path.exists():  # a user may have cleared them away
            with path.open("rb") as file:
                removed = Image.open(file).convert("RGB")
        cells: list[pictures.Cell] = [
            {"heading": "source", "image": real(row["source"])},
            {"heading": "removed", "image": removed},
            {"heading": "nearest", "image": real(row["real"])},
        ]
        grid.append(pictures.Row(name=name, cells=cells))
    return pictures.grid_png(grid, _TILE, most_bytes=_SHEET_BYTES)
