"""Images in Parquet files, e.g. Hugging Face's or our own synthetic sets, as a source.

Opening a source reads footers, labels and paths; image bytes are read on demand, one
row group at a time. In ascending order each row group is read once.
"""

import contextlib
import functools
import glob
import json
import os
import pathlib
import re
import threading
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mvc_jax import servers
from mvc_jax.data import remote
from mvc_jax.data.decode import LFS_POINTER, BadImage, Decoder
from mvc_jax.data.example import Example
from mvc_jax.errors import UserError

_CACHE_BYTES = 128 << 20  # of row groups; at least two are cached, whatever their size
_UNREADABLE = (pa.ArrowException, OSError, KeyError)  # raised by Arrow for bad files
_BINARY = (pa.binary(), pa.large_binary(), pa.binary_view())
_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_IMAGES = "binary, or a struct of bytes and path,"
_LABELS = "integers, strings or booleans"
_PART = re.compile(r"(.*?)(\d+)-of-(\d+)(.*\.parquet)")
_SPLIT_OF_WORD = {  # in the names of files and folders, as Hugging Face reads them
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


class Parquet:
    """The rows of Parquet files, in the order of the file names, as a `Source`.

    The image column holds the bytes of image files, or Hugging Face's struct of `bytes`
    and `path`; where bytes are null, the path is relative to the Parquet file's folder.
    The label column holds ClassLabels, with names in the schema, or integers, strings
    or booleans, whose sorted distinct values are the classes.

    The id of an image is its path if all paths are distinct, else `FILE#ROW`. The split
    is recognised by names like `train-00000-of-00002.parquet` or `test/0.parquet`: test
    images are those of the test split, else of validation, which otherwise joins train.

    Args:
      pattern: a file, a folder (all `*.parquet` below it) or a glob, optionally with
        `**`; or such a URL of fsspec, e.g. `hf://datasets/NAME/**/*.parquet`.
      decoder: of the image bytes.
      image_column: name of the column of images.
      label_column: name of the column of labels.
      keep_validation: whether validation images neither join train nor are test.

    Attributes:
      is_remote: whether reading waits for a server.

    Raises:
      UserError: no file matches; a file cannot be read, lacks a column or differs from
        the others; or no row can be used.
    """

    def __init__(
        self,
        pattern: str,
        decoder: Decoder,
        *,
        image_column: str = "image",
        label_column: str = "label",
        keep_validation: bool = False,
    ):
        self.is_remote = remote.is_remote(pattern)
        each = servers.parallel if self.is_remote else map
        files = remote.Remote(pattern) if self.is_remote else None
        paths = _find(pattern) if files is None else _find_remote(files, pattern)
        shards = list(
            each(lambda path: _Shard(path, image_column, label_column, files), paths)
        )
        _require_same_layout(shards)
        self._decoder, self._shards = decoder, shards
        self._starts, self._groups = _row_groups(shards)
        largest = max((size for _, _, size in self._groups), default=0)
        cached = max(2, _CACHE_BYTES // max(largest, 1))
        self._read_group = functools.lru_cache(cached)(self._read_group)
        self._reading = threading.Lock()

        parts = list(each(_Shard.read_rows, shards))
        values = pa.chunked_array([part.labels for part in parts])
        paths = [path for part in parts for path in part.paths]
        reasons = [reason for part in parts for reason in part.reasons]
        folder = os.path.commonpath([shard.path.parent for shard in shards])
        names = [shard.path.relative_to(folder) for shard in shards]
        rows = [len(part.labels) for part in parts]
        ids = _names_of_rows(names, rows, paths, reasons)
        self.class_names, labels = _classes(values, shards[0].class_names, reasons)
        pairs = zip(ids, reasons, strict=True)
        self.remarks = ()
        self.defects = {name: reason for name, reason in pairs if reason}
        self._rows = np.flatnonzero([not reason for reason in reasons])
        if not len(self._rows):
            raise UserError(
                "config.data.source",
                wanted="rows with an image and a label",
                got=f"no usable row among {len(ids)} in {pattern!r}",
                fix="Name other files.",
                details=[f"{name}: {reason}" for name, reason in self.defects.items()],
            )
        self.labels = labels[self._rows]
        self.ids = tuple(ids[row] for row in self._rows)
        splits = np.repeat(list(map(_split, names)), rows)[self._rows]
        kept = splits == "validation"
        self.is_validation = kept if keep_validation and kept.any() else None
        if self.is_validation is not None:
            splits = np.where(kept, "train", splits)
        self.is_test = _is_test(splits)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        image, note = self._decoder(self._content(int(self._rows[index])))
        label, id_ = int(self.labels[index]), self.ids[index]
        return Example(image=image, label=label, id=id_, note=note)

    def column(self, name: str) -> list[str] | None:
        """Another column as texts, "" where it is null; None if there is none."""
        each = servers.parallel if self.is_remote else map
        columns = list(each(lambda shard: shard.read_column(name), self._shards))
        if None in columns:
            return None
        values = [value for column in columns for value in column]
        return [values[row] for row in self._rows]

    def _content(self, row: int) -> bytes:
        """Reads the image file that a row contains or refers to."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard = self._shards[self._groups[group][0]]
        try:
            with self._reading:  # threads that need the same group read it once
                images = self._read_group(group)
            cell = images[row - int(self._starts[group])].as_py()
            cell = cell if isinstance(cell, dict) else {"bytes": cell}
            if cell.get("bytes") is not None:
                return cell["bytes"]
            # The footer may say that there are none of these.
            if reason := shard.check_path(cell.get("path") or ""):
                raise BadImage(reason)
            return shard.resolve(cell["path"]).read_bytes()
        except _UNREADABLE as error:
            raise BadImage(f"{shard.path} cannot be read: {error}") from error

    def _read_group(self, group: int) -> pa.ChunkedArray:
        shard, number, _ = self._groups[group]
        return self._shards[shard].read_images(number)


class _Rows(NamedTuple):
    """The rows of a file without their images.

    Attributes:
      labels: may be null.
      paths: of the images, "" where there is none.
      reasons: why each image cannot be used, "" if it can.
    """

    labels: pa.ChunkedArray
    paths: list[str]
    reasons: list[str]


class _Shard:
    """One Parquet file, opened for each read, so that any thread may read.

    Attributes:
      path: of the file.
      metadata: its footer.
      layout: a description of its two columns.
      class_names: of Hugging Face's ClassLabel; None for other labels.

    Raises:
      UserError: it is not a Parquet file, or lacks one of the columns.
    """

    def __init__(
        self,
        path: str,
        image_column: str,
        label_column: str,
        files: remote.Remote | None,
    ):
        self._remote = files
        self._place = path  # a `pathlib.Path` would lose a slash of a URL
        self.path = pathlib.Path(path if files is None else files.name(path))
        self.metadata = None
        try:
            with self._open() as file:
                self.metadata, schema = file.metadata, file.schema_arrow
        except _UNREADABLE as error:
            self._require_no_pointer()
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
            if not good:
                raise UserError(
                    path,
                    wanted=f"{what} in a column {column!r}",
                    got="; ".join(f"{name}: {type_}" for name, type_ in types.items()),
                    fix=f"Set config.data.{field} to one of these columns.",
                )
        self.class_names = None
        if self._label_type == pa.int64():
            self.class_names = _class_label_names(schema, label_column, path)
        columns = " and ".join(filter(None, leaves))
        self.layout = f"{columns}, {self._label_type} labels of {self.class_names}"

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(
            self.path if self._remote is None else self._remote.open(self._place),
            metadata=self.metadata,
        )

    def _require_no_pointer(self) -> None:
        """Raises a `UserError` for what Git LFS leaves in the place of a large file."""
        with contextlib.suppress(OSError), self._open_bytes() as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    str(self.path),
                    wanted="a Parquet file",
                    got="a Git LFS pointer to it",
                    fix="Run `git lfs pull` in its repository.",
                )

    def _open_bytes(self) -> Any:
        if self._remote is None:
            return self.path.open("rb")
        return self._remote.open(self._place)

    def _broken(self, wanted: str, error: Exception) -> UserError:
        return UserError(
            str(self.path),
            wanted=wanted,
            got=f"{type(error).__name__}: {error}",
            fix="Write it again, or exclude it from config.data.source.",
        )

    def read_rows(self) -> _Rows:
        """Reads labels and paths, and finds the images that are null.

        Raises:
          UserError: the file is damaged, or labels are not whole numbers.
        """
        columns = [self._label, *([self._path] if self._path else [])]
        try:
            with self._open() as file:
                table = file.read(columns=columns)
                without_bytes = np.flatnonzero(self._has_no_bytes(file))
            labels = _blank_to_null(table[self._label], self._label_type)
        except _UNREADABLE as error:
            raise self._broken("labels that can be read", error) from error
        paths, reasons = [""] * len(labels), [""] * len(labels)
        if self._path:
            paths = pc.struct_field(table[self._image], "path")
            paths = pc.fill_null(paths, "").to_pylist()
        for row in without_bytes:
            reasons[row] = self.check_path(paths[row])
        return _Rows(labels, paths, reasons)

    def read_column(self, name: str) -> list[str] | None:
        """A column as texts, "" for null; None if there is none."""
        try:
            with self._open() as file:
                if name not in file.schema_arrow.names:
                    return None
                values = file.read(columns=[name])[name].to_pylist()
        except _UNREADABLE as error:
            raise self._broken(f"a column {name!r}", error) from error
        return ["" if value is None else str(value) for value in values]

    def _has_no_bytes(self, file: pq.ParquetFile) -> np.ndarray:
        """Whether image bytes are null, bool [rows]; from the footer where possible."""
        if not self._bytes:
            return np.ones(self.metadata.num_rows, bool)
        schema = self.metadata.schema
        leaf = [schema.column(i).path for i in range(len(schema))].index(self._bytes)
        masks = [np.zeros(0, bool)]
        for number in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(number)
            stats = group.column(leaf).statistics
            if stats and stats.has_null_count and not stats.null_count:
                masks.append(np.zeros(group.num_rows, bool))
                continue
            column = file.read_row_group(number, columns=[self._bytes])[self._image]
            if self._bytes != self._image:
                column = pc.struct_field(column, "bytes")
            masks.append(column.is_null().to_numpy())
        return np.concatenate(masks)

    def check_path(self, path: str) -> str:
        """Why the image of a row without bytes cannot be used, "" if it can."""
        if not path:
            return "no image"
        if self._remote is not None:
            return f"a path and no bytes, in a remote file: {path}"
        try:
            file = self.resolve(path)
            if not file.is_relative_to(self.path.parent.resolve()):
                return f"its path leads out of the dataset's folder: {path}"
            return "" if file.is_file() else f"no such file: {path}"
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, a loop
            return f"not the path of a file: {error}"

    def resolve(self, path: str) -> pathlib.Path:
        """Resolves a path in the image column, following links."""
        return (self.path.parent / path).resolve()

    def read_images(self, number: int) -> pa.ChunkedArray:
        """Reads the image column of a row group."""
        with self._open() as file:
            return file.read_row_group(number, columns=[self._image])[self._image]


def _find(pattern: str) -> list[str]:
    """Paths that a glob, a folder or a file name matches, sorted."""
    expanded = os.path.expanduser(pattern)
    if os.path.exists(expanded):  # its name may contain stars and brackets
        below = ("**", "*.parquet") if os.path.isdir(expanded) else ()
        expanded = os.path.join(glob.escape(expanded), *below)
    found = {p for p in glob.glob(expanded, recursive=True) if not os.path.isdir(p)}
    if not found:
        raise UserError(
            "config.data.source",
            wanted="a Parquet file, a folder with *.parquet in it, or a glob",
            got=f"{pattern!r}, which matches no file",
            fix="Correct it.",
        )
    if found != {expanded}:  # one file by its name is meant
        _require_complete(found)
    return sorted(found)


def _find_remote(files: remote.Remote, url: str) -> list[str]:
    """Paths on the server that a URL matches, sorted."""
    listed = files.find(pattern=True)
    found = [path for path in listed if files.name(path).endswith(".parquet")]
    if not found:
        raise UserError(
            "config.data.source",
            wanted=f"Parquet files at {url}",
            got="no Parquet file there",
            fix="Correct it.",
        )
    if found != [files.path]:  # one file by its name is meant
        _require_complete(found)
    return found


def _require_complete(paths: Collection[str]) -> None:
    """Raises a `UserError` if e.g. `train-00001-of-00003.parquet` is missing."""
    missing = set()
    for path in paths:
        folder, name = os.path.split(path)
        if match := _PART.fullmatch(name):
            before, number, total, after = match.groups()
            for k in range(int(total)):
                other = f"{before}{k:0{len(number)}d}-of-{total}{after}"
                other = os.path.join(folder, other)
                missing |= {other} - {*paths}
    if missing:
        first, *more = sorted(missing)
        raise UserError(
            "config.data.source",
            wanted=f"all parts of a dataset, among them {first}",
            got="no such file" + (f", and {len(more)} others missing" if more else ""),
            fix="Download it again, or name the files to use one by one or by a folder "
            "of their own, under names without `-of-`.",
        )


def _leaves(image: pa.DataType, column: str) -> tuple[str, str]:
    """Dotted names of the columns of bytes and of paths, "" for one that is missing."""
    if image in _BINARY:
        return column, ""
    fields = image if pa.types.is_struct(image) else ()
    types = {field.name: field.type for field in fields}
    wanted = ("bytes", _BINARY), ("path", _TEXT)
    return tuple(f"{column}.{x}" if types.get(x) in good else "" for x, good in wanted)


def _common_type(label: pa.DataType) -> pa.DataType | None:
    """The type that labels are cast to; None: the type does not suit labels.

    Floats become integers, since pandas stores integers with missing values as floats.
    """
    if pa.types.is_dictionary(label):
        return _common_type(label.value_type)
    if pa.types.is_integer(label) or pa.types.is_floating(label):
        return pa.int64()
    if label in _TEXT:
        return pa.large_string()
    return pa.bool_() if pa.types.is_boolean(label) else None


def _blank_to_null(labels: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Casts labels to their common type; NaN and blank strings become null."""
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
    """Names of Hugging Face's ClassLabel; None: the schema does not define one."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = tuple(map(str, described["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None
    if len(set(names)) != len(names):
        raise UserError(
            path,
            wanted=f"distinct class names of {column!r}",
            got=", ".join(names),
            fix="Correct the key 'huggingface' of its schema's metadata.",
        )
    return names or None


def _require_same_layout(shards: Sequence[_Shard]) -> None:
    """Raises a `UserError` if columns or class names of the files differ."""
    for shard in shards[1:]:
        if shard.layout != shards[0].layout:
            raise UserError(
                str(shard.path),
                wanted=f"{shards[0].layout}, as in {shards[0].path}",
                got=shard.layout,
                fix="Set config.data.source to files of one dataset.",
            )


def _row_groups(
    shards: Sequence[_Shard],
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """First row [G] of each row group, and its (shard, number in the shard, bytes)."""
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
    """A distinct name for each row: its image's path if possible, else file#row."""
    counted = zip((file.as_posix() for file in files), rows, strict=True)
    numbers = [f"{file}#{row}" for file, count in counted for row in range(count)]
    names = [path or number for path, number in zip(paths, numbers, strict=True)]
    unnamed = ("", "") in zip(paths, reasons, strict=True)
    return numbers if unnamed or len(set(names)) < len(names) else names


def _classes(
    values: pa.ChunkedArray, names: tuple[str, ...] | None, reasons: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and labels int32 [rows]; rows of no class get a reason."""
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
    """The split in the name of a file, else in that of the nearest folder."""
    parts = (file.stem, *reversed(file.parts[:-1]))
    words = re.split(r"[^a-z]+", "/".join(parts).lower())
    return next((_SPLIT_OF_WORD[w] for w in words if w in _SPLIT_OF_WORD), "train")


def _is_test(splits: np.ndarray) -> np.ndarray | None:
    """Which rows are test, bool [N], given their splits; None: no split is test."""
    for name in ("test", "validation"):
        mine = splits == name
        if mine.any():
            return None if mine.all() else mine
    return None
