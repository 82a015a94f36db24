"""Weights & Biases and MLflow: what a run logs, beside that of others.

Both are optional and offline unless their own environment variables say otherwise
(`WANDB_MODE=online`; `MLFLOW_TRACKING_URI`). A workdir is one record in each, whose id
is kept in `trackers.json`, so that a run that resumes goes on with it. A tracker that
fails is left out from then on, with one warning: no run ends because of it.
"""

import contextlib
import importlib.util
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError

PROJECT = "mvc_jax"
RECORD, FOLDER = "trackers.json", "tracked"
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
_SECONDS = 5.0  # between two writes of MLflow
_AT_ONCE = 1000  # metrics that MLflow takes


class Tracker(Protocol):
    """One record of a run.

    Attributes:
      id: by which it is continued.
    """

    id: str

    def scalars(self, series: str, step: int, values: Mapping[str, float]) -> None:
        """Records values of a training loop at an optimiser step."""

    def picture(self, series: str, step: int, name: str, image: np.ndarray) -> None:
        """Records an image, uint8 [H, W, 3], at an optimiser step."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Records a table; its columns have texts or numbers, or None."""

    def results(self, values: Mapping[str, float]) -> None:
        """Records what a run ends with."""

    def flush(self) -> None:
        """Writes what was recorded."""

    def close(self, *, finished: bool) -> None:
        """Ends the record, which may be continued."""


Open = Callable[[epath.Path, str | None, Mapping[str, Any]], Tracker]


class WandbTracker:
    """A run of Weights & Biases, in offline mode unless `WANDB_MODE` says otherwise."""

    def __init__(
        self, workdir: epath.Path, known: str | None, settings: Mapping[str, Any]
    ):
        import wandb

        folder = workdir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", workdir.absolute().name),
            id=known or uuid.uuid4().hex[:8],
            dir=str(folder),
            config=dict(settings),
            mode=_wandb_mode(),
            resume="allow",
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, silent=True
            ),
        )
        self.id = self._run.id
        self._series: set[str] = set()

    def _at(self, series: str, step: int) -> dict[str, Any]:
        """The step of a series, which is the horizontal axis of its values."""
        if series not in self._series:
            self._series.add(series)
            self._run.define_metric(f"{series}/step", hidden=True)
            self._run.define_metric(f"{series}/*", step_metric=f"{series}/step")
        return {f"{series}/step": step}

    def scalars(self, series, step, values):
        named = {f"{series}/{name}": value for name, value in values.items()}
        self._run.log(self._at(series, step) | named)

    def picture(self, series, step, name, image):
        picture = self._wandb.Image(image)
        self._run.log(self._at(series, step) | {f"{series}/{name}": picture})

    def table(self, name, columns, rows):
        data = [list(row) for row in rows]
        self._run.log({name: self._wandb.Table(columns=list(columns), data=data)})

    def results(self, values):
        self._run.summary.update(dict(values))

    def flush(self):
        """Its own process writes at once."""

    def close(self, *, finished):
        self._run.finish(exit_code=0 if finished else 1)


class MlflowTracker:
    """A run of MLflow, in a folder of the workdir unless MLFLOW_TRACKING_URI is set."""

    def __init__(
        self, workdir: epath.Path, known: str | None, settings: Mapping[str, Any]
    ):
        self._client = _mlflow_client(workdir)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self.id = known or ""
        if known:
            self._client.update_run(known, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(name)
            experiment = (
                found.experiment_id if found else self._client.create_experiment(name)
            )
            run = self._client.create_run(experiment, run_name=workdir.absolute().name)
            self.id = run.info.run_id
        self._client.log_dict(self.id, dict(settings), "config.json")
        self._waiting: list[Any] = []
        self._written = time.monotonic()

    def scalars(self, series, step, values):
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._waiting += [
            Metric(_mlflow_name(f"{series}/{name}"), value, now, step)
            for name, value in values.items()
        ]
        if time.monotonic() - self._written > _SECONDS:
            self.flush()

    def picture(self, series, step, name, image):
        path = f"{_mlflow_name(series)}/{name}_{step:06d}.png"
        self._client.log_image(self.id, image, path)

    def table(self, name, columns, rows):
        lines = [columns, ["---"] * len(columns), *rows]
        text = "".join(
            "| " + " | ".join("" if x is None else str(x) for x in line) + " |\n"
            for line in lines
        )
        self._client.log_text(self.id, text, f"{name}.md")
        named = [dict(zip(columns, row, strict=True)) for row in rows]
        self._client.log_dict(self.id, {"rows": named}, f"{name}.json")

    def results(self, values):
        self.scalars("results", 0, values)

    def flush(self):
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), _AT_ONCE):
            metrics = waiting[start : start + _AT_ONCE]
            self._client.log_batch(self.id, metrics=metrics)
        self._written = time.monotonic()

    def close(self, *, finished):
        self.flush()
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Open] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
_opened: dict[str, Tracker] = {}
_board = [True]  # whether TensorBoard's files are written


