"""Handling of SIGTERM: the run stops, and the same command resumes it later.

JAX's own preemption service is not used, which would take the signal from this handler
where there are several processes. `train.main` installs it; SIGINT still raises
`KeyboardInterrupt`.

1. Normally the signal raises `Preempted` at once; stages resume from complete files.
2. Inside `deferred()` the signal only sets a flag; the block ends once it has saved.
3. Launchers repeat the signal: one within five seconds of the last is ignored.
4. Of several processes that are inside `deferred()`, one that receives it asks all to
   stop, and they agree on the step, where each of them calls `stop_requested`.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from mvc_jax import joining, processes

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: launchers retry
_SAME_REQUEST_SECONDS = 5.0


class Preempted(BaseException):
    """The run received SIGTERM; all finished work is on disk.

    Not an `Exception`, like `KeyboardInterrupt`: code that skips a bad image or a
    damaged file must not catch it.

    Args:
      where: what was stopped, e.g. "finetune after step 12".

    `shared` says that all processes of the run raise it.
    """

    def __init__(self, where: str = ""):
        super().__init__(where)
        self.where, self.shared = where, False


class _Request:
    """The state of the request to stop, one for the process."""

    def __init__(self):
        self.deferrals = 0
        self.forget()

    def forget(self) -> None:
        self.made = False
        self.raised = -float("inf")  # time of the last `Preempted`, monotonic

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        if self.deferrals:
            joining.request_stop()
        else:
            repeated = time.monotonic() - self.raised < _SAME_REQUEST_SECONDS
            self.raised = time.monotonic()
            if not repeated:
                raise Preempted


_request = _Request()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles SIGTERM as described above until the block ends; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _request.on_signal)
    try:
        yield
    finally:  # None: a handler that was not installed from Python
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        _request.forget()


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Defers SIGTERM to the end of the block; yields `stop_requested() -> bool`.

    If it was requested, the block ends in `Preempted`, unless it raises by itself.
    """
    _request.deferrals += 1
    many = processes.count() > 1
    try:
        yield joining.stop_here if many else lambda: _request.made
        if _request.made or (many and joining.stopping()):
            raise Preempted
    except Preempted as stop:
        stop.shared = many and joining.stopping()
        _request.raised = time.monotonic()
        raise
    finally:
        _request.deferrals -= 1
