"""Intervals, confusion and calibration equal their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mvc_jax.metrics import statistics

accuracy = st.integers(0, 1000).map(lambda n: n / 1000)


@given(
    st.lists(st.tuples(accuracy, accuracy), min_size=2, max_size=8),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
@settings(deadline=None, max_examples=50)
def test_the_interval_is_that_of_the_paired_t_test(pairs, confidence):
    ours, theirs = np.asarray(pairs).T
    found = statistics.paired_difference(ours, theirs, confidence)
    assert found["mean"] == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-12)
    if np.std(ours - theirs) > 1e-9:  # SciPy warns if there is no spread
        expected = stats.ttest_rel(ours, theirs).confidence_interval(confidence)
        assert found["low"] == pytest.approx(expected.low, abs=1e-9)
        assert found["high"] == pytest.approx(expected.high, abs=1e-9)
    else:
        assert found["low"] is found["high"] is None


def test_one_seed_has_no_interval():
    found = statistics.paired_difference(np.array([0.9]), np.array([0.8]), 0.95)
    assert found == {"mean": pytest.approx(0.1), "low": None, "high": None}


def test_calibration_error_is_zero_where_confidence_equals_accuracy():
    """Two bins: 0.6 right in 3 of 5, and 0.9 right in half of the cases."""
    correct = np.array([True] * 3 + [False] * 2)
    assert statistics.calibration_error(np.full(5, 0.6), correct) == pytest.approx(0)
    both = np.concatenate([np.full(5, 0.6), np.full(4, 0.9)])
    more = np.concatenate([correct, np.array([True, True, False, False])])
    expected = 4 / 9 * (0.9 - 0.5)  # equation 3
    assert statistics.calibration_error(both, more) == pytest.approx(expected)
    assert statistics.calibration_error(np.ones(4), ~more[5:] | True) == 0


def test_the_confusion_matrix_has_all_classes_and_sums_over_seeds():
    labels = np.array([0, 1, 1, 2])
    predicted = np.array([[0, 1, 2, 2], [0, 1, 1, 0]])
    counts = statistics.confusion_matrix(labels, predicted, classes=4)
    assert counts.tolist() == [
        [2, 0, 0, 0],
        [0, 3, 1, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 0],
    ]
