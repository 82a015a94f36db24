"""Every operation equals Pillow's, at every magnitude that a policy can have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_digits

from mvc_jax.augment import color, conditional, crops, operations

FILL, PAINT = 128, (125, 123, 114)


def scale(low: float, high: float, levels: int) -> list[float]:
    return [low + level * (high - low) / levels for level in range(levels + 1)]


SHEARS = scale(0.0, 0.3, 10) + scale(0.0, 0.3, 30) + scale(0.0, 0.99, 30)
FACTORS = scale(0.1, 1.9, 10) + scale(0.1, 1.9, 30) + scale(0.01, 2.0, 30) + [0.0]
PIXELS = [*range(33), *np.linspace(0, 0.45 * 32, 97).tolist()]
DEGREES = [*range(136), *np.linspace(0, 30, 31).tolist()]
MAGNITUDES = {
    **dict.fromkeys(("Identity", "Invert", "AutoContrast", "Equalize"), [0.0]),
    **dict.fromkeys(("ShearX", "ShearY"), SHEARS),
    **dict.fromkeys(("TranslateX", "TranslateY"), PIXELS),
    "Rotate": DEGREES,
    "Solarize": [*range(257), *np.linspace(0, 256, 50).tolist()],
    "Posterize": range(1, 9),
    **dict.fromkeys(operations.BLENDS, FACTORS),
}
SIGNS = {name: (1, -1) for name in operations.GEOMETRIC}
ALL = [
    (name, float(sign * value))
    for name, values in MAGNITUDES.items()
    for value in values
    for sign in SIGNS.get(name, (1,))
]


def digit() -> np.ndarray:
    """A handwritten digit, 16x16, grey."""
    image = Image.fromarray((load_digits().images[3] * 255 / 16).astype(np.uint8))
    image = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    return (30 + image * 0.7).astype(np.uint8)[..., None]


def texture(height: int, width: int) -> np.ndarray:
    """Waves and noise, with different levels in each channel."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(0)
    waves = [np.sin(x / 3 + c) * np.cos(y / (4 + c)) for c in range(3)]
    image = 120 + np.stack(waves, -1) * [90, 50, 120] + rng.normal(0, 9, (*y.shape, 3))
    return np.clip(image, [20, 0, 0], [230, 255, 255]).astype(np.uint8)


IMAGES = {"digit": digit(), "texture": texture(32, 32), "wide": texture(20, 31)}


def pillow(image: np.ndarray, name: str, value: float, method) -> np.ndarray:
    picture = Image.fromarray(image.squeeze())
    colour = (FILL,) * 3 if picture.mode == "RGB" else FILL
    matrices = {
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
        "TranslateX": (1, 0, value, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, value),
    }
    if name in matrices:
        affine = Image.Transform.AFFINE
        matrix = matrices[name]
        done = picture.transform(picture.size, affine, matrix, method, fillcolor=colour)
    elif name == "Rotate":
        done = picture.rotate(value, method, fillcolor=colour)
    elif name in operations.BLENDS:
        done = getattr(ImageEnhance, name)(picture).enhance(value)
    elif name in ("Solarize", "Posterize"):
        amount = int(value) if name == "Posterize" else value
        done = getattr(ImageOps, name.lower())(picture, amount)
    elif name == "Identity":
        done = picture
    else:
        done = getattr(ImageOps, name.lower())(picture)
    return np.asarray(done).reshape(image.shape)


def ours(image: np.ndarray, chosen: list, resampling: str = "nearest") -> np.ndarray:
    table = operations.table(chosen, *image.shape[:2], resampling)
    rows = jnp.arange(1, len(chosen) + 1)[:, None]
    return np.asarray(performed(table, rows, image, resampling))


def performed(table, rows, image, resampling):
    """Applies `rows` [images, steps] of a table to the same image, jitted."""

    def one(drawn, image):
        where = jnp.zeros((len(drawn), 2))
        return operations.perform(
            table, drawn, where, image, fill=FILL, paint=PAINT, resampling=resampling
        )

    return jax.jit(jax.vmap(one, in_axes=(0, None)))(rows, image)


@functools.cache
def all_of(kind: str) -> np.ndarray:
    return ours(IMAGES[kind], ALL)


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("kind", IMAGES)
def test_an_operation_equals_pillows(kind, name):
    image, results = IMAGES[kind], all_of(kind)
    changed = 0
    for (other, value), result in zip(ALL, results, strict=True):
        if other != name:
            continue
        expected = pillow(image, name, value, Image.Resampling.NEAREST)
        far = np.abs(result.astype(int) - expected.astype(int)).max()
        # Pillow's double precision sometimes truncates an integer to the one below.
        assert far <= (1 if name == "AutoContrast" else 0), (value, far)
        changed += (expected != image).any()
    # 256 pixels are too few for Pillow to equalize.
    stays = name == "Identity" or (kind == "digit" and name in ("Color", "Equalize"))
    assert changed == 0 if stays else changed > 0


@pytest.mark.parametrize("kind", ["digit", "wide"])
def test_bilinear_sampling_equals_pillows_within_one_level(kind):
    image = IMAGES[kind]
    chosen = [(n, v) for n, v in ALL if n in operations.GEOMETRIC][::3]
    for (name, value), result in zip(
        chosen, ours(image, chosen, "bilinear"), strict=True
    ):
        expected = pillow(image, name, value, Image.Resampling.BILINEAR)
        far = np.abs(result.astype(int) - expected.astype(int)).max()
        assert far <= 1, (name, value)


