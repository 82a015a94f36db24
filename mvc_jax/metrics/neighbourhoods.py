"""Precision, recall, density and coverage, from balls around every image.

The ball of an image reaches to its k-th nearest other image of its own set, which is
not inside.

Legend: N real and M synthetic images, k neighbours.
"""

import numpy as np
from jaxtyping import Float

from mvc_jax.metrics.points import Block

_SLAB = 255  # rows whose flags are summed in bytes


class NearestSquares:
    """The squared distances [N, k] to the k nearest others of a set, ascending."""

    def __init__(self, count: int, neighbours: int):
        self.squared = np.full((count, neighbours), np.inf)

    def visit(self, block: Block) -> list[tuple]:
        """The nearest in a block of those points to which it has a nearer one."""
        found = []
        for points, squared in block.sides:
            # Another thread may lower `squared` meanwhile, and `add` compares again.
            nearer = np.flatnonzero(squared.min(1) < self.squared[points, -1])
            some = squared[nearer]
            k = self.squared.shape[1]
            if some.shape[1] > k:
                some = np.partition(some, k - 1, axis=1)[:, :k]
            found.append((nearer + points.start, some))
        return found

    def add(self, found: list[tuple]) -> None:
        """Takes over what `visit` found."""
        for rows, squared in found:
            both = np.concatenate([self.squared[rows], squared], axis=1)
            self.squared[rows] = np.sort(both, axis=1)[:, : self.squared.shape[1]]

    def merge(self, other: "NearestSquares") -> None:
        """Takes over what was found in other blocks."""
        self.add([(np.arange(len(self.squared)), other.squared)])


class Balls:
    """Which images are in the balls of the other set.

    Attributes:
      around: int64 [M], real balls that hold a synthetic image.
      holds: bool [N], whether a real ball holds a synthetic image.
      inside: bool [N], whether a real image is in a synthetic ball.
    """

    def __init__(
        self, real: Float[np.ndarray, " N"], synthetic: Float[np.ndarray, " M"]
    ):
        """Starts with no block.

        Args:
          real, synthetic: squared radii, in levels.
        """
        self._real, self._synthetic = real, synthetic
        self.around = np.zeros(len(synthetic), np.int64)
        self.holds, self.inside = np.zeros((2, len(real)), bool)

    def visit(self, block: Block) -> tuple:
        """Those of a block of real rows and synthetic columns."""
        kind = block.squared.dtype
        real = self._real[block.rows].astype(kind)[:, None]
        synthetic = self._synthetic[block.columns].astype(kind)[None]
        inside = (block.squared < synthetic).any(1)
        flags = block.squared < real
        around = sum(
            flags[row : row + _SLAB].view(np.uint8).sum(0, dtype=np.uint8).astype(int)
            for row in range(0, len(flags), _SLAB)
        )
        return block, around, flags.any(1), inside

    def add(self, found: tuple) -> None:
        """Takes over what `visit` found."""
        block, around, holds, inside = found
        self.around[block.columns] += around
        self.holds[block.rows] |= holds
        self.inside[block.rows] |= inside

    def merge(self, other: "Balls") -> None:
        """Takes over what was found in other blocks."""
        self.around += other.around
        self.holds |= other.holds
        self.inside |= other.inside

    def scores(self, neighbours: int) -> dict[str, float]:
        """The four numbers.

        `precision` and `recall`: synthetic images in a real ball, and real images in a
        synthetic one; Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2.
        `density`: real balls around a synthetic image, over k; `coverage`: real balls
        with a synthetic image; Naeem et al., arXiv 2002.09797, equations 3 and 4.
        """
        return {
            "precision": float((self.around > 0).mean()),
            "recall": float(self.inside.mean()),
            "density": float(self.around.mean() / neighbours),
            "coverage": float(self.holds.mean()),
        }
