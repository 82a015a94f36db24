"""Files on the Hugging Face hub and in object stores, through fsspec.

What fails in passing (a cut connection, an overloaded server) is tried again, besides
what the libraries try themselves. What fails for good is a `UserError`: never a bad
image, which a run may skip.
"""

import glob
import logging
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

from mvc_jax import servers
from mvc_jax.errors import UserError

_WAITS = (1.0, 4.0)  # seconds before another try, where the library tries once
_TRY_ONCE = ("hf", "http", "https")
_DIGESTS = ("md5Hash", "ETag", "blob_id")  # as Google, Amazon and the hub name them
_Result = TypeVar("_Result")


def is_remote(path: str) -> bool:
    return "://" in path


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
        for name in servers.TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._system, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            package = servers.PACKAGES.get(self._protocol, "")
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

    def open(self, path: str) -> servers.RangeReader:
        """A file of which only the parts that are read are fetched."""
        options = {"cache_type": "none", "size": self._sizes.get(path)}
        file = self._attempt(lambda: self._system.open(path, "rb", **options), path)
        self._sizes[path] = file.size
        return servers.RangeReader(
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
                passes = servers.passes(error)
                if wait is None or not passes:
                    failed = self._failed(path, error)
                    self._broken = failed if passes else None
                    raise failed from error
                time.sleep(wait)
        raise AssertionError

    def _failed(self, path: str, error: Exception) -> UserError:
        refused = servers.is_refused(error)
        login = servers.SIGN_IN.get(self._protocol)
        if refused or (servers.is_missing(error) and self._protocol == "hf"):
            fix = f"Sign in{f' (`{login}`)' if login else ''}, or correct the name."
        elif servers.is_missing(error):
            fix = "Correct the name."
        else:
            fix = "Check the connection and run the same command again."
        return UserError(
            f"config.data.source={self._url}",
            wanted=f"{path} from the server"
            if path != self._url
            else "an answer of the server",
            got=servers.words(error),
            fix=fix,
        )


def _part(file: Any, start: int, stop: int) -> bytes:
    file.seek(start)
    content = file.read(stop - start)
    if len(content) != stop - start:
        raise OSError(f"the answer ended after {len(content)} of {stop - start} bytes")
    return content
