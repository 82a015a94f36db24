"""Metrics of a run, in `metrics.jsonl` and TensorBoard."""

import time

import numpy as np
from etils import epath

from mvc_jax import files
from mvc_jax.imports import hidden

with hidden("torch"):  # it would be imported for its tensors only
    from tensorboardX import SummaryWriter

_FLUSH_SECONDS = 10.0


class MetricsLog:
    """Scalars of one stage, in `workdir/metrics.jsonl` and `workdir/tensorboard/`.

    The file is small and always rewritten as a whole: no line is ever incomplete, and a
    run that resumes at step n drops the rows that the killed one wrote after n.
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
        """Records scalars at an optimiser step, or at 0 where there are no steps."""
        values = {name: float(value) for name, value in scalars.items()}
        self._rows.append({"stage": self._stage, "step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3], to TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        files.write_jsonl(self._path, self._rows)
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._board.close()
