"""Numbers and progress: `metrics.jsonl`, TensorBoard, a bar on the terminal."""

import sys
import time

from absl import logging
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mvc_jax import files

_FLUSH_SECONDS = 10.0
_PLAIN_SECONDS = 15.0


class MetricsLog:
    """Scalars of one stage, in `workdir/metrics.jsonl` and `workdir/tensorboard/`.

    The file is rewritten whole (it is small), so that a run which goes on from step n
    drops what its killed predecessor wrote past n, and no line is ever half.
    """

    def __init__(self, workdir: epath.PathLike, stage: str, *, from_step: int = 0):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._stage = stage
        rows = files.read_jsonl(self._path) if self._path.exists() else []
        self._rows = [
            row for row in rows if row["stage"] != stage or row["step"] <= from_step
        ]
        self._board = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard" / stage.replace("/", "_")),
            purge_step=from_step,
        )
        self._flushed = time.monotonic()

    def write(self, step: int, **scalars: float) -> None:
        """Records scalars at an optimiser step (or at 0 for what has no steps)."""
        values = {name: float(value) for name, value in scalars.items()}
        self._rows.append({"stage": self._stage, "step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        files.write_jsonl(self._path, self._rows)
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._board.close()


class Progress:
    """A bar with rate and time left; plain lines every 15 s when not a terminal."""

    def __init__(self, name: str, total: int, *, done: int = 0, unit: str = "step"):
        self._name, self._total, self._unit = name, total, unit
        self._count = self._first = done
        self._began = self._spoke = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True
            )
        else:
            self._say()

    def advance(self, count: int, **shown: float) -> None:
        """Moves on by `count`; `shown` are numbers to print beside the bar."""
        self._count += count
        text = {name: f"{value:.4g}" for name, value in shown.items()}
        if self._bar is not None:
            self._bar.set_postfix(text, refresh=False)
            self._bar.update(count)
        elif (
            self._count >= self._total
            or time.monotonic() - self._spoke > _PLAIN_SECONDS
        ):
            self._say(**text)

    def _say(self, **text: str) -> None:
        self._spoke = time.monotonic()
        seconds = max(self._spoke - self._began, 1e-9)
        rate = (self._count - self._first) / seconds
        line = f"{self._name}: {self._count}/{self._total} {self._unit}s"
        if rate:
            left = (self._total - self._count) / rate
            line += f", {rate:.3g} {self._unit}s/s, {left:.0f} s left"
        line += "".join(f", {name} {value}" for name, value in text.items())
        logging.info(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
