"""The objects of buckets: asked about, listed, read, written, copied, deleted.

1. An object appears as a whole or not at all: files are written to local scratch and
   then put under their names. There are no temporary objects and no renames.
2. An object is known by the checksum that the store has of it, not by its time.
3. What is mapped, or was written, is kept in local scratch (`TMPDIR`) as long as there
   is room; the next process finds it there.

Folders are in store_folders.py, clients in store_client.py.
"""

import base64
import contextlib
import functools
import hashlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from mvc_jax import scratch, servers
from mvc_jax.errors import UserError, require_disk_space
from mvc_jax.store_client import ask, bucket, is_remote

_LARGE = 1 << 20  # bytes of files that are kept in scratch
_READ_AHEAD = 1 << 20  # bytes


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
# Of each folder that is listed: its prefix, its objects, and the folders in it.
_listings: list[tuple[str, dict[str, Known], set[str]]] = []


def content(path: epath.PathLike) -> bytes:
    """The bytes of an object; small ones of a list in use are remembered.

    Raises:
      FileNotFoundError: it is not there.
    """
    for _, listing, _ in _listings:
        known = listing.get(str(path))
        if known and known.size < _LARGE:
            return _remembered(str(path), known.token)
    return ask(lambda system: system.cat_file(str(path)), path)


@functools.lru_cache(maxsize=256)
def _remembered(path: str, token: int) -> bytes:
    """The content of an object that is known to have this token."""
    del token
    return ask(lambda system: system.cat_file(path), path)


def opened(path: epath.PathLike) -> io.BufferedIOBase:
    """An object, opened to be read in parts.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = require(path)
    kept = _kept(path, found.token)
    if kept.exists():
        return kept.open("rb")
    part = functools.partial(_part, path)
    return io.BufferedReader(servers.RangeReader(found.size, part), _READ_AHEAD)


def find(path: epath.PathLike) -> Known | None:
    """What the store knows of an object or folder; None: it is not there."""
    for prefix, listing, folders in reversed(_listings):
        if f"{path}/".startswith(prefix):
            if found := listing.get(str(path)):
                return found
            return Known(0, 0, 0.0, True) if str(path) in folders else None
    try:
        return _known(ask(lambda system: system.info(str(path)), path))
    except FileNotFoundError:
        return None


def require(path: epath.PathLike) -> Known:
    """What the store knows of an object or folder.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = find(path)
    if found is None:
        raise FileNotFoundError(2, os.strerror(2), str(path))
    return found


def children(folder: epath.PathLike) -> dict[epath.Path, bool]:
    """The objects and folders in a folder -> whether each is a folder."""
    try:
        rows = ask(lambda system: system.ls(str(folder), detail=True), folder)
    except FileNotFoundError:
        return {}
    scheme, prefix = str(folder).partition("://")[0], f"{folder}/"
    found = {}
    for row in rows:
        name = f"{scheme}://{row['name'].rstrip('/')}"
        if name.startswith(prefix) and not name.endswith("~"):
            found[epath.Path(name)] = row["type"] == "directory"
    return found


def below(folder: epath.PathLike) -> dict[str, Known]:
    """Name of each object below a folder, relative to it -> what is known of it."""
    scheme, prefix = str(folder).partition("://")[0], f"{folder}/"
    rows = ask(lambda system: system.find(str(folder), detail=True), folder)
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
    folders = {
        name[:end] for name in listing for end in range(len(name)) if name[end] == "/"
    }
    _listings.append((f"{folder}/", listing, folders))
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
    url = str(path)

    def send(system: Any) -> None:
        if isinstance(content, bytes):
            system.pipe_file(url, content, **options)
        else:
            system.put_file(str(content), url, **options)

    _require_writes(path)
    try:
        ask(send, path)
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


def delete(path: epath.PathLike) -> None:
    """Deletes an object, if it is there."""
    _require_writes(path)
    with contextlib.suppress(FileNotFoundError):
        ask(lambda system: system.rm_file(str(path)), path)
    _changed(path)


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
    found = require(path)
    return found.size, found.token


def written(path: epath.PathLike) -> Content | None:
    """What this process wrote to a path last."""
    return _sent.get(str(path))


def identify(path: epath.PathLike) -> Content:
    """What an object holds; it is fetched unless that is known.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = require(path)
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
    found = require(path)
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

    def get(system: Any) -> None:
        system.get_file(str(path), str(target))
        if target.stat().st_size != size:
            raise OSError(f"{target.stat().st_size} of {size} bytes came")

    ask(get, path)


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a file, of which one or both paths are in a bucket.

    Within a store nothing is fetched.
    """
    if not is_remote(target):
        fetch(source, pathlib.Path(target), size=require(source).size)
    elif not is_remote(source):
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    elif str(source)[:5] != str(target)[:5]:
        put(local_copy(source), target)
    else:
        _require_writes(target)
        ask(lambda system: system.cp_file(str(source), str(target)), source)
        _changed(target)


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
    for _, listing, _ in _listings:
        listing.pop(str(path), None)


def _part(path: epath.PathLike, start: int, stop: int) -> bytes:
    def fetch(system: Any) -> bytes:
        content = system.cat_file(str(path), start=start, end=stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} of {stop - start} bytes came")
        return content

    return ask(fetch, path)


def _kept(path: epath.PathLike, token: int) -> pathlib.Path:
    """Where scratch has an object of this content."""
    name = hashlib.sha256(str(path).encode()).hexdigest()[:24]
    suffix = pathlib.PurePosixPath(str(path)).suffix[:20]
    return scratch.folder() / f"{name}-{-token:016x}{suffix}"
