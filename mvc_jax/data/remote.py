"""Files on the Hugging Face hub and in object stores, through fsspec.

What fails in passing (a cut connection, an overloaded server) is tried again, besides
what the libraries try themselves. What fails for good is a `UserError`: never a bad
image, which a run may skip.
"""

import concurrent.futures
import glob
import io
import logging
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mvc_jax.errors import UserError

THREADS = 16  # that wait for answers at the same time
_WAITS = (1.0, 4.0)  # seconds before another try, where the library tries once
_TRY_ONCE = ("hf", "http", "https")
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
}
_SIGN_IN = {
    "hf": "hf auth login",
    "gs": "gcloud auth application-default login",
    "gcs": "gcloud auth application-default login",
    "s3": "aws configure",
    "az": "az login",
    "abfs": "az login",
}
_REFUSED = re.compile(r"\w*(Credentials|Auth|Refresh)\w*: |OSError: Forbidden")
# Loggers that describe each further try, and each way to sign in, some by a traceback.
_TALKATIVE = ("gcsfs", "google.auth", "huggingface_hub.utils._http")
_LONG = 160  # letters
_DIGESTS = ("md5Hash", "ETag", "blob_id")  # as Google, Amazon and the hub name them
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def is_remote(path: str) -> bool:
    return "://" in path


def parallel(
    function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> list[_Result]:
    """The results for all items, in their order, of which many wait at a time."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


class Remote:
    """A file system of fsspec below a URL; any thread may use it.

    Attributes:
      path: of the URL, as the file system writes paths.

    Raises:
      UserError: its package is not installed, or there is no such protocol; or, by any
        method, what was asked for is not there, or not to be had.
    """

    def __init__(self, url: str):
        import fsspec

        self._url, self._protocol = url, url.partition("://")[0]
        self._is_web = self._protocol in ("http", "https")
        self._broken: UserError | None = None
        self._sizes: dict[str, int] = {}  # of opened files, which need not be asked for
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._system, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(self._protocol, "")
            raise UserError(
                "config.data.source",
                wanted=f"a protocol that fsspec knows, for {url}",
                got=f"{type(error).__name__}: {error}",
                fix=f"Run `pip install {package}`." if package else "Correct it.",
            ) from error
        except Exception as error:  # of a dozen libraries: it asks for credentials
            raise self._failed(url, error) from error
        self.path = path.rstrip("/") if path.strip("/") else path

    def find(self, *, pattern: bool = False) -> dict[str, dict[str, Any]]:
        """Path -> what the server says of it, for all files below the URL.

        Args:
          pattern: whether a URL with `*`, `?` or `[...]` stands for what it matches.
        """
        # A folder that cannot be listed would be left out.
        whole = {"on_error": "raise"} if self._is_web else {}
        pattern &= glob.has_magic(
            self.path.partition("?")[0] if self._is_web else self.path
        )

        def list_() -> dict[str, dict[str, Any]]:
            try:
                if pattern:
                    return self._system.glob(self.path, detail=True, **whole)
                return self._system.find(self.path, detail=True, **whole)
            except Exception:  # what came before is kept, and would be taken for all
                self._system.invalidate_cache()
                raise

        found = self._attempt(list_, self._url)
        return {
            path: entry
            for path, entry in sorted(found.items())
            if entry.get("type") != "directory"
        }

    def name(self, path: str) -> str:
        """A path as people write it: URLs of web servers are quoted, and may query."""
        return urllib.parse.unquote(path.partition("?")[0]) if self._is_web else path

    def read(self, path: str) -> bytes:
        """All bytes of a file, by one request where the server allows it."""
        # The hub's file system would look for its size.
        options = {"block_size": 0} if self._protocol == "hf" else {}
        return self._attempt(lambda: self._system.cat_file(path, **options), path)

    def open(self, path: str) -> "RangeReader":
        """A file of which only the parts that are read are fetched."""
        options = {"cache_type": "none", "size": self._sizes.get(path)}
        file = self._attempt(lambda: self._system.open(path, "rb", **options), path)
        self._sizes[path] = file.size
        return RangeReader(
            file.size,
            lambda start, stop: self._attempt(lambda: _part(file, start, stop), path),
        )

    def same(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        """Whether two files, of what `find` knows of them, have the same content."""
        if a.get("size") != b.get("size"):
            return False
        for name in _DIGESTS:
            if a.get(name) and b.get(name):
                return a[name] == b[name]
        return self.read(a["name"]) == self.read(b["name"])

    def _attempt(self, action: Callable[[], _Result], path: str) -> _Result:
        if self._broken:  # so that no other thread finds out for itself
            raise self._broken
        waits = _WAITS if self._protocol in _TRY_ONCE else ()
        for wait in (*waits, None):
            try:
                return action()
            except Exception as error:  # of a dozen libraries
                passes = _passes(error)
                if wait is None or not passes:
                    failed = self._failed(path, error)
                    self._broken = failed if passes else None
                    raise failed from error
                time.sleep(wait)
        raise AssertionError

    def _failed(self, path: str, error: Exception) -> UserError:
        refused = _is_refused(error)
        login = _SIGN_IN.get(self._protocol)
        if refused or (_is_missing(error) and self._protocol == "hf"):
            fix = f"Sign in{f' (`{login}`)' if login else ''}, or correct the name."
        elif _is_missing(error):
            fix = "Correct the name."
        else:
            fix = "Check the connection and run the same command again."
        return UserError(
            f"config.data.source={self._url}",
            wanted=f"{path} from the server"
            if path != self._url
            else "an answer of the server",
            got=_words(error),
            fix=fix,
        )


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

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        content = self._fetch(self._place, stop)
        buffer[: len(content)] = content
        self._place = stop
        return len(content)


def _part(file: Any, start: int, stop: int) -> bytes:
    file.seek(start)
    content = file.read(stop - start)
    if len(content) != stop - start:
        raise OSError(f"the answer ended after {len(content)} of {stop - start} bytes")
    return content


def _status(error: BaseException) -> int:
    """The status of the answer that an error is about; 0: there was none."""
    response = getattr(error, "response", None)
    for part, name in (response, "status_code"), (error, "status"), (error, "code"):
        found = getattr(part, name, None)
        if isinstance(found, int) or (isinstance(found, str) and found.isdigit()):
            return int(found)
    # fsspec calls all that a web server does not answer missing.
    if isinstance(error, FileNotFoundError) and error.__cause__:
        return _status(error.__cause__)
    return 0


def _is_missing(error: Exception) -> bool:
    if _status(error):
        return _status(error) == 404
    if type(error.__cause__).__module__.startswith("aiohttp"):
        return False
    # The hub's file system has no lists of data sets, and says so for unknown ones.
    return isinstance(error, (FileNotFoundError, NotImplementedError))


def _is_refused(error: Exception) -> bool:
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return True
    return bool(_REFUSED.match(f"{type(error).__name__}: {error}"))


def _passes(error: Exception) -> bool:
    """Whether another try may succeed."""
    if _is_missing(error) or _is_refused(error):
        return False
    status = _status(error)
    return not status or status in (408, 429) or status >= 500


def _words(error: Exception) -> str:
    """An error in one line; where it is long, its first cause."""
    text, cause = _first_line(error), error
    while len(text) > _LONG and (cause := cause.__cause__ or cause.__context__):
        text = _first_line(cause)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "")
