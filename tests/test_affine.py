"""The random similarity: identity, exact cases, ranges, independence of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.augment import affine

IMAGE = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
STILL = {"degrees": 0.0, "zoom": 0.0, "shift": 0.0}
augment = jax.jit(affine.random_affine)
augment_batch = jax.jit(jax.vmap(affine.random_affine))


@pytest.fixture
def drawing(monkeypatch):
    """`drawing(angle, scale, y, x, ...)` augments with these draws."""

    def draw(*draws, image=IMAGE, **ranges):
        fixed = jnp.asarray(draws, jnp.float32)
        monkeypatch.setattr(jax.random, "uniform", lambda key, *_, **__: fixed)
        options = STILL | ranges
        return affine.random_affine(jax.random.key(0), jnp.asarray(image), **options)

    return draw


@pytest.mark.parametrize("shape", [(8, 8, 3), (5, 9, 1), (1, 1, 2)])
def test_ranges_of_zero_are_the_identity(shape):
    image = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    moved = jax.jit(functools.partial(affine.random_affine, **STILL))
    for seed in range(3):
        np.testing.assert_array_equal(moved(jax.random.key(seed), image), image)


@pytest.mark.parametrize(("y", "x"), [(2, 0), (0, -1), (-2, 2)])
def test_integer_shifts_roll_and_repeat_the_border(drawing, y, x):
    moved = drawing(0, 0, y / 2, x / 2, shift=0.25)  # 0.25 * 8 pixels
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), mode="edge")
    expected = np.roll(padded, (y, x), axis=(0, 1))[2:-2, 2:-2]
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_a_shift_is_a_fraction_of_each_side(drawing):
    image = IMAGE[:4]  # 4 high, 8 wide
    moved = drawing(0, 0, 1, 1, image=image, shift=0.25)
    np.testing.assert_allclose(moved[1:, 2:], image[:-1, :-2], atol=1e-6)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("draw", "turns"), [(1, -1), (-1, 1)])
def test_a_right_angle_turns_about_the_centre(drawing, size, draw, turns):
    image = IMAGE[:size, :size]
    moved = drawing(draw, 0, 0, 0, image=image, degrees=90.0)
    expected = [np.rot90(image, turns), np.rot90(image, -turns)]
    assert min(np.abs(moved - turned).max() for turned in expected) < 1e-5
    back = drawing(-draw, 0, 0, 0, image=moved, degrees=90.0)
    np.testing.assert_allclose(back, image, atol=1e-5)


def test_zooming_by_two_shows_the_middle_half(drawing):
    """A plane stays a plane: v = y becomes (y - c) / 2 + c."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None], (8, 8, 1))
    moved = drawing(0, 1, 0, 0, image=ramp, zoom=1.0)
    np.testing.assert_allclose(moved, (ramp - 3.5) / 2 + 3.5, atol=1e-5)


@given(st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=100)
def test_values_stay_in_the_range_of_their_channel(seed):
    moved = np.asarray(augment(jax.random.key(seed), IMAGE))
    assert moved.shape == IMAGE.shape
    assert (moved <= IMAGE.max((0, 1)) + 1e-6).all()
    assert (moved >= IMAGE.min((0, 1)) - 1e-6).all()


def test_each_image_of_a_batch_depends_on_its_own_key_and_pixels():
    keys = jax.random.split(jax.random.key(0), 4)
    batch = jnp.asarray(np.stack([IMAGE, IMAGE, IMAGE, IMAGE * 2]))
    together = augment_batch(keys, batch)
    for key, image, moved in zip(keys, batch, together, strict=True):
        np.testing.assert_allclose(augment(key, image), moved, atol=1e-5)
    moved = augment_batch(keys[::-1], batch.at[0].set(0.0))
    np.testing.assert_allclose(moved[1], together[2], atol=1e-5)  # same key and pixels
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert jnp.abs(together[a] - together[b]).max() > 0.1


MEASURES = {  # of an image whose value is y: the range, and the draw by the result
    "shift": (2 / 8, lambda image: (4 - image[:, 4, 4]) / 8),
    "zoom": (0.25, lambda image: 1 / (image[:, 4, 4] - image[:, 3, 4]) - 1),
    "degrees": (30.0, lambda image: np.rad2deg(np.arcsin(np.diff(image)[:, 4, 3]))),
}


@pytest.mark.parametrize("name", MEASURES)
def test_draws_are_uniform_over_their_range(name):
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None], (8, 8, 1))
    limit, measure = MEASURES[name]
    one = functools.partial(affine.random_affine, **STILL | {name: limit})
    keys = jax.random.split(jax.random.key(0), 2000)
    moved = jax.jit(jax.vmap(one, in_axes=(0, None)))(keys, ramp)
    drawn = measure(np.asarray(moved)[..., 0]) / limit
    assert np.abs(drawn).max() < 1 + 1e-4
    quantiles = np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, [-1, -0.5, 0, 0.5, 1], atol=0.1)
