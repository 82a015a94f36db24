"""The clients of object stores, and how often a request is tried.

What fails in passing is tried again by `ask`, after `_WAITS`: for `_UNREACHED`
seconds while a store has not answered this process yet, so that a wrong address or a
missing connection is soon said; for `_OUTAGE` afterwards, so that a run outlives one.
What the libraries try by themselves comes within each of these tries.
"""

import functools
import itertools
import logging as std_logging
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging
from etils import epath

from mvc_jax import servers
from mvc_jax.errors import UserError, no_room

SCHEMES = ("gs://", "s3://")
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds; the last one again and again
_UNREACHED, _OUTAGE = 20.0, 300.0  # seconds
_SAID = 16.0  # seconds: of a longer wait there is a warning
_CONNECT, _READ = 10, 30  # seconds without a connection, or without a byte of an answer
_Result = TypeVar("_Result")
_reached: set[str] = set()  # buckets that have answered


def is_remote(path: epath.PathLike) -> bool:
    return str(path).startswith(SCHEMES)


def bucket(path: epath.PathLike) -> str:
    return "/".join(str(path).split("/")[:3])


@functools.cache
def _system(scheme: str) -> Any:
    return _connect(scheme)


def _connect(scheme: str) -> Any:
    """A file system of fsspec; lists are never remembered."""
    for name in servers.TALKATIVE:
        std_logging.getLogger(name).setLevel(std_logging.CRITICAL)
    return {"gs": _google, "s3": _amazon}[scheme](
        use_listings_cache=False, skip_instance_cache=True
    )


def _google(**options: Any) -> Any:
    import aiohttp
    from gcsfs import core

    class Google(core.GCSFileSystem):
        """Leaves it to `ask` to try again, for most requests."""

        _request = core.GCSFileSystem._request.__wrapped__

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_READ)
    return Google(consistency="md5", session_kwargs={"timeout": timeout}, **options)


def _amazon(**options: Any) -> Any:
    import s3fs

    tries = int(os.environ.get("AWS_MAX_ATTEMPTS", 2))
    system = s3fs.S3FileSystem(
        config_kwargs={
            "connect_timeout": _CONNECT / tries,
            "read_timeout": _READ,
            "retries": {"mode": "standard", "total_max_attempts": tries},
        },
        **options,
    )
    system.retries = 1
    return system


def ask(question: Callable[[Any], _Result], path: epath.PathLike) -> _Result:
    """What a function returns that asks a store; tries again what fails in passing.

    Args:
      question: is given the file system of fsspec.
      path: of the object or folder that it is about.

    Raises:
      FileNotFoundError, FileExistsError: as the store says.
      UserError: the store refuses, or does not answer.
    """
    scheme = str(path).partition("://")[0]
    began, waited = time.monotonic(), 0.0
    for wait in itertools.chain(_WAITS, itertools.repeat(_WAITS[-1])):
        try:
            result = question(_system(scheme))
            _reached.add(bucket(path))
            return result
        except (FileExistsError, UserError):
            raise
        except Exception as error:  # of a dozen libraries
            if no_room(error, tempfile.gettempdir()):
                raise
            if servers.is_missing(error):
                _reached.add(bucket(path))
                raise FileNotFoundError(2, os.strerror(2), str(path)) from error
            left = _OUTAGE - waited
            if bucket(path) not in _reached:
                left = _UNREACHED - max(waited, time.monotonic() - began)
            if not servers.passes(error) or wait > left:
                raise _failed(path, error) from error
            if wait >= _SAID:
                logging.warning(
                    "%s: %s; trying again for %.0f s", path, servers.words(error), left
                )
            time.sleep(wait)
            waited += wait
    raise AssertionError


def _failed(path: epath.PathLike, error: Exception) -> UserError:
    scheme = str(path).partition("://")[0]
    fix = "Check the connection, then rerun the same command to resume."
    if isinstance(error, ImportError):
        fix = f"Run `pip install {servers.PACKAGES[scheme]}`."
    elif servers.is_refused(error):
        fix = (
            f"Sign in (`{servers.SIGN_IN[scheme]}`) with an account that may read and "
            f"write {bucket(path)}, or choose another folder."
        )
    return UserError(
        str(path),
        wanted="an answer of the object store",
        got=servers.words(error),
        fix=fix,
    )
