"""Buckets of object stores as folders, at gs:// and s3://, behind `epath.Path`.

1. An object appears as a whole or not at all: files are written to local scratch and
   then put under their names. There are no temporary objects and no renames.
2. There are no folders, only names with slashes: making one is nothing, and one without
   objects is not there.
3. What needs many objects together, a folder that is copied or moved, has an object
   `.tmp-NAME` beside the folder NAME while it is incomplete; `remove_incomplete`
   deletes such a folder. The files that say that a stage is there (`RECORDS`) come last
   and go first.
4. An object is known by the checksum that the store has of it, not by its time.
5. What is mapped, or was written, is kept in local scratch (`TMPDIR`) as long as there
   is room; the next process finds it there.
6. What fails in passing is tried again; what fails for good is a `UserError`.
"""

import base64
import contextlib
import functools
import hashlib
import io
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from etils import epath
from etils.epath import gpath, stat_utils

from mvc_jax import scratch, servers
from mvc_jax.errors import UserError, no_room, require_disk_space

SCHEMES = ("gs://", "s3://")
RECORDS = ("manifest.json", "started.json")
_WAITS = (1.0, 4.0, 16.0)  # seconds before another try, besides those of the libraries
_LARGE = 1 << 20  # bytes of files that are kept in scratch
_READ_AHEAD = 1 << 20  # bytes
_Result = TypeVar("_Result")


class Known(NamedTuple):
    """What a store knows of an object.

    Attributes:
      size: in bytes.
      token: a negative number that another content would change; it is that of the MD5
        where the store has it.
      modified: seconds since the epoch, by the store's clock.
      is_folder: whether it is none, but the start of the names of some.
    """

    size: int
    token: int
    modified: float
    is_folder: bool


class Content(NamedTuple):
    """What a file holds: bytes, their SHA-256, and what the store has of its MD5."""

    size: int
    sha256: str
    token: int


_sent: dict[str, Content] = {}  # by this process
_refused: dict[str, UserError] = {}  # folder -> why nothing may be written there
_listings: list[tuple[str, dict[str, Known]]] = []  # prefix -> the objects below it


def is_remote(path: epath.PathLike) -> bool:
    return str(path).startswith(SCHEMES)


@epath.register_path_cls(SCHEMES)
class StorePath(gpath.PosixGPath):
    """A path in a bucket. Files are opened for reading only: `replacing` writes."""

    def exists(self) -> bool:
        return find(self) is not None

    def is_dir(self) -> bool:
        found = find(self)
        return found is not None and found.is_folder

    def stat(self) -> stat_utils.StatResult:
        found = _require(self)
        time_ = int(found.modified)
        return stat_utils.StatResult(found.is_folder, found.size, time_)

    def resolve(self, strict: bool = False) -> "StorePath":
        return self

    def iterdir(self) -> Iterator["StorePath"]:
        """Objects and folders in a folder; none if there is no such folder."""
        return iter(children(self))

    def mkdir(self, *args: Any, **options: Any) -> None:
        """Folders need not be made."""

    def rmdir(self) -> None:
        """One without objects is not there."""

    def read_bytes(self) -> bytes:
        for _, listing in _listings:
            known = listing.get(str(self))
            if known and known.size < _LARGE:
                return _remembered(self, known.token)
        return _attempt(lambda: _system(self).cat_file(str(self)), self)

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        put(bytes(data), self)
        return len(data)

    def write_text(self, data: str, encoding=None, errors=None) -> int:
        return self.write_bytes(data.encode())

    def open(self, mode: str = "r", **options: Any) -> Any:
        if mode.replace("b", "") != "r":
            raise ValueError(f"{self}: opened as {mode!r}; `replacing` writes")
        found = _require(self)
        kept = _kept(self, found.token)
        if kept.exists():
            file = kept.open("rb")
        else:
            file = io.BufferedReader(
                servers.RangeReader(found.size, functools.partial(_part, self)),
                _READ_AHEAD,
            )
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def unlink(self, missing_ok: bool = False) -> None:
        _require_writes(self)
        with contextlib.suppress(FileNotFoundError):
            _attempt(lambda: _system(self).rm_file(str(self)), self)
        _changed(self)

    def rmtree(self, missing_ok: bool = False) -> None:
        """Deletes a folder: what marks a stage as there first."""
        names = sorted(below(self))
        for name in (x for x in names if x in RECORDS):
            (self / name).unlink()
        servers.parallel(lambda x: (self / x).unlink(), set(names) - {*RECORDS})

    def copy(self, dst: epath.PathLike, overwrite: bool = False) -> Any:
        copy(self, epath.Path(dst))
        return dst

    def rename(self, target: epath.PathLike) -> Any:
        """Copies an object or a folder, then deletes it; can be repeated."""
        target = epath.Path(target)
        if not self.is_dir():
            copy(self, target)
            self.unlink()
            return target
        with appearing(target):
            copy_tree(self, target)
        with _marked(self):
            self.rmtree()
        return target

    replace = rename


