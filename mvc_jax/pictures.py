"""Pictures for people: PNG bytes, and labelled grids."""

import functools
import io
import math
import os
from collections.abc import Sequence
from typing import Any, TypedDict

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


def grid_png(
    rows: Sequence[Row], tile: int, *, most_bytes: int, **options: Any
) -> bytes:
    """`grid` as PNG; with fewer colours, then smaller, if it is too large."""
    content = png(grid(rows, tile, **options))
    while len(content) > most_bytes and tile >= 16:
        content = png(grid(rows, tile, **options).quantize(256))
        tile = tile * 3 // 4
    return content


def grid(
    rows: Sequence[Row], tile: int, *, panels: int = 0, notes: Sequence[str] = ()
) -> Image.Image:
    """Rows of images with names at the left, headings above, two panels when many.

    Args:
      rows: each with as many cells as the first, whose headings are shown, as far as
        there is room; a gap stands between different ones.
      tile: pixels along a side of a cell. Smaller images are enlarged pixel by pixel.
      panels: beside each other; 0: two of more than five rows.
      notes: sentences below, broken where they are too long.
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
    panels = panels or (1 if len(rows) <= 5 else 2)
    per_panel = math.ceil(len(rows) / panels)
    width, bottom = panels * left + margin, top + per_panel * (tile + gap) + margin
    small = _font(max(tile // 8, 9))
    lines = [
        line for note in notes for line in _broken(note, small, width - 2 * margin)
    ]
    below = len(lines) * tile // 6 + margin if lines else 0
    image = Image.new("RGB", (width, bottom + below), "white")
    draw = ImageDraw.Draw(image)
    for n, line in enumerate(lines):
        draw.text((margin, bottom + n * tile // 6), line, "#222222", small)
    font_above, headings = _fitted(headings, tile)
    for n, row in enumerate(rows):
        x, y = n // per_panel * left, top + n % per_panel * (tile + gap)
        middle = (x + margin + names, y + tile / 2)
        draw.text(middle, row["name"], "#222222", font, anchor="rm")
        for cell_left, heading, cell in zip(lefts, headings, row["cells"], strict=True):
            if n % per_panel == 0:
                above = (x + cell_left + tile / 2, top - 2 * gap)
                draw.text(above, heading, "#666666", font_above, anchor="ms")
            if cell["image"] is not None:
                smaller = cell["image"].width > tile
                method = (
                    Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
                )
                image.paste(
                    cell["image"].resize((tile, tile), method), (x + cell_left, y)
                )
    return image


def _fitted(
    texts: Sequence[str], width: int
) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """A font for headings of columns of a width, and these, cut where they must be."""
    fonts = [_font(max(width // part, 9)) for part in (5, 6, 7, 8)]
    fitting = [f for f in fonts if max(map(f.getlength, texts)) <= width]
    font, cut = (fitting or fonts[-1:])[0], []
    for text in texts:
        while font.getlength(text) > width and len(text) > 2:
            text = text.rstrip("…")[:-1] + "…"
        cut.append(text)
    return font, cut


def _broken(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of a text, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings: class names are not always Latin."""
    import matplotlib

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, "DejaVuSans.ttf"), size)
