"""Tables that are shown twice: on a page, and as Markdown on a terminal."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
      text: what it says.
      small: what is added in small print, as an interval; "": nothing.
      shade: of its background, from 0 for none to 1.
      is_word: whether it is words, else a number, which is set to the right.
      link: the address of a page; "": none.
    """

    text: str
    small: str = ""
    shade: float = 0.0
    is_word: bool = False
    link: str = ""

    @property
    def line(self) -> str:
        """Both parts in one line."""
        return f"{self.text} ({self.small})" if self.small else self.text


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells below their headings.

    Attributes:
      title: above the table.
      columns: headings; the first is that of the rows' names.
      rows: of each its name, then a cell for each other column.
      note: below the title: what the numbers are.
    """

    title: str
    columns: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def markdown(self) -> str:
        """The table by itself, in Markdown."""
        first, *others = self.columns
        rules = ["---" if cell.is_word else "---:" for cell in others]
        lines = [
            _line([cell.text for cell in (first, *others)]),
            f"|---|{'|'.join(rules)}|",
            *(_line([cell.line for cell in row]) for row in self.rows),
        ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Document:
    """What a comparison says, for a page and for a terminal.

    Attributes:
      title: of the page.
      lead: sentences that say what was found.
      notes: what the numbers are of, and what they do not say.
      tables: the numbers.
    """

    title: str
    lead: Sequence[str]
    notes: Sequence[str]
    tables: Sequence[Table]

    def markdown(self, picture: tuple[str, str] = ("", "")) -> str:
        """All of it; `picture` is what one shows, and the name of its file."""
        parts = [f"# {self.title}", *self.lead]
        if picture[1]:
            parts.append(f"![{picture[0]}]({picture[1]})")
        for table in self.tables:
            parts += [f"## {table.title}", *([table.note] if table.note else [])]
            parts.append(table.markdown())
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(parts) + "\n"


def headings(*texts: str, words: Sequence[str] = ()) -> list[Cell]:
    """The headings of a table; those in `words` are of columns of words."""
    return [Cell(text, is_word=text in words) for text in texts]


def shaded(values: Mapping[object, float]) -> dict[object, float]:
    """A shade for each of some numbers: 0 for the least, 0.6 for the greatest."""
    low, high = min(values.values()), max(values.values())
    span = high - low
    return {
        key: 0.6 * (value - low) / span if span else 0.0
        for key, value in values.items()
    }


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
