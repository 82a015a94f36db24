"""The files that a stage's manifest lists, compared with what is on the disk."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mvc_jax import files, object_store, processes
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError

Described = Mapping[str, Mapping[str, Any]]  # name -> its `bytes` and `sha256`
_SMALL = 1 << 20  # bytes of files that are hashed whenever they are compared


def digests_of(folder: epath.Path, *, read_only: bool = False) -> Digests:
    """What the files of a stage's folder held when they were written.

    Each process of a run appends to records of its own; `Digests.collect` ends that.
    """
    place, number = folder.parent / "digests", processes.index()
    own = f"{folder.name}-{number}.jsonl" if number else f"{folder.name}.jsonl"
    found = files.matching(place, f"{folder.name}-*.jsonl")
    if number:
        found.append(place / f"{folder.name}.jsonl")
    others = [path for path in found if path.name != own]
    return Digests(folder, place / own, others=others, read_only=read_only)


def collect_records(workdir: epath.Path) -> None:
    """Makes one file of records for each stage of those of processes that were killed.

    Only the first process may call it.
    """
    for path in files.matching(workdir / "digests", "*-*.jsonl"):
        digests_of(workdir / path.name.rpartition("-")[0]).collect()


def lost(
    digests: Digests, folder: epath.Path, artifacts: Described
) -> list[epath.Path]:
    """Paths of the artifacts that are missing or hold something else."""
    small = 0 if object_store.is_remote(folder) else _SMALL  # the store has checksums
    with object_store.listed(folder):
        return [
            folder / name
            for name, described in artifacts.items()
            if not digests.holds(name, described, again=described["bytes"] <= small)
        ]


def is_restored(folder: epath.Path, path: epath.Path, patterns: Sequence[str]) -> bool:
    """Whether a file is among those that its stage makes again when it was damaged."""
    name = str(path.relative_to(folder))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def delete_damaged(paths: Sequence[epath.Path]) -> None:
    """Deletes files that are made again next."""
    for path in paths:
        logging.warning("%s was damaged: making it again", path)
        path.unlink()


def require_no_strangers(folder: epath.Path, artifacts: Iterable[str]) -> None:
    """Raises a `UserError` for a Parquet file beside those that the stage wrote.

    Readers, other people's as well, take all such files of a folder for one dataset.
    """
    shards = {name for name in artifacts if name.endswith(".parquet")}
    for place in sorted({name.rpartition("/")[0] for name in shards}):
        for path in files.matching(folder, f"{place}/*.parquet"):
            if f"{place}/{path.name}" not in shards:
                raise UserError(
                    str(path),
                    wanted=f"only the files that the stage {folder.name} wrote",
                    got="another one",
                    fix="Move it to another folder.",
                )
