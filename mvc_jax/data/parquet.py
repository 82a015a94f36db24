"""Images in Parquet files: Hugging Face's, our own synthetic sets, anybody's.

Opening a source reads footers, labels and paths; image bytes are read a row group at a
time, when they are asked for. Ask in ascending order: then each group is read once.
"""

import functools
import glob
import json
import os
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mvc_jax.data.decode import BadImage, Decoder
from mvc_jax.data.example import Example
from mvc_jax.errors import UserError, require

_KEPT_BYTES = 128 << 20  # of row groups; the last two are kept whatever their size
_UNREADABLE = (pa.ArrowException, OSError, KeyError)  # what Arrow raises: a bad file
_BINARY = (pa.binary(), pa.large_binary(), pa.binary_view())
_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_IMAGES = "binary, or a struct of bytes and path,"
_LABELS = "integers, texts or truth values"
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
        the others; no row can be used.
    """

    def __init__(
        self,
        pattern: str,
        decoder: Decoder,
        *,
        image_column: str = "image",
        label_column: str = "label",
    ):
        shards = [_Shard(path, image_column, label_column) for path in _find(pattern)]
        _require_alike(shards)
        self._decoder, self._shards = decoder, shards
        self._starts, self._groups = _row_groups(shards)
        largest = max((size for _, _, size in self._groups), default=0)
        kept = max(2, _KEPT_BYTES // max(largest, 1))
        self._read_group = functools.lru_cache(kept)(self._read_group)
        self._reading = threading.Lock()

        parts = [shard.read_rows() for shard in shards]
        values = pa.chunked_array([part.labels for part in parts])
        paths = [path for part in parts for path in part.paths]
        reasons = [reason for part in parts for reason in part.reasons]
        folder = os.path.commonpath([shard.path.parent for shard in shards])
        files = [shard.path.relative_to(folder) for shard in shards]
        rows = [len(part.labels) for part in parts]
        names = _names_of_rows(files, rows, paths, reasons)
        self.class_names, labels = _classes(values, shards[0].class_names, reasons)
        pairs = zip(names, reasons, strict=True)
        self.remarks = ()
        self.defects = {name: reason for name, reason in pairs if reason}
        self._rows = np.flatnonzero([not reason for reason in reasons])
        if not len(self._rows):
            raise UserError(
                "config.data.source",
                wanted="rows with an image and a label",
                got=f"none that can be used of the {len(names)} in {pattern!r}",
                fix="Name other files.",
                details=[f"{name}: {reason}" for name, reason in self.defects.items()],
            )
        self.labels = labels[self._rows]
        self.ids = tuple(names[row] for row in self._rows)
        self.is_test = _is_test(np.repeat(list(map(_split, files)), rows)[self._rows])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        image, note = self._decoder(self._content(int(self._rows[index])))
        label, id_ = int(self.labels[index]), self.ids[index]
        return Example(image=image, label=label, id=id_, note=note)

    def _content(self, row: int) -> bytes:
        """The image file that a row holds or names."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard = self._shards[self._groups[group][0]]
        try:
            with self._reading:  # threads that want the same group read it once
                images = self._read_group(group)
            cell = images[row - int(self._starts[group])].as_py()
            cell = cell if isinstance(cell, dict) else {"bytes": cell}
            if cell.get("bytes") is None:
                return shard.beside(cell["path"]).read_bytes()
            return cell["bytes"]
        except _UNREADABLE as error:
            raise BadImage(f"{shard.path} cannot be read: {error}") from error

    def _read_group(self, group: int) -> pa.ChunkedArray:
        shard, number, _ = self._groups[group]
        return self._shards[shard].read_images(number)


