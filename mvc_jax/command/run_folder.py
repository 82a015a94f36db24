"""The folder of a run: that it can be used, and what it has beside the stages' folders.

`metrics.jsonl`, `timings.json`, `tensorboard/` and `digests/` have parts that belong to
one stage each; they move with it.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from mvc_jax import files, object_store, processes, store_folders
from mvc_jax.command import store_lock
from mvc_jax.errors import UserError, no_room
from mvc_jax.stage import Part

_METRICS, _TIMINGS = "metrics.jsonl", "timings.json"
_BOARDS, _DIGESTS = "tensorboard", "digests"


def check(workdir: epath.Path, min_free_gib: float) -> None:
    """Creates the workdir; raises if it is not writable or its disk is too full."""
    if object_store.is_remote(workdir):
        store_lock.require_writable(workdir)
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        number = processes.index()
        trial = workdir / (f".writable-{number}" if number else ".writable")
        files.write_text(trial, "")
        trial.unlink()
    except (OSError, ImportError) as error:
        if no_room(error, workdir):
            raise
        raise UserError(
            f"--workdir={workdir}",
            wanted="a folder that can be written",
            got=getattr(error, "strerror", None) or str(error),
            fix="Choose another folder, or fix its permissions.",
        ) from error
    free = shutil.disk_usage(workdir).free / 2**30
    if free < min_free_gib:
        raise UserError(
            f"--workdir={workdir}",
            wanted=f"{min_free_gib:g} GiB of free disk (config.min_free_disk_gib)",
            got=f"{free:.2f} GiB",
            fix="Free some, or choose a folder on another disk.",
        )


@contextlib.contextmanager
def locked(folder: epath.Path | None, flag: str = "workdir") -> Iterator[None]:
    """Locks a workdir; raises if another run on this machine has locked it.

    Otherwise each would delete the other's temporary files, as if left by a killed run.
    The lock is released when its process ends, however it ends, and leaves no file. Of
    the processes of a run the first has it, for all.

    Args:
      folder: the workdir; None: nothing is locked.
      flag: that named it; with `from`, others may read it at the same time.
    """
    with contextlib.ExitStack() as stack:
        processes.on_first(
            "the lock", lambda: stack.enter_context(_locked(folder, flag))
        )
        yield


@contextlib.contextmanager
def _locked(folder: epath.Path | None, flag: str) -> Iterator[None]:
    if folder is None:
        yield
        return
    if object_store.is_remote(folder):
        if flag == "workdir":
            with store_lock.held(folder):
                _remove_incomplete(folder)
                yield
        else:
            store_lock.require_free(folder)
            yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            kind = fcntl.LOCK_EX if flag == "workdir" else fcntl.LOCK_SH
            try:
                fcntl.flock(opened, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--{flag}={folder}",
                    wanted="a folder that no other run is using",
                    got="one in use by another process",
                    fix="Wait until it has ended, or choose another folder.",
                ) from error
        yield
    finally:
        os.close(opened)


def require_shared(workdir: epath.Path) -> None:
    """Checks that all processes see the files of one workdir.

    Raises:
      UserError: a process has a folder of its own under that name.
    """
    if processes.count() == 1:
        return
    token = workdir / processes.on_first("the workdir", lambda: _write_token(workdir))

    def check() -> None:
        if not token.exists():
            raise UserError(
                f"--workdir={workdir}",
                wanted="one folder, on a disk or bucket that all hosts share",
                got=f"a folder without the files of {processes.named(0)}",
                fix="Mount the same disk everywhere, or use a bucket: gs:// or s3://.",
            )

    try:
        processes.on_all("the workdir is shared", check)
    finally:
        if processes.is_first():
            token.unlink(missing_ok=True)


def _write_token(workdir: epath.Path) -> str:
    name = f".tmp-shared-{uuid.uuid4().hex[:8]}"
    files.write_text(workdir / name, "")
    return name


def workdirs(folder: epath.Path) -> list[epath.Path]:
    """The workdirs in a folder, by name."""
    return [x for x in files.matching(folder, "*") if (x / "config.json").exists()]


def remove_temporaries(workdir: epath.Path) -> None:
    """Deletes what a killed run left in the workdir outside of its stages."""
    if object_store.is_remote(workdir):
        return  # `locked` has
    patterns = (".tmp-*", "earlier/*/.tmp-*")
    for leftover in [x for part in patterns for x in files.matching(workdir, part)]:
        leftover.rmtree() if leftover.is_dir() else leftover.unlink()


def _remove_incomplete(workdir: epath.Path) -> None:
    """Deletes the folders in a bucket that a killed run was about to copy or move."""
    aside = files.matching(workdir, "earlier/*")
    for folder in [workdir, *aside]:
        store_folders.remove_incomplete(folder)
        store_folders.remove_incomplete(folder / _BOARDS)


def record_timing(workdir: epath.Path, name: str, timing: dict[str, Any]) -> None:
    timings = _timings(workdir)
    files.write_json(workdir / _TIMINGS, {**timings, name: timing})


def move_records(
    names: Collection[str], workdir: epath.Path, aside: epath.Path
) -> None:
    """Moves what the workdir has of these stages into `aside`; may be repeated."""
    digests = [path for name in names if (path := _digests(workdir, name)).exists()]
    for path in [*_boards(workdir, names), *digests]:
        target = aside / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    rows, timings = _rows(workdir), _timings(workdir)
    moved = [row for row in rows if _stage_of(row) in names]
    if moved:
        files.write_jsonl(aside / _METRICS, moved)
        kept = [row for row in rows if _stage_of(row) not in names]
        files.write_jsonl(workdir / _METRICS, kept)
    if timings.keys() & {*names}:
        files.write_json(aside / _TIMINGS, timings)
        kept = {name: timings[name] for name in timings if name not in names}
        files.write_json(workdir / _TIMINGS, kept)


def copy_records(name: str, source: epath.Path, workdir: epath.Path) -> None:
    """Copies what another workdir has of a stage; replaces what this one has of it."""
    mine = [row for row in _rows(workdir) if _stage_of(row) != name]
    others = [row for row in _rows(source) if _stage_of(row) == name]
    if others:
        files.write_jsonl(workdir / _METRICS, [*mine, *others])
    if timing := _timings(source).get(name):
        record_timing(workdir, name, timing)
    for folder in _boards(source, [name]):
        link_or_copy(folder, workdir / _BOARDS / folder.name)
    digests = _digests(source, name)
    if digests.exists():  # a copy: rows are appended to it
        files.write_bytes(_digests(workdir, name), digests.read_bytes())


def copy_part_records(
    name: str, part: Part, source: epath.Path, workdir: epath.Path
) -> None:
    """Copies what another workdir has of a part of a stage."""
    logs = f"{name}/{part.name}/"
    mine = [row for row in _rows(workdir) if not _logged(row).startswith(logs)]
    others = [row for row in _rows(source) if _logged(row).startswith(logs)]
    if others:
        files.write_jsonl(workdir / _METRICS, [*mine, *others])
    for folder in _boards(source, [name]):
        if f"{folder.name}_".startswith(logs.replace("/", "_")):
            link_or_copy(folder, workdir / _BOARDS / folder.name)
    records = files.read_rows(_digests(source, name))
    mine = [row for row in files.read_rows(_digests(workdir, name)) if row]
    others = [row for row in records if part.has(row.get("name", ""))]
    files.write_jsonl(_digests(workdir, name), [*mine, *others])


def link_or_copy(source: epath.Path, target: epath.Path) -> None:
    """Makes `target` a file or folder with the content of `source`.

    Files are hard links where the disk allows it. Nothing may change them in place: our
    files are written under other names and renamed. In buckets, they are copies.
    """
    if object_store.is_remote(source) or object_store.is_remote(target):
        store_folders.copy_tree(source, target)
    elif source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            if not child.name.startswith(".tmp-"):
                link_or_copy(child, target / child.name)
    else:
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if no_room(error, target):
                raise
            shutil.copy2(source, target)  # another disk, or one without links


def _boards(workdir: epath.Path, names: Collection[str]) -> list[epath.Path]:
    """The folders of TensorBoard that belong to these stages."""
    found = files.matching(workdir / _BOARDS, "*")
    return [folder for folder in found if folder.name.split("_")[0] in names]


def _digests(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / _DIGESTS / f"{name}.jsonl"


def _stage_of(row: Any) -> str:
    return _logged(row).split("/")[0]


def _logged(row: Any) -> str:
    return str(row.get("stage", "")) if isinstance(row, dict) else ""


def _rows(workdir: epath.Path) -> list[dict]:
    return files.read_rows(workdir / _METRICS)


def _timings(workdir: epath.Path) -> dict[str, Any]:
    return files.read_record(workdir / _TIMINGS)
