"""What a loop tells while it runs: rows of metrics, progress, pictures, warnings."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mvc_jax.errors import UserError
from mvc_jax.training import memory
from mvc_jax.training.console import Progress
from mvc_jax.training.metrics import MetricsLog
from mvc_jax.training.throughput import Throughput


@dataclasses.dataclass(frozen=True)
class Watch:
    """Something to look at: `draw(step, state, log)` every `every` steps."""

    every: int
    draw: Callable[[int, Any, MetricsLog], None]


class TrainLogger:
    """Metrics of one loop; they stay on the device until their row is written."""

    def __init__(
        self,
        workdir: epath.PathLike,
        name: str,
        *,
        log_every: int,
        max_skipped: int = 10,
        flops: float = 0.0,
        watch: Watch | None = None,
        progress: Progress | None = None,
    ):
        """
        Args:
          workdir: whose `metrics.jsonl` and TensorBoard get the rows.
          name: of the loop, there and on the terminal.
          log_every: steps over which metrics are averaged into one row.
          max_skipped: so many steps in a row that were skipped are too many.
          flops: of one example's step; 0: not known.
          watch: what to draw, and when.
          progress: on the terminal, of a larger whole that this loop is a part of;
            None: its own.
        """
        self.name = name
        self._workdir, self._log_every = workdir, log_every
        self._max_skipped, self._flops, self._watch = max_skipped, flops, watch
        self._whole = progress
        self._open: list[dict] = []
        self._skipped_in_a_row = 0  # the longest streak that is known of
        self._last: dict[str, float] = {}

    @contextlib.contextmanager
    def opened(
        self, first: int, steps: int, batch_size: int, stride: int = 1
    ) -> Iterator[None]:
        """From step `first` to `steps`, noted by `stride` at once.

        `batch_size` examples are in each step.
        """
        self._steps, self._stride = steps, stride
        self._rate = Throughput(batch_size, self._flops)
        log = MetricsLog(self._workdir, self.name, from_step=first)
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(contextlib.closing(log))
            self._progress = self._whole
            if self._whole is None:
                progress = Progress(self.name, steps, done=first)
                self._progress = stack.enter_context(contextlib.closing(progress))
            yield

    @property
    def hopeless(self) -> bool:
        """Whether too many steps in a row were skipped, as far as it is known."""
        return self._skipped_in_a_row >= self._max_skipped

    def resume(self, skipped_in_a_row: int) -> None:
        """Takes over the count of a restored state.

        Raises:
          UserError: that state ended a run already.
        """
        self._skipped_in_a_row = skipped_in_a_row
        self.raise_if_hopeless()

    def may_save(self, state: Any) -> bool:
        """Whether who goes on from `state` learns that the run is hopeless, if it is.

        A state behind too long a streak does not tell: one before it meets it again.
        """
        return not self.hopeless or int(state.skipped_in_a_row) >= self._max_skipped

    def note(self, done: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of the steps up to `done`; writes the row that was full.

        That row is fetched after these steps were dispatched: the device stays busy.
        """
        if (done - self._stride) % self._log_every == 0:
            self.close_row(done - self._stride)
        self._open.append(values)

    def draw(self, done: int, state: Any) -> None:
        """Shows the state, if it is time or the last step."""
        watch = self._watch
        if watch and (done % watch.every == 0 or done == self._steps):
            with self.pause():
                watch.draw(done, state, self._log)

    def close_row(self, step: int) -> dict[str, float]:
        """Writes at `step` the mean of each metric over the steps since the last row.

        Steps that were skipped count for nothing but `skipped`, their number.

        Returns:
          the newest row.
        """
        if not self._open:
            return self._last
        fetched, self._open = jax.device_get(self._open), []
        columns = {
            name: np.concatenate([np.atleast_1d(values[name]) for values in fetched])
            for name in fetched[0]
        }
        streaks = columns.pop("skipped_in_a_row")
        good, count = streaks == 0, len(streaks)
        self._skipped_in_a_row = max(self._skipped_in_a_row, int(streaks.max()))
        skipped = count - int(good.sum())
        if skipped:
            logging.warning(
                "%s: %d of the %d steps up to %d were skipped: not finite",
                self.name,
                skipped,
                count,
                step,
            )
        means = {}
        if good.any():
            means = {k: float(np.mean(column[good])) for k, column in columns.items()}
        self._last = means | {"skipped": float(skipped)}
        rates = self._rate.over(count)
        self._log.write(step, **self._last, **rates, **memory.in_use())
        self._progress.advance(count, **means)
        return self._last

    def add(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Writes what was measured of the state after `step`, beside its row.

        Returns:
          that row with it.
        """
        self._log.write(step, **values)
        return self._last | values

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what is done within it out of the rates."""
        jax.block_until_ready(self._open)  # or it would wait for steps that count
        with self._rate.paused():
            yield

    def raise_if_hopeless(self) -> None:
        if self.hopeless:
            raise UserError(
                self.name,
                wanted="finite losses and gradients",
                got=f"{self._skipped_in_a_row} steps in a row without",
                fix="Lower the learning rate, in a new --workdir or after deleting "
                f"{epath.Path(self._workdir) / self.name.split('/')[0]}: what is there "
                "was made with this one.",
            )
