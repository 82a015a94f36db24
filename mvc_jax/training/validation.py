"""What a state is worth on examples that it is not trained on, and when to stop."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mvc_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Validation:
    """Early stopping on held-out examples (Prechelt, 1998).

    Attributes:
      measure: state -> numbers, among them the one that `Checkpoints` keeps the lowest
        of.
      every: steps from one measurement to the next.
      patience: steps without a lower one after which training ends, at the next
        measurement; 0: never.
    """

    measure: Callable[[Any], dict[str, float]]
    every: int
    patience: int = 0

    def ends(self, step: int, checkpoints: Checkpoints) -> bool:
        """Whether nothing better has come for too long, after `step` steps."""
        if step % self.every:
            return False  # the next measurement may be a better one
        best = checkpoints.best_step
        return 0 < self.patience <= step - (step if best is None else best)
