"""--redo: stages are moved aside, never deleted, and then made again.

1. With a stage, all that depend on it are moved to `earlier/<date>/`, the last of the
   pipeline first: a kill in between leaves a workdir of complete stages.
2. `redo.json` is written when all are moved, and deleted when they are made again.
   While it exists, the same --redo goes on instead of moving the new files aside, as a
   launcher repeats the same command.
3. Where the new files cannot be gone on with, since a setting has changed again or an
   error asks for a --redo, they are moved aside, too.
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files, stage
from mvc_jax.command import pipeline, plan, run_folder
from mvc_jax.errors import UserError

_JOURNAL, _EARLIER = "redo.json", "earlier"


def stages_to_move(
    names: Sequence[str],
    stages: Sequence[str],
    config: ConfigDict,
    workdir: epath.Path,
    sources: Sequence[epath.Path] = (),
) -> list[str]:
    """The stages that --redo is about, and all that depend on them; changes nothing.

    Args:
      names: those of --redo; `all`: the selected ones.
      stages: the selected ones.
      config: of the run.
      workdir: of the run.
      sources: other workdirs, from which stages are taken over.

    Returns:
      them, in the pipeline's order; [] without --redo, or where the run goes on with
      one that was interrupted.

    Raises:
      UserError: a name is not that of a selected stage.
    """
    if unknown := [n for n in names if n not in stages and n != "all"]:
        raise UserError(
            f"--redo={','.join(names)}",
            wanted=f"all, or some stages of this run: {','.join(stages)}",
            got=",".join(unknown),
            fix="Correct the names, or add them to --config.stages.",
        )
    again = pipeline.dependents(stages if "all" in names else names, config, workdir)
    if not names or _journal(workdir).get("redo") != [*names]:
        return again
    steps = plan.make(stages, config, workdir, sources=sources)
    if any(step.state == "refused" and step.name in again for step in steps):
        return again
    logging.info("going on with --redo=%s, which was interrupted", ",".join(names))
    return []


def move_aside(
    names: Sequence[str],
    moved: Sequence[str],
    stages: Sequence[str],
    workdir: epath.Path,
) -> None:
    """Moves stages, and what else the workdir has of them, into a folder of their own.

    Args:
      names: those of --redo.
      moved: the result of `stages_to_move`.
      stages: the selected ones.
      workdir: of the run.
    """
    there = [name for name in moved if (workdir / name).exists()]
    aside = _new_folder(workdir / _EARLIER)
    for name in reversed(there):
        aside.mkdir(parents=True, exist_ok=True)
        (workdir / name).rename(aside / name)
    run_folder.move_records(moved, workdir, aside)
    if there:
        logging.info("moved to %s: %s", aside, ", ".join(there))
    made_again = [name for name in moved if name in stages]
    journal = {"redo": [*names], "stages": made_again}
    files.write_json(workdir / _JOURNAL, journal)


@contextlib.contextmanager
def ending_redo(workdir: epath.Path) -> Iterator[None]:
    """Ends a --redo with the block, if it made the stages again.

    So does an error that asks for a --redo: the same one is then a new one.
    """
    try:
        yield
    except UserError as error:
        if "--redo=" in str(error):
            (workdir / _JOURNAL).unlink(missing_ok=True)
        raise
    names = _journal(workdir).get("stages", [])
    if names and all(stage.is_complete(workdir, name) for name in names):
        (workdir / _JOURNAL).unlink(missing_ok=True)


def _journal(workdir: epath.Path) -> dict[str, list[str]]:
    """What `redo.json` says; {} without one."""
    try:
        record = files.read_json(workdir / _JOURNAL)
    except (FileNotFoundError, ValueError):  # one of ours appears by a rename
        return {}
    return record if isinstance(record, dict) else {}


def _new_folder(parent: epath.Path) -> epath.Path:
    stamp = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    number = 1
    while (parent / (name := f"{stamp}-{number}" if number > 1 else stamp)).exists():
        number += 1
    return parent / name
