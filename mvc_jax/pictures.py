"""Pictures for people: PNG, labelled grids of images, line plots."""

import base64
import functools
import io
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from absl import logging
from PIL import Image, ImageDraw, ImageFont


class Cell(TypedDict):
    """A cell of a grid; empty without an image."""

    heading: str
    image: Image.Image | None


class Row(TypedDict):
    """A row of a grid; `number`, of its class, is shown if no font has its name."""

    name: str
    number: NotRequired[int]
    cells: Sequence[Cell]


def png(image: Image.Image) -> bytes:
    """Encodes an image as PNG, of up to 4 million pixels as small as it gets."""
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=image.width * image.height <= 4_000_000)
    return buffer.getvalue()


def data_uri(image: Image.Image, size: int) -> str:
    """Returns an image as an inline PNG, reduced to at most `size` pixels per side."""
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(png(small)).decode()


def grid_png(
    rows: Sequence[Row], tile: int, *, max_bytes: int, **options: Any
) -> bytes:
    """Encodes `grid` as PNG, with fewer colours and then smaller tiles to fit."""
    content = png(grid(rows, tile, **options))
    while len(content) > max_bytes and tile >= 16:
        content = png(grid(rows, tile, **options).quantize(256))
        tile = tile * 3 // 4
    return content


