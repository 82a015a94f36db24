"""Folders in buckets, at gs:// and s3://, behind `epath.Path`.

1. There are no folders, only names with slashes: making one is nothing, and one without
   objects is not there.
2. What needs many objects together, a folder that is copied or moved, has an object
   `.tmp-NAME` beside the folder NAME while it is incomplete; `remove_incomplete`
   deletes such a folder. The files that say that a stage is there (`RECORDS`) come last
   and go first.

`epath.Path` makes a `StorePath` of an address once this module is imported.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath
from etils.epath import gpath, stat_utils

from mvc_jax import object_store, scratch, servers
from mvc_jax.store_client import SCHEMES, is_remote

RECORDS = ("manifest.json", "started.json")


@epath.register_path_cls(SCHEMES)
class StorePath(gpath.PosixGPath):
    """A path in a bucket. Files are opened for reading only: `replacing` writes."""

    def exists(self) -> bool:
        return object_store.find(self) is not None

    def is_dir(self) -> bool:
        found = object_store.find(self)
        return found is not None and found.is_folder

    def stat(self) -> stat_utils.StatResult:
        found = object_store.require(self)
        time_ = int(found.modified)
        return stat_utils.StatResult(found.is_folder, found.size, time_)

    def resolve(self, strict: bool = False) -> "StorePath":
        return self

    def iterdir(self) -> Iterator["StorePath"]:
        """Objects and folders in a folder; none if there is no such folder."""
        return iter(object_store.children(self))

    def mkdir(self, *args: Any, **options: Any) -> None:
        """Folders need not be made."""

    def rmdir(self) -> None:
        """One without objects is not there."""

    def read_bytes(self) -> bytes:
        return object_store.content(self)

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        object_store.put(bytes(data), self)
        return len(data)

    def write_text(self, data: str, encoding=None, errors=None) -> int:
        return self.write_bytes(data.encode())

    def open(self, mode: str = "r", **options: Any) -> Any:
        if mode.replace("b", "") != "r":
            raise ValueError(f"{self}: opened as {mode!r}; `replacing` writes")
        file = object_store.opened(self)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def unlink(self, missing_ok: bool = False) -> None:
        object_store.delete(self)

    def rmtree(self, missing_ok: bool = False) -> None:
        """Deletes a folder: what marks a stage as there first."""
        names = sorted(object_store.below(self))
        for name in (x for x in names if x in RECORDS):
            (self / name).unlink()
        servers.parallel(lambda x: (self / x).unlink(), set(names) - {*RECORDS})

    def copy(self, dst: epath.PathLike, overwrite: bool = False) -> Any:
        object_store.copy(self, epath.Path(dst))
        return dst

    def rename(self, target: epath.PathLike) -> Any:
        """Copies an object or a folder, then deletes it; can be repeated."""
        target = epath.Path(target)
        if not self.is_dir():
            object_store.copy(self, target)
            self.unlink()
            return target
        with appearing(target):
            copy_tree(self, target)
        with _marked(self):
            self.rmtree()
        return target

    replace = rename


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder, of which one or both paths are in a bucket; `RECORDS` last."""
    names = [*object_store.below(source)] if is_remote(source) else local_files(source)
    names = [
        name for name in names if not name.rpartition("/")[2].startswith(scratch.MARK)
    ]

    def copy_one(name: str) -> None:
        if not is_remote(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        object_store.copy(source / name, target / name)

    servers.parallel(copy_one, [name for name in names if name not in RECORDS])
    for name in RECORDS:
        if name in names:
            copy_one(name)


def local_files(folder: os.PathLike) -> list[str]:
    """The names of all files below a local folder, relative to it."""
    return [
        pathlib.Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    ]


@contextlib.contextmanager
def appearing(folder: epath.PathLike) -> Iterator[None]:
    """Marks a folder as incomplete until the end of the block; deletes it on errors."""
    with _marked(folder):
        try:
            yield
        except BaseException:
            epath.Path(folder).rmtree()
            raise


def remove_incomplete(folder: epath.Path) -> None:
    """Deletes the folders in a folder that a killed process left incomplete."""
    for mark, is_folder in object_store.children(folder).items():
        if mark.name.startswith(scratch.MARK) and not is_folder:
            (folder / mark.name.removeprefix(scratch.MARK)).rmtree()
            mark.unlink()


@contextlib.contextmanager
def _marked(folder: epath.PathLike) -> Iterator[None]:
    """Has an object beside a folder while the block runs, or until that was killed."""
    folder = StorePath(folder)
    mark = folder.parent / f"{scratch.MARK}{folder.name}"
    object_store.put(b"", mark)
    yield
    mark.unlink()
