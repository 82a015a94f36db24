"""Selects the images of a shard that are kept, and limits how many are unusable."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from mvc_jax.errors import UserError

_MAX_UNUSABLE = 0.1  # as a fraction of the images drawn
_MIN_IMAGES = 100  # drawn before that fraction is meaningful
Screen = Callable[[np.ndarray, Sequence[dict]], Sequence[Sequence[dict]]]


def unusable_reasons(notes: Sequence[dict]) -> list[str]:
    """Reasons why images stayed unusable after all redraws.

    Args:
      notes: of redrawn images, `{"reason", "kept", ...}`.
    """
    return [note["reason"] for note in notes if not note["kept"]]


def require_few_unusable(name: str, reasons: Counter, done: int, total: int) -> None:
    """Stops a set in which more than a tenth of the images are unusable.

    Args:
      name: of the set.
      reasons: number of unusable images by reason.
      done: images drawn so far.
      total: images of the set.

    Raises:
      UserError: too many are unusable.
    """
    count = sum(reasons.values())
    too_many = count > _MAX_UNUSABLE * done and done >= _MIN_IMAGES
    if not too_many and count <= _MAX_UNUSABLE * total:
        return
    listed = ", ".join(
        f"{number} {reason}" for reason, number in sorted(reasons.items())
    )
    raise UserError(
        f"generate/{name}",
        wanted=f"at least {1 - _MAX_UNUSABLE:.0%} usable images",
        got=f"{count} of {done} that are unusable after all redraws ({listed})",
        fix="NaN and black images usually mean overflow in half precision: set "
        "--config.generate.dtype=float32, or lower generate.text_scale and "
        "generate.image_scale. Otherwise the fine-tuned model is broken (see "
        "finetune/samples), or generate.steps is too small.",
    )


def select(
    images: UInt8[np.ndarray, "N H W 3"],
    usable: Bool[np.ndarray, " N"],
    rows: Sequence[dict],
    screen: Screen | None,
) -> tuple[list[int], list[dict]]:
    """Selects among the images of a shard.

    Args:
      images: as drawn, in [0, 255].
      usable: false for images that are black, constant or not finite.
      rows: provenance of each image.
      screen: (images, their provenance) -> for each image the rows of `removed.jsonl`,
        none for an image to keep. None: all usable images are kept.

    Returns:
      indices of the images to keep, and the rows of the images that `screen` removes.
    """
    candidates = np.flatnonzero(usable).tolist()
    if screen is None:
        return candidates, []
    found = screen(images[candidates], [rows[i] for i in candidates])
    kept = [i for i, removed in zip(candidates, found, strict=True) if not removed]
    return kept, [row for removed in found for row in removed]
