"""Images in Parquet files: Hugging Face's, our own synthetic sets, anybody's.

Opening a source reads footers, labels and paths; image bytes are read a row group at a
time, when they are asked for. Ask in ascending order: then each group is read once.
"""

import dataclasses
import functools
import glob
import json
import os
import pathlib
import re
import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mvc_jax.data.decode import BadImage, Decoder
from mvc_jax.data.sources import Example, check_class_names
from mvc_jax.errors import UserError, require

_KEPT_BYTES = 128 << 20  # of row groups; the last two are kept whatever their size
_UNREADABLE = (pa.ArrowException, OSError)  # what Arrow raises for files that are bad
_SPLIT_OF_WORD = {  # in the names of files and folders, as Hugging Face reads them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class Parquet:
    """The rows of Parquet files, in the order of the files' names, as a `Source`.

    The image column holds the bytes of image files, or Hugging Face's struct of `bytes`
    and `path`; where bytes are null, the path leads to a file beside the Parquet file.
    The label column holds ClassLabels, whose names the schema knows, or integers, texts
    or truth values; then the distinct ones, sorted, are the classes.

    An image's id is its path if every image has one of its own, else `FILE#ROW`. Splits
    are told by names like `train-00000-of-00002.parquet` or `test/0.parquet`: test
    images are those of the test split, else of validation, which otherwise joins train.

    Args:
      pattern: a file, a folder (then every `*.parquet` below it) or a glob with `**`.
      decoder: of the image bytes.
      image_column: name of the column of images.
      label_column: name of the column of labels.

    Raises:
      UserError: no file matches; one cannot be read, lacks a column or differs from
        the others; no row can be used; two classes read the same.
    """

    def __init__(
        self,
        pattern: str,
        decoder: Decoder,
        *,
        image_column: str = "image",
        label_column: str = "label",
    ):
        self._decoder = decoder
        self._shards = [_Shard(p, image_column, label_column) for p in _find(pattern)]
        _require_alike(self._shards)
        self._starts, self._groups, largest = _row_groups(self._shards)
        kept = max(2, _KEPT_BYTES // max(largest, 1))
        self._read_group = functools.lru_cache(kept)(self._read_group)
        self._reading = threading.Lock()

        parts = [shard.read_rows() for shard in self._shards]
        values = pa.chunked_array([part.labels for part in parts])
        self.class_names, labels = _classes(values, self._shards[0].class_names)
        check_class_names(self.class_names)
        files = _relative([shard.path for shard in self._shards])
        names = _names_of_rows(files, parts)
        reasons = _defects(parts, values, labels)
        self.defects = {names[row]: why for row, why in sorted(reasons.items())}
        usable = np.ones(len(names), bool)
        usable[list(reasons)] = False
        _require_some(usable, self.defects, pattern)

        self._rows = np.flatnonzero(usable)
        self.labels = labels[usable]
        self.ids = tuple(names[row] for row in self._rows)
        rows = [len(part.labels) for part in parts]
        self.is_test = _is_test(np.repeat(list(map(_split, files)), rows)[usable])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        image, note = self._decoder(self._content(int(self._rows[index])))
        label, id_ = int(self.labels[index]), self.ids[index]
        example = Example(image=image, label=label, id=id_)
        return example | {"note": note} if note else example

    def _content(self, row: int) -> bytes:
        """The image file that a row holds or names."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard = self._shards[self._groups[group][0]]
        try:
            with self._reading:  # threads that want the same group share it
                images = self._read_group(group)
            cell = images[row - int(self._starts[group])].as_py()
            cell = cell if isinstance(cell, dict) else {"bytes": cell}
            if cell.get("bytes") is None:
                return shard.beside(cell["path"]).read_bytes()
            return cell["bytes"]
        except _UNREADABLE as error:
            raise BadImage(f"{shard.path} cannot be read: {error}") from error

    def _read_group(self, group: int) -> pa.ChunkedArray:
        shard, number = self._groups[group]
        return self._shards[shard].read_images(number)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is known of the rows of a file without reading its images.

    Attributes:
      labels: one a row; null: it has none.
      paths: one a row, "" if its image has none.
      bad_images: row -> why its image cannot be used.
    """

    labels: pa.ChunkedArray
    paths: list[str]
    bad_images: dict[int, str]


class _Shard:
    """One Parquet file; it is open only while it is read, so any thread may.

    Attributes:
      path: of the file.
      metadata: its footer.
      layout: what its two columns hold, in words.
      class_names: of Hugging Face's ClassLabel; None: it is none.

    Raises:
      UserError: it is no Parquet file, or has no such two columns.
    """

    def __init__(self, path: str, image_column: str, label_column: str):
        self.path, self.metadata = pathlib.Path(path), None
        with self._open() as file:
            self.metadata, schema = file.metadata, file.schema_arrow
        self._image, self._label = image_column, label_column
        image = self._type_of(schema, image_column, "image_column")
        label = self._type_of(schema, label_column, "label_column")
        fields, self._label_type = _fields(image), _common_type(label)
        self._bytes = f"{image_column}.bytes" if "bytes" in fields else ""
        self._path = f"{image_column}.path" if "path" in fields else ""
        if _is_binary(image):
            fields, self._bytes = ["binary"], image_column
        require(
            bool(fields) and self._label_type is not None,
            path,
            wanted=f"binary or a struct of bytes and path in {image_column!r}, integers, "
            f"texts or truth values in {label_column!r}",
            got=f"{image} and {label}",
            fix="Name others by config.data.image_column and config.data.label_column.",
        )
        self.layout = f"{' and '.join(fields)}, labels of {self._label_type}"
        self.class_names = None
        if self._label_type == pa.int64():
            self.class_names = _class_label_names(schema, label_column, path)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, metadata=self.metadata)
        except _UNREADABLE as error:
            raise self._broken("a Parquet file", error) from error

    def _broken(self, wanted: str, error: Exception) -> UserError:
        return UserError(
            str(self.path),
            wanted=wanted,
            got=f"{type(error).__name__}: {error}",
            fix="Write it anew, or leave it out of config.data.source.",
        )

    def _type_of(self, schema: pa.Schema, column: str, field: str) -> pa.DataType:
        require(
            schema.names.count(column) == 1,
            str(self.path),
            wanted=f"a column {column!r}",
            got=", ".join(map(repr, schema.names)) or "none",
            fix=f"Name one of these by config.data.{field}.",
        )
        return schema.field(column).type

    def read_rows(self) -> _Rows:
        """Reads labels and paths, and which images are null.

        Raises:
          UserError: the file is damaged, or labels are not whole numbers.
        """
        columns = [self._label, *([self._path] if self._path else [])]
        try:
            with self._open() as file:
                table = file.read(columns=columns)
                bare = np.flatnonzero(self._without_bytes(file))
            labels = _without_blanks(table[self._label], self._label_type)
        except _UNREADABLE as error:
            raise self._broken("labels that can be read", error) from error
        paths = [""] * len(labels)
        if self._path:
            field = pc.struct_field(table[self._image], "path")
            paths = pc.fill_null(field.cast(pa.large_string()), "").to_pylist()
        bad = {int(row): self._why_bad(paths[row]) for row in bare}
        return _Rows(labels, paths, {row: why for row, why in bad.items() if why})

    def _without_bytes(self, file: pq.ParquetFile) -> np.ndarray:
        """Which image bytes are null, bool [rows]; mostly the footer knows."""
        if not self._bytes:
            return np.ones(self.metadata.num_rows, bool)
        schema = self.metadata.schema
        leaf = [schema.column(i).path for i in range(len(schema))].index(self._bytes)
        masks = [np.zeros(0, bool)]
        for number in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(number)
            known = group.column(leaf).statistics
            nulls = known.null_count if known and known.has_null_count else None
            if nulls in (0, group.num_rows):
                masks.append(np.full(group.num_rows, nulls > 0))
                continue
            column = file.read_row_group(number, columns=[self._bytes])[self._image]
            if self._bytes != self._image:
                column = pc.struct_field(column, "bytes")
            masks.append(column.is_null().to_numpy())
        return np.concatenate(masks)

    def _why_bad(self, path: str) -> str:
        """Why the image of a row without bytes cannot be used, "" if it can."""
        if not path:
            return "no image"
        file = self.beside(path)
        if not file.is_relative_to(self.path.parent.resolve()):
            return f"its path leads out of the dataset's folder: {path}"
        return "" if file.is_file() else f"no such file: {path}"

    def beside(self, path: str) -> pathlib.Path:
        """Where a path in the image column leads, links followed."""
        return (self.path.parent / path).resolve()

    def read_images(self, number: int) -> pa.ChunkedArray:
        """The image column of a row group."""
        with self._open() as file:
            return file.read_row_group(number, columns=[self._image])[self._image]


def _find(pattern: str) -> list[str]:
    """Paths of the files that a glob, a folder or a path names, sorted."""
    wide = os.path.expanduser(pattern)
    if os.path.exists(wide):  # whatever stars and brackets are in its name
        deep = ("**", "*.parquet") if os.path.isdir(wide) else ()
        wide = os.path.join(glob.escape(wide), *deep)
    found = {
        path for path in glob.glob(wide, recursive=True) if not os.path.isdir(path)
    }
    require(
        bool(found),
        "config.data.source",
        wanted="a Parquet file, a folder with *.parquet in it, or a glob",
        got=f"{pattern!r}, which names no file",
        fix="Correct it.",
    )
    return sorted(found)


def _relative(paths: Sequence[pathlib.Path]) -> list[pathlib.PurePath]:
    """The same, counted from the folder that they have in common."""
    folder = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(folder) for path in paths]


