"""Maximum mean discrepancies: KID and CMMD, summed block by block.

Legend: N and M points of two sets, P dims.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from mvc_jax.metrics.points import Block, Points

# From the squared distances [r, c] of rows and columns to the kernel, in place.
Kernel = Callable[[np.ndarray, slice, slice], np.ndarray]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper


class KernelSums:
    """Sums of a kernel over the pairs of two sets, without those of a point and itself.

    Attributes:
      rows: float64 [N], for each of the one set the sum over the other.
      columns: float64 [M], the other way round; of a set with itself `rows` has all.
    """

    def __init__(self, kernel: Kernel, rows: int, columns: int):
        self._kernel = kernel
        self.rows, self.columns = np.zeros(rows), np.zeros(columns)

    def visit(self, block: Block) -> tuple[Block, np.ndarray, np.ndarray]:
        """The sums in a block."""
        values = self._kernel(block.squared, block.rows, block.columns)
        values[block.own] = 0
        return block, values.sum(1), values.sum(0)

    def add(self, found: tuple[Block, np.ndarray, np.ndarray]) -> None:
        """Takes over what `visit` found."""
        block, rows, columns = found
        self.rows[block.rows] += rows
        # The other triangle of a symmetric matrix is not visited.
        (self.rows if block.mirrored else self.columns)[block.columns] += columns

    def merge(self, other: "KernelSums") -> None:
        """Adds the sums over other blocks."""
        self.rows += other.rows
        self.columns += other.columns


def polynomial(a: Points, b: Points) -> Kernel:
    """(x . y / P + 1)^3, the kernel of KID: Bińkowski et al., arXiv 1801.01401."""
    half = 0.5 / a.dims
    x = (half * a.square_norms() + 1).astype(np.float32)[:, None]
    y = (half * b.square_norms()).astype(np.float32)[None]
    factor = np.float32(-half * a.scale**2)

    def kernel(squared: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        base = np.multiply(squared, factor, dtype=np.float32, casting="same_kind")
        base += x[rows]
        base += y[:, columns]
        cube = base * base
        return np.multiply(cube, base, out=cube)

    return kernel


def one_minus_gaussian(scale: float) -> Kernel:
    """1 - exp(-|x - y|^2 / (2 sigma^2)), one minus the kernel of CMMD.

    With the paper's sigma the kernel is nearly 1: float32 would lose what is below it.
    """
    factor = np.float32(-(scale**2) / (2 * CMMD_SIGMA**2))

    def kernel(squared: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        power = np.multiply(squared, factor, dtype=np.float32, casting="same_kind")
        return np.negative(np.expm1(power, out=power), out=power)

    return kernel


def kid(
    within_a: Float[np.ndarray, " N"],
    within_b: Float[np.ndarray, " M"],
    across_a: Float[np.ndarray, " N"],
    across_b: Float[np.ndarray, " M"],
) -> tuple[float, float | None]:
    """The kernel inception distance, and its standard error.

    The unbiased estimate of the squared maximum mean discrepancy over all pairs, of
    which the published mean over subsets of 1000 images is a noisier one: Bińkowski et
    al., arXiv 1801.01401, equation 4. The error is that of the jackknife over images.

    Args:
      within_a, within_b: sums of the kernel over the others of the same set.
      across_a, across_b: sums over all of the other set.

    Returns:
      the distance; its standard error, None where a set has fewer than three images.
    """
    n, m = len(within_a), len(within_b)
    a, b = within_a.sum() / (n * (n - 1)), within_b.sum() / (m * (m - 1))
    across = across_a.sum() / (n * m)
    distance = float(a + b - 2 * across)
    if min(n, m) < 3:
        return distance, None
    variance = 0.0
    for count, others, within, mean, cross in (
        (n, m, within_a, b, across_a),
        (m, n, within_b, a, across_b),
    ):
        left = (within.sum() - 2 * within) / ((count - 1) * (count - 2))
        left = left + mean - 2 * (cross.sum() - cross) / ((count - 1) * others)
        variance += (count - 1) / count * ((left - left.mean()) ** 2).sum()
    return distance, float(np.sqrt(variance))


def cmmd(
    within_a: Float[np.ndarray, " N"],
    within_b: Float[np.ndarray, " M"],
    across: Float[np.ndarray, " N"],
) -> float:
    """The CLIP maximum mean discrepancy: Jayasumana et al., arXiv 2401.09603.

    As in its published code the estimate is the one of least variance, which has the
    pairs of an image and itself, of CLIP embeddings of length 1, times 1000.

    Args:
      within_a, within_b, across: sums of `one_minus_gaussian`, as for `kid`.
    """
    n, m = len(within_a), len(within_b)
    total = 2 * across.sum() / (n * m) - within_a.sum() / n**2 - within_b.sum() / m**2
    return float(CMMD_SCALE * total)
