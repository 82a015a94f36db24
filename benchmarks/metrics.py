"""Measures the metrics of features, beside `prdc` and SciPy on a part of them.

    pip install prdc
    python benchmarks/metrics.py --images=50000 --dims=768

Two sets of random features with a known shift. All metrics of them, then those of the
first `--reference` of each beside `prdc` (precision, recall, density, coverage: three
whole matrices of distances) and SciPy (`sqrtm` of the product of the covariances),
whose numbers have to be the same. Processor seconds are those of all cores together.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvc_jax.metrics import compare, distances, other_class  # noqa: E402
from mvc_jax.metrics.points import Points  # noqa: E402

NAMES = ("kid", "cmmd", "frechet", "prdc", "vendi")
K = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000, help="of each set")
    parser.add_argument("--dims", type=int, default=768, help="of the features")
    parser.add_argument("--classes", type=int, default=10, help="of the images")
    parser.add_argument("--reference", type=int, default=5000, help="for the others")
    flags = parser.parse_args()
    real, synthetic = (
        drawn(flags.images, flags.dims, seed, shift)
        for seed, shift in ((0, 0.0), (1, 0.05))
    )
    ours, seconds = timed(lambda: everything(real, synthetic, flags.classes))
    print(f"{flags.images} and {flags.images} features of {flags.dims}: {seconds}")
    for name, value in ours.items():
        print(f"  {name:18} {value:.6g}")
    real, synthetic = real[: flags.reference], synthetic[: flags.reference]
    ours, seconds = timed(lambda: everything(real, synthetic, flags.classes))
    print(f"the first {len(real)} of each: {seconds}")
    for title, other in (("prdc", by_prdc), ("SciPy", by_scipy)):
        theirs, seconds = timed(lambda other=other: other(real, synthetic))
        print(f"  {title}: {seconds}")
        for name, value in theirs.items():
            print(f"    {name:18} {value:.6g}, ours {ours[name]:.6g}")
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-4)


def drawn(count: int, dims: int, seed: int, shift: float) -> np.ndarray:
    """Features whose neighbours mean something: a few latent factors, and noise."""
    rng = np.random.default_rng(seed)
    factors = np.random.default_rng(100).normal(size=(16, dims)).astype(np.float32)
    latent = rng.standard_normal((count, 16), np.float32) + np.float32(shift)
    return latent @ factors + 0.1 * rng.standard_normal((count, dims), np.float32)


def timed(run: Callable[[], Any]) -> tuple[Any, str]:
    began, used = time.perf_counter(), time.process_time()
    result = run()
    seconds, used = time.perf_counter() - began, time.process_time() - used
    return (
        result,
        f"{seconds:.1f} s, {used:.1f} processor seconds, peak {peak():.2f} GiB",
    )


def peak() -> float:
    """The largest resident size of the process until now, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def everything(
    real: np.ndarray, synthetic: np.ndarray, classes: int
) -> dict[str, float]:
    wanted = compare.Wanted(NAMES, neighbours=K)
    own = [compare.describe(Points(x), wanted) for x in (real, synthetic)]
    labels = np.arange(len(synthetic)) % classes
    search = other_class.LabelSearch(np.arange(len(real)) % classes, labels, K)
    found, nearest = compare.compare(*own, wanted, also={"labels": search})
    found["other_class"] = float((search.predictions().label != labels).mean())
    found["nearest"] = float(nearest.distance.mean())
    found["nearest_real"] = float(own[0].nearest.distance.mean())
    within = [
        distances.mean_pairwise(Points(synthetic[labels == label]))
        for label in range(classes)
    ]
    found["within_class"] = float(np.mean(within))
    return found


def by_prdc(real: np.ndarray, synthetic: np.ndarray) -> dict[str, float]:
    from prdc import compute_prdc

    return compute_prdc(real, synthetic, nearest_k=K)


def by_scipy(real: np.ndarray, synthetic: np.ndarray) -> dict[str, float]:
    import scipy.linalg

    means = [x.mean(0, dtype=np.float64) for x in (real, synthetic)]
    covariances = [np.cov(x, rowvar=False, dtype=np.float64) for x in (real, synthetic)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    distance = ((means[0] - means[1]) ** 2).sum()
    return {"frechet_distance": distance + np.trace(sum(covariances) - 2 * root)}


if __name__ == "__main__":
    main()
