"""The axis of a column of intervals: a dot and a line in each row of a table."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

_STEPS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
_TICKS = 6  # at most
_MARGIN = 0.08  # on both sides
_LEAST = 0.002  # width


@dataclasses.dataclass(frozen=True)
class Axis:
    """From `left` to `left + span`, in the unit of the values.

    Attributes:
      left: at the left end.
      span: of the whole.
      ticks: values that are labelled, round numbers.
    """

    left: float
    span: float
    ticks: tuple[float, ...]

    def at(self, value: int | float) -> str:
        """Where a value is, as a CSS percentage."""
        return f"{100 * (value - self.left) / self.span:.2f}%"


def axis(rows: Iterable[Mapping[str, Any] | None]) -> Axis:
    """The axis on which intervals fit, and zero.

    Args:
      rows: with numbers `mean`, `low` and `high`, each of which may be None.
    """
    values = [0.0]
    for row in rows:
        values += [row[key] for key in ("mean", "low", "high")] if row else []
    known = [value for value in values if isinstance(value, int | float)]
    low, high = min(known), max(known)
    span = max((1 + 2 * _MARGIN) * (high - low), _LEAST)
    left = (low + high - span) / 2
    step = min((x for x in _STEPS if span / x <= _TICKS), default=1.0)
    first, last = -int(-left // step), int((left + span) // step)
    return Axis(left, span, tuple(k * step for k in range(first, last + 1)))
