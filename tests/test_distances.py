"""Distances depend on their two images alone."""

import numpy as np
import pytest

from mvc_jax.metrics import distances
from mvc_jax.metrics import points as points_module


@pytest.fixture(params=["pixels", "directions"])
def points(request):
    rng = np.random.default_rng(0)
    if request.param == "pixels":
        return distances.pixels(rng.integers(0, 256, (60, 8, 8, 3), np.uint8), 8)
    return distances.directions(rng.normal(size=(60, 24)))


def test_distances_match_their_definition():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    real = images[:, None].astype(float) - images[None]
    expected = np.sqrt((real**2).mean((2, 3, 4))) / 255
    points = distances.pixels(images, 8)
    np.fill_diagonal(expected, np.inf)
    found = distances.nearest(points, points, skip_self=True)
    np.testing.assert_allclose(found.distance, expected.min(1), rtol=1e-12)
    np.testing.assert_array_equal(found.index, expected.argmin(1))
    mean = expected[np.isfinite(expected)].mean()
    assert distances.mean_pairwise(points) == pytest.approx(mean, rel=1e-12)

    vectors = rng.normal(size=(6, 5))
    cosine = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    expected = np.sqrt(np.maximum(2 - 2 * cosine, 0))
    np.fill_diagonal(expected, np.inf)
    points = distances.directions(1000 * vectors)  # any length
    found = distances.nearest(points, points, skip_self=True)
    np.testing.assert_allclose(found.distance, expected.min(1), atol=2e-4)


def test_a_distance_does_not_depend_on_the_batch(points, monkeypatch):
    ours, theirs = points[np.arange(20)], points[np.arange(20, 60)]
    whole = distances.nearest(ours, theirs)
    monkeypatch.setattr(points_module, "_STRIP", 7)
    monkeypatch.setattr(points_module, "_ROWS", 14)
    monkeypatch.setattr(points_module, "_COLUMNS", 9)
    in_blocks = distances.nearest(ours, theirs)
    singly = [distances.nearest(ours[np.arange(i, i + 1)], theirs) for i in range(20)]
    for k, values in enumerate(whole):
        np.testing.assert_array_equal(in_blocks[k], values)
        np.testing.assert_array_equal(np.concatenate([s[k] for s in singly]), values)
    of_pairs = distances.paired(ours, theirs[whole.index])
    np.testing.assert_array_equal(of_pairs, whole.distance)


def test_duplicates_have_distance_zero_and_one_group(points):
    twice = points[np.asarray([0, 1, 2, 1, 0, 0])]
    found = distances.nearest(twice, twice, skip_self=True)
    np.testing.assert_array_equal(found.distance == 0, [1, 1, 0, 1, 1, 1])
    assert (found.different > 0).all() and np.isfinite(found.different).all()
    np.testing.assert_array_equal(distances.duplicate_groups(twice), [0, 1, 2, 1, 0, 0])
    alone = distances.nearest(twice[np.asarray([0, 4])], points[np.asarray([0])])
    assert np.isinf(alone.different).all() and (alone.distance == 0).all()


def test_images_of_any_size_are_compared_at_one_size():
    square = np.zeros((64, 64, 3), np.uint8)
    square[:32] = 200
    for shape in ((64, 64), (32, 32), (128, 96), (16, 16)):
        image = np.zeros((*shape, 3), np.uint8)
        image[: shape[0] // 2] = 200
        ours, theirs = distances.pixels([image], 64), distances.pixels([square], 64)
        assert ours.levels.shape == (1, 3 * distances.MAX_SIZE**2)
        assert distances.nearest(ours, theirs).distance == 0


@pytest.mark.parametrize(
    ("different", "quantile", "expected"),
    [
        ([0.3, 0.1, 0.2], 0.0, 0.1),
        ([0.3, 0.1, np.inf, 0.2], 0.5, 0.2),
        ([0.3, 0.1], 1.0, 0.3),
    ],
)
def test_copy_distance_is_a_quantile_of_the_finite_distances(
    different, quantile, expected
):
    found = distances.copy_distance(np.asarray(different), quantile)
    assert found == pytest.approx(expected)


def test_without_different_images_only_a_duplicate_is_a_copy():
    assert 0 < distances.copy_distance(np.asarray([np.inf])) < 1e-9
