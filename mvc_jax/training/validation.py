"""Validation on held-out examples, and early stopping."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mvc_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Validation:
    """Early stopping on held-out examples (Prechelt, 1998).

    Attributes:
      measure: state -> metrics, including the one given to `Checkpoints(best=...)`.
      every: steps between two validations.
      patience: steps without a new lowest value after which training ends, at a
        validation; 0: never.
    """

    measure: Callable[[Any], dict[str, float]]
    every: int
    patience: int = 0

    def ends(self, step: int, checkpoints: Checkpoints) -> bool:
        """Whether training ends after `step` steps, for lack of improvement."""
        if step % self.every:
            return False  # the next validation may be better
        best = checkpoints.best_step
        return 0 < self.patience <= step - (step if best is None else best)
