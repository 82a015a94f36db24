"""Figures that `generate` has drawn, of images that open large."""

import io
from typing import Any

from PIL import Image

from mvc_jax import pictures
from mvc_jax.generation import figures
from mvc_jax.generation.conditionings import CONDITIONINGS
from mvc_jax.reporting.run_images import RunImages

_OF_A_SET = "coarse_fine"  # whose images are those of the set `mixed`
_TITLES = {
    _OF_A_SET: "Coarse and fine mixing",
    "conditionings": "The same images and noise under every conditioning",
    "levels": "Mixing more and more",
}
_SIZE = 1400  # pixels of a picture


def read(images: RunImages) -> list[dict[str, Any]]:
    """The figures of a run, with their titles.

    Returns:
      `headings` of the columns, `rows` of cells and `notes`; or, where an older version
      has drawn it, `uri` and `size` of the whole picture.
    """
    found = []
    for name, title in _TITLES.items():
        data, picture = figures.paths(images.generate, name)
        if data.exists():
            figure = figures.read(data)
            rows = [
                {
                    "name": row.name,
                    "cells": [_cell(images, name, row, cell) for cell in row.cells],
                }
                for row in figure.rows
            ]
            found.append(
                {
                    "title": figure.title,
                    "headings": [cell.heading for cell in figure.rows[0].cells],
                    "rows": rows,
                    "notes": figure.notes,
                }
            )
        elif picture.exists():
            image = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
            image.thumbnail((_SIZE, _SIZE), Image.Resampling.LANCZOS)
            uri = pictures.data_uri(image.quantize(256), _SIZE)
            found.append({"title": title, "uri": uri, "size": image.size})
    return found


def _cell(
    images: RunImages, figure: str, row: figures.Row, cell: figures.Cell
) -> dict[str, Any]:
    """A cell of the page, with what is known of its image."""
    if cell.image is None:
        return {"heading": cell.heading, "image": None}
    made = dict(cell.provenance)
    alt = ", ".join(dict.fromkeys((cell.label, row.name, cell.heading)))
    if cell.set == figures.REAL and made["source"] in images.places:
        label = images.real.labels[images.places[made["source"]]]
        return images.real_cell(made["source"], int(label), cell.heading)
    sets = images.sets
    if figure == _OF_A_SET and made.get("index") in sets.get(cell.set, ()):
        return images.cell(cell.set, sets[cell.set][made["index"]], cell.heading)
    facts = [("Class", cell.label), ("Source", made["source"])]
    if cell.set in CONDITIONINGS:
        facts.insert(0, ("Conditioning", CONDITIONINGS[cell.set].about))
    if made.get("partners"):
        facts.append(("Partners", ", ".join(made["partners"])))
    if "text_scale" in made:
        scales = f"text {made['text_scale']:g}, image {made['image_scale']:g}"
        facts.append(("Guidance", scales))
    if "noise_seed" in made:
        facts.append(("Noise seed", str(made["noise_seed"])))
    shown = {
        "heading": cell.heading,
        "image": Image.fromarray(cell.image),
        "alt": alt,
        "facts": facts,
        "words": [],
    }
    return shown | ({"recipe": made} if "prompt" in made else {})