def grid(
    rows: Sequence[Row], tile: int, *, panels: int = 0, notes: Sequence[str] = ()
) -> Image.Image:
    """Draws rows of images with their names on the left and column headings above.

    Args:
      rows: each with as many cells as the first, whose headings are shown, shortened to
        the column's width; columns of different headings are separated by a gap.
      tile: pixels along a side of a cell. Smaller images are enlarged without
        interpolation.
      panels: number of panels side by side; 0: two if there are more than five rows.
      notes: paragraphs below the grid.
    """
    gap, margin, top = max(tile // 16, 2), tile // 4, tile // 2
    shown = _shown_names(rows)
    fonts = [_font(max(tile // 5, 9), name) for name in shown]
    widths = [font.getlength(name) for font, name in zip(fonts, shown, strict=True)]
    names = math.ceil(max(widths))
    headings = [cell["heading"] for cell in rows[0]["cells"]]
    lefts, left = [], 2 * margin + names
    for i, heading in enumerate(headings):
        left += gap if i and heading != headings[i - 1] else 0
        lefts.append(left)
        left += tile + gap
    panels = panels or (1 if len(rows) <= 5 else 2)
    per_panel = math.ceil(len(rows) / panels)
    width, bottom = panels * left + margin, top + per_panel * (tile + gap) + margin
    small = _font(max(tile // 8, 9), " ".join(notes))
    lines = [line for note in notes for line in _wrap(note, small, width - 2 * margin)]
    below = len(lines) * tile // 6 + margin if lines else 0
    image = Image.new("RGB", (width, bottom + below), "white")
    draw = ImageDraw.Draw(image)
    for n, line in enumerate(lines):
        draw.text((margin, bottom + n * tile // 6), line, "#222222", small)
    known = enumerate(_written(headings), 1)
    shown_headings = _fit_headings([x or f"column {n}" for n, x in known], tile)
    for n, row in enumerate(rows):
        x, y = n // per_panel * left, top + n % per_panel * (tile + gap)
        middle = (x + margin + names, y + tile / 2)
        draw.text(middle, shown[n], "#222222", fonts[n], anchor="rm")
        columns = zip(lefts, shown_headings, row["cells"], strict=True)
        for cell_left, (heading, font), cell in columns:
            if n % per_panel == 0:
                above = (x + cell_left + tile / 2, top - 2 * gap)
                draw.text(above, heading, "#666666", font, anchor="ms")
            if cell["image"] is not None:
                fitted = _fitted(cell["image"], tile)
                middle = x + cell_left + (tile - fitted.width) // 2
                image.paste(fitted, (middle, y + (tile - fitted.height) // 2))
    return image


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    """An image whose longer side is `tile`; a small one shows its pixels."""
    scale = tile / max(image.size)
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    width, height = (max(round(scale * x), 1) for x in image.size)
    return image.resize((width, height), method)


def line_plot_svg(
    lines: Sequence[Sequence[tuple[int, float]]],
    *,
    x_title: str,
    y_title: str,
    salt: str,
    line_colour: str,
    text_colour: str,
    axis_colour: str,
) -> str:
    """Draws lines of (x, y) as an SVG element to be inlined in an HTML page.

    The y axis is logarithmic if positive values span more than a factor of 10.

    Args:
      lines: points of each line.
      x_title: what x is, with its unit.
      y_title: the same of y.
      salt: makes the ids in the element unique within the page.
      line_colour: as CSS, such as `var(--accent)`.
      text_colour: the same.
      axis_colour: the same.
    """
    import matplotlib
    from matplotlib import figure, ticker

    values = [y for points in lines for _, y in points]
    # Matplotlib does not take CSS variables, so they are substituted afterwards.
    line, text, axis = "#030303", "#010101", "#020202"
    settings = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.size": 8,
        "axes.edgecolor": axis,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc has no effect
        matplotlib.rcParams.update(settings)
        drawing = figure.Figure(figsize=(3.4, 2.0), layout="constrained")
        axes = drawing.subplots()
        for points in lines:
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=line, linewidth=1.3 / len(lines) ** 0.25)
        if values and 0 < 10 * min(values) < max(values):
            axes.set_yscale("log")
            subs = (1, 2, 5) if max(values) < 100 * min(values) else (1,)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=axis, linewidth=0.6)
        axes.tick_params(colors=text, length=0)
        axes.set_xlabel(x_title, color=text)
        axes.set_ylabel(y_title, color=text)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    # The page has its own styles and fonts, and group ids recur in every plot.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>|font-family.*?; ", "", svg)
    for colour, css in ((line, line_colour), (text, text_colour), (axis, axis_colour)):
        svg = svg.replace(colour, css)
    return svg


def _fit_headings(
    texts: Sequence[str], width: int
) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Shortened headings of columns of this width, each with a font; of one size."""
    for part in (5, 6, 7, 8):
        fonts = [_font(max(width // part, 9), text) for text in texts]
        pairs = list(zip(texts, fonts, strict=True))
        if all(font.getlength(text) <= width for text, font in pairs):
            return pairs
    shortened = []
    for text, font in pairs:
        while font.getlength(text) > width and len(text) > 2:
            text = text.rstrip("…")[:-1] + "…"
        shortened.append((text, font))
    return shortened


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wraps a text at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shown_names(rows: Sequence[Row]) -> list[str]:
    """The names of rows; the number of the class in place of what no font has."""
    names = _written([row["name"] for row in rows])
    numbers = [f"class {r['number']}" if "number" in r else "" for r in rows]
    return [
        name or number or f"row {n}"
        for n, (name, number) in enumerate(zip(names, numbers, strict=True), 1)
    ]


def _written(texts: Sequence[str]) -> list[str]:
    """Texts in one line each; "" and a warning for those that no font has."""
    lines = [" ".join(text.split()) for text in texts]
    unknown = [line for line in lines if _font_file(line) is None]
    if unknown:
        logging.warning(
            "no font on this machine can write %s: pictures show a number instead; "
            "install one, such as Debian's fonts-noto-core or fonts-noto-cjk",
            ", ".join(dict.fromkeys(unknown)),
        )
    return ["" if line in unknown else line for line in lines]


@functools.cache
def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """A font that has the characters of a text, as far as there is one."""
    return ImageFont.truetype(_font_file(text) or _dejavu(), size)


def _dejavu() -> str:
    """DejaVu Sans from Matplotlib: Latin, Greek, Cyrillic, Arabic and more."""
    import matplotlib

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return os.path.join(folder, "DejaVuSans.ttf")


@functools.cache
def _font_file(text: str) -> str | None:
    """The first font that has all characters of a text, DejaVu Sans before others."""
    wanted = {ord(x) for x in text if not x.isspace() and not _is_invisible(x)}
    if wanted <= _characters(_dejavu()):
        return _dejavu()
    return next((x for x in _system_fonts() if wanted <= _characters(x)), None)


def _is_invisible(character: str) -> bool:
    """Joiners, variation selectors and the like, which need no glyph."""
    is_selector = "\ufe00" <= character <= "\ufe0f"
    return is_selector or unicodedata.category(character) in ("Cf", "Cc")


@functools.cache
def _system_fonts() -> list[str]:
    """The machine's fonts, regular ones without serifs first."""
    from matplotlib import font_manager

    def order(path: str) -> tuple:
        name = os.path.basename(path).lower()
        return "regular" not in name, "sans" not in name, "serif" in name, path

    found = font_manager.findSystemFonts()
    return sorted((x for x in found if "lastresort" not in x.lower()), key=order)


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """Code points that a font has; none if it is damaged or cannot be scaled."""
    from matplotlib import ft2font

    try:
        ImageFont.truetype(path, 12)
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
