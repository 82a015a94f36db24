"""Arrays larger than memory, in shards with checksums that are complete or absent.

`00000.npy`, `00001.npy`, ... hold the rows in order. `index.json` holds the number of
rows, their shape and dtype, the rows per shard, and size and sha256 of each shard that
is written. It is replaced after every shard, so that an interrupted writer resumes.

Of many processes each writes some of the shards, and all but the first an index of
these alone, `index-1.json` and so on, which the first adds to its own at the end.
"""

import dataclasses
import functools

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int

from mvc_jax import files, processes
from mvc_jax.errors import UserError

# tensorstore (zarr3, one chunk per row with crc32c) was tried in place of this file.
# It survives SIGKILL and detects damage as well, and could read remote rows without a
# whole shard. But 50 random rows of 128 KiB took 7 to 9 ms and 5.5 ms of processor time
# in place of 5 to 6 and 1.9; and `missing`, the checks on opening, the messages and a
# reader of the present format would still be needed.

# The memory that writing takes, and the work that a killed writer loses: 2048 images at
# 64x64 latents. 26 GB are a hundred files.
SHARD_BYTES = 256 << 20
_INDEX, _OTHERS = "index.json", "index-*.json"


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The position of every row: the part of the index that is known in advance."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    rows_per_shard: int

    @functools.cached_property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    @functools.cached_property
    def spans(self) -> list[range]:
        """Rows of each shard."""
        size = self.rows_per_shard
        starts = range(0, self.rows, size)
        return [range(start, min(start + size, self.rows)) for start in starts]


class Writer:
    """Writes an array shard by shard, keeping the valid shards of an earlier attempt.

    Shards do not depend on the order in which they are written, or on who writes them:
    an interrupted run ends with the same files if it computes the same rows.

    All processes make one of the same array together, and call `finish` together.

    Args:
      folder: for this array alone.
      rows: N.
      row_shape: shape of one row.
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
        self._index = self._folder / _INDEX
        name = f"the index of {self._folder.name}"
        self._written = processes.on_first(name, self._begin)
        if not processes.is_first():
            self._index = self._folder / f"index-{processes.index()}.json"

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
        """Rows of each shard that is not written yet, as far as this process knows."""
        pairs = zip(self._layout.spans, self._written, strict=True)
        return [span for span, written in pairs if written is None]

    @property
    def missing_bytes(self) -> int:
        return sum(len(span) for span in self.missing) * self.row_bytes

    @property
    def names(self) -> list[str]:
        """All files, relative to the parent of this array's folder."""
        shards = [_name(k) for k in range(len(self._written))]
        return [f"{self._folder.name}/{name}" for name in [*shards, _INDEX]]

    def write(self, rows: range, array: np.ndarray) -> None:
        """Writes one shard.

        Args:
          rows: an item of `missing`.
          array: [len(rows), *row_shape].
        """
        shard = self._layout.spans.index(rows)
        assert array.dtype == self.dtype, (array.dtype, self.dtype)
        assert array.shape == (len(rows), *self.shape[1:]), (array.shape, self.shape)
        path = self._folder / _name(shard)
        files.write_array(path, array)
        self._written[shard] = _describe(path)
        self._write_index()

    def finish(self) -> None:
        """Waits until all processes have written their shards, and completes the index.

        A single process has nothing to do here.
        """
        if processes.count() > 1:
            name = self._folder.name
            processes.barrier(f"the shards of {name}", processes.WORK_SECONDS)
            self._written = processes.on_first(
                f"the index of {name}", lambda: self._complete(self._listed())
            )

    def _write_index(self) -> None:
        index = dataclasses.asdict(self._layout) | {"shards": self._written}
        files.write_json(self._index, index)

    def _begin(self) -> list[dict | None]:
        """Checks the shards that are there, and writes their index."""
        written = self._listed()
        self._drop_damaged(written)
        return self._complete(written)

    def _complete(self, written: list[dict | None]) -> list[dict | None]:
        """Writes the index of all shards, and removes those of other processes."""
        self._written = written
        self._write_index()
        for path in files.matching(self._folder, _OTHERS):
            path.unlink()
        return written

    def _listed(self) -> list[dict | None]:
        """The entry of each shard in any index of this array; None if it has none."""
        found: list[dict | None] = [None] * len(self._layout.spans)
        paths = [self._folder / _INDEX, *files.matching(self._folder, _OTHERS)]
        for path in paths:
            if path.exists():
                entries = self._entries(path)
                found = [x or y for x, y in zip(found, entries, strict=True)]
        return found

    def _entries(self, path: epath.Path) -> list[dict | None]:
        none: list[dict | None] = [None] * len(self._layout.spans)
        try:
            layout, written = _read_index(path)
        except UserError as error:
            logging.warning("%s; writing all shards again", error)
            return none
        if layout != self._layout:
            logging.warning("%s is for another array: writing all shards again", path)
            return none
        return written

    def _drop_damaged(self, written: list[dict | None]) -> None:
        """Sets the entries of shards that are missing or damaged to None."""
        if any(written):
            logging.info("%s: checking the existing shards", self._folder)
        for shard, described in enumerate(written):
            path = self._folder / _name(shard)
            if described is None or not path.exists():
                written[shard] = None
            elif described != _describe(path):
                logging.warning("%s is damaged: writing it again", path)
                written[shard] = None


class Shards:
    """A complete array, read row by row; opening it reads no rows.

    Shards on a local disk are memory-mapped, so that memory holds only the rows that
    are read. A remote shard is loaded whole when it is first needed.

    Args:
      folder: of a `Writer`.

    Raises:
      UserError: a shard is missing or has the wrong size.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder = epath.Path(folder)
        self._layout, self._written = _read_index(self._folder / _INDEX)
        self._maps: dict[int, np.ndarray] = {}
        for shard, described in enumerate(self._written):
            path = self._folder / _name(shard)
            got = "one that is not written yet" if described is None else "no file"
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

    def row(self, index: int) -> np.ndarray:
        """One row, which is not copied."""
        shard, offset = divmod(index, self._layout.rows_per_shard)
        return self._mapped(shard)[offset]

    def take(self, indices: Int[np.ndarray, " B"]) -> np.ndarray:
        """Reads the rows [B, ...] at `indices` in [0, N), in any order, with repeats.

        Raises:
          IndexError: an index is out of range.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self._folder} has rows 0 to {len(self) - 1}")
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        shards, offsets = np.divmod(indices, self._layout.rows_per_shard)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            rows[here] = self._mapped(shard)[offsets[here]]
        return rows

    def verify(self) -> None:
        """Reads all shards and compares their checksums.

        Raises:
          UserError: a shard differs from what was written.
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
    stage = path.parent.parent.name
    fix = f"Run the stage {stage} again: it restores missing shards."
    if path.exists():
        fix = f"Delete it and run the stage {stage} again: it restores missing shards."
    return UserError(str(path), wanted=wanted, got=got, fix=fix)


def _read_index(path: epath.Path) -> tuple[_Layout, list[dict | None]]:
    """The layout, and for each shard `{"bytes", "sha256"}`, None if not written yet."""
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
