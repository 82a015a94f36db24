"""The contract of a stage on disk: skip what is done, refuse what differs, go on.

1. A stage writes into `workdir/<stage>/` alone, and its `manifest.json` last.
2. Manifest there, same settings and inputs: the stage is complete, nothing is done.
3. Manifest there, other settings or inputs: an error that prints what differs.
4. No manifest, but `started.json` with the same settings: the stage goes on.
5. No manifest, and `started.json` with others: the error of rule 3.
6. A file that the manifest lists is gone: the stage runs again and fills it in.
7. A file that the manifest lists was edited: an error; nothing is overwritten.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError

_PACKAGES = (
    *("mvc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("diffusers", "transformers", "numpy", "pillow", "pyarrow"),
)
_HASHED_BYTES = 64 << 20  # larger files are compared by size alone


@dataclasses.dataclass
class Stage:
    """An opened stage: where it writes, and whether anything is left to do."""

    name: str
    folder: epath.Path
    complete: bool
    settings: dict[str, Any]
    inputs: dict[str, str]

    def finish(self, artifacts: Sequence[str], **counts: int) -> None:
        """Writes the manifest, after which the stage counts as complete.

        Args:
          artifacts: files written, relative to the stage's folder.
          **counts: what was made, e.g. `images=800`.
        """
        described = {name: _describe(self.folder / name) for name in sorted(artifacts)}
        manifest = {
            "stage": self.name,
            "settings": self.settings,
            "settings_hash": _hash(self.settings),
            "inputs": self.inputs,
            "artifacts": described,
            "counts": counts,
            "versions": versions(),
        }
        files.write_json(self.folder / "manifest.json", manifest)
        (self.folder / "started.json").unlink(missing_ok=True)
        self.complete = True

    def abandon(self) -> None:
        """Forgets the settings of a stage that kept nothing: others may follow."""
        (self.folder / "started.json").unlink(missing_ok=True)


def open_stage(
    workdir: epath.PathLike,
    name: str,
    settings: dict[str, Any],
    inputs: Sequence[str] = (),
) -> Stage:
    """Opens `workdir/<name>` by the rules at the top of this file.

    Args:
      workdir: of the run.
      name: of the stage.
      settings: the config sections that shape its output, as plain JSON values.
      inputs: names of the stages whose artifacts it reads; they must be complete.

    Raises:
      UserError: an input is missing, or rule 3, 5 or 7 applies.
    """
    workdir = epath.Path(workdir)
    folder = workdir / name
    settings = json.loads(json.dumps(settings))  # tuples become lists, as on disk
    hashes = {stage: _input_hash(workdir, stage, reader=name) for stage in inputs}
    stage = Stage(name, folder, False, settings, hashes)
    finished, started = folder / "manifest.json", folder / "started.json"
    for path in (finished, started):
        if path.exists():
            earlier = _read(path)
            _require_same(path, stage, earlier)
            stage.complete = path == finished and _all_there(folder, earlier)
            break
    else:
        now = {"settings": settings, "inputs": hashes}
        files.write_json(started, now)
    if not stage.complete:
        files.remove_temporaries(folder)
    return stage


def is_complete(workdir: epath.PathLike, name: str) -> bool:
    return (epath.Path(workdir) / name / "manifest.json").exists()


def read_manifest(workdir: epath.PathLike, name: str) -> dict[str, Any]:
    return files.read_json(epath.Path(workdir) / name / "manifest.json")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            found[name] = "not installed"
    return found


def differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    """Lines `field: old -> new` for every leaf in which two nested dicts differ."""
    if not (isinstance(new, dict) and isinstance(old, dict)):
        return [] if new == old else [f"{prefix}: {old!r} -> {new!r}"]
    missing = "(none)"
    lines = []
    for key in sorted({*new, *old}):
        inner = f"{prefix}.{key}" if prefix else key
        lines += differences(new.get(key, missing), old.get(key, missing), inner)
    return lines


def _require_same(path: epath.Path, stage: Stage, earlier: dict) -> None:
    changed = differences(stage.settings, earlier["settings"])
    for name in sorted({*stage.inputs, *earlier["inputs"]}):
        if earlier["inputs"].get(name) != stage.inputs.get(name):
            changed.append(f"stage {name} was made anew")
    if changed:
        raise UserError(
            str(path),
            wanted="the settings of this run",
            got=f"a stage made with others ({'; '.join(changed)})",
            fix="Take back these settings or name a new --workdir; or delete "
            f"{stage.folder} and the stages after it to make them anew.",
        )


def _input_hash(workdir: epath.Path, name: str, reader: str) -> str:
    path = workdir / name / "manifest.json"
    if not path.exists():
        raise UserError(
            f"stage {reader}",
            wanted=f"the finished stage {name} in {workdir}",
            got="none",
            fix=f"Add {name} to --config.stages or run it first.",
        )
    manifest = _read(path)
    # Versions stay out: the same artifacts are the same input, whoever made them.
    return _hash([manifest[key] for key in ("settings", "inputs", "artifacts")])


def _read(path: epath.Path) -> dict:
    try:
        return files.read_json(path)
    except ValueError as error:
        raise UserError(
            str(path),
            wanted="the JSON that this stage wrote",
            got=f"a damaged file ({error})",
            fix=f"Delete {path.parent} to make the stage anew.",
        ) from error


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _describe(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": files.sha256(path)}


def _all_there(folder: epath.Path, manifest: dict) -> bool:
    complete = True
    for name, described in manifest["artifacts"].items():
        path = folder / name
        if not path.exists():
            complete = False
            continue
        size = path.stat().length
        same = size == described["bytes"] and (
            size > _HASHED_BYTES or files.sha256(path) == described["sha256"]
        )
        if not same:
            raise UserError(
                str(path),
                wanted="the file that this stage wrote",
                got="one that was changed since",
                fix="Keep a copy if the change is meant (captions can be handed back "
                f"by config.caption.file). Put the old one back, or delete {folder} "
                "and the stages after it to make them anew.",
            )
    return complete
