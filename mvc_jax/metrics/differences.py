"""How much more accurate one classifier is than another, and how sure that is.

Both see the same test images, and seed i of one is paired with seed i of the other. An
accuracy varies with both, so the interval is for other seeds and other test images.

Legend: S seeds, T test images.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

_BLOCK = 1000  # draws at a time, to bound the memory


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of accuracies, in [-1, 1].

    Attributes:
      mean: over seeds and test images.
      low, high: ends of the confidence interval; None: it cannot be known.
      p: two-sided p-value of no difference; None: it cannot be known.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired(
    ours: Bool[np.ndarray, "S T"],
    theirs: Bool[np.ndarray, "S T"],
    confidence: float,
    *,
    draws: int = 10_000,
) -> Difference:
    """Compares two classifiers by a paired bootstrap over seeds and test images.

    Each draw takes seeds and test images at random with replacement, the same for both
    (Owen, The pigeonhole bootstrap, arXiv 0712.1111). Its quantiles give the shape of
    the interval. Its variance is too large where seeds err on different images, and too
    small for few seeds, so the width is that of the variance of the mean in a two-way
    analysis of variance, with the degrees of freedom of Satterthwaite (Biometrics
    Bulletin 2(6), 1946) and the quantile of Student's t.

    Args:
      ours: whether seed s is right about test image t.
      theirs: the same of the other classifier.
      confidence: of the interval, in (0, 1).
      draws: of the bootstrap.

    Returns:
      without an interval if there is one seed or one image, or if every seed differs by
      the same on every image.
    """
    from scipy import stats  # takes a second to import

    difference = ours.astype(np.float64) - theirs
    mean = float(difference.mean())
    if min(difference.shape) < 2:
        return Difference(mean)
    error, freedom = standard_error(difference)
    if error == 0:
        return Difference(mean)
    drawn = bootstrap(difference, draws)
    tails = np.asarray([0.5 - confidence / 2, 0.5 + confidence / 2])
    shape = (np.quantile(drawn, tails) - drawn.mean()) / drawn.std()
    width = stats.t.ppf(tails[1], freedom) / stats.norm.ppf(tails[1])
    low, high = mean + error * width * shape
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return Difference(mean, float(low), float(high), float(p))


def over_splits(values: Float[np.ndarray, " N"], confidence: float) -> Difference:
    """The mean of one difference in each of N splits, with Student's interval.

    Returns:
      without an interval if there is one split, or if all values are the same.
    """
    from scipy import stats  # takes a second to import

    mean, error = float(values.mean()), 0.0
    if len(values) > 1:
        error = float(stats.sem(values))
    if error <= np.finfo(np.float64).eps:  # rounding is no spread
        return Difference(mean)
    freedom = len(values) - 1
    low, high = stats.t.interval(confidence, freedom, loc=mean, scale=error)
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return Difference(mean, float(low), float(high), float(p))


def standard_error(difference: Float[np.ndarray, "S T"]) -> tuple[float, float]:
    """The standard error of the mean over random seeds and images; degrees of freedom.

    Of a two-way analysis of variance without replication: `seeds`, `images` and `rest`
    are its mean squares. A variance component that comes out negative counts as zero.
    """
    seeds, images = difference.shape
    rows, columns = difference.mean(1, keepdims=True), difference.mean(0, keepdims=True)
    rest = difference - rows - columns + difference.mean()
    squares = {
        "seeds": images * rows.var(ddof=1),
        "images": seeds * columns.var(ddof=1),
        "rest": (rest**2).sum() / ((seeds - 1) * (images - 1)),
    }
    freedom = {
        "seeds": seeds - 1,
        "images": images - 1,
        "rest": (seeds - 1) * (images - 1),
    }
    used = {"seeds": 1, "images": 1, "rest": -1}
    if squares["seeds"] <= squares["rest"]:
        used = {"images": 1}
    elif squares["images"] <= squares["rest"]:
        used = {"seeds": 1}
    variance = sum(sign * squares[name] for name, sign in used.items())
    if variance <= 0:
        return 0.0, 1.0
    spread = sum(squares[name] ** 2 / freedom[name] for name in used)
    return float(np.sqrt(variance / difference.size)), float(variance**2 / spread)


def bootstrap(
    difference: Float[np.ndarray, "S T"], draws: int, seed: int = 0
) -> Float[np.ndarray, " D"]:
    """The mean difference in each of D draws of seeds and images with replacement."""
    generator = np.random.default_rng(seed)
    seeds, images = difference.shape
    # Images on which all seeds differ alike are drawn together: there are few kinds.
    kinds, counts = np.unique(difference.T, axis=0, return_counts=True)
    means = []
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        of_kinds = generator.multinomial(images, counts / images, size)
        means.append(((of_seeds @ kinds.T) * of_kinds).sum(1) / difference.size)
    return np.concatenate(means)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several questions, adjusted for asking all of them.

    By the step-down method of Holm (Scandinavian Journal of Statistics 6(2), 1979): the
    chance that any question without a difference seems to have one stays as it is for
    a single question.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