class _Rows(NamedTuple):
    """What is known of the rows of a file without their images.

    Labels may be null. A path is "" where there is none, a reason says why an image
    cannot be used, "" if it can.
    """

    labels: pa.ChunkedArray
    paths: list[str]
    reasons: list[str]


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
        try:
            with self._open() as file:
                self.metadata, schema = file.metadata, file.schema_arrow
        except _UNREADABLE as error:
            raise self._broken("a Parquet file", error) from error
        self._image, self._label = image_column, label_column
        types = dict(zip(schema.names, schema.types, strict=True))
        leaves = _leaves(types.get(image_column, pa.null()), image_column)
        self._bytes, self._path = leaves
        self._label_type = _common_type(types.get(label_column, pa.null()))
        for field, column, good, what in (
            ("image_column", image_column, any(leaves), _IMAGES),
            ("label_column", label_column, self._label_type is not None, _LABELS),
        ):
            require(
                good,
                path,
                wanted=f"{what} in a column {column!r}",
                got="; ".join(f"{name}: {type_}" for name, type_ in types.items()),
                fix=f"Name one of these columns by config.data.{field}.",
            )
        self.class_names = None
        if self._label_type == pa.int64():
            self.class_names = _class_label_names(schema, label_column, path)
        columns = " and ".join(filter(None, leaves))
        self.layout = f"{columns}, {self._label_type} labels of {self.class_names}"

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, metadata=self.metadata)

    def _broken(self, wanted: str, error: Exception) -> UserError:
        return UserError(
            str(self.path),
            wanted=wanted,
            got=f"{type(error).__name__}: {error}",
            fix="Write it anew, or leave it out of config.data.source.",
        )

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
        paths, reasons = [""] * len(labels), [""] * len(labels)
        if self._path:
            paths = pc.struct_field(table[self._image], "path")
            paths = pc.fill_null(paths, "").to_pylist()
        for row in bare:
            reasons[row] = self._why_bad(paths[row])
        return _Rows(labels, paths, reasons)

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
            if known and known.has_null_count and not known.null_count:
                masks.append(np.zeros(group.num_rows, bool))
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
        try:
            file = self.beside(path)
            if not file.is_relative_to(self.path.parent.resolve()):
                return f"its path leads out of the dataset's folder: {path}"
            return "" if file.is_file() else f"no such file: {path}"
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, a loop
            return f"no path of a file: {error}"

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
    found = {p for p in glob.glob(wide, recursive=True) if not os.path.isdir(p)}
    require(
        bool(found),
        "config.data.source",
        wanted="a Parquet file, a folder with *.parquet in it, or a glob",
        got=f"{pattern!r}, which names no file",
        fix="Correct it.",
    )
    return sorted(found)


def _leaves(image: pa.DataType, column: str) -> tuple[str, str]:
    """Dotted names of the columns of bytes and of paths, "" if there is none."""
    if image in _BINARY:
        return column, ""
    fields = image if pa.types.is_struct(image) else ()
    types = {field.name: field.type for field in fields}
    wanted = ("bytes", _BINARY), ("path", _TEXT)
    return tuple(f"{column}.{x}" if types.get(x) in good else "" for x, good in wanted)


def _common_type(label: pa.DataType) -> pa.DataType | None:
    """The type to which labels of a kind are cast; None: they are no labels.

    Floats are among the integers: pandas makes them so where some are missing.
    """
    if pa.types.is_dictionary(label):
        return _common_type(label.value_type)
    if pa.types.is_integer(label) or pa.types.is_floating(label):
        return pa.int64()
    if label in _TEXT:
        return pa.large_string()
    return pa.bool_() if pa.types.is_boolean(label) else None


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
        require(
            shard.layout == shards[0].layout,
            str(shard.path),
            wanted=f"{shards[0].layout}, as in {shards[0].path}",
            got=shard.layout,
            fix="Name files of one dataset by config.data.source.",
        )


def _row_groups(
    shards: Sequence[_Shard],
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """The first row [G] of each row group, and its (shard, number there, bytes)."""
    rows, groups = [0], []
    for index, shard in enumerate(shards):
        for number in range(shard.metadata.num_row_groups):
            group = shard.metadata.row_group(number)
            rows.append(group.num_rows)
            groups.append((index, number, group.total_byte_size))
    return np.cumsum(rows)[:-1], groups


def _names_of_rows(
    files: Sequence[pathlib.PurePath],
    rows: Sequence[int],
    paths: Sequence[str],
    reasons: Sequence[str],
) -> list[str]:
    """A distinct name for each row: its image's path if it can be, or file and row."""
    counted = zip((file.as_posix() for file in files), rows, strict=True)
    numbers = [f"{file}#{row}" for file, count in counted for row in range(count)]
    names = [path or number for path, number in zip(paths, numbers, strict=True)]
    unnamed = ("", "") in zip(paths, reasons, strict=True)
    return numbers if unnamed or len(set(names)) < len(names) else names


def _classes(
    values: pa.ChunkedArray, names: tuple[str, ...] | None, reasons: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and labels int32 [rows]; those of no class get a reason."""
    distinct = sorted(pc.unique(values).drop_null().to_pylist())
    known = distinct if names is None else list(range(len(names)))
    labels = pc.index_in(values, value_set=pa.array(known, values.type))
    labels = pc.fill_null(labels, -1).to_numpy().astype(np.int32)
    stray = np.flatnonzero(labels < 0)
    for row, value in zip(stray, values.take(stray).to_pylist(), strict=True):
        unlabelled = value in (None, -1)  # Hugging Face's test sets have -1
        reasons[row] = "no label" if unlabelled else f"no class has the label {value}"
    return names or tuple(map(str, distinct)), labels


def _split(file: pathlib.PurePath) -> str:
    """The split that a file's name tells, else that of the nearest folder."""
    parts = (file.stem, *reversed(file.parts[:-1]))
    words = re.split(r"[^a-z]+", "/".join(parts).lower())
    return next((_SPLIT_OF_WORD[w] for w in words if w in _SPLIT_OF_WORD), "train")


def _is_test(splits: np.ndarray) -> np.ndarray | None:
    """Which rows are test, bool [N], given their splits; None: there is no telling."""
    for name in ("test", "validation"):
        mine = splits == name
        if mine.any():
            return None if mine.all() else mine
    return None
