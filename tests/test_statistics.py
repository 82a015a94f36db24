"""Intervals, confusion and calibration equal their definitions."""

import numpy as np
import pytest

from mvc_jax.metrics import statistics


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
