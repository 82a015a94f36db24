"""SIGTERM: the machine is wanted elsewhere, and the same command goes on later.

JAX's own preemption service hears the signal only where hosts are coordinated, so one
host needs this. `train.main` installs the handler; SIGINT stays a `KeyboardInterrupt`.

1. As a rule the signal raises `Preempted` at once: stages go on from what is whole.
2. Inside `deferred()` it only raises a flag, and the block leaves when it has saved.
3. Launchers repeat the signal: what follows within five seconds is the same request.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run me again
_SAME_REQUEST_SECONDS = 5.0


class Preempted(BaseException):
    """The run was told to stop, and what it has made is on disk.

    Like `KeyboardInterrupt` it is no `Exception`: nothing that forgives errors, of a
    bad image or a damaged file, is to swallow it.

    Args:
      where: what was stopped, in words: "finetune after step 12".
    """

    def __init__(self, where: str = ""):
        super().__init__(where)
        self.where = where


class _Request:
    """What the process knows of the signal."""

    def __init__(self):
        self.deferrals = 0
        self.forget()

    def forget(self) -> None:
        self.made = False
        self.raised = -float("inf")  # when, on the monotonic clock

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        if not self.deferrals:
            repeated = time.monotonic() - self.raised < _SAME_REQUEST_SECONDS
            self.raised = time.monotonic()
            if not repeated:
                raise Preempted


_request = _Request()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """SIGTERM is answered as above until the block ends; in the main thread only."""
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
    """Yields `asked() -> bool`; no signal interrupts the block.

    A block that was asked and ends without an exception of its own ends as `Preempted`.
    """
    _request.deferrals += 1
    try:
        yield lambda: _request.made
        if _request.made:
            raise Preempted
    except Preempted:
        _request.raised = time.monotonic()
        raise
    finally:
        _request.deferrals -= 1
