"""Pictures: grids that fit, names in fonts that have them."""

import base64
import io
import itertools

import fontTools.fontBuilder
import numpy as np
import pytest
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from mvc_jax import pictures


def test_a_picture_of_noise_is_reduced_to_fit():
    rng = np.random.default_rng(0)
    cell = {"heading": "real", "image": None}
    rows = [{"name": "a", "cells": [dict(cell) for _ in range(5)]} for _ in range(10)]
    for each in itertools.chain.from_iterable(row["cells"] for row in rows):
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        each["image"] = Image.fromarray(noise)
    content = pictures.grid_png(rows, 64, max_bytes=150_000)
    assert 20_000 < len(content) < 150_000


def test_a_data_uri_is_no_larger_than_shown():
    uri = pictures.data_uri(Image.new("RGB", (512, 512)), 32)
    content = base64.b64decode(uri.partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (32, 32)


def font_with(path, characters):
    """A font whose glyphs are all squares."""
    pen = TTGlyphPen(None)
    for method, points in (
        (pen.moveTo, [(100, 0)]),
        (pen.lineTo, [(100, 700), (900, 700), (900, 0)]),
    ):
        for point in points:
            method(point)
    pen.closePath()
    names = [".notdef", *(f"u{ord(x):x}" for x in characters)]
    built = fontTools.fontBuilder.FontBuilder(1000)
    built.setupGlyphOrder(names)
    built.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    built.setupGlyf(dict.fromkeys(names, pen.glyph()))
    built.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    built.setupHorizontalHeader(ascent=800, descent=-200)
    built.setupOS2()
    built.setupPost()
    built.save(path)
    return str(path)


@pytest.fixture
def system_fonts(monkeypatch):
    """A function that sets the fonts of the machine."""

    def set_(*paths):
        monkeypatch.setattr(pictures, "_system_fonts", lambda: list(paths))
        pictures._font_file.cache_clear()
        pictures._font.cache_clear()

    yield set_
    pictures._font_file.cache_clear()
    pictures._font.cache_clear()


def grid_of(name, **number):
    cell = {"heading": "real", "image": Image.new("RGB", (8, 8))}
    rows = [{"name": "healthy é", "cells": [cell]}, {"name": name, "cells": [cell]}]
    rows[1] |= number
    return np.asarray(pictures.grid(rows, 64))


def test_a_name_of_several_lines_is_written_in_one(caplog):
    np.testing.assert_array_equal(grid_of("a b\n\tc"), grid_of("a b c"))
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["数字", "हिन्दी", "ภาษา"])
def test_a_name_that_no_font_has_is_its_number_with_a_warning(
    system_fonts, caplog, name
):
    system_fonts()
    numbered = grid_of(name, number=7)
    assert caplog.text.count(name) == 1 and "install one" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(numbered, grid_of("class 7"))
    np.testing.assert_array_equal(grid_of(name), grid_of("row 2"))


def test_a_heading_that_no_font_has_is_a_number_and_else_is_in_a_font_that_has_it(
    system_fonts, tmp_path, caplog
):
    def grid(heading):
        cells = [pictures.Cell(heading=x, image=None) for x in ("source", heading)]
        return np.asarray(pictures.grid([pictures.Row(name="a", cells=cells)], 64))

    system_fonts()
    np.testing.assert_array_equal(grid("数字"), grid("column 2"))
    assert "数字" in caplog.text
    system_fonts(font_with(tmp_path / "all.ttf", "数字"))
    caplog.clear()
    assert (grid("数字") != grid("column 2")).any()
    assert caplog.text == ""


def test_a_name_is_written_in_a_font_of_the_machine(system_fonts, tmp_path, caplog):
    system_fonts()
    numbered = grid_of("数\u200d字", number=7)
    caplog.clear()
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    some = font_with(tmp_path / "some.ttf", "数")
    system_fonts(str(damaged), some, font_with(tmp_path / "all.ttf", "数字"))
    written = grid_of("数\u200d字", number=7)
    assert caplog.text == ""
    dark = [(picture == 0x22).all(-1).sum() for picture in (numbered, written)]
    assert dark[1] > dark[0] + 100  # two squares
    assert (grid_of("healthy") == grid_of("healthy")).all() and caplog.text == ""
