"""Differences of accuracies: intervals that hold what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mvc_jax.metrics import differences


def simulated(generator, seeds, images, effect, by_seed, by_image):
    """Two classifiers whose accuracies differ by `true_difference` on average.

    An image is right where a normal score is positive. Images are easy or hard for
    both; the first has an advantage, which varies between images; seeds vary.
    """
    difficulty = generator.normal(size=images)

    def right(advantage):
        noise = generator.normal(size=(seeds, images))
        noise += by_seed * generator.normal(size=(seeds, 1))
        return difficulty + advantage + noise > 0

    return right(effect + by_image * generator.normal(size=images)), right(0.0)


def true_difference(effect, by_seed, by_image):
    return stats.norm.cdf(effect / np.sqrt(2 + by_seed**2 + by_image**2)) - 0.5


@pytest.mark.parametrize(
    ("seeds", "images", "by_seed", "by_image"),
    [(3, 400, 0.1, 0.5), (5, 200, 0.1, 1.0), (10, 300, 0.2, 0.2)],
)
@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(
    seeds, images, by_seed, by_image, effect
):
    generator, trials = np.random.default_rng(0), 300
    true = true_difference(effect, by_seed, by_image)
    hits = 0
    for _ in range(trials):
        pair = simulated(generator, seeds, images, effect, by_seed, by_image)
        found = differences.paired(*pair, 0.95, draws=100)
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / trials <= 0.98


def test_few_test_images_widen_the_interval():
    """An interval over seeds alone would not: both seeds agree on every image."""
    generator = np.random.default_rng(0)

    def width(images):
        ours, theirs = (np.tile(generator.random(images) < 0.7, (4, 1)) for _ in "ab")
        found = differences.paired(ours, theirs, 0.95)
        return found.high - found.low

    assert width(100) == pytest.approx(2 * 1.96 * np.sqrt(0.42 / 100), rel=0.2)
    assert width(10_000) == pytest.approx(2 * 1.96 * np.sqrt(0.42 / 10_000), rel=0.1)


def test_without_variation_between_images_it_is_the_paired_t_test():
    """Seeds that differ by whole shares of one kind of images, in equal parts."""
    shares = np.asarray([0.10, 0.20, 0.15, 0.30])
    images = np.arange(20_000) % 100  # every share of any 100 is the same
    ours = images < 100 * (0.5 + shares[:, None])
    theirs = np.tile(images < 50, (4, 1))
    error, freedom = differences.standard_error(ours.astype(float) - theirs)
    assert error == pytest.approx(stats.sem(shares), rel=0.02)
    assert freedom == pytest.approx(3, rel=0.02)


def test_the_bootstrap_draws_seeds_and_images():
    generator = np.random.default_rng(0)
    difference = generator.normal(size=(4, 60)) + generator.normal(size=(4, 1))
    drawn = differences.bootstrap(difference, 4000)
    rows = generator.integers(0, 4, (4000, 4))
    columns = generator.integers(0, 60, (4000, 60))
    wanted = [
        difference[np.ix_(i, j)].mean() for i, j in zip(rows, columns, strict=True)
    ]
    assert drawn.mean() == pytest.approx(np.mean(wanted), abs=0.03)
    assert drawn.std() == pytest.approx(np.std(wanted), rel=0.05)
    assert (drawn == differences.bootstrap(difference, 4000)).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([[True, False, True]], [[False, False, True]]),  # one seed
        ([[True], [False]], [[False], [False]]),  # one image
        ([[True, True], [True, True]], [[False, False], [False, False]]),  # no spread
        ([[True, False], [True, False]], [[True, False], [True, False]]),
    ],
)
def test_what_has_no_spread_has_no_interval(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    found = differences.paired(ours, theirs, 0.95)
    assert found.mean == ours.mean() - theirs.mean()
    assert (found.low, found.high, found.p) == (None, None, None)


def test_the_example_of_holm():
    assert differences.holm([0.01, 0.04, 0.03, 0.005]) == [0.03, 0.06, 0.06, 0.02]
    assert differences.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lowers_nothing(p_values):
    found = differences.holm(p_values)
    assert all(
        before <= after <= 1 for before, after in zip(p_values, found, strict=True)
    )
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.asarray(found)[order]) >= 0).all()
    if len(p_values) == 1:
        assert found == p_values


def test_holm_errs_in_one_of_twenty_families_at_most():
    generator = np.random.default_rng(0)
    families = generator.random((4000, 5))
    wrong = np.mean([min(differences.holm([*family])) < 0.05 for family in families])
    assert 0.035 < wrong < 0.06


@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=8),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_the_interval_over_splits_is_that_of_the_t_test(values, confidence):
    values = np.asarray(values) / 1000
    found = differences.over_splits(values, confidence)
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    if values.std() > 1e-9:  # SciPy warns if there is no spread
        test = stats.ttest_1samp(values, 0)
        expected = test.confidence_interval(confidence)
        assert found.low == pytest.approx(expected.low, abs=1e-9)
        assert found.high == pytest.approx(expected.high, abs=1e-9)
        assert found.p == pytest.approx(test.pvalue, abs=1e-9)
    else:
        assert found.low is found.high is found.p is None


def test_one_split_has_no_interval():
    found = differences.over_splits(np.asarray([0.1]), 0.95)
    assert (found.mean, found.low, found.high, found.p) == (0.1, None, None, None)
