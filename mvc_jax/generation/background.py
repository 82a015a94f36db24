"""One thread beside the main one, for what the device need not wait for."""

import collections
import concurrent.futures
from collections.abc import Callable
from typing import Any


class Background:
    """Does its tasks one after another, in the order in which they were handed over.

    A context manager: the block ends when all tasks are done. An error of a task is
    raised by the next `submit`, or at the end; tasks behind it are not begun.

    Args:
      ahead: tasks that may wait; `submit` blocks while there are more.
    """

    def __init__(self, ahead: int = 1):
        self._ahead = ahead
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._tasks: collections.deque[concurrent.futures.Future] = collections.deque()
        self._failed = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Hands over a task; raises the error of an earlier one."""
        while len(self._tasks) > self._ahead:
            self._tasks.popleft().result()
        self._tasks.append(self._pool.submit(self._run, function, arguments))

    def _run(self, function: Callable[..., Any], arguments: tuple) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for task in self._tasks:
                task.result()