@functools.lru_cache(maxsize=256)
def _remembered(path: StorePath, token: int) -> bytes:
    """The content of an object that is known to have this token."""
    del token
    return _attempt(lambda: _system(path).cat_file(str(path)), path)


def find(path: epath.PathLike) -> Known | None:
    """What the store knows of an object or folder; None: it is not there."""
    for prefix, listing in reversed(_listings):
        if f"{path}/".startswith(prefix):
            if found := listing.get(str(path)):
                return found
            inside = any(name.startswith(f"{path}/") for name in listing)
            return Known(0, 0, 0.0, True) if inside else None
    try:
        return _known(_attempt(lambda: _system(path).info(str(path)), path))
    except FileNotFoundError:
        return None


def children(folder: epath.PathLike) -> dict[StorePath, bool]:
    """The objects and folders in a folder -> whether each is a folder."""
    try:
        rows = _attempt(lambda: _system(folder).ls(str(folder), detail=True), folder)
    except FileNotFoundError:
        return {}
    scheme, prefix = str(folder).partition("://")[0], f"{folder}/"
    found = {}
    for row in rows:
        name = f"{scheme}://{row['name'].rstrip('/')}"
        if name.startswith(prefix) and not name.endswith("~"):
            found[StorePath(name)] = row["type"] == "directory"
    return found


def below(folder: epath.PathLike) -> dict[str, Known]:
    """Name of each object below a folder, relative to it -> what is known of it."""

    def list_() -> dict[str, dict[str, Any]]:
        return _system(folder).find(str(folder), detail=True)

    scheme, prefix = str(folder).partition("://")[0], f"{folder}/"
    rows = _attempt(list_, folder)
    names = {f"{scheme}://{name}": _known(row) for name, row in rows.items()}
    return {x.removeprefix(prefix): y for x, y in names.items() if x.startswith(prefix)}


@contextlib.contextmanager
def listed(folder: epath.PathLike) -> Iterator[None]:
    """In the block, what is in a remote folder is known by listing it once.

    For comparing many files: a list has a thousand objects, a question is about one.
    """
    if not is_remote(folder):
        yield
        return
    listing = {f"{folder}/{name}": known for name, known in below(folder).items()}
    _listings.append((f"{folder}/", listing))
    try:
        yield
    finally:
        _listings.pop()


def put(content: bytes | pathlib.Path, path: epath.PathLike, **options: Any) -> None:
    """Writes an object from bytes or a local file, at once.

    Args:
      content: bytes, or the path of a file.
      path: of the object.
      **options: `mode="create"`: one that is there is not replaced.

    Raises:
      FileExistsError: it is there.
      UserError: the bucket is not there or not writable, or does not answer.
    """
    system, url = _system(path), str(path)
    _require_writes(path)
    if isinstance(content, bytes):
        action = functools.partial(system.pipe_file, url, content, **options)
    else:
        action = functools.partial(system.put_file, str(content), url, **options)
    try:
        _attempt(action, path)
    except FileNotFoundError as error:
        if not isinstance(content, bytes) and not content.exists():
            raise
        raise UserError(
            url,
            wanted="a bucket to write to",
            got=f"no bucket {bucket(path)}",
            fix="Create it, or correct the name.",
        ) from error
    _changed(path)


