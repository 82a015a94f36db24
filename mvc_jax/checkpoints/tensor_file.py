"""safetensors files, whole or split into shards, one tensor at a time.

The library reads and validates them; the errors are ours. It has no writer that takes
one tensor after another, so `write` is ours too: `safetensors.serialize_file` needs all
tensors on the host at the same time, a second copy of a model that is on a device.

Weights may be split into shards: a JSON file, the index, then names the shard of each
tensor.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from mvc_jax import files, object_store
from mvc_jax.errors import UserError

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_WRITTEN = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_POINTER = b"version https://git-lfs"
_BLOCK = 4 << 20  # bytes written at a time
_PREFIX = "Error while deserializing header: "  # of the library's messages
_DOWNLOAD = (
    "Download the checkpoint again, or use another one: nothing can be made of it."
)
_TRAIN = (
    "Nothing is exported: the training diverged. Lower its learning rate, in a new "
    "--workdir or after deleting the folder of this stage."
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in the header of the file `path`.

    `dtype` is the format's own name, as the keys of `DTYPES`, the only ones to be read.
    """

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]


def entries(path: epath.PathLike) -> dict[str, Entry]:
    """Lists the tensors of a file, or of all shards of a JSON index; reads headers
    only.

    Raises:
      UserError: a file is missing, truncated or damaged, or shards and index disagree.
    """
    path = epath.Path(path)
    if path.suffix != ".json":
        return _read_header(path)
    shard_of = _read_index(path)
    shards = sorted(set(shard_of.values()))
    missing = [name for name in shards if not (path.parent / name).exists()]
    _require_none(missing, path, f"the {len(shards)} files in it", "are missing")
    found, problems = {}, []
    for shard in shards:
        for name, entry in _read_header(path.parent / shard).items():
            if name in found:
                problems.append(f"{name} (in {found[name].path.name} and {shard})")
            found[name] = entry
    problems += [
        f"{name} (not in {shard})"
        for name, shard in shard_of.items()
        if name not in found or found[name].path.name != shard
    ]
    _require_none(problems, path, "each tensor in its shard", "are elsewhere")
    return found


def tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of the files, in the stored precision.

    Raises:
      UserError: a tensor is not finite, or a file has changed since its header was
        read.
    """
    for path in sorted({entry.path for entry in entries.values()}):
        try:
            with _opened(path) as file:
                for name in file.offset_keys():
                    if name in entries and entries[name].path == path:
                        tensor = file.get_tensor(name)
                        _require_finite(path, name, tensor, _DOWNLOAD)
                        yield name, tensor
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"one that changed while it was read: {error}") from (
                error
            )


def write(
    path: epath.PathLike,
    shapes: Mapping[str, Sequence[int]],
    fetch: Callable[[str], np.ndarray],
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors one at a time; the file is byte for byte the library's.

    Every weight that this program exports takes this way.

    Args:
      path: of the new file.
      shapes: by name.
      fetch: name -> array of that shape.
      dtypes: by name, `F32` or `I64`; the default is `F32`.
      metadata: further entries of the header, besides the format.

    Raises:
      UserError: a tensor is not finite; nothing is written.
    """
    dtypes = {name: (dtypes or {}).get(name, "F32") for name in shapes}
    order = sorted(shapes, key=lambda name: (-_WRITTEN[dtypes[name]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        size = _WRITTEN[dtypes[name]].itemsize * math.prod(shapes[name])
        start, end = end, end + size
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = np.asarray(fetch(name), _WRITTEN[dtypes[name]], order="C")
            assert tensor.shape == tuple(shapes[name]), name
            _require_finite(path, name, tensor, _TRAIN)
            content = tensor.reshape(-1).view(np.uint8)
            for start in range(0, content.size, _BLOCK):
                file.write(content[start : start + _BLOCK].tobytes())


def listed(lines: Sequence[str], limit: int = 3) -> tuple[str, tuple[str, ...]]:
    """Formats problems as part of a sentence and, beyond `limit`, as lines below it."""
    if len(lines) <= limit:
        return "; ".join(lines), ()
    return f"{lines[0]}; and {len(lines) - 1} more, all below", tuple(lines)


@contextlib.contextmanager
def _opened(path: epath.Path, *, header_only: bool = False) -> Iterator[Any]:
    """Opens a file with the library, which reads local files only.

    An object of a bucket is copied into local scratch; with `header_only`, its tensors
    are a hole in a sparse file. Tensors are read by `pread`: mapped pages would stay in
    memory beside the arrays.
    """
    if not object_store.is_remote(path) or not header_only:
        with safe_open(files.local(path), "np", backend="pread") as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder) / path.name
        with path.open("rb") as remote:
            start = remote.read(8)
            length = int.from_bytes(start, "little")
            local.write_bytes(start + remote.read(min(length, _MAX_HEADER)))
        os.truncate(local, path.stat().length)
        with safe_open(local, "np", backend="pread") as file:
            yield file


def _require_finite(
    path: epath.PathLike, name: str, tensor: np.ndarray, fix: str
) -> None:
    finite = np.isfinite(tensor)
    if not finite.all():
        raise UserError(
            f"{path}: {name}",
            wanted="finite numbers",
            got=f"NaN or infinity in {int((~finite).sum())} of {finite.size}",
            fix=fix,
        )


def _read_header(path: epath.Path) -> dict[str, Entry]:
    try:
        with _opened(path, header_only=True) as file:
            views = {name: file.get_slice(name) for name in file.offset_keys()}
            return {
                name: Entry(path, view.get_dtype(), tuple(view.get_shape()))
                for name, view in views.items()
            }
    except OSError as error:
        reason = error.strerror or str(error)
        raise _damaged(path, reason if path.exists() else "no such file") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
        if pointer:
            raise UserError(
                str(path),
                wanted="a safetensors file",
                got="the pointer that git-lfs leaves in its place",
                fix="Run `git lfs pull` in that checkout.",
            ) from error
        size, reason = path.stat().length, str(error).removeprefix(_PREFIX)
        got = f"{size} bytes: half-downloaded, damaged, or of another kind ({reason})"
        raise _damaged(path, got) from error


def _read_index(path: epath.Path) -> dict[str, str]:
    """The file name of the shard of each tensor."""
    try:
        shard_of = files.read_json(path)["weight_map"]
        if not shard_of or not all(_is_file_name(name) for name in shard_of.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            str(path),
            wanted="the JSON index of a safetensors checkpoint, with its weight_map",
            got=f"a damaged one ({reason})" if path.exists() else "no such file",
            fix="Download it again.",
        ) from error
    return shard_of


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == epath.Path(name).name != ""


def _require_none(
    problems: list[str], path: epath.Path, wanted: str, what: str
) -> None:
    if problems:
        got, details = listed(problems)
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
