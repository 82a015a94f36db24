"""Local scratch for what is in buckets: copies that are mapped, and files to be put.

It is a folder of the user in `TMPDIR`. Copies stay there for the next process, as long
as there is room; files that begin with `MARK` are of one process.
"""

import functools
import os
import pathlib
import shutil
import tempfile
import uuid

from mvc_jax.errors import UserError

MARK = ".tmp-"
_SPARE = 0.1  # of the disk, which copies leave free


def temporary(name: str = "") -> pathlib.Path:
    """A new path in local scratch, which ends as `name` does."""
    return folder() / f"{MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}-{name[-40:]}"


def folder() -> pathlib.Path:
    """The folder of local scratch, without what killed processes left there."""
    path = pathlib.Path(tempfile.gettempdir()) / f"mvc_jax-{os.getuid()}"
    _prepare(str(path))
    return path


@functools.cache
def _prepare(name: str) -> None:
    path = pathlib.Path(name)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise UserError(
            name,
            wanted="a folder of this user for local scratch",
            got="one of another user",
            fix="Set TMPDIR to another folder.",
        )
    for name in os.listdir(path):
        left = path / name
        if name.startswith(MARK) and not _is_at_work(name.split("-")[1]):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _is_at_work(process: str) -> bool:
    return pathlib.Path(f"/proc/{process}").exists()


def make_room(size: int) -> None:
    """Deletes kept files, the least recently used first, until one of `size` fits."""
    place = folder()
    kept = [x for x in place.iterdir() if x.is_file() and not x.name.startswith(MARK)]
    kept.sort(key=lambda path: path.stat().st_mtime)
    for path in kept:
        disk = shutil.disk_usage(place)
        if disk.free - size > _SPARE * disk.total:
            return
        path.unlink(missing_ok=True)
