"""The processes of a run: how this one joins the others, and what must be the same."""

import dataclasses
import json
import os
from collections.abc import Sequence

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import joining, processes, stage
from mvc_jax.command.command_line import Place
from mvc_jax.errors import UserError


def join(place: Place | None) -> None:
    """Joins the other processes, if there are any; before JAX starts its backend.

    Args:
      place: what the command line says; None: what JAX's detection of clusters finds.

    Raises:
      UserError: as `joining.join` does.
    """
    where = joining.detected() if place is None else dataclasses.asdict(place)
    if where is None or where["count"] == 1 or processes.hosts:
        return
    warnings = joining.join(**where)
    logging.info("%d processes on %s", processes.count(), ", ".join(_hosts()))
    for warning in warnings:
        logging.warning("%s: set the clocks by the same server", warning)


def require_single(place: Place | None, command: str) -> None:
    """Refuses a command that one process runs."""
    if place is not None and place.count > 1:
        raise UserError(
            f"--num_processes={place.count}",
            wanted=f"1 for `mvc-jax {command}`",
            got=f"{place.count}",
            fix="Run each of its points as a run of its own, or leave the flag out.",
        )


def require(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    redo: Sequence[str] = (),
    sources: Sequence[epath.Path] = (),
) -> None:
    """Checks that all processes run the same command with the same code.

    Raises:
      UserError: a process, which is named, has another config or version.
    """
    if processes.count() == 1:
        return
    fix = "Start the same command, from the same environment, on every host."
    versions = {f"version of {k}": v for k, v in stage.versions().items()}
    processes.require_same("the versions", versions, fix)
    own = {
        "--workdir": str(workdir),
        "--redo": ",".join(redo),
        "--from": ",".join(map(str, sources)),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        **stage.flat(json.loads(config.to_json_best_effort()), "config"),
    }
    processes.require_same("the command", own, fix)


def _hosts() -> list[str]:
    return [*dict.fromkeys(processes.hosts)]
