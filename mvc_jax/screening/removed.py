"""Records the images that the filters remove from a set.

removed.jsonl          one row per image and filter that removed it
removed/00000012.png   those images, as drawn
removed.png            some of them, beside what they were compared with
"""

import collections
import contextlib
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data.splits import Split
from mvc_jax.screening.filters import Finding
from mvc_jax.screening.settings import FIELD

LIST, SHEET = "removed.jsonl", "removed.png"
FACTS = "filters.json"  # beside the sets: `FittedFilters.facts`
_SHEET_ROWS = 24
_TILE = 48  # pixels along a side of an image in the sheet
_SHEET_BYTES = 400_000
_MAX_REMOVED = 0.5  # fraction of a set; a filter that removes more is misconfigured
_MAX_NAME = 44  # characters of a row's name in the sheet
_REMEDIES = {
    "label": f"lower {FIELD}.label_threshold or raise {FIELD}.label_top",
    "copies": f"lower {FIELD}.copies_quantile, or lower config.generate.image_scale to "
    "draw images less like their sources",
    "outliers": f"raise {FIELD}.outliers_quantile",
}


def rows(
    recipe: Mapping[str, Any], findings: Iterable[Finding], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the rows of `removed.jsonl` of one image.

    Args:
      recipe: `index` and `source` of the image, and `label`, a class index.
      findings: of the image.
      class_names: of the dataset.
    """
    return [
        {
            "index": recipe["index"],
            "source": recipe["source"],
            "label": class_names[recipe["label"]],
            **dataclasses.asdict(finding),
        }
        for finding in findings
    ]


def save_picture(
    folder: epath.Path, index: int, image: UInt8[np.ndarray, "H W 3"]
) -> None:
    """Saves a removed image in a set's folder."""
    content = pictures.png(Image.fromarray(image))
    files.write_bytes(_picture_path(folder, index), content)


def write(
    folder: epath.Path, found: Sequence[Mapping[str, Any]], train: Split
) -> list[str]:
    """Writes `removed.jsonl` and, if an image was removed, `removed.png`.

    Args:
      folder: of the set; the pictures are there.
      found: rows of all removed images.
      train: the real training images.

    Returns:
      the files written, relative to `folder`.
    """
    files.write_jsonl(folder / LIST, [dict(row) for row in found])
    if not found:
        return [LIST]
    files.write_bytes(folder / SHEET, _sheet(folder, _examples(found), train))
    return [LIST, SHEET]


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """Reads `removed.jsonl` of a set; [] if there is none."""
    path = folder / LIST
    return files.read_jsonl(path) if path.exists() else []


def count(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts removed images: `images` in total, and by filter."""
    by_filter = collections.Counter(row["filter"] for row in found)
    return {"images": len({row["index"] for row in found}), **by_filter}


def reasons(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts removed images by all their filters: `{"copies and label": 2}`."""
    filters_of: dict[int, list[str]] = {}
    for row in found:
        filters_of.setdefault(row["index"], []).append(row["filter"])
    return dict(
        collections.Counter(" and ".join(sorted(f)) for f in filters_of.values())
    )


def warnings(
    found: Sequence[Mapping[str, Any]], drawn: int, facts: Mapping[str, Any]
) -> list[str]:
    """Returns a warning for each filter that removes most images of a set.

    Args:
      found: rows of `removed.jsonl`.
      drawn: number of images screened.
      facts: of the filters.
    """
    found_warnings = []
    for name, number in count(found).items():
        if name == "images" or number <= _MAX_REMOVED * drawn:
            continue
        scores = sorted(row["score"] for row in found if row["filter"] == name)
        low, median, high = scores[0], scores[len(scores) // 2], scores[-1]
        text = (
            f"the filter {name} removed {number} of {drawn} images (scores {low:.3g} "
            f"to {high:.3g}, median {median:.3g}); look at {SHEET}. If the images are "
            f"good, {_REMEDIES[name]}"
        )
        real = facts.get(name, {})
        if "real_removed" in real:
            text += (
                f"; it would also remove {real['real_removed']} of "
                f"{real['real_images']} real images"
            )
        found_warnings.append(text)
    return found_warnings


def _examples(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Selects rows of different images for the sheet, evenly from each filter."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        by_filter.setdefault(row["filter"], []).append(row)
    chosen: dict[int, Mapping[str, Any]] = {}
    fewest_first = sorted(by_filter.values(), key=len)
    for place, mine in enumerate(fewest_first):
        new = [row for row in mine if row["index"] not in chosen]
        left = _SHEET_ROWS - len(chosen)
        quota = min(left // (len(fewest_first) - place), len(new))
        at = np.linspace(0, len(new) - 1, quota).round().astype(int)
        chosen.update({new[i]["index"]: new[i] for i in at})
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
        name = name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"
        path, image = _picture_path(folder, row["index"]), None
        with contextlib.suppress(OSError):  # it was deleted, or damaged
            image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        cells: list[pictures.Cell] = [
            {"heading": "source", "image": real(row["source"])},
            {"heading": "removed", "image": image},
            {"heading": "nearest", "image": real(row["real"])},
        ]
        number = train.class_names.index(row["label"])
        grid.append(pictures.Row(name=name, number=number, cells=cells))
    return pictures.grid_png(grid, _TILE, max_bytes=_SHEET_BYTES)


def _picture_path(folder: epath.Path, index: int) -> epath.Path:
    return folder / "removed" / f"{index:08d}.png"