def refuse_writes(folder: epath.PathLike, reason: UserError | None) -> None:
    """Lets whatever writes below a folder raise an error; None: no more."""
    _refused.pop(f"{folder}/", None)
    if reason:
        _refused[f"{folder}/"] = reason


def _require_writes(path: epath.PathLike) -> None:
    for folder, reason in [*_refused.items()]:
        if str(path).startswith(folder):
            raise reason


def bucket(path: epath.PathLike) -> str:
    return "/".join(str(path).split("/")[:3])


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path in local scratch, whose file becomes the object at the block's end.

    It is kept there if it is large.
    """
    local = scratch.temporary(epath.Path(path).name)
    try:
        yield epath.Path(local)
        content = _content(local)
        put(local, path)
        if content.size >= _LARGE and (found := find(path)):
            content = content._replace(token=found.token)
            os.replace(local, _kept(path, found.token))
        _sent[str(path)] = content
    finally:
        local.unlink(missing_ok=True)


def size_and_token(path: epath.PathLike) -> tuple[int, int]:
    """Size in bytes of an object, and what another content would change.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = _require(path)
    return found.size, found.token


def written(path: epath.PathLike) -> Content | None:
    """What this process wrote to a path last."""
    return _sent.get(str(path))


def identify(path: epath.PathLike) -> Content:
    """What an object holds; it is fetched unless that is known.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = _require(path)
    sent = _sent.get(str(path))
    if sent is None or (sent.size, sent.token) != (found.size, found.token):
        content = _content(local_copy(path))
        sent = _sent[str(path)] = content._replace(token=found.token)
    return sent


def local_copy(path: epath.PathLike) -> pathlib.Path:
    """A file in local scratch with the content of an object, to be opened at once.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = _require(path)
    kept = _kept(path, found.token)
    if not kept.exists() or kept.stat().st_size != found.size:
        scratch.make_room(found.size)
        require_disk_space(
            scratch.folder(),
            found.size,
            what=f"a copy of {path}",
            fix="Free some, or set TMPDIR to a folder on another disk.",
        )
        part = scratch.temporary()
        try:
            fetch(path, part, size=found.size)
            os.replace(part, kept)
        finally:
            part.unlink(missing_ok=True)
    os.utime(kept)
    return kept


def fetch(path: epath.PathLike, target: pathlib.Path, *, size: int) -> None:
    """Copies an object of this size to a local path.

    Raises:
      FileNotFoundError: it is not there.
      UserError: it is not to be had.
    """

    def get() -> None:
        _system(path).get_file(str(path), str(target))
        if target.stat().st_size != size:
            raise OSError(f"{target.stat().st_size} of {size} bytes came")

    _attempt(get, path)


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a file, of which one or both paths are in a bucket.

    Within a store nothing is fetched.
    """
    if not is_remote(target):
        fetch(source, pathlib.Path(target), size=_require(source).size)
    elif not is_remote(source):
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    elif str(source)[:5] != str(target)[:5]:
        put(local_copy(source), target)
    else:
        _require_writes(target)
        action = functools.partial(_system(source).cp_file, str(source), str(target))
        _attempt(action, source)
        _changed(target)


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder, of which one or both paths are in a bucket; `RECORDS` last."""
    names = [*below(source)] if is_remote(source) else local_files(source)
    names = [
        name for name in names if not name.rpartition("/")[2].startswith(scratch.MARK)
    ]

    def copy_one(name: str) -> None:
        if not is_remote(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source / name, target / name)

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
    for mark, is_folder in children(folder).items():
        if mark.name.startswith(scratch.MARK) and not is_folder:
            (folder / mark.name.removeprefix(scratch.MARK)).rmtree()
            mark.unlink()


def _require(path: epath.PathLike) -> Known:
    found = find(path)
    if found is None:
        raise FileNotFoundError(2, os.strerror(2), str(path))
    return found


