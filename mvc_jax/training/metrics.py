"""Metrics of a run, in `metrics.jsonl`, TensorBoard and other trackers."""

import contextlib
import os
import pathlib
import shutil
import time
from typing import Any

import numpy as np
from etils import epath

from mvc_jax import files, object_store, scratch
from mvc_jax.imports import hidden
from mvc_jax.training import trackers

with hidden("torch"):  # it would be imported for its tensors only
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import directory_check

_FLUSH_SECONDS = 10.0
_UPLOAD_SECONDS = 60.0  # between two uploads of an event file, always whole
_NOTHING = contextlib.nullcontext()


class MetricsLog:
    """Scalars of one stage, in `workdir/metrics.jsonl` and `workdir/tensorboard/`.

    The file is small and always rewritten as a whole: no line is ever incomplete, and a
    run that resumes at step n drops the rows that the killed one wrote after n. Lines
    that were damaged since are dropped with a warning.
    """

    def __init__(self, workdir: epath.PathLike, stage: str, *, from_step: int = 0):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._stage = stage
        self._rows = [
            row
            for row in read_rows(workdir)
            if row["stage"] != stage or row["step"] <= from_step
        ]
        folder = epath.Path(workdir) / "tensorboard" / stage.replace("/", "_")
        self._board = None
        if trackers.with_tensorboard():
            self._board = _Board(str(folder), from_step)
        self._flushed = time.monotonic()

    def write(self, step: int, **scalars: float) -> None:
        """Records scalars at an optimiser step, or at 0 where there are no steps."""
        values = {name: float(value) for name, value in scalars.items()}
        self._rows.append({"stage": self._stage, "step": step, **values})
        trackers.scalars(self._stage, step, values)
        if self._board:
            for name, value in values.items():
                self._board.add(step, summary.scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            if self._board:
                self._board.flush()
            self.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3], to TensorBoard and other trackers."""
        trackers.picture(self._stage, step, name, image)
        if self._board:
            self._board.add(step, summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        """Writes the rows to the disk, and what trackers have."""
        files.write_jsonl(self._path, self._rows)
        trackers.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with contextlib.closing(self._board) if self._board else _NOTHING:
            self.flush()


class NoLog:
    """In place of a `MetricsLog`, for a process that writes none."""

    def write(self, step: int, **scalars: float) -> None:
        pass

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def tell_board(
    workdir: epath.PathLike,
    stage: str,
    *,
    text: str = "",
    image: np.ndarray | None = None,
) -> None:
    """Writes a text in Markdown or an image, uint8 [H, W, 3], of a stage's result.

    They are not in `metrics.jsonl`.
    """
    board = _Board(str(epath.Path(workdir) / "tensorboard" / stage), 0)
    with contextlib.closing(board):
        if text:
            board.add(0, summary.text(stage, text))
        if image is not None:
            board.add(0, summary.image(stage, image, dataformats="HWC"))


class _Board:
    """An event file of TensorBoard, written by the calling thread.

    tensorboardX's own writer has a thread for it, which a full disk ends: the run would
    then wait for it forever.
    """

    def __init__(self, folder: str, from_step: int):
        """Opens a new file; TensorBoard hides what others have after `from_step`.

        From its step on, a START hides events. At step 0 nothing was trained, and rows
        of what has no steps are written again.
        """
        self._remote = epath.Path(folder) if object_store.is_remote(folder) else None
        self._uploaded = time.monotonic()
        if self._remote:  # they are appended to in local scratch
            folder = str(scratch.temporary("tensorboard"))
        self._local = pathlib.Path(folder)
        directory_check(folder)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = from_step + 1 if from_step else 0
        self._write(step=first, file_version="brain.Event:2")
        self._write(step=first, session_log=start)

    def add(self, step: int, content: Any) -> None:
        self._write(step=step, summary=content)

    def flush(self) -> None:
        self._writer.flush()
        if self._remote and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._upload()

    def close(self) -> None:
        self._writer.close()
        if self._remote:
            self._upload()
            shutil.rmtree(self._local)

    def _upload(self) -> None:
        for path in self._local.iterdir():
            object_store.put(path, self._remote / path.name)
        self._uploaded = time.monotonic()

    def _write(self, **fields: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), **fields)
        self._writer.write_event(event)


def read_rows(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without damaged ones; [] without the file.

    Each has a `stage`, a `step`, and scalars by name.
    """
    return files.read_rows(epath.Path(workdir) / "metrics.jsonl", valid=_is_row)


def _is_row(row: dict[str, Any]) -> bool:
    scalars = [value for name, value in row.items() if name != "stage"]
    return (
        isinstance(row.get("stage"), str)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) for value in scalars)
    )
