"""Metrics, progress, pictures and warnings of one training loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mvc_jax import processes
from mvc_jax.errors import UserError
from mvc_jax.training import memory
from mvc_jax.training.console import Progress
from mvc_jax.training.host_work import HostWork
from mvc_jax.training.metrics import MetricsLog, NoLog
from mvc_jax.training.throughput import Throughput


@dataclasses.dataclass(frozen=True)
class DrawHook:
    """Calls `draw(step, state, log)` every `every` steps and after the last one."""

    every: int
    draw: Callable[[int, Any, MetricsLog], None]


class TrainLogger:
    """Logs one loop; metrics stay on the devices until their row is written."""

    def __init__(
        self,
        workdir: epath.PathLike,
        name: str,
        *,
        log_every: int,
        max_skipped: int = 10,
        flops: float = 0.0,
        draw_hook: DrawHook | None = None,
        progress: Progress | None = None,
    ):
        """
        Args:
          workdir: the run's folder, with `metrics.jsonl` and the TensorBoard logs.
          name: the loop's name, there and on the terminal.
          log_every: steps whose metrics are averaged into one row.
          max_skipped: consecutive skipped steps after which training has diverged.
          flops: FLOPs of a step on one example; 0: unknown.
          draw_hook: draws samples regularly.
          progress: the progress bar to advance, if this loop is part of a larger task;
            None: the loop gets its own.
        """
        self.name = name
        self._workdir, self._log_every = workdir, log_every
        self._max_skipped, self._flops = max_skipped, flops
        self._draw_hook, self._shared_progress = draw_hook, progress
        self._unwritten: list[dict] = []
        self._skipped_in_a_row = 0  # the longest streak seen
        self._last: dict[str, float] = {}
        self._host_work = HostWork()

    def timed(self, load: Callable[[int], Any]) -> Callable[[int], Any]:
        """`load`, whose time is what this process's own work on a step takes."""
        return self._host_work.timed(load)

    @contextlib.contextmanager
    def open(
        self, first: int, steps: int, batch_size: int, stride: int = 1
    ) -> Iterator[None]:
        """Opens the logs, and closes them when the block ends.

        Args:
          first: the step that training starts at.
          steps: the step that it ends at.
          batch_size: examples of a step.
          stride: steps of one call of `record`.
        """
        self._steps, self._stride, self._batch_size = steps, stride, batch_size
        self._throughput = Throughput(batch_size, self._flops)
        log = NoLog()  # one process writes
        if processes.is_first():
            log = MetricsLog(self._workdir, self.name, from_step=first)
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(contextlib.closing(log))
            self._progress = self._shared_progress
            if self._shared_progress is None:
                progress = Progress(self.name, steps, done=first)
                self._progress = stack.enter_context(contextlib.closing(progress))
            yield

    @property
    def diverged(self) -> bool:
        """Whether too many consecutive steps were skipped, as of the last row."""
        return self._skipped_in_a_row >= self._max_skipped

    def resume(self, skipped_in_a_row: int, steps: int) -> None:
        """Takes the count of consecutive skipped steps from a restored state.

        Args:
          skipped_in_a_row: that count.
          steps: the step that training ends at. If all are skipped nothing was trained,
            whatever `max_skipped` is.

        Raises:
          UserError: training had diverged when that state was saved.
        """
        self._max_skipped = min(self._max_skipped, max(steps, 1))
        self._skipped_in_a_row = skipped_in_a_row
        self.raise_if_diverged()

    def may_save(self, state: Any) -> bool:
        """Whether a run that resumes from `state` would notice that training diverged.

        It would not if the streak of skipped steps was too long but has ended since:
        then the last checkpoint before the streak must stay the newest.
        """
        return not self.diverged or int(state.skipped_in_a_row) >= self._max_skipped

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of the steps up to `step`, and writes the row before them.

        That row is fetched after these steps were dispatched, so the device stays busy.
        """
        if (step - self._stride) % self._log_every == 0:
            self.write_row(step - self._stride)
        self._unwritten.append(metrics)

    def draw(self, step: int, state: Any) -> None:
        """Calls the draw hook if it is due, or this is the last step."""
        hook = self._draw_hook
        if hook and (step % hook.every == 0 or step == self._steps):
            with self.pause():
                hook.draw(step, state, self._log)

    def write_row(self, step: int) -> dict[str, float]:
        """Writes the mean of each metric since the last row, as the row of `step`.

        Means are over steps that were not skipped; `skipped` is the number of others.

        Returns:
          the newest row.
        """
        if not self._unwritten:
            return self._last
        fetched, self._unwritten = jax.device_get(self._unwritten), []
        columns = {
            name: np.concatenate([np.atleast_1d(metrics[name]) for metrics in fetched])
            for name in fetched[0]
        }
        streaks = columns.pop("skipped_in_a_row")
        good, count = streaks == 0, len(streaks)
        self._skipped_in_a_row = max(self._skipped_in_a_row, int(streaks.max()))
        skipped = count - int(good.sum())
        if skipped:
            logging.warning(
                "%s: %d of the %d steps up to step %d were skipped: loss or gradients "
                "not finite",
                self.name,
                skipped,
                count,
                step,
            )
        means = {}
        if good.any():
            means = {k: float(np.mean(column[good])) for k, column in columns.items()}
        self._last = {**means, "skipped": float(skipped)}
        rates = self._throughput.lap(count)
        work = self._host_work.lap(self.name, count, self._batch_size, rates)
        self._log.write(step, **self._last, **rates, **work, **memory.in_use())
        self._progress.advance(count, **means)
        return self._last

    def add_to_row(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Writes further values of `step`, e.g. a validation loss.

        Returns:
          the newest row together with them.
        """
        self._log.write(step, **values)
        return self._last | values

    def flush(self) -> None:
        """Writes all rows to the disk; to be called before a checkpoint is saved.

        Otherwise a run that is killed after the save would lack the rows before it.
        """
        self._log.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent in the block from the rates."""
        jax.block_until_ready(self._unwritten)  # the rates include these steps
        with self._throughput.paused():
            yield

    def raise_if_diverged(self) -> None:
        """Raises a `UserError` if training has diverged."""
        if self.diverged:
            raise UserError(
                self.name,
                wanted="finite losses and gradients",
                got=f"{self._skipped_in_a_row} consecutive steps without",
                fix="Lower the learning rate, and choose a new --workdir or add "
                f"--redo={self.name.split('/')[0]}: there are checkpoints of this one.",
            )
