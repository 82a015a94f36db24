"""What answers of servers mean, and reading parts of what they have.

What fails in passing (a cut connection, an overloaded server) may be tried again; what
is refused or not there may not.
"""

import concurrent.futures
import io
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

THREADS = 16  # that wait for answers at the same time
PACKAGES = {  # protocol -> the package that fsspec needs for it
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
}
SIGN_IN = {
    "hf": "hf auth login",
    "gs": "gcloud auth application-default login",
    "gcs": "gcloud auth application-default login",
    "s3": "aws configure",
    "az": "az login",
    "abfs": "az login",
}
# Loggers that describe each further try, and each way to sign in, some by a traceback.
TALKATIVE = ("gcsfs", "google.auth", "huggingface_hub.utils._http")
_REFUSED = re.compile(r"\w*(Credentials|Auth|Refresh)\w*: |OSError: Forbidden")
_MISTAKES = (ImportError, AttributeError, NameError, TypeError)  # of programs
_LONG = 160  # letters
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def parallel(
    function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> list[_Result]:
    """The results for all items, in their order, of which many wait at a time."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


class RangeReader(io.RawIOBase):
    """A file of which parts are fetched as they are read.

    Args:
      size: in bytes.
      fetch: (start, stop) -> these bytes.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]):
        self._size, self._fetch, self._place = size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}
        self._place = max(0, start[whence] + offset)
        return self._place

    def readall(self) -> bytes:  # else in small parts
        content = (
            self._fetch(self._place, self._size) if self._place < self._size else b""
        )
        self._place = max(self._place, self._size)
        return content

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        content = self._fetch(self._place, stop)
        buffer[: len(content)] = content
        self._place = stop
        return len(content)


def status(error: BaseException) -> int:
    """The status of the answer that an error is about; 0: there was none."""
    response = getattr(error, "response", None)
    for part, name in (response, "status_code"), (error, "status"), (error, "code"):
        found = getattr(part, name, None)
        if isinstance(found, int) or (isinstance(found, str) and found.isdigit()):
            return int(found)
    # fsspec calls all that a web server does not answer missing.
    if isinstance(error, FileNotFoundError) and error.__cause__:
        return status(error.__cause__)
    return 0


def is_missing(error: Exception) -> bool:
    if status(error):
        return status(error) == 404
    if type(error.__cause__).__module__.startswith("aiohttp"):
        return False
    # The hub's file system has no lists of data sets, and says so for unknown ones.
    return isinstance(error, (FileNotFoundError, NotImplementedError))


def is_refused(error: Exception) -> bool:
    if isinstance(error, PermissionError) or status(error) in (401, 403):
        return True
    return bool(_REFUSED.match(f"{type(error).__name__}: {error}"))


def passes(error: Exception) -> bool:
    """Whether another try may succeed."""
    if is_missing(error) or is_refused(error) or isinstance(error, _MISTAKES):
        return False
    code = status(error)
    return not code or code in (408, 429) or code >= 500


def words(error: Exception) -> str:
    """An error in one line; where it is long, its first cause."""
    text, cause = _first_line(error), error
    while len(text) > _LONG and (cause := cause.__cause__ or cause.__context__):
        text = _first_line(cause)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "")
