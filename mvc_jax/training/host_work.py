"""What each process spends on a step by itself: a slow host shows.

The devices of all processes take a step together, so its time is the same everywhere.
What differs is the time in which a process makes its rows of the batch.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from mvc_jax import processes

_SLOWER = 2.0  # times the median of all
_SHARE = 0.2  # of the time of a step


class HostWork:
    """Measures one process's own work; costs nothing where there is only one."""

    def __init__(self):
        self._seconds = 0.0
        self._warned = False

    def timed(self, load: Callable[[int], Any]) -> Callable[[int], Any]:
        """A function like `load` whose time is added up."""
        if processes.count() == 1:
            return load

        def run(step: int) -> Any:
            began = time.monotonic()
            try:
                return load(step)
            finally:
                self._seconds += time.monotonic() - began

        return run

    def lap(
        self, name: str, steps: int, batch_size: int, rates: dict[str, float]
    ) -> dict[str, float]:
        """Each process's own seconds per step, as `host_seconds_<process>`.

        All processes call it together; {} for a single one.

        Args:
          name: of the loop, for the warning.
          steps: that were taken since the last call.
          batch_size: examples of a step.
          rates: `examples_per_s` of these steps.
        """
        if processes.count() == 1:
            return {}
        own, self._seconds = self._seconds / max(steps, 1), 0.0
        each = processes.gather("host work", own)
        step_seconds = batch_size / rates["examples_per_s"]
        if not self._warned and processes.is_first():
            found = slow(each, step_seconds)
            for number in found:
                logging.warning(
                    "%s: %s is slow: its part of a batch takes it %.3g s a step, the "
                    "median of all %.3g s",
                    name,
                    processes.named(number),
                    each[number],
                    statistics.median(each),
                )
            self._warned = bool(found)
        return {f"host_seconds_{number}": value for number, value in enumerate(each)}


def slow(seconds: Sequence[float], step_seconds: float) -> list[int]:
    """The processes that take much longer than the others, and long for a step."""
    usual = statistics.median(seconds)
    return [
        number
        for number, value in enumerate(seconds)
        if value > _SLOWER * usual and value > _SHARE * step_seconds
    ]
