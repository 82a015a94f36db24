"""Files that are complete or absent: written to a temporary name, then renamed.

In a bucket (`object_store.py`) they are written to local scratch, then uploaded.
"""

import contextlib
import fnmatch
import hashlib
import io
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mvc_jax import object_store, servers, store_folders

# NumPy parses headers by `ast`, which fails in CPython 3.11 and some of 3.12 when two
# threads are in it at the same time (github.com/python/cpython/issues/106905).
_parsing_header = threading.Lock()


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary sibling of `path` and renames it to `path` at the block's end.

    If the block raises, or the process is killed inside it, `path` does not change. The
    temporary name keeps the suffix, which some writers read, and starts with ".tmp-".
    """
    path = epath.Path(path)
    if isinstance(path, store_folders.StorePath):
        with object_store.replacing(path) as temporary:
            yield temporary
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a disk that became read-only
            temporary.unlink(missing_ok=True)
        unnamed = getattr(error, "filename", "") in (None, str(temporary))
        if isinstance(error, OSError) and error.errno and unnamed:
            error.filename = str(path)  # writing to an open file names none
        raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_all(contents: Mapping[epath.Path, bytes]) -> None:
    """Writes many small files; those in a bucket at the same time."""
    if any(map(object_store.is_remote, contents)):
        servers.parallel(lambda path: write_bytes(path, contents[path]), contents)
    else:
        for path, content in contents.items():
            write_bytes(path, content)


def write_text(path: epath.PathLike, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: epath.PathLike) -> Any:
    return json.loads(epath.Path(path).read_text())


def read_record(path: epath.PathLike) -> dict[str, Any]:
    """The object in a JSON file that only informs; {} if it is missing or damaged."""
    path = epath.Path(path)
    try:
        content = read_json(path) if path.exists() else {}
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        logging.warning("%s is damaged and not used: %s", path, error)
        return {}
    return content


def read_rows(
    path: epath.PathLike, valid: Callable[[dict], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """The rows of a JSONL file that only informs; [] if it is missing.

    Args:
      path: of the file.
      valid: whether a row, which is a JSON object, has the wanted fields. Others, and
        lines that are damaged, are left out with a warning.
    """
    path = epath.Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows, damaged = [], 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and valid(row):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        logging.warning("%s: %d damaged rows are not used", path, damaged)
    return rows


def write_jsonl(path: epath.PathLike, rows: list[dict]) -> None:
    """Writes one JSON object per line, in the given order."""
    write_text(path, jsonl(rows))


def jsonl(rows: list[dict]) -> str:
    """The text that `write_jsonl` writes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: epath.PathLike) -> list[dict]:
    # Not splitlines(): it also splits at U+2028 and others, which JSON does not escape.
    return [json.loads(x) for x in epath.Path(path).read_text().split("\n") if x]


def write_array(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes a `.npy` file.

    Raises:
      ValueError: it is an object array, which would need a pickle.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: epath.PathLike) -> np.ndarray:
    with open(local(path), "rb") as file, _parsing_header:
        return np.load(file, allow_pickle=False)


def map_array(path: epath.PathLike) -> np.ndarray:
    """Like `read_array`, but memory-maps the file instead of reading it."""
    name = local(path)
    with _parsing_header:
        return np.asarray(np.load(name, mmap_mode="r", allow_pickle=False))


def local(path: epath.PathLike) -> str:
    """The path itself; of a file in a bucket, that of a copy in local scratch."""
    return str(object_store.local_copy(path) if object_store.is_remote(path) else path)


def sha256(*paths: epath.PathLike) -> str:
    """Hex digest of the concatenated bytes of the given files."""
    if len(paths) == 1 and object_store.is_remote(paths[0]):
        return object_store.identify(paths[0]).sha256
    digest = hashlib.sha256()
    for path in paths:
        with open(local(path), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def matching(folder: epath.PathLike, pattern: str) -> list[epath.Path]:
    """Sorted paths below `folder` that match `pattern`; [] without such a folder.

    Unlike `Path.glob`, which `epath` hands to `glob.glob` with the folder in front,
    only `pattern` is one: a workdir may be called `lr[1e-4]`.

    Args:
      folder: to look in; its name is taken literally.
      pattern: names with `*`, `?` and `[...]`, one for each level, separated by "/". As
        in a shell, names with a leading dot need one in the pattern. Backup files,
        whose names end in `~`, are left out.
    """
    found = {epath.Path(folder): True}  # path -> whether it may be a folder
    for part in pattern.split("/"):
        inside = [_children(path) for path, may_be in found.items() if may_be]
        found = {
            x: may_be
            for children in inside
            for x, may_be in children.items()
            if fnmatch.fnmatchcase(x.name, part)
            and (part.startswith(".") or not x.name.startswith("."))
        }
    return sorted(found)


def _children(path: epath.Path) -> dict[epath.Path, bool]:
    """What is in a folder -> whether it may be a folder; {} for what is none."""
    if object_store.is_remote(path):
        return object_store.children(path)
    return dict.fromkeys(path.iterdir(), True) if path.is_dir() else {}


def remove_temporaries(folder: epath.Path) -> None:
    """Deletes, recursively, the files that a killed `replacing` left in `folder`."""
    if object_store.is_remote(folder):  # has none
        return
    for path in folder.iterdir():
        if path.name.startswith(".tmp-"):
            path.unlink(missing_ok=True)
        elif path.is_dir():
            remove_temporaries(path)


def image_array_header(count: int, size: int) -> bytes:
    """Header of the `.npy` file of a uint8 array [count, size, size, 3]."""
    buffer = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()
