"""Figures as data: images in rows and columns, each with what it was made of.

`<name>.parquet` has a row for each cell: where it is, its image as a PNG, and its
provenance in the columns of a set (`synthetic.PROVENANCE`; null where it does not
apply). `<name>.png` is drawn from it.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.generation.synthetic import PROVENANCE, arrow_type

REAL = "real"
_PLACE = {
    "row": "int32",
    "column": "int32",
    "row_heading": "string",
    "column_heading": "string",
    "set": "string",
    "label": "string",
}
_TILE = 128  # pixels along a side, at least
_MAX_PIXELS = 100_000_000  # of the picture
_RECORD = b"mvc_jax"


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image of a figure.

    Attributes:
      heading: of its column.
      image: its pixels; None: the cell is empty.
      set: by whose conditioning it was drawn; `REAL` for a training image.
      label: its class.
      provenance: some of `PROVENANCE`.
    """

    heading: str
    image: UInt8[np.ndarray, "H W 3"] | None = None
    set: str = ""
    label: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a figure; `number`, of its class, if that is what it shows."""

    name: str
    cells: Sequence[Cell]
    number: int | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """Rows of as many cells each.

    Attributes:
      title: a few words.
      rows: at least one.
      notes: sentences below it.
    """

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def side(self) -> int:
        """Pixels along the longest side of any image."""
        cells = [cell for row in self.rows for cell in row.cells]
        return max(max(x.image.shape[:2]) for x in cells if x.image is not None)


def paths(folder: epath.Path, name: str) -> tuple[epath.Path, epath.Path]:
    """Paths of a figure's data and of its picture."""
    return folder / f"{name}.parquet", folder / f"{name}.png"


def write(folder: epath.Path, name: str, figure: Figure) -> None:
    """Writes the data, then the picture."""
    data, picture = paths(folder, name)
    cells = [
        _row(row, column, each, cell)
        for row, each in enumerate(figure.rows)
        for column, cell in enumerate(each.cells)
    ]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"image": image}
    types |= {key: arrow_type(type_) for key, type_ in (_PLACE | PROVENANCE).items()}
    table = pa.table(
        {key: pa.array([x.get(key) for x in cells], t) for key, t in types.items()}
    )
    record = {
        "title": figure.title,
        "notes": [*figure.notes],
        "numbers": [row.number for row in figure.rows],
    }
    table = table.replace_schema_metadata({_RECORD: json.dumps(record)})
    with files.replacing(data) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file)
    files.write_bytes(picture, png(figure))


def _row(row: int, column: int, of: Row, cell: Cell) -> dict[str, Any]:
    image = None
    if cell.image is not None:
        content = pictures.png(Image.fromarray(cell.image))
        image = {"bytes": content, "path": f"{row:02d}-{column:02d}.png"}
    return {
        **cell.provenance,
        "row": row,
        "column": column,
        "row_heading": of.name,
        "column_heading": cell.heading,
        "set": cell.set,
        "label": cell.label,
        "image": image,
    }


def read(path: epath.PathLike) -> Figure:
    """A figure from its data."""
    with epath.Path(path).open("rb") as file:
        table = pq.read_table(file)
    record = json.loads(table.schema.metadata[_RECORD])
    rows: dict[int, list[dict]] = {}
    for each in table.to_pylist():
        rows.setdefault(each["row"], []).append(each)
    return Figure(
        record["title"],
        [
            Row(cells[0]["row_heading"], [*map(_cell, cells)], record["numbers"][row])
            for row, cells in sorted(rows.items())
        ],
        record["notes"],
    )


def _cell(row: dict[str, Any]) -> Cell:
    image = None
    if row["image"] is not None:
        image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    return Cell(
        row["column_heading"],
        image,
        row["set"],
        row["label"],
        {key: row[key] for key in PROVENANCE if row[key] is not None},
    )


def png(figure: Figure, *, panels: int = 1) -> bytes:
    """A figure as a PNG, its images at their own size, or a whole multiple of it.

    They are smaller only where all together have more than 100 million pixels.
    """
    cells = len(figure.rows) * len(figure.rows[0].cells)
    tile = figure.side * -(-_TILE // figure.side)
    if cells * tile**2 > _MAX_PIXELS:
        tile = int((_MAX_PIXELS / cells) ** 0.5)
    rows = [
        pictures.Row(
            name=row.name,
            cells=[
                pictures.Cell(
                    heading=cell.heading,
                    image=None if cell.image is None else Image.fromarray(cell.image),
                )
                for cell in row.cells
            ],
            **({} if row.number is None else {"number": row.number}),
        )
        for row in figure.rows
    ]
    picture = pictures.grid(rows, tile, panels=panels, notes=figure.notes)
    return pictures.png(picture)
