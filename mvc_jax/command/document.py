"""A comparison of runs, printed and written: Markdown, JSON and a page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath, epy

from mvc_jax import files, stage
from mvc_jax.reporting import formats, tables
from mvc_jax.reporting.tables import Cell, Table

with epy.lazy_imports():
    from mvc_jax.classification import tested
    from mvc_jax.reporting import page


def read(workdir: epath.Path) -> "tested.Tested":
    """The results of a workdir's classifiers, which are finished."""
    settings = stage.read_manifest(workdir, "classify")["settings"]
    return tested.read(workdir, settings["classify"]["runs"])


def write(
    path: epath.Path,
    document: tables.Document,
    summary: Mapping[str, Any],
    *,
    picture: tuple[str, bytes] = ("", b""),
) -> None:
    """Prints a comparison, and writes `<path>.json`, `.md`, `.html` and `.png`.

    Args:
      path: of the files, without a suffix.
      document: what is said.
      summary: all of its numbers, as JSON.
      picture: what a PNG shows, and the PNG; empty: there is none.
    """
    shown, content = picture
    name = f"{path.name}.png" if content else ""
    text = document.markdown((shown, name))
    files.write_json(path.parent / f"{path.name}.json", summary)
    files.write_text(path.parent / f"{path.name}.md", text)
    if content:
        files.write_bytes(path.parent / name, content)
    template = epath.Path(__file__).parent / "comparison.html.j2"
    html = page.render(template, document=document, picture=_inline(shown, content))
    files.write_text(path.parent / f"{path.name}.html", html)
    print(f"\n{document.markdown()}\nreport: {path.parent / path.name}.html")


def accuracy_cell(found: Mapping[str, Any] | None) -> Cell:
    """An accuracy in percent, as `comparisons.accuracy` describes it, if any."""
    if found is None:
        return Cell(formats.NONE)
    low, high = found["low"], found["high"]
    ends = f"{formats.percent(low)} to {formats.percent(high)}"
    return Cell(formats.percent(found["accuracy"]), "" if low is None else ends)


def points(found: Mapping[str, Any]) -> str:
    """A difference with its interval, within a sentence."""
    ends = f"{formats.points(found['low'])} to {formats.points(found['high'])}"
    return f"{formats.points(found['mean'])} points ({ends})"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def difference_columns(*names: str, confidence: float, over: str = "") -> list[Cell]:
    """Headings of a table of differences, behind those of what is compared."""
    interval = f"{confidence:.0%} interval{over}"
    first, *words = names
    return [
        Cell(first),
        *(Cell(word, is_word=True) for word in words),
        Cell("difference, points"),
        Cell(interval),
        Cell("verdict", is_word=True),
    ]


def difference_cells(found: Mapping[str, Any], words: Mapping[str, str]) -> list[Cell]:
    """A difference, its interval, and the verdict.

    Args:
      found: as `comparisons.compared` describes it.
      words: for the verdicts "yes" and "no".
    """
    low, high = found["low"], found["high"]
    ends = "–" if low is None else f"{formats.points(low)} to {formats.points(high)}"
    verdict = words.get(found["verdict"], "no difference seen")
    if low is None:
        verdict = "not known: no spread"
    elif verdict not in words.values() and not low <= 0 <= high:
        verdict = f"not clear, of {found['asked']} asked"
    return [
        Cell(formats.points(found["mean"])),
        Cell(ends),
        Cell(verdict, is_word=True),
    ]


def difference_table(
    title: str,
    note: str,
    rows: Sequence[tuple[str, str, Mapping[str, Any]]],
    *,
    place: str,
    words: Mapping[str, str],
    confidence: float,
) -> Table:
    """A table of differences: what was trained, where, and what was found.

    Args:
      title: of the table.
      note: above it.
      rows: (training, place, difference as of `difference_cells`).
      place: heading of the places.
      words: for the verdicts "yes" and "no".
      confidence: of the intervals.
    """
    columns = difference_columns("training", place, confidence=confidence)
    cells = [
        [Cell(training), Cell(where, is_word=True), *difference_cells(found, words)]
        for training, where, found in rows
    ]
    return Table(title, columns, cells, note)


def _inline(shown: str, content: bytes) -> dict[str, Any] | None:
    """A picture for a page, which has no other files."""
    if not content:
        return None
    from PIL import Image

    width, height = Image.open(io.BytesIO(content)).size
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {
        "title": shown[0].upper() + shown[1:],
        "alt": shown,
        "uri": uri,
        "width": width,
        "height": height,
    }
