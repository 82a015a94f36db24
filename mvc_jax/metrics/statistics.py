"""Statistics of classifiers over seeds, and of fractions of images.

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


def effective_count(
    flags: Bool[np.ndarray, " N"], groups: Int[np.ndarray, " N"]
) -> float:
    """How many independent images would tell a fraction as precisely as these.

    N over the design effect (Kish, Survey Sampling, 1965): the variance of the mean of
    flags, where whole groups are drawn, over that where images are, at least 1.

    Args:
      flags: of images.
      groups: of images that resemble each other, as of one source.
    """
    _, which, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    mean, count = flags.mean(), len(sizes)
    if not 0 < mean < 1:
        return float(count)
    excess = np.bincount(which, weights=flags) - mean * sizes
    effect = (excess**2).sum() / (len(flags) * mean * (1 - mean))
    return float(len(flags) / max(effect, 1))


def difference_of_fractions(
    ours: tuple[float, float], theirs: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """The interval of the difference of two fractions.

    By Wilson's intervals: Newcombe, Statistics in Medicine 17 (1998), method 10.

    Args:
      ours: fraction, and number of independent images that it is of.
      theirs: the same of others.
      confidence: of the interval, in (0, 1).
    """
    p, q = ours[0], theirs[0]
    (p_low, p_high), (q_low, q_high) = (_wilson(*x, confidence) for x in (ours, theirs))
    low = p - q - np.hypot(p - p_low, q_high - q)
    high = p - q + np.hypot(p_high - p, q - q_low)
    return float(low), float(high)


def _wilson(fraction: float, count: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a fraction, JASA 22 (1927)."""
    from scipy import stats  # takes a second to import

    z = stats.norm.ppf(0.5 + confidence / 2)
    middle = fraction + z**2 / (2 * count)
    width = z * np.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    return (middle - width) / scale, (middle + width) / scale
