"""Statistics of classifiers over seeds.

Legend: S seeds, T test images, K classes.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

_BINS = 15  # of confidence, as in Guo et al.


_ROUNDING = 1e-9  # by which equal differences of accuracies may differ


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
