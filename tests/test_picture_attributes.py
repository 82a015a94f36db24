"""Attributes of photographs and scans, against images that are known to have them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mvc_jax.data import picture_attributes
from mvc_jax.data.attribute_captions import KINDS, attribute_captions

SIDE = 48
PLAIN = {
    "black": (5, 5, 5),
    "grey": (128, 128, 128),
    "white": (250, 250, 250),
    "red": (230, 20, 20),
    "orange": (250, 140, 20),
    "yellow": (240, 230, 30),
    "green": (30, 180, 40),
    "cyan": (20, 220, 220),
    "blue": (30, 60, 220),
    "purple": (150, 30, 230),
    "pink": (240, 50, 180),
    "brown": (110, 60, 20),
}


def plain(colour, side=SIDE):
    return np.full((side, side, 3), colour, np.uint8)


def square(row, column, size=10, background=20, level=220):
    image = plain((background,) * 3)
    image[row : row + size, column : column + size] = level
    return image


@pytest.mark.parametrize("name", PLAIN)
def test_colours_have_their_names(name):
    assert picture_attributes.colours(plain(PLAIN[name])) == (name,)
    assert {*PLAIN} == {*picture_attributes.COLOURS}


def test_the_more_frequent_colour_comes_first_and_a_rare_one_is_not_named():
    image = plain(PLAIN["blue"])
    image[:20] = PLAIN["white"]
    assert picture_attributes.colours(image) == ("blue", "white")
    image[5:20] = PLAIN["blue"]
    assert picture_attributes.colours(image) == ("blue",)


@pytest.mark.parametrize(
    ("direction", "name"),
    [((1, 0), "horizontal"), ((0, 1), "vertical"), ((1, 1), "diagonal")],
)
def test_lines_have_their_direction(direction, name):
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin((direction[0] * y + direction[1] * x) / 2)
    grey = (127 + 100 * wave).astype(np.uint8)
    image = np.repeat(grey[..., None], 3, axis=2)
    found = picture_attributes.measure(image, scan=False)
    assert found.orientation == name
    turned = picture_attributes.measure(np.rot90(image).copy(), scan=False)
    other = {"horizontal": "vertical", "vertical": "horizontal"}
    assert turned.orientation == other.get(name, name)


def test_noise_and_plain_images_have_no_direction():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for image in (noise, plain((90, 90, 90))):
        assert picture_attributes.measure(image, scan=False).orientation == ""


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("row", "column", "where"),
    [
        (2, 2, "upper left"),
        (2, 19, "upper"),
        (19, 19, "centre"),
        (19, 35, "right"),
        (35, 35, "lower right"),
    ],
)
def test_the_main_region_is_where_it_is(scan, row, column, where):
    found = picture_attributes.measure(square(row, column), scan=scan)
    assert found.position == where
    assert 0.02 < found.area < 0.1


@settings(max_examples=40, deadline=None)
@given(image=hnp.arrays(np.uint8, (12, 10, 3)), scan=st.booleans())
def test_any_image_has_attributes(image, scan):
    found = picture_attributes.measure(image, scan=scan)
    assert 0 <= found.brightness <= 1 and 0 <= found.area <= 1
    assert np.isfinite([found.contrast, found.texture]).all()
    assert {*found.colours} <= {*picture_attributes.COLOURS}
    assert bool(found.colours) != scan


@pytest.mark.parametrize("kind", ["photo", "scan"])
def test_captions_are_relative_to_the_images_and_in_one_order(kind):
    images = np.stack([square(19, 19, level=60 + 5 * i) for i in range(30)])
    captions = attribute_captions(images, kind)
    words = [caption.split(", ") for caption in captions]
    at = 0 if kind == "scan" else 1
    shades = [each[at] for each in words]
    assert shades == ["dark"] * 10 + ["mid-tone"] * 10 + ["bright"] * 10
    assert all("contrast" in each[at + 1] for each in words)
    region = "bright region" if kind == "scan" else "object"
    assert all(each[-1].endswith(f"{region} centre") for each in words)
    shuffled = attribute_captions(images[::-1], kind)
    assert shuffled[::-1] == captions  # the order of the images does not matter


def test_strokes_are_the_default():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    assert attribute_captions(images) == KINDS["strokes"](images)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_relative_to_the_first_images_do_not_depend_on_the_others(kind):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images[12:] //= 4  # the others are dark
    first = attribute_captions(images, kind, relative_to=12)
    assert first[:12] == attribute_captions(images[:12], kind)
    assert first[:12] != attribute_captions(images, kind)[:12]
