"""Statistics of classifiers over seeds.

Legend: S seeds, T test images, K classes.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

_BINS = 15  # of confidence, as in Guo et al.


_ROUNDING = 1e-9  # by which equal differences of accuracies may differ


def paired_difference(
    ours: Float[np.ndarray, " S"], theirs: Float[np.ndarray, " S"], confidence: float
) -> dict[str, float | None]:
    """Returns the mean of `ours - theirs` with the interval of the paired t-test.

    Args:
      ours: accuracies by seed.
      theirs: accuracies of the same seeds: seed i of both has the same initialisation.
      confidence: of the interval, in (0, 1).

    Returns:
      `mean`, `low` and `high`; with one seed, or with equal differences, whose spread
      is not known, `low` and `high` are None.
    """
    from scipy import stats  # takes a second to import

    difference = ours - theirs
    mean, count = float(difference.mean()), len(difference)
    if count < 2 or np.ptp(difference) < _ROUNDING:
        return {"mean": mean, "low": None, "high": None}
    error = stats.sem(difference)
    low, high = stats.t.interval(confidence, count - 1, loc=mean, scale=error)
    return {"mean": mean, "low": float(low), "high": float(high)}


def confusion_matrix(
    labels: Int[np.ndarray, " T"], predictions: Int[np.ndarray, "S T"], classes: int
) -> Int[np.ndarray, "K K"]:
    """Counts how often images of class i (row) are predicted as j, over all seeds."""
    from sklearn import metrics  # takes a second to import

    repeated = np.broadcast_to(labels, predictions.shape)
    return metrics.confusion_matrix(
        repeated.ravel(), predictions.ravel(), labels=np.arange(classes)
    )


def calibration_error(
    confidences: Float[np.ndarray, " T"], correct: Bool[np.ndarray, " T"]
) -> float:
    """Returns the expected calibration error: Guo et al., arXiv 1706.04599, equation 3.

    This is the mean distance between confidence and accuracy in 15 bins of equal width,
    weighted by the number of images in them.

    Args:
      confidences: probability of the predicted class, in [0, 1].
      correct: whether it is the label.
    """
    edges = np.linspace(0, 1, _BINS + 1)[1:-1]
    bins = np.digitize(confidences, edges, right=True)
    gaps = np.bincount(bins, weights=confidences - correct, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(correct))
