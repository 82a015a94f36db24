"""Metrics of features against references: SciPy, scikit-learn, and their equations."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist
from sklearn import metrics as sklearn_metrics

from mvc_jax.errors import UserError
from mvc_jax.metrics import compare, distances, domain_shift, moments, points
from mvc_jax.metrics.distances import NearestSearch, pixel_points
from mvc_jax.metrics.kernel_means import KernelSums, polynomial
from mvc_jax.metrics.neighbourhoods import Balls, NearestSquares
from mvc_jax.metrics.points import Points, visit_blocks

ALL = ("kid", "cmmd", "frechet", "prdc", "vendi")
WANTED = compare.Wanted(ALL, neighbours=3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that do not divide the sets, several of each kind."""
    for name, size in (("_ROWS", 32), ("_COLUMNS", 32), ("_STRIP", 12), ("_READ", 17)):
        monkeypatch.setattr(points, name, size)


def features(count, dims=6, *, seed=0, shift=0.0):
    drawn = np.random.default_rng(seed).normal(shift, 1, (count, dims))
    return drawn.astype(np.float32)


REAL, FAKE = features(75), features(100, seed=1, shift=0.4)


def compared(real=REAL, fake=FAKE, wanted=WANTED):
    own = [compare.describe(Points(x), wanted) for x in (real, fake)]
    return compare.compare(*own, wanted)


@pytest.fixture(scope="module")
def found():
    return compared()


def test_the_frechet_distance_is_the_published_formula(found):
    covariances = [np.cov(x, rowvar=False, dtype=np.float64) for x in (REAL, FAKE)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    mean = ((REAL.mean(0, np.float64) - FAKE.mean(0, np.float64)) ** 2).sum()
    expected = mean + np.trace(sum(covariances) - 2 * root.real)
    assert found[0]["frechet_distance"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sizes", [(5, 40), (40, 5), (5, 9)])
def test_fewer_images_than_dims_have_the_same_frechet_distance(sizes):
    """A subspace of a larger space changes no distance, and no full rank is needed."""
    few, many = (Points(features(n, seed=i)) for i, n in enumerate(sizes))
    wide = [
        dataclasses.replace(x, levels=np.pad(x.levels, ((0, 0), (0, 50))))
        for x in (few, many)
    ]
    covariances = [np.cov(x.levels, rowvar=False, dtype=np.float64) for x in wide]
    values = np.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    means = [x.levels.mean(0, np.float64) for x in wide]
    expected = ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances))
    expected -= 2 * root
    found = moments.frechet_distance(*wide)
    assert found == pytest.approx(expected, rel=1e-5)


def test_moments_merge_exactly():
    whole = moments.Moments.of([REAL.astype(np.float64)], 6)
    parts = [
        moments.Moments.of([x.astype(np.float64)], 6) for x in (REAL[:9], REAL[9:])
    ]
    nothing = moments.Moments.of([], 6)
    merged = nothing.merge(parts[0]).merge(nothing).merge(parts[1])
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(REAL.T.astype(float)), 1e-9)
    assert merged.count == 75


def unbiased(kernel, real, fake):
    total = 0.0
    for x in (real, fake):
        own = kernel(x, x)
        total += (own.sum() - np.trace(own)) / (len(x) * (len(x) - 1))
    return total - 2 * kernel(real, fake).mean()