def test_several_steps_equal_pillows_one_after_the_other():
    """Two maps are sampled at once, but not across a colour operation."""
    chosen = [("Rotate", 20.0), ("ShearX", -0.3), ("Equalize", 0.0), ("Color", 1.7),
              ("TranslateY", 5.0), ("Sharpness", 1.9), ("Solarize", 100.0)]  # fmt: skip
    image = IMAGES["wide"]
    rng = np.random.default_rng(0)
    table = operations.table(chosen, *image.shape[:2], "nearest")
    rows = rng.integers(0, len(chosen) + 1, (120, 3))  # 0: no step
    results = performed(table, jnp.asarray(rows), jnp.asarray(image), "nearest")
    for drawn, result in zip(rows, results, strict=True):
        expected = image
        for step in drawn[drawn > 0]:
            method = Image.Resampling.NEAREST
            expected = pillow(expected, *chosen[step - 1], method)
        np.testing.assert_array_equal(result, expected, err_msg=str(drawn))


@pytest.mark.parametrize("operation", [
    ("ShearX", 0.0), ("ShearY", 0.0), ("TranslateX", 0.0), ("TranslateY", 0.0),
    ("Rotate", 0.0), ("Rotate", 360.0), ("Solarize", 256.0), ("Posterize", 8.0),
    *((name, 1.0) for name in operations.BLENDS), ("Cutout", 0.0),
])  # fmt: skip
def test_neutral_values_are_the_identity(operation):
    """Their rows have the numbers of the identity's."""
    row = operations.row(operation, 20, 31, "nearest")
    neutral = operations.row(("Identity", 0.0), 20, 31, "nearest")
    for field, value, expected in zip(row._fields, row, neutral, strict=True):
        if field != "blend":  # with factor 1 it has no effect
            np.testing.assert_array_equal(value, expected, err_msg=field)


def test_cutout_equals_pillows_rectangle():
    image, side = jnp.asarray(IMAGES["wide"]), 6.2
    table = operations.table([("Cutout", side)], 20, 31, "nearest")
    points = np.random.default_rng(0).random((50, 2)).astype(np.float32)

    def one(where):
        rows, settings = jnp.array([1]), {"fill": 0, "resampling": "nearest"}
        return operations.perform(
            table, rows, where[None], image, paint=PAINT, **settings
        )

    results = jax.jit(jax.vmap(one))(points)
    for (y, x), result in zip(points, results, strict=True):
        picture = Image.fromarray(IMAGES["wide"])
        left, top = (int(max(0, u * n - side / 2)) for u, n in ((x, 31), (y, 20)))
        box = (left, top, min(31, left + side), min(20, top + side))
        ImageDraw.Draw(picture).rectangle(box, PAINT)
        np.testing.assert_array_equal(result, np.asarray(picture))


def test_apply_where_changes_the_images_whose_condition_holds():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 99, (2, 3, 16, 17, 3)))
    images = images.astype(jnp.uint8)
    where = jnp.array([[True, False, True], [False, False, True]])
    apply, equalize = conditional.apply_where(color.equalize), jax.jit(color.equalize)
    one = jax.jit(apply)
    results = jax.jit(jax.vmap(jax.vmap(apply)))(where, images)
    for i in np.ndindex(2, 3):
        expected = equalize(images[i]) if where[i] else images[i]
        np.testing.assert_array_equal(results[i], expected)
        np.testing.assert_array_equal(one(where[i], images[i]), expected)
        assert where[i] == (results[i] != images[i]).any()


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("sides, looped", [((47, 48), False), ((48, 49), True)])
def test_a_batch_equals_each_image_alone(resampling, sides, looped):
    """A CPU loops over large images, in which few operations of a row are computed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 99, (2, 10, *sides, 3), dtype=np.uint8)
    steps = [("Equalize", 0.0), ("Sharpness", 1.5), ("Rotate", 20.0), ("ShearX", 0.2)]
    table = operations.table([*steps, ("Cutout", 9.0)], *sides, resampling)
    drawn = rng.integers(0, len(steps) + 2, (2, 10, 2))
    where = rng.random((2, 10, 2, 2), np.float32)
    perform = functools.partial(
        operations.perform, table, fill=FILL, paint=PAINT, resampling=resampling
    )
    one = jax.jit(perform)
    batch = jax.jit(jax.vmap(jax.vmap(perform)))
    traced = str(jax.make_jaxpr(batch)(drawn, where, images))
    assert ("length=20" in traced) == looped
    results = batch(drawn, where, images)
    for i in np.ndindex(2, 10):
        np.testing.assert_array_equal(results[i], one(drawn[i], where[i], images[i]))


def test_a_resized_crop_equals_pillows_within_one_level():
    image = IMAGES["wide"]
    enlarge = jax.jit(crops.enlarge)
    for top, left, height, width in [(0, 0, 20, 31), (3, 5, 9, 8), (19, 30, 1, 1)]:
        part = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((31, 20), Image.Resampling.BILINEAR))
        result = enlarge(image, jnp.array([top, left]), jnp.array([height, width]))
        assert np.abs(np.asarray(result).astype(int) - expected).max() <= 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'Blur'; known: Identity, ShearX"):
        operations.table([("Blur", 1.0)], 8, 8, "nearest")
    with pytest.raises(ValueError, match="'cubic'; known: nearest, bilinear"):
        operations.table([("Invert", 0.0)], 8, 8, "cubic")
