"""`config.track`: a run's trackers, and what they log at its end."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import files, processes, stage
from mvc_jax.command import plan
from mvc_jax.reporting.tables import Cell, Table, headings
from mvc_jax.training import trackers

with epy.lazy_imports():
    from mvc_jax.training import metrics

_COLUMNS = ("training", "accuracy", "std", "difference", "low", "high", "against")


@contextlib.contextmanager
def opened(
    config: ConfigDict, workdir: epath.Path, steps: Sequence[plan.Step]
) -> Iterator[None]:
    """Opens the trackers of a run that has something to do or to tell.

    Args:
      config: of the run.
      workdir: of the run.
      steps: what the run will do.

    Raises:
      UserError: a record cannot be kept there.
    """
    names = config.track if processes.is_first() else ()
    trackers.check_folder(names, workdir)
    works = any(step.state != "done" or step.source for step in steps)
    if not works and trackers.recorded(names, workdir):
        yield
        return
    with trackers.opened(
        names, workdir, config.to_dict(), lambda: metrics.read_rows(workdir)
    ):
        yield
        _tell_results(config, workdir)


def _tell_results(config: ConfigDict, workdir: epath.Path) -> None:
    """Hands the table and the grid of images to the trackers, if they are current."""
    if config.generate.limit:
        _tell_picture(workdir / "generate" / "contact_sheet.png", "contact_sheet")
        return
    names = [x for x in ("evaluate", "report") if stage.is_complete(workdir, x)]
    behind, _ = plan.behind(names, config, workdir)
    current = [name for name in names if name not in behind]
    if "evaluate" in current:
        measured = files.read_json(workdir / "evaluate" / "metrics.json")
        _tell_table(workdir, measured.get("runs", ()))
    if "report" in current:
        _tell_picture(workdir / "report" / "grid.png", "grid")


def _tell_table(workdir: epath.Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Hands the accuracies of all runs to the trackers; none of a run without any."""
    if not runs:
        return
    rows = [_row(run) for run in runs]
    trackers.table("accuracy", _COLUMNS, rows)
    means = {f"accuracy/{run['name']}": run["accuracy"]["mean"] for run in runs}
    trackers.results(means)
    if trackers.with_tensorboard():
        cells = [[Cell(_text(x), is_word=True) for x in row] for row in rows]
        columns = headings(*_COLUMNS, words=_COLUMNS)
        text = Table("", columns, cells).markdown()
        metrics.tell_board(workdir, "evaluate", text=text)


def _tell_picture(path: epath.Path, name: str) -> None:
    if not path.exists():
        return
    from PIL import Image

    with path.open("rb") as file:
        image = np.asarray(Image.open(file).convert("RGB"))
    trackers.picture(path.parent.name, 0, name, image)
    if trackers.with_tensorboard():
        metrics.tell_board(
            workdir=path.parent.parent, stage=path.parent.name, image=image
        )


def _row(run: Mapping[str, Any]) -> list[Any]:
    accuracy, than = run["accuracy"], run["difference"] or {}
    ends = [than.get(name) for name in ("mean", "low", "high")]
    against = than.get("against", "")
    return [run["title"], accuracy["mean"], accuracy["std"], *ends, against]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value)
