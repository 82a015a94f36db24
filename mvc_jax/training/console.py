"""Terminal output: log lines and progress bars."""

import contextlib
import logging as std_logging
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import logging
from tqdm import tqdm

from mvc_jax import processes

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In a checkout the configs are beside the package.
_CONFIGS = os.path.join(os.path.dirname(_PACKAGE), "configs")
_OURS = (_PACKAGE + os.sep, _CONFIGS + os.sep)
_LINE_SECONDS = 15.0
_NOTE_SECONDS = 1.0


def be_quiet() -> None:
    """Logs our own messages without a prefix, and only warnings of other packages.

    Of several processes the first logs messages; the warnings of others have a prefix.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    handler = std_logging.StreamHandler()
    handler.addFilter(_is_shown)
    handler.setFormatter(_Formatter())
    std_logging.basicConfig(handlers=[handler], force=True)
    logging.set_verbosity(logging.INFO)
    sys.excepthook = _print_exception


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Shows our messages in a program that has not set up logging; then leaves it so.

    A notebook is one.
    """
    root = std_logging.getLogger()
    if root.handlers:
        yield
        return
    before = root.level, logging.get_verbosity(), sys.excepthook
    be_quiet()
    try:
        yield
    finally:
        root.handlers.clear()
        root.setLevel(before[0])
        logging.set_verbosity(before[1])
        sys.excepthook = before[2]


def is_unread() -> bool:
    """Whether what reads the output, such as `head`, has ended.

    If so, nothing more is written: Python would try again when it ends.
    """
    number = sys.stdout.fileno()
    asked = select.poll()
    asked.register(number, 0)
    if not any(found & select.POLLERR for _, found in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


class _Formatter(std_logging.Formatter):
    """`message`, or `warning: message` from that level on."""

    def format(self, record: std_logging.LogRecord) -> str:
        if record.levelno < std_logging.WARNING:
            return record.getMessage()
        level = record.levelname.lower()
        return f"{processes.prefix()}{level}: {super().format(record)}"


def _is_shown(record: std_logging.LogRecord) -> bool:
    if record.levelno >= std_logging.ERROR:
        # A failed save raises in our thread; Orbax's threads log the same error again.
        by_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
        if by_orbax or "exception was never retrieved" in record.getMessage():
            return False
    ours = os.path.abspath(record.pathname).startswith(_OURS)
    ours = ours and processes.is_first()
    return ours or record.levelno >= std_logging.WARNING


def _print_exception(kind: type, error: BaseException, trace: Any) -> None:
    """Python's, except for what TensorStore prints for each write after a failed one.

    The save of the checkpoint has ended then; `Checkpoints` reports why.
    """
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)


class Progress:
    """A progress bar with rate and time left; off a terminal, a line every 15 s.

    Of many processes the first alone shows it, with what all have done if they share
    the work.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        done: int = 0,
        unit: str = "step",
        shared: bool = False,
    ):
        self._name, self._total, self._unit = name, total, unit
        self._own = self._first = done
        self._shared, self._others = shared, 0
        self._began = self._printed = self._noted = time.monotonic()
        self._bar = None
        processes.note(name, 0)
        if not processes.is_first():
            return
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True
            )
        else:
            self._print()

    def extend(self, total: int) -> None:
        """Sets the total to what has become known of it."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def advance(self, count: int, **shown: float) -> None:
        """Advances by `count`; `shown` are numbers to print beside the bar."""
        self._own += count
        if time.monotonic() - self._noted > _NOTE_SECONDS:
            self._tell()
        if not processes.is_first():
            return
        text = {name: f"{value:.4g}" for name, value in shown.items()}
        if self._bar is not None:
            self._bar.set_postfix(text, refresh=False)
            self._bar.update(self._count - self._bar.n)
        elif (
            self._count >= self._total
            or time.monotonic() - self._printed > _LINE_SECONDS
        ):
            self._print(**text)

    @property
    def _count(self) -> int:
        """Of all processes, as far as this one knows."""
        return min(self._own + self._others, max(self._total, self._own))

    def _tell(self) -> None:
        """Tells the other processes of this one, and asks for them."""
        self._noted = time.monotonic()
        processes.note(self._name, self._own - self._first)
        if self._shared:
            self._others = processes.noted(self._name)

    def _print(self, **text: str) -> None:
        self._printed = time.monotonic()
        seconds = max(self._printed - self._began, 1e-9)
        rate = (self._count - self._first) / seconds
        line = f"{self._name}: {self._count}/{self._total} {self._unit}s"
        if rate:
            left = (self._total - self._count) / rate
            line += f", {rate:.3g} {self._unit}s/s, {left:.0f} s left"
        line += "".join(f", {name} {value}" for name, value in text.items())
        logging.info(line)

    def close(self) -> None:
        """Ends it; others may still be at work."""
        self._tell()
        if self._bar is not None:
            self._bar.close()
