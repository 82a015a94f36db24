"""Which of the images that were drawn are kept.

A part of `generate`: no image that cannot be used, and none that a judge leaves out.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mvc_jax.errors import UserError
from mvc_jax.generation.sampler import Drawn

_MOST_BAD = 0.1  # of what was drawn; more is no accident
_ENOUGH = 100  # images by which to judge that
Judge = Callable[[np.ndarray, Sequence[dict]], Sequence[Sequence[dict]]]


def given_up(notes: Sequence[dict]) -> list[str]:
    """Why images could not be used, however often they were drawn."""
    return [note["reason"] for note in notes if not note["kept"]]


def require_few(name: str, bad: Counter, done: int, total: int) -> None:
    """Stops where so many images cannot be used that it is no accident."""
    given_up = sum(bad.values())
    many = given_up > _MOST_BAD * done and done >= _ENOUGH
    if not many and given_up <= _MOST_BAD * total:
        return
    raise UserError(
        f"generate/{name}",
        wanted=f"images that can be used, at least {1 - _MOST_BAD:.0%} of them",
        got=f"{given_up} of {done} that cannot, however often they were drawn anew ("
        + ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))
        + ")",
        fix="NaN and black are mostly numbers too large for half precision: set "
        "--config.generate.dtype=float32, or lower generate.text_scale and "
        "generate.image_scale; or the fine-tuned model is broken (look at "
        "finetune/samples), or generate.steps are too few.",
    )


def judged(
    judge: Judge | None, drawn: Drawn, rows: Sequence[dict]
) -> tuple[list[int], list[dict]]:
    """Chooses among the images of a shard.

    Args:
      judge: says which are to be left out: (images as they were drawn, their
        provenance) -> a list for each, of what speaks against it, empty for one that is
        kept; `Store.recorded("removed")` gives it back. None: all that can be used are
        kept.
      drawn: the images.
      rows: of provenance.

    Returns:
      places of the images that are kept, and what `judge` says of the others.
    """
    healthy = np.flatnonzero(drawn.health == 0).tolist()
    if judge is None:
        return healthy, []
    found = judge(drawn.images[healthy], [rows[place] for place in healthy])
    judged = list(zip(healthy, found, strict=True))
    kept = [place for place, reasons in judged if not reasons]
    return kept, [reason for _, reasons in judged for reason in reasons]
