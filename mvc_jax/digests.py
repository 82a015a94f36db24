"""Files known by their content: what each held when it was written.

A file of records has a row for each file below a folder: size, sha256, when it was
modified, and when it was hashed. A file is hashed once: while its size and the time of
its modification stay the same, so does its digest. Later rows replace earlier ones, and
a row that a killed process left incomplete is no row.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from mvc_jax import files, object_store

# Ticks of the clock of modification times, in ns.
_TICK = 20_000_000
_LONG_TICK = 2_000_000_000  # of file systems that store whole seconds
_DAMAGED = (ValueError, TypeError, KeyError)  # raised by a row that is none


class _Row(NamedTuple):
    bytes: int
    sha256: str
    modified: int  # time in ns
    hashed: int

    def describes(self, size: int, modified: int) -> bool:
        """Whether a file of this size and time certainly has this content."""
        same = (self.bytes, self.modified) == (size, modified)
        return same and self.hashed - modified > _tick(modified)

    @property
    def content(self) -> dict:
        return {"bytes": self.bytes, "sha256": self.sha256}


class Digests:
    """The digests of the files below a folder.

    Args:
      folder: of the files; it need not exist yet.
      records: the file of the records, outside of the folder.
      others: files of records that other processes write; they are read.
      read_only: whether nothing is written, so that a file whose time is not the
        recorded one is hashed again and again.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        records: epath.PathLike,
        *,
        others: Sequence[epath.Path] = (),
        read_only: bool = False,
    ):
        self._folder, self._records = epath.Path(folder), epath.Path(records)
        self._others = others
        self._read_only = read_only
        self._prefix = f"{self._folder}/"
        rows, self._as_a_whole = {}, False
        with contextlib.suppress(FileNotFoundError):
            rows, self._as_a_whole = _read(records, *_stat(str(records)))
        self._rows = dict(rows)
        for other in others:
            with contextlib.suppress(FileNotFoundError):
                rows, _ = _read(other, *_stat(str(other)))
                self._rows |= {
                    name: row
                    for name, row in rows.items()
                    if name not in self._rows or self._rows[name].hashed < row.hashed
                }

    def add(self, *paths: epath.PathLike) -> None:
        """Records files as they are now; call it when they have been written."""
        names = [self._name(path) for path in paths]
        self._append({name: self._row(name) for name in names})

    def intact(self, path: epath.PathLike) -> bool:
        """Whether a file is there and holds what was recorded.

        A file without a record is recorded as it is: it is complete, since files are
        renamed into place.
        """
        name = self._name(path)
        recorded = self._rows.get(name)
        if recorded is None:
            if not _exists(self._prefix + name):
                return False
            self.add(path)
            return True
        with contextlib.suppress(FileNotFoundError):
            if recorded.describes(*_stat(self._prefix + name)):
                return True
        return self.holds(path, recorded.content)

    def holds(
        self, path: epath.PathLike, content: dict, *, again: bool = False
    ) -> bool:
        """Whether a file is there with this content.

        Args:
          path: of the file.
          content: its `bytes` and `sha256`.
          again: whether to hash it even if its size and modification time are known.
        """
        name = self._name(path)
        try:
            size, modified = _stat(self._prefix + name)
        except FileNotFoundError:
            return False
        if size != content["bytes"]:
            return False
        recorded = self._rows.get(name)
        known = recorded is not None and recorded.describes(size, modified)
        if known and not again and recorded.content == content:
            return True
        row = self._hashed(name)
        if row.content != content:
            return False
        if not known:
            with contextlib.suppress(OSError):  # only to be faster the next time
                self._append({name: row})
        return True

    def describe(self, path: epath.PathLike) -> dict:
        """`bytes` and `sha256` of a file as it is now, which is recorded."""
        self.add(path)
        return self._rows[self._name(path)].content

    def recorded(self) -> dict[str, dict]:
        """Name of each recorded file, relative to the folder -> its content."""
        return {name: row.content for name, row in self._rows.items()}

    def collect(self) -> None:
        """Takes the records of other processes, which have ended, over into its own."""
        if self._others:
            files.write_text(self._records, _lines(self._rows))
        for other in self._others:
            other.unlink(missing_ok=True)

    def forget_missing(self) -> None:
        """Removes the records of files that are no longer there."""
        with object_store.listed(self._folder):
            there = {x: self._rows[x] for x in self._rows if _exists(self._prefix + x)}
        if len(there) < len(self._rows):
            self._rows = there
            files.write_text(self._records, _lines(there))

    def _name(self, path: epath.PathLike) -> str:
        return str(path).removeprefix(self._prefix)

    def _row(self, name: str) -> _Row:
        """A file's row, hashed only if its size or time is not the recorded one."""
        if written := object_store.written(self._prefix + name):
            return _Row(*written, time.time_ns())
        recorded = self._rows.get(name)
        if recorded and recorded.describes(*_stat(self._prefix + name)):
            return recorded
        return self._hashed(name)

    def _hashed(self, name: str) -> _Row:
        path = self._prefix + name
        size, modified = _stat(path)  # first: a change while hashing must be noticed
        wait = modified + _tick(modified) - time.time_ns()
        if 0 <= wait <= _tick(modified):  # else the clock of the disk is another one
            time.sleep((wait + 1) / 1e9)
        hashed = time.time_ns()
        return _Row(size, files.sha256(path), modified, hashed)

    def _append(self, rows: dict[str, _Row]) -> None:
        rows = {name: row for name, row in rows.items() if row != self._rows.get(name)}
        if not rows:
            return
        self._rows.update(rows)
        if self._read_only:
            return
        path = self._records
        if self._as_a_whole or object_store.is_remote(path):  # which cannot append
            files.write_text(path, _lines(self._rows))
            self._as_a_whole = False
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(_lines(rows))


def _lines(rows: dict[str, _Row]) -> str:
    described = ({"name": name, **row._asdict()} for name, row in rows.items())
    return "".join(json.dumps(row) + "\n" for row in described)


@functools.lru_cache(maxsize=16)
def _read(path: epath.PathLike, size: int, modified: int) -> tuple[dict, bool]:
    """The rows of a file of records, and whether it has others than these.

    They were replaced or damaged, or the last one is incomplete.
    """
    del size, modified  # of the content that is remembered
    *lines, last = epath.Path(path).read_bytes().split(b"\n")
    try:  # at once: much faster than line by line
        found = [_entry(fields) for fields in json.loads(b"[%s]" % b",".join(lines))]
    except _DAMAGED:
        found = filter(None, map(_parse, lines))
    rows = dict(found)
    return rows, len(rows) < len(lines) or last != b""


def _entry(fields: dict) -> tuple[str, _Row]:
    size, sha256 = fields["bytes"], fields["sha256"]
    return fields["name"], _Row(size, sha256, fields["modified"], fields["hashed"])


def _parse(line: bytes) -> tuple[str, _Row] | None:
    """Name and row in a line of the records; None if it cannot be read."""
    try:
        return _entry(json.loads(line))
    except _DAMAGED:
        return None


def _tick(modified: int) -> int:
    """The longest time after `modified` in which a change may not change it."""
    return _TICK if modified % 1_000_000_000 else _LONG_TICK


def _exists(path: str) -> bool:
    remote = object_store.is_remote(path)
    return epath.Path(path).exists() if remote else os.path.exists(path)


def _stat(path: str) -> tuple[int, int]:
    """Size in bytes, and modification time in ns.

    Of an object, a negative number in place of the time, which is that of its content.
    """
    if object_store.is_remote(path):
        return object_store.size_and_token(path)
    local = os.stat(path)
    return local.st_size, local.st_mtime_ns
