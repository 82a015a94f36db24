"""The lock of a workdir in a bucket: an object that its holder writes again and again.

It is advisory: runs of this program respect it. Times are the store's. A lock that was
not written for `EXPIRES` seconds was held by a run that was killed; of one on this
machine, that is known at once.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from mvc_jax import files, object_store, scratch
from mvc_jax.errors import UserError

NAME, _PROBE = ".lock", f"{scratch.MARK}writable"
BEAT, EXPIRES = 15.0, 60.0  # seconds
_SETTLE = 2.0  # seconds in which two that take an expired lock would both write it


def require_writable(workdir: epath.Path) -> None:
    """Raises a `UserError` unless objects can be written, read and deleted there."""
    with _probe(workdir):
        pass


@contextlib.contextmanager
def _probe(workdir: epath.Path) -> Iterator[object_store.Known]:
    """Writes an object of this process alone, which is deleted after the block."""
    path = workdir / f"{_PROBE}-{uuid.uuid4().hex[:8]}"
    found = None
    try:
        for _ in range(2):  # a run that begins deletes those of killed ones
            files.write_text(path, "")
            if found := object_store.find(path):
                break
        else:
            raise UserError(
                f"--workdir={workdir}",
                wanted="a bucket in which what was written is found",
                got="one in which it is not",
                fix="Choose another one.",
            )
        yield found
    finally:
        path.unlink()


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
    """Holds the lock during the block; waits for one that may be that of a killed run.

    Raises:
      UserError: another run holds it; or, by anything that is written below `workdir`,
        it was lost: this run was not heard of for long, and another began.
    """
    me = _Holder(workdir)
    me.take()
    try:
        yield
    finally:
        me.release()


def require_free(workdir: epath.Path) -> None:
    """Raises a `UserError` if a run is at work in a workdir that is only read."""
    known, found = object_store.find(workdir / NAME), _read(workdir / NAME)
    if known is None or found is None or _is_dead(found):
        return
    if time.time() - known.modified < EXPIRES:  # nothing may be written there
        raise _in_use(workdir, found, "from")


class _Holder:
    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / NAME
        self._me = {
            "run": uuid.uuid4().hex,
            "machine": socket.gethostname(),
            "boot": _boot(),
            "process": os.getpid(),
        }
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        while not self._create():
            found = _read(self._path)
            if found is None:
                continue
            if not _is_dead(found):
                self._await_expiry(found)
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            if self._create():
                time.sleep(_SETTLE)
                if self._is_mine():
                    break
        self._thread.start()

    def release(self) -> None:
        self._ends.set()
        self._thread.join()
        object_store.refuse_writes(self._workdir, None)
        if self._is_mine():
            self._path.unlink()

    def _create(self) -> bool:
        try:
            object_store.put(self._content(), self._path, mode="create")
        except FileExistsError:
            return self._is_mine()  # by a try whose answer was lost
        return True

    def _content(self) -> bytes:
        return (json.dumps({**self._me, "written": time.time()}) + "\n").encode()

    def _is_mine(self) -> bool:
        return (_read(self._path) or {}).get("run") == self._me["run"]

    def _await_expiry(self, found: dict[str, Any]) -> None:
        """Returns once the lock has expired; raises if its holder is at work."""
        said = False
        while (age := self._age()) < EXPIRES:
            if not said:
                logging.info(
                    "%s was in use %.0f s ago; waiting %.0f s for a sign of that run",
                    self._workdir,
                    age,
                    EXPIRES - age,
                )
                said = True
            time.sleep(min(BEAT / 3, EXPIRES - age))
            now = _read(self._path)
            if now is None:
                return
            if now != found:
                raise _in_use(self._workdir, now, "workdir")

    def _age(self) -> float:
        """Seconds since the lock was written."""
        with _probe(self._workdir) as now:
            known = object_store.find(self._path)
            return EXPIRES if known is None else now.modified - known.modified

    def _beat(self) -> None:
        while not self._ends.wait(BEAT):
            try:
                if not self._is_mine():
                    lost = _in_use(self._workdir, _read(self._path) or {}, "workdir")
                    object_store.refuse_writes(self._workdir, lost)
                    return
                object_store.put(self._content(), self._path)
            except Exception as error:  # the next one may succeed
                logging.warning("%s was not written: %s", self._path, error)


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What a lock says; None: there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether it was held by a process of this machine, which has ended."""
    if (found.get("machine"), found.get("boot")) != (socket.gethostname(), _boot()):
        return False
    return not pathlib.Path(f"/proc/{found.get('process')}").exists()


def _boot() -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _in_use(workdir: epath.Path, found: dict[str, Any], flag: str) -> UserError:
    return UserError(
        f"--{flag}={workdir}",
        wanted="a folder that no other run is using",
        got=f"one in use by process {found.get('process')} of {found.get('machine')}",
        fix="Wait until it has ended, or choose another folder.",
    )