def check(names: Sequence[str]) -> None:
    """Checks that trackers can be opened; imports one only to look for credentials.

    Args:
      names: of them; `tensorboard` needs nothing.

    Raises:
      UserError: a package is not installed; there are no credentials for a service that
        was asked for by its environment variables, or it does not answer.
    """
    for name in names:
        package = _PACKAGES.get(name)
        if package and not _is_installed(package):
            raise _error(
                f"the package {package}",
                "none",
                f"Install it: pip install 'mvc_jax[{name}]'; or leave out {name}.",
            )
    if "wandb" in names and _wandb_mode() == "online":
        import wandb

        if not wandb.api.api_key:
            raise _error(
                "an API key for WANDB_MODE=online",
                "none",
                "Run `wandb login`, set WANDB_API_KEY, or unset WANDB_MODE: then the "
                "record stays in the workdir, for `wandb sync`.",
            )
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "mlflow" in names and uri.startswith("http"):
        _require_answer(uri)


def check_folder(names: Sequence[str], workdir: epath.Path) -> None:
    """Checks that records are kept where the workdir is, or at a service.

    Raises:
      UserError: the workdir is no local folder, and a tracker is offline.
    """
    if "://" not in str(workdir):
        return
    online = {
        "wandb": _wandb_mode() == "online",
        "mlflow": bool(os.environ.get("MLFLOW_TRACKING_URI")),
    }
    for name in names:
        if not online.get(name, True):
            raise _error(
                f"a local --workdir for {name}, which is offline",
                str(workdir),
                f"Leave out {name}, or name its service: WANDB_MODE=online, or "
                "MLFLOW_TRACKING_URI.",
            )


@contextlib.contextmanager
def opened(
    names: Sequence[str],
    workdir: epath.Path,
    settings: Mapping[str, Any],
    rows: Callable[[], Sequence[Mapping[str, Any]]],
) -> Iterator[None]:
    """Opens trackers, and closes them when the block ends, however it ends.

    Args:
      names: of the trackers, see `TRACKERS`, and `tensorboard`.
      workdir: of the run.
      settings: the config, for a record that is new.
      rows: what was logged before, for a record that is new: see `metrics.read_rows`.
    """
    path = workdir / RECORD
    known = files.read_record(path)
    _board[0] = "tensorboard" in names
    finished = False
    try:
        for name in names:
            if name not in TRACKERS:
                continue
            with _guarded(name):
                tracker = TRACKERS[name](workdir, known.get(name), settings)
                _opened[name] = tracker
                if known.get(name) != tracker.id:
                    known[name] = tracker.id
                    files.write_json(path, known)
                    for row in rows():
                        values = dict(row)
                        series, step = values.pop("stage"), values.pop("step")
                        tracker.scalars(series, step, values)
        yield
        finished = True
    finally:
        _board[0] = True
        for name, tracker in [*_opened.items()]:
            with _guarded(name):
                tracker.close(finished=finished)
        _opened.clear()


def recorded(names: Sequence[str], workdir: epath.Path) -> bool:
    """Whether each of these trackers has a record of a workdir already."""
    known = files.read_record(workdir / RECORD)
    return all(name in known for name in names if name in TRACKERS)


def with_tensorboard() -> bool:
    """Whether TensorBoard's files are to be written."""
    return _board[0]


def scalars(series: str, step: int, values: Mapping[str, float]) -> None:
    """Hands values to all open trackers."""
    _each(lambda tracker: tracker.scalars(series, step, values))


def picture(series: str, step: int, name: str, image: np.ndarray) -> None:
    """Hands an image, uint8 [H, W, 3], to all open trackers."""
    _each(lambda tracker: tracker.picture(series, step, name, image))


def table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Hands a table to all open trackers."""
    _each(lambda tracker: tracker.table(name, columns, rows))


def results(values: Mapping[str, float]) -> None:
    """Hands what a run ends with to all open trackers."""
    _each(lambda tracker: tracker.results(values))


def flush() -> None:
    """Has all open trackers write; to be called before a checkpoint is saved."""
    _each(lambda tracker: tracker.flush())


def _each(call: Callable[[Tracker], None]) -> None:
    for name, tracker in [*_opened.items()]:
        with _guarded(name):
            call(tracker)


@contextlib.contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Leaves a tracker out once it has failed."""
    try:
        yield
    except Exception as error:
        _opened.pop(name, None)
        lines = str(error).splitlines() or [""]
        logging.warning(
            "%s is left out from here on: %s: %s", name, type(error).__name__, lines[0]
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE", "") or "offline"


def _mlflow_client(workdir: epath.Path) -> Any:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:  # MLflow calls folders finished, not deprecated, and asks for this
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = (workdir.absolute() / FOLDER / "mlflow").as_uri()
    # Else it tries for minutes, while training waits.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def _mlflow_name(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-./ ]", "_", name)


def _require_answer(uri: str) -> None:
    """Checks that a server of MLflow answers, and knows us.

    Raises:
      UserError: it does not.
    """
    try:
        _mlflow_client(epath.Path()).search_experiments(max_results=1)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise _error(
            f"an answer of MLFLOW_TRACKING_URI={uri}",
            f"{type(error).__name__}: {lines[0]}",
            "Start it, correct the address, set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or unset it: then the record stays in the "
            "workdir.",
        ) from error


def _error(wanted: str, got: str, fix: str) -> UserError:
    return UserError("config.track", wanted=wanted, got=got, fix=fix)