def kid_kernel(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return sklearn_metrics.pairwise.polynomial_kernel(x, y, degree=3, coef0=1)


def test_kid_and_its_error_are_those_of_the_kernel(found):
    expected = unbiased(kid_kernel, REAL, FAKE)
    assert found[0]["kid"] == pytest.approx(expected, rel=1e-4)
    variance = 0.0
    for side in range(2):
        sets = [REAL, FAKE]
        count = len(sets[side])
        left = []
        for i in range(count):
            without = list(sets)
            without[side] = np.delete(sets[side], i, 0)
            left.append(unbiased(kid_kernel, *without))
        variance += (count - 1) * np.var(left)
    assert found[0]["kid_error"] == pytest.approx(np.sqrt(variance), rel=1e-4)


def test_cmmd_is_that_of_the_published_code():
    real, fake = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (REAL, FAKE))

    def kernel(x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        return sklearn_metrics.pairwise.rbf_kernel(x, y, gamma=1 / (2 * 10**2)).mean()

    expected = kernel(real, real) + kernel(fake, fake) - 2 * kernel(real, fake)
    wanted = compare.Wanted(("cmmd",))
    assert compared(real, fake, wanted)[0] == {
        "cmmd": pytest.approx(1000 * expected, rel=1e-4)
    }


def test_precision_recall_density_and_coverage_are_those_of_prdc(found):
    """The equations of Naeem et al., as their package `prdc` computes them."""
    k, across = WANTED.neighbours, cdist(REAL, FAKE)
    real, fake = (np.sort(cdist(x, x), axis=1)[:, k] for x in (REAL, FAKE))
    in_real, in_fake = across < real[:, None], across < fake[None]
    expected = {
        "precision": in_real.any(0).mean(),
        "recall": in_fake.any(1).mean(),
        "density": in_real.sum(0).mean() / k,
        "coverage": (across.min(1) < real).mean(),
    }
    assert {name: found[0][name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("dims", [6, 200], ids=["more images", "more dims"])
def test_vendi_is_the_entropy_of_cosine_similarities(dims):
    some = features(40, dims).astype(np.float64)
    similarities = sklearn_metrics.pairwise.cosine_similarity(some) / 40
    values = scipy.linalg.eigvalsh(similarities)
    values = values[values > 1e-12]
    expected = np.exp(-(values * np.log(values)).sum())
    assert moments.vendi_score(Points(some)) == pytest.approx(expected, rel=1e-6)
    assert moments.vendi_score(Points(np.eye(7))) == pytest.approx(7)
    assert moments.vendi_score(Points(np.ones((7, 3)))) == pytest.approx(1)


def test_identical_sets_are_recognised():
    metrics, nearest = compared(REAL, REAL.copy())
    assert metrics["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert metrics["kid"] <= 0  # unbiased: below zero where nothing differs
    assert metrics["cmmd"] == pytest.approx(0, abs=1e-4)
    assert metrics["precision"] == metrics["recall"] == metrics["coverage"] == 1
    np.testing.assert_array_equal(nearest.distance, 0)
    np.testing.assert_array_equal(nearest.index, np.arange(75))
    own = compare.describe(Points(REAL), WANTED)
    assert compare.compare(own, own, WANTED)[0] == pytest.approx(metrics)


def test_nearest_images_are_those_of_cdist(found):
    across = cdist(FAKE.astype(np.float64), REAL)
    np.testing.assert_array_equal(found[1].index, across.argmin(1))
    np.testing.assert_allclose(found[1].distance, across.min(1), rtol=1e-6)
    own = compare.describe(Points(FAKE), WANTED).nearest
    among = cdist(FAKE, FAKE)
    np.fill_diagonal(among, np.inf)
    np.testing.assert_array_equal(own.index, among.argmin(1))
    mean = among[np.isfinite(among)].mean()
    assert distances.mean_pairwise(Points(FAKE)) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("same", [False, True])
def test_parts_of_the_work_merge_to_the_whole(same):
    a = Points(REAL)
    b = a if same else Points(FAKE)
    radii = np.full(len(a), 2.0), np.full(len(b), 3.0)

    def accumulate(parts):
        found = [
            KernelSums(polynomial(a, b), len(a), len(b)),
            NearestSearch(len(a)),
            NearestSquares(len(a), 3),
            *([] if same else [Balls(*radii)]),
        ]
        for part in parts:
            for block in visit_blocks(a, b, lambda block: block, part=part):
                for each in found:
                    each.add(each.visit(block))
        return found

    whole = accumulate([(0, 1)])
    merged = accumulate([(0, 3)])
    for i in (1, 2):
        for mine, theirs in zip(merged, accumulate([(i, 3)]), strict=True):
            mine.merge(theirs)
    for mine, theirs in zip(merged, whole, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(getattr(mine, name), value, rtol=1e-6)


def test_distances_of_bytes_are_exact_over_many_dims():
    """float32 could not sum 3,000 products of extreme values without rounding."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.choice(np.asarray([0, 1, 254, 255], np.uint8), (40, 3000)) for _ in "ab"
    )
    found = distances.nearest(pixel_points(a), pixel_points(b))
    squared = ((a[:, None].astype(np.int64) - b[None]) ** 2).sum(2)
    expected = np.sqrt(squared.min(1)) / (255 * np.sqrt(3000))
    np.testing.assert_array_equal(found.distance, expected)


def test_metrics_of_pixels_are_those_of_values_in_0_to_1():
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(0, 256, (n, 12), np.uint8) for n in (30, 40))
    own = [compare.describe(pixel_points(x), WANTED) for x in (real, fake)]
    as_bytes, nearest = compare.compare(*own, WANTED)
    as_floats, other = compared(real / np.float32(255), fake / np.float32(255))
    assert as_bytes == pytest.approx(as_floats, rel=1e-4)
    rms = other.distance / np.sqrt(12)
    np.testing.assert_allclose(nearest.distance, rms, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_needs_more_images_is_none(count):
    metrics, _ = compared(REAL, FAKE[:count])
    assert (metrics["frechet_distance"] is None) == (count < 2)
    assert (metrics["kid"] is None) == (count < 2)
    assert (metrics["kid_error"] is None) == (count < 3)
    assert metrics["precision"] is None  # no third neighbour


def test_features_that_are_not_finite_are_named():
    spoiled = REAL.copy()
    spoiled[40, 2] = np.nan
    with pytest.raises(UserError, match="features of mixed.*image 40 first"):
        compare.require_finite(Points(spoiled), "mixed")
    compare.require_finite(Points(REAL), "mixed")


def test_blocks_are_counted():
    a, b = Points(REAL), Points(FAKE)
    seen = [sum(1 for _ in visit_blocks(x, y, len_of)) for x, y in ((a, a), (a, b))]
    assert points.count_blocks(a, a) == seen[0]
    assert points.count_blocks(a, b) == seen[1]
    steps: list[int] = []
    own = [compare.describe(x, WANTED, steps.append) for x in (a, b)]
    compare.compare(*own, WANTED, steps.append)
    assert sum(steps) == compare.blocks_of(75, [100])


def len_of(block):
    return block.squared.size


def statistics_of(images):
    found = domain_shift.ImageStatistics(images.shape[1])
    found.add(images)
    return found


def test_the_histogram_shift_is_a_wasserstein_distance():
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (3, 8, 8, 3), np.uint8)
    b = rng.integers(50, 256, (5, 8, 8, 3), np.uint8)
    expected = np.mean(
        [
            wasserstein_distance(a[..., c].reshape(-1), b[..., c].reshape(-1))
            for c in range(3)
        ]
    )
    found = domain_shift.histogram_shift(statistics_of(a), statistics_of(b))
    assert found == pytest.approx(expected / 255)
    parts = statistics_of(b[:2])
    parts.merge(statistics_of(b[2:]))
    assert domain_shift.histogram_shift(statistics_of(b), parts) == 0
    assert domain_shift.spectrum_shift(statistics_of(b), parts) == pytest.approx(0)


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_wave_has_its_power_at_its_frequency(size, axis):
    wave = 100 + 100 * np.cos(2 * np.pi * 3 * np.arange(size) / size)
    image = np.broadcast_to(np.expand_dims(wave, (1 - axis, 2)), (size, size, 3))
    spectrum = domain_shift.radial_spectrum(np.rint(image).astype(np.uint8))
    assert len(spectrum) == size // 2 and spectrum.argmax() == 2  # 3 cycles
    assert spectrum[2] > 100 * np.delete(spectrum, 2).max()


@pytest.mark.parametrize("size", [9, 16])
def test_the_spectrum_of_noise_is_flat_and_has_its_variance(size):
    noise = np.random.default_rng(0).integers(0, 256, (400, size, size, 1), np.uint8)
    found = statistics_of(np.broadcast_to(noise, (400, size, size, 3)))
    variance = (noise / 255).var()
    np.testing.assert_allclose(found.mean_spectrum(), variance, rtol=0.1)
    half = statistics_of(np.broadcast_to(noise // 2, (400, size, size, 3)))
    shift = domain_shift.spectrum_shift(half, found)  # a quarter of the power
    assert shift == pytest.approx(10 * np.log10(4), rel=0.02)
