"""An array too long for memory: shards of rows, each whole or absent, with checksums.

`00000.npy`, `00001.npy`, ... hold the rows in order; `index.json` says how many there
are, their shape and dtype, how many lie in a shard, and bytes and sha256 of each shard
that is written. It is replaced after every shard: a killed writer goes on from there.
"""

import dataclasses
import functools

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int

from mvc_jax import files
from mvc_jax.errors import UserError

# A shard is the memory that writing takes and the work that a killed writer loses: 2048
# images at 64x64 latents. 26 GB are a hundred files.
SHARD_BYTES = 256 << 20
_INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where which row lies: the part of the index that is known before writing."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    rows_per_shard: int

    @functools.cached_property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    @functools.cached_property
    def spans(self) -> list[range]:
        """The rows of each shard."""
        size = self.rows_per_shard
        starts = range(0, self.rows, size)
        return [range(start, min(start + size, self.rows)) for start in starts]


class Writer:
    """Writes an array shard by shard, keeping those that are there and whole.

    Shards do not depend on who fills them, or in which order: a cut run ends with the
    same files if it makes the same rows.

    Args:
      folder: of this array alone.
      rows: N.
      row_shape: of one row.
      dtype: name of a NumPy dtype, e.g. `"float32"`.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        rows: int,
        row_shape: tuple[int, ...],
        dtype: str,
    ):
        self._folder = epath.Path(folder)
        layout = _Layout(rows, row_shape, dtype, 1)
        fitting = max(SHARD_BYTES // max(layout.row_bytes, 1), 1)
        self._layout = dataclasses.replace(layout, rows_per_shard=fitting)
        self._written = self._kept()
        self._write_index()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._layout.rows, *self._layout.row_shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._layout.dtype)

    @property
    def row_bytes(self) -> int:
        return self._layout.row_bytes

    @property
    def missing(self) -> list[range]:
        """The rows of each shard that is still to be written."""
        pairs = zip(self._layout.spans, self._written, strict=True)
        return [span for span, written in pairs if written is None]

    @property
    def missing_bytes(self) -> int:
        return sum(len(span) for span in self.missing) * self.row_bytes

    @property
    def names(self) -> list[str]:
        """Every file, relative to the folder that holds this array's."""
        shards = [_name(k) for k in range(len(self._written))]
        return [f"{self._folder.name}/{name}" for name in [*shards, _INDEX]]

    def write(self, rows: range, array: np.ndarray) -> None:
        """Writes one shard: `rows` of `missing`, `array` [len(rows), *row_shape]."""
        shard = self._layout.spans.index(rows)
        assert array.dtype == self.dtype, (array.dtype, self.dtype)
        assert array.shape == (len(rows), *self.shape[1:]), (array.shape, self.shape)
        path = self._folder / _name(shard)
        files.write_array(path, array)
        self._written[shard] = _describe(path)
        self._write_index()

    def _write_index(self) -> None:
        index = dataclasses.asdict(self._layout) | {"shards": self._written}
        files.write_json(self._folder / _INDEX, index)

    def _kept(self) -> list[dict | None]:
        """For each shard its entry in the index there is, None if it must be made."""
        nothing: list[dict | None] = [None] * len(self._layout.spans)
        path = self._folder / _INDEX
        if not path.exists():
            return nothing
        try:
            layout, written = _read_index(path)
        except UserError as error:
            logging.warning("%s; all shards are made anew", error)
            return nothing
        if layout != self._layout:
            logging.warning("%s is of another array: all shards are made anew", path)
            return nothing
        if any(written):
            logging.info("%s: checking the shards that are there", self._folder)
        for shard, described in enumerate(written):
            path = self._folder / _name(shard)
            if described is None or not path.exists():
                written[shard] = None
            elif described != _describe(path):
                logging.warning("%s is damaged: it is made anew", path)
                written[shard] = None
        return written


class Shards:
    """A finished array, read row by row; opening it reads no rows.

    On a local disk the shards are mapped and memory holds the rows asked for; of a
    remote one each shard is loaded when it is first needed.

    Args:
      folder: what a `Writer` filled.

    Raises:
      UserError: a shard is not there, or not of its size.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder = epath.Path(folder)
        self._layout, self._written = _read_index(self._folder / _INDEX)
        self._maps: dict[int, np.ndarray] = {}
        for shard, described in enumerate(self._written):
            path = self._folder / _name(shard)
            got = "a shard that is not written yet" if described is None else "no file"
            if described is not None and path.exists():
                size = path.stat().length
                got = "" if size == described["bytes"] else f"{size} bytes"
            if got:
                raise _error(path, "the shard that the index lists", got)

    def __len__(self) -> int:
        return self._layout.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *shape of a row)."""
        return (self._layout.rows, *self._layout.row_shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._layout.dtype)

    def take(self, indices: Int[np.ndarray, " B"]) -> np.ndarray:
        """The rows [B, ...] at `indices` in [0, N), in any order, with repeats."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self._folder} has rows 0 to {len(self) - 1}")
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        shards, offsets = np.divmod(indices, self._layout.rows_per_shard)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            rows[here] = self._mapped(shard)[offsets[here]]
        return rows

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
          UserError: a shard is not what was written.
        """
        for shard, described in enumerate(self._written):
            path = self._folder / _name(shard)
            if files.sha256(path) != described["sha256"]:
                raise _error(path, "the shard that was written", "other content")

    def _mapped(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = files.map_array(self._folder / _name(shard))
        return self._maps[shard]


def _name(shard: int) -> str:
    return f"{shard:05d}.npy"


def _describe(path: epath.Path) -> dict:
    return {"bytes": path.stat().length, "sha256": files.sha256(path)}


def _error(path: epath.Path, wanted: str, got: str) -> UserError:
    fix = f"run the stage {path.parent.parent.name} again: it fills in what is gone."
    fix = f"Delete it and {fix}" if path.exists() else fix.capitalize()
    return UserError(str(path), wanted=wanted, got=got, fix=fix)


def _read_index(path: epath.Path) -> tuple[_Layout, list[dict | None]]:
    """The layout, and for each shard `{"bytes", "sha256"}`, None if it is unwritten."""
    wanted = "the index of an array in shards"
    if not path.exists():
        raise _error(path, wanted, "no such file")
    try:
        index = files.read_json(path)
        written = [
            None if s is None else {key: s[key] for key in ("bytes", "sha256")}
            for s in index.pop("shards")
        ]
        layout = _Layout(**index | {"row_shape": tuple(index["row_shape"])})
        if layout.row_bytes <= 0 or len(written) != len(layout.spans):
            raise ValueError(f"{len(written)} shards of {layout}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _error(path, wanted, f"a damaged file ({error})") from error
    return layout, written
