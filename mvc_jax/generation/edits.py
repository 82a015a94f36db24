"""Sets that start from a noised real image instead of from noise (SDEdit).

They are the methods of other papers, drawn from the same sources and noise seeds as the
recipes, without their mixing. What they need beside a recipe is a function of (seed, k)
and is added to it by `Edits.completed`:

  strength    of the noise, in [0, 1]: the fraction of the sampler's steps
  target      id of the image whose prompt is used: the source, or where the set is
              drawn towards another class, one of that, which is also its partner
  soft_label  probability of each class; null where the label is that of the source
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mvc_jax.data import order
from mvc_jax.errors import UserError

# Column of a set that starts from its sources -> its type, as `synthetic.PROVENANCE`.
COLUMNS = {"strength": "float32", "target": "string", "soft_label": ["float32"]}


@dataclasses.dataclass(frozen=True)
class Edits:
    """Completes recipes for these sets.

    Attributes:
      strengths: of which each image draws one.
      gamma: of `soft_label`.
      ids: of the training images.
      labels: of the training images, class indices.
      classes: K.
      seed: of the run.
    """

    strengths: Sequence[float]
    gamma: float
    ids: Sequence[str]
    labels: Int[np.ndarray, " N"]
    classes: int
    seed: int

    def completed(self, recipe: dict[str, Any], *, towards: bool) -> dict[str, Any]:
        """The recipe of an image, with `COLUMNS`.

        Args:
          recipe: without mixing.
          towards: whether it is drawn towards another class (Diff-Mix).
        """
        k = recipe["index"]
        draw = order.generator(self.seed, "generate/strength", k)
        strength = float(draw.choice(np.asarray(self.strengths, np.float64)))
        found = {"strength": strength, "target": recipe["source"], "soft_label": None}
        if towards:
            own = self._label_of[recipe["source"]]
            target = self._target(k, own)
            found["target"] = self.ids[target]
            found["partners"] = [self.ids[target]]
            found["soft_label"] = soft_label(
                own,
                int(self.labels[target]),
                strength,
                gamma=self.gamma,
                classes=self.classes,
            )
        return {**recipe, **found}

    @functools.cached_property
    def _label_of(self) -> dict[str, int]:
        return dict(zip(self.ids, map(int, self.labels), strict=True))

    @functools.cached_property
    def _rows_of(self) -> dict[int, np.ndarray]:
        """Class that has images -> their rows."""
        labels = np.asarray(self.labels)
        return {int(k): np.flatnonzero(labels == k) for k in np.unique(labels)}

    def _target(self, k: int, own: int) -> int:
        """The row of an image of another class: any class, then any of its images."""
        others = [label for label in self._rows_of if label != own]
        if not others:
            raise UserError(
                "config.generate.sets",
                wanted="at least two classes with training images, for diff_mix, which "
                "draws towards another one",
                got="one",
                fix="Leave diff_mix out.",
            )
        draw = order.generator(self.seed, "generate/target", k)
        return int(draw.choice(self._rows_of[int(draw.choice(others))]))


def soft_label(
    own: int, other: int, strength: float, *, gamma: float, classes: int
) -> list[float]:
    """(1 - s^gamma) of the source's class and s^gamma of the other one (Diff-Mix).

    Wang et al., arXiv 2403.19600; as `get_syn_item` in dataset/base.py of their code,
    whose README has 0.8 as the gamma of its example.
    """
    weight = strength**gamma
    found = [0.0] * classes
    found[own] += 1.0 - weight
    found[other] += weight
    return found