def _known(row: dict[str, Any]) -> Known:
    is_folder = row.get("type") == "directory"
    size = int(row.get("size") or 0)
    modified = row.get("LastModified") or row.get("mtime") or row.get("updated")
    digest = str(row.get("md5Hash") or row.get("ETag") or row.get("generation") or "")
    with contextlib.suppress(ValueError):
        digest = (
            base64.b64decode(digest, validate=True).hex() if "=" in digest else digest
        )
    if isinstance(modified, str):
        import datetime

        modified = datetime.datetime.fromisoformat(modified)
    seconds = modified.timestamp() if hasattr(modified, "timestamp") else 0.0
    return Known(size, _token(digest.strip('"')), seconds, is_folder)


def _token(digest: str) -> int:
    hashed = hashlib.sha256(digest.encode()).digest()
    return -1 - (int.from_bytes(hashed[:8], "big") >> 2)


def _content(path: pathlib.Path) -> Content:
    """What a local file holds, with the token that its MD5 gives."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            md5.update(block)
            size += len(block)
    return Content(size, sha256.hexdigest(), _token(md5.hexdigest()))


def _changed(path: epath.PathLike) -> None:
    """Forgets what was known of an object that is written or deleted."""
    _sent.pop(str(path), None)
    for _, listing in _listings:
        listing.pop(str(path), None)


@contextlib.contextmanager
def _marked(folder: epath.PathLike) -> Iterator[None]:
    """Has an object beside a folder while the block runs, or until that was killed."""
    folder = StorePath(folder)
    mark = folder.parent / f"{scratch.MARK}{folder.name}"
    put(b"", mark)
    yield
    mark.unlink()


def _part(path: StorePath, start: int, stop: int) -> bytes:
    def fetch() -> bytes:
        content = _system(path).cat_file(str(path), start=start, end=stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} of {stop - start} bytes came")
        return content

    return _attempt(fetch, path)


def _kept(path: epath.PathLike, token: int) -> pathlib.Path:
    """Where scratch has an object of this content."""
    name = hashlib.sha256(str(path).encode()).hexdigest()[:24]
    suffix = pathlib.PurePosixPath(str(path)).suffix[:20]
    return scratch.folder() / f"{name}-{-token:016x}{suffix}"


@functools.cache
def _file_system(scheme: str) -> Any:
    """The file system of fsspec; lists are never remembered."""
    import fsspec

    for name in servers.TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = {"consistency": "md5"} if scheme == "gs" else {}
    return fsspec.filesystem(
        scheme, use_listings_cache=False, skip_instance_cache=True, **options
    )


def _system(path: epath.PathLike) -> Any:
    return _file_system(str(path).partition("://")[0])


def _attempt(action: Callable[[], _Result], path: epath.PathLike) -> _Result:
    """What an action on an object returns; tries again what fails in passing.

    Raises:
      FileNotFoundError, FileExistsError: as the store says.
      UserError: the store refuses, or does not answer.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except (FileExistsError, UserError):
            raise
        except Exception as error:  # of a dozen libraries
            if no_room(error, tempfile.gettempdir()):
                raise
            if servers.is_missing(error):
                raise FileNotFoundError(2, os.strerror(2), str(path)) from error
            if wait is None or not servers.passes(error):
                raise _failed(path, error) from error
            time.sleep(wait)
    raise AssertionError


def _failed(path: epath.PathLike, error: Exception) -> UserError:
    scheme = str(path).partition("://")[0]
    fix = "Check the connection, then rerun the same command to resume."
    if isinstance(error, ImportError):
        fix = f"Run `pip install {servers.PACKAGES[scheme]}`."
    elif servers.is_refused(error):
        fix = (
            f"Sign in (`{servers.SIGN_IN[scheme]}`) with an account that may read and "
            f"write {bucket(path)}, or choose another folder."
        )
    return UserError(
        str(path),
        wanted="an answer of the object store",
        got=servers.words(error),
        fix=fix,
    )
