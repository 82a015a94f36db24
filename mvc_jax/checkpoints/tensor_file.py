"""The safetensors format, a tensor at a time; nothing in it can be executed.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype,
shape and place of each tensor by name), and the tensors back to back. Weights may be
split into shards: an index, a JSON file, then names the shard of each tensor.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SIZES = {  # bytes of one element of the dtypes that are at least checked
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_POINTER = b"version https://git-lfs"
_BLOCK = 4 << 20  # bytes moved at a time; remote files have no `readinto`


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `size` bytes from byte `start` of the file `path` on.

    `dtype` is in the format's own words, of which `DTYPES` are read.
    """

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def entries(path: epath.PathLike) -> dict[str, Entry]:
    """What a safetensors file holds, or all shards of a JSON index; no tensor is read.

    Raises:
      UserError: a file is missing, cut or damaged, or shards and index disagree.
    """
    path = epath.Path(path)
    if path.suffix != ".json":
        return _read_header(path)
    placed = _read_index(path)
    shards = sorted(set(placed.values()))
    missing = [name for name in shards if not (path.parent / name).exists()]
    _refuse(path, f"the {len(shards)} files that it names", missing, "are not there")
    found, problems = {}, []
    for shard in shards:
        for name, entry in _read_header(path.parent / shard).items():
            if name in found:
                problems.append(f"{name} (in {found[name].path.name} and {shard})")
            found[name] = entry
    problems += [
        f"{name} (not in {shard})"
        for name, shard in placed.items()
        if name not in found or found[name].path.name != shard
    ]
    _refuse(path, "each tensor in the shard that it names", problems, "are elsewhere")
    return found


def tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of the files, in the stored precision.

    All tensors are views of one buffer: each is good until the next is asked for.
    """
    order = sorted(entries, key=lambda name: (entries[name].path, entries[name].start))
    scratch = np.empty(max((e.size for e in entries.values()), default=0), np.uint8)
    file, opened = None, None
    try:
        for name in order:
            entry = entries[name]
            if opened != entry.path:
                if file is not None:
                    file.close()
                file, opened = entry.path.open("rb"), entry.path
            _read_into(scratch[: entry.size], file, entry)
            flat = scratch[: entry.size].view(DTYPES[entry.dtype])
            yield name, flat.reshape(entry.shape)
    finally:
        if file is not None:
            file.close()


def write(
    path: epath.PathLike,
    shapes: Mapping[str, Sequence[int]],
    fetch: Callable[[str], np.ndarray],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors, each fetched when its turn comes; the library's own bytes.

    Args:
      path: of the new file.
      shapes: by name.
      fetch: name -> array of that shape.
      dtypes: "I64" of those that are not F32, by name.
    """
    dtypes = {name: (dtypes or {}).get(name, "F32") for name in shapes}
    order = sorted(shapes, key=lambda name: (-_SIZES[dtypes[name]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + _SIZES[dtypes[name]] * math.prod(shapes[name])
        header[name] = {"dtype": dtypes[name], "shape": list(shapes[name])}
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype = {"F32": "<f4", "I64": "<i8"}[dtypes[name]]
            tensor = np.asarray(fetch(name), dtype, order="C")
            assert tensor.shape == tuple(shapes[name]), name
            content = tensor.reshape(-1).view(np.uint8)
            for start in range(0, content.size, _BLOCK):
                file.write(content[start : start + _BLOCK].tobytes())


def listed(lines: Sequence[str], most: int = 3) -> tuple[str, tuple[str, ...]]:
    """Problems as a part of a sentence and, where there are many, lines below it."""
    if len(lines) <= most:
        return "; ".join(lines), ()
    return f"{lines[0]}; and {len(lines) - 1} more, all below", tuple(lines)


def _read_header(path: epath.Path) -> dict[str, Entry]:
    try:
        size = path.stat().length
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            sane = len(start) == 8 and length <= min(size - 8, _MAX_HEADER)
            content = file.read(length if sane else len(_POINTER))
    except OSError as error:
        reason = error.strerror or str(error)
        raise _damaged(path, "no such file" if not path.exists() else reason) from error
    if not sane and (start + content).startswith(_POINTER):
        raise UserError(
            str(path),
            wanted="a safetensors file",
            got="the pointer that git-lfs leaves in its place",
            fix="Run `git lfs pull` in that checkout.",
        )
    if size < 8:
        raise _damaged(path, f"a half-downloaded one of {size} bytes")
    if not sane:
        most = min(size - 8, _MAX_HEADER)
        raise _damaged(
            path,
            f"one cut short, or of another kind (a header of {length} bytes where at "
            f"most {most} can be)",
        )
    try:
        header = json.loads(content, object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        found = {
            name: _entry(path, name, fields, 8 + length)
            for name, fields in header.items()
        }
        _check_places(found, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a damaged one ({error})") from error
    return found


def _entry(path: epath.Path, name: str, fields: Any, offset: int) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError(f"{name!r} has no fields")
    dtype, shape = fields.get("dtype"), fields.get("shape")
    places = fields.get("data_offsets")
    if not (
        isinstance(dtype, str)
        and _are_sizes(shape)
        and _are_sizes(places)
        and len(places) == 2
    ):
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    size = places[1] - places[0]
    if dtype in _SIZES and size != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name!r}, {dtype} {shape}, is given {size} bytes")
    return Entry(path, dtype, tuple(shape), offset + places[0], size)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)


def _check_places(found: Mapping[str, Entry], start: int, size: int) -> None:
    """Requires that the tensors fill the file: no gap, no overlap, nothing behind."""
    for name, entry in sorted(found.items(), key=lambda x: (x[1].start, x[1].size)):
        if entry.start != start or entry.size < 0:
            raise ValueError(f"{name!r} does not start where the one before it ends")
        start += entry.size
    if start > size:
        raise ValueError(f"half-downloaded: {size} of {start} bytes")
    if start < size:
        raise ValueError(f"{size - start} bytes too many")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is there twice in its header")
    return dict(pairs)


def _read_into(buffer: np.ndarray, file: Any, entry: Entry) -> None:
    file.seek(entry.start)
    done = 0
    while done < len(buffer):
        block = file.read(min(_BLOCK, len(buffer) - done))
        if not block:
            raise _damaged(entry.path, "one that was cut while it was read")
        buffer[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)


def _read_index(path: epath.Path) -> dict[str, str]:
    """The file name of the shard of each tensor."""
    try:
        placed = files.read_json(path)["weight_map"]
        if not placed or not all(_is_file_name(name) for name in placed.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            str(path),
            wanted="the JSON index of a safetensors checkpoint, with its weight_map",
            got="no such file" if not path.exists() else f"a damaged one ({reason})",
            fix="Download it again.",
        ) from error
    return placed


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == epath.Path(name).name != ""


def _refuse(path: epath.Path, wanted: str, problems: list[str], what: str) -> None:
    got, details = listed(problems)
    if problems:
        raise UserError(
            str(path),
            wanted=wanted,
            got=f"{len(problems)} that {what}: {got}",
            fix="Download the checkpoint again.",
            details=details,
        )


def _damaged(path: epath.Path, got: str) -> UserError:
    return UserError(
        str(path),
        wanted="a whole safetensors file",
        got=got,
        fix="Download it again; weights in .bin or .ckpt files are never opened.",
    )
