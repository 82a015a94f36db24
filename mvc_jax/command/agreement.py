"""The processes of a run: how this one joins the others, and what must be the same."""

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import joining, processes, stage
from mvc_jax.command.command_line import Place
from mvc_jax.errors import UserError

_ENDS = 1 << 20  # bytes of the beginning and of the end of a file


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


def require_sweep_alone(place: Place | None) -> None:
    """Refuses a sweep in one of several processes."""
    where = joining.detected() if place is None else dataclasses.asdict(place)
    if where is not None and where["count"] > 1:
        raise UserError(
            "mvc-jax sweep",
            wanted="a single process",
            got=f"{where['count']}",
            fix="Make each point in all of them, by `mvc-jax train "
            "--workdir=SWEEP/FIELD=VALUE --config.FIELD=VALUE`, and then run the sweep "
            "in one, with --workdir=SWEEP: it compares what it finds finished.",
        )


def require(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    redo: Sequence[str] = (),
    sources: Sequence[epath.Path] = (),
) -> None:
    """Checks that all processes run the same command with the same code and data.

    Raises:
      UserError: a process, which is named, has another config or version, or sees
        other images or another base model under the same path.
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
    paths = {"config.base.path": config.base.path}
    if redo or not stage.is_complete(workdir, "caption"):
        paths["config.data.source"] = config.data.source.partition(":")[2]
    seen = {name: seen_at(path) for name, path in paths.items() if path}
    fix = "Copy the same files to every host, or use a disk or bucket that all share."
    processes.require_same("the inputs", seen, fix)


def seen_at(path: str) -> str:
    """What a host has under a local path, by names, sizes and the ends of a file.

    Args:
      path: of a file or folder, or a pattern; others, such as names on the hub, and
        buckets, are the same for all hosts.
    """
    path = os.path.expanduser(path)
    if "://" in path:
        return "a bucket"
    root, pattern = path, "*"
    if not os.path.exists(path):  # a pattern: what it matches below its first wildcard
        first, *others = re.split(r"[*?[]", path)
        root = os.path.dirname(first) if others else path
        pattern = path.replace("**/", "*")
    count = size = 0
    digest = hashlib.sha256()
    for name, file in _files(root):
        if not fnmatch.fnmatchcase(file, pattern):
            continue
        bytes_ = os.path.getsize(file)
        count, size = count + 1, size + bytes_
        digest.update(f"{name}\0{bytes_}\0".encode())
    if not count:
        return "no files"
    if os.path.isfile(path):
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read())
    return f"{count} files, {size} bytes, names and sizes {digest.hexdigest()[:8]}"


def _files(path: str) -> Iterator[tuple[str, str]]:
    """The files at and below a path, in order: relative name, and path."""
    if os.path.isfile(path):
        yield os.path.basename(path), path
    for folder, below, names in os.walk(path):
        below.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            if os.path.isfile(file):
                yield os.path.relpath(file, path), file


def _hosts() -> list[str]:
    return [*dict.fromkeys(processes.hosts)]
