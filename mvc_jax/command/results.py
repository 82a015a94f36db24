"""What a run prints at its end; nothing that has been overtaken by a later change."""

from collections.abc import Sequence

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files, stage
from mvc_jax.command import pipeline, plan


def show(stages: Sequence[str], config: ConfigDict, workdir: epath.Path) -> None:
    """Prints the table and the path of the report, or of the captions alone.

    Args:
      stages: that were selected, and have ended.
      config: of the run.
      workdir: of the run.
    """
    if [*stages] == ["caption"]:
        print(pipeline.module("caption").table(workdir))
        return
    names = [n for n in ("evaluate", "report") if stage.is_complete(workdir, n)]
    behind, fix = plan.behind(names, config, workdir)
    current = [name for name in names if name not in behind]
    if "evaluate" in current:
        metrics = files.read_json(workdir / "evaluate" / "metrics.json")
        print(pipeline.module("evaluate").table(metrics))
    if "report" in current:
        print(f"\nreport: {workdir / 'report' / 'report.html'}")
    for name, reason in behind.items():
        what = {"evaluate": "the table", "report": "the report"}[name]
        logging.warning("%s of an earlier run is not shown: %s", what, reason)
    if behind:
        logging.warning("to bring the results up to date, %s", fix)