def _fields(type_: pa.DataType) -> list[str]:
    """Those of `bytes` and `path` that a struct has in a type that can be read."""
    good = {"bytes": _is_binary, "path": _is_text}
    fields = list(type_) if pa.types.is_struct(type_) else []
    return [f.name for f in fields if f.name in good and good[f.name](f.type)]


def _is_binary(type_: pa.DataType) -> bool:
    return type_ in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_text(type_: pa.DataType) -> bool:
    return type_ in (pa.string(), pa.large_string(), pa.string_view())


def _common_type(type_: pa.DataType) -> pa.DataType | None:
    """The type to which labels of a kind are cast; None: such are no labels.

    Floats are among the integers: pandas makes them so where some are missing.
    """
    if pa.types.is_dictionary(type_):
        return _common_type(type_.value_type)
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return pa.int64()
    if _is_text(type_):
        return pa.large_string()
    return pa.bool_() if pa.types.is_boolean(type_) else None


def _without_blanks(labels: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Casts labels to their common type; NaN and blank texts become null."""
    if pa.types.is_floating(labels.type):
        labels = labels.cast(pa.float64())
        labels = pc.if_else(pc.is_nan(labels), None, labels)
    labels = labels.cast(type_)
    if type_ == pa.large_string():
        blank = pc.equal(pc.utf8_trim_whitespace(labels), "")
        labels = pc.if_else(blank, None, labels)
    return labels


def _class_label_names(
    schema: pa.Schema, column: str, path: str
) -> tuple[str, ...] | None:
    """The names of Hugging Face's ClassLabel; None: the schema tells of none."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = tuple(map(str, described["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None
    require(
        len(set(names)) == len(names),
        path,
        wanted=f"distinct class names of {column!r}",
        got=", ".join(names),
        fix="Correct the key 'huggingface' of its schema's metadata.",
    )
    return names or None


def _require_alike(shards: Sequence[_Shard]) -> None:
    for shard in shards[1:]:
        for what in ("layout", "class_names"):
            ours, theirs = getattr(shards[0], what), getattr(shard, what)
            require(
                ours == theirs,
                str(shard.path),
                wanted=f"{ours}, as in {shards[0].path}",
                got=theirs,
                fix="Name files of one dataset by config.data.source.",
            )


def _row_groups(shards: Sequence[_Shard]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The first row [G] of each row group, and its (index of a shard, number there)."""
    metadata = [shard.metadata for shard in shards]
    groups = [(i, n) for i, m in enumerate(metadata) for n in range(m.num_row_groups)]
    sizes = [metadata[i].row_group(n).num_rows for i, n in groups]
    return np.cumsum([0, *sizes[:-1]]), groups


def _classes(
    values: pa.ChunkedArray, names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and the labels int32 [rows]; -1: of no class."""
    if names is None:
        distinct = sorted(pc.unique(values).drop_null().to_pylist())
        names = tuple(map(str, distinct))
    else:
        distinct = list(range(len(names)))
    labels = pc.index_in(values, value_set=pa.array(distinct, values.type))
    return names, pc.fill_null(labels, -1).to_numpy().astype(np.int32)


def _names_of_rows(
    files: Sequence[pathlib.PurePath], parts: Sequence[_Rows]
) -> list[str]:
    """A distinct name for each row, bad ones too: its path, else file and row."""
    numbers, paths, unnamed = [], [], False
    for file, part in zip(files, parts, strict=True):
        mine = [f"{file.as_posix()}#{row}" for row in range(len(part.paths))]
        bare = {row for row, path in enumerate(part.paths) if not path}
        unnamed |= not bare <= part.bad_images.keys()
        numbers += mine
        paths += [path or number for path, number in zip(part.paths, mine, strict=True)]
    return numbers if unnamed or len(set(paths)) < len(paths) else paths


def _defects(
    parts: Sequence[_Rows], values: pa.ChunkedArray, labels: np.ndarray
) -> dict[int, str]:
    """Row -> why it cannot be used."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)]).tolist()
    reasons = {
        start + row: why
        for start, part in zip(starts, parts, strict=False)
        for row, why in part.bad_images.items()
    }
    stray = np.flatnonzero(labels < 0)
    for row, value in zip(stray.tolist(), values.take(stray).to_pylist(), strict=True):
        unlabelled = value in (None, -1)  # Hugging Face's test sets have -1
        reasons[row] = "no label" if unlabelled else f"no class has the label {value}"
    return reasons


def _require_some(usable: np.ndarray, defects: dict[str, str], pattern: str) -> None:
    some = "".join(f", {name}: {why}" for name, why in list(defects.items())[:3])
    require(
        bool(usable.any()),
        "config.data.source",
        wanted="rows with an image and a label",
        got=f"none that can be used of {len(usable)} in {pattern!r}{some}",
        fix="Name other files.",
    )


def _split(file: pathlib.PurePath) -> str:
    """The split that a file's name tells, else that of the nearest folder."""
    for part in (file.stem, *reversed(file.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return "train"


def _is_test(splits: np.ndarray) -> np.ndarray | None:
    """Which rows are test, bool [N], given their splits; None: there is no telling."""
    for name in ("test", "validation"):
        mine = splits == name
        if mine.any():
            return None if mine.all() else mine
    return None
