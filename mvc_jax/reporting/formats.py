"""Numbers as pages and texts show them, with a minus sign and without noise."""

import json
from typing import Any

NONE = "–"


def percent(value: Any, digits: int = 1) -> str:
    """A fraction in percent; a dash for what is no number."""
    if not isinstance(value, int | float) or value != value:
        return NONE
    return f"{100 * value:.{digits}f}".replace("-", "−")


def points(value: Any) -> str:
    """A difference of fractions in percentage points, with its sign."""
    if not isinstance(value, int | float) or value != value:
        return NONE
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def number(value: Any) -> str:
    """Any value of a table: counts in full, measures with four digits."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def spaced(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ")


FILTERS = {each.__name__: each for each in (percent, points, number, duration, spaced)}
