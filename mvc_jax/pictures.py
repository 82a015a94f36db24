"""Pictures for people: PNG bytes, and labelled grids."""

import functools
import io
import math
import os
from collections.abc import Sequence
from typing import TypedDict

from PIL import Image, ImageDraw, ImageFont


class Cell(TypedDict):
    """One place of a grid; without an image it stays empty."""

    heading: str
    image: Image.Image | None


class Row(TypedDict):
    """One row of a grid."""

    name: str
    cells: Sequence[Cell]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def grid_png(rows: Sequence[Row], tile: int, *, most_bytes: int) -> bytes:
    """`grid` as PNG; with fewer colours, then smaller, if it is too large."""
    content = png(grid(rows, tile))
    while len(content) > most_bytes and tile >= 16:
        content = png(grid(rows, tile).quantize(256))
        tile = tile * 3 // 4
    return content


def grid(rows: Sequence[Row], tile: int) -> Image.Image:
    """Rows of images with names at the left, headings above, two panels when many.

    Args:
      rows: each with as many cells as the first, whose headings are shown; a gap
        stands between different ones.
      tile: pixels along a side of a cell. Smaller images are enlarged pixel by pixel.
    """
    font = _font(max(tile // 5, 9))
    gap, margin, top = max(tile // 16, 2), tile // 4, tile // 2
    names = max(math.ceil(font.getlength(row["name"])) for row in rows)
    headings = [cell["heading"] for cell in rows[0]["cells"]]
    lefts, left = [], 2 * margin + names
    for i, heading in enumerate(headings):
        left += gap if i and heading != headings[i - 1] else 0
        lefts.append(left)
        left += tile + gap
    panels = 1 if len(rows) <= 5 else 2
    per_panel = math.ceil(len(rows) / panels)
    size = (panels * left + margin, top + per_panel * (tile + gap) + margin)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for n, row in enumerate(rows):
        x, y = n // per_panel * left, top + n % per_panel * (tile + gap)
        middle = (x + margin + names, y + tile / 2)
        draw.text(middle, row["name"], "#222222", font, anchor="rm")
        for cell_left, cell in zip(lefts, row["cells"], strict=True):
            if n % per_panel == 0:
                above = (x + cell_left + tile / 2, top - gap)
                draw.text(above, cell["heading"], "#666666", font, anchor="mb")
            if cell["image"] is not None:
                smaller = cell["image"].width > tile
                method = (
                    Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
                )
                image.paste(
                    cell["image"].resize((tile, tile), method), (x + cell_left, y)
                )
    return image


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings: class names are not always Latin."""
    import matplotlib

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, "DejaVuSans.ttf"), size)
