"""Numbers as pages and texts show them, with a minus sign and without noise."""

import json
import re
from typing import Any

import markupsafe

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


def tick(value: int | float) -> str:
    """A label of an axis of differences, in percentage points."""
    text = f"{round(100 * value, 1):+g}"
    return "0" if text in ("+0", "-0") else text.replace("-", "−")


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


def size(count: int) -> str:
    """A number of bytes."""
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= divisor:
            return f"{count / divisor:,.1f} {unit}"
    return f"{count / 2**10:,.0f} KiB" if count >= 2**10 else f"{count} bytes"


def distance(value: int | float | None) -> str:
    """A distance with three digits, the last of which may be zero."""
    return NONE if value is None else f"{value:#.3g}"


def prose(text: str) -> markupsafe.Markup:
    """A sentence in HTML, where `code` is between backticks."""
    escaped = str(markupsafe.escape(text))
    return markupsafe.Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))


def spaced(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ")


def line(text: str) -> str:
    """A text in one line of Markdown that means no markup."""
    one = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", one)


def cell(text: str) -> str:
    """A text in a cell of a table in Markdown."""
    return line(text).replace("|", "\\|")


FILTERS = {
    each.__name__: each
    for each in (percent, points, tick, number, distance, prose, spaced, line, cell)
}
