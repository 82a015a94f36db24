"""The contract of a stage on disk: skip what is done, refuse what differs, go on.

1. A stage writes into `workdir/<stage>/` alone, and its `manifest.json` last.
2. Manifest there, same settings and inputs: the stage is complete, nothing is done.
3. Manifest there, other settings or inputs: an error that prints what differs.
4. No manifest, but `started.json` with the same settings: the stage goes on.
5. No manifest, and `started.json` with others: the error of rule 3.
6. A file that the manifest lists is gone: the stage runs again and fills it in.
7. A file that the manifest lists was edited: an error; nothing is overwritten.
8. A stage may name settings that grow (whole numbers, or False -> True) and inputs that
   it grows with. If nothing differs but that such a setting is larger, or that such an
   input has itself grown, it goes on as in rule 4: what it made before stands, the rest
   is added, and a new manifest is written, which lists the hashes of the earlier ones.
   To the stages after it, it was made anew, unless they grow with it.
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
    "mvc_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "diffusers",
    "transformers",
    "numpy",
    "pillow",
    "pyarrow",
)
_FINISHED, _STARTED = "manifest.json", "started.json"
_HASHED_BYTES = 64 << 20  # larger files are compared by size alone


@dataclasses.dataclass
class Stage:
    """An opened stage: where it writes, and whether anything is left to do.

    Attributes:
      name: of the stage.
      folder: of its files.
      complete: whether nothing is left to do.
      settings: as JSON values.
      inputs: name of each input -> its hash.
      earlier: the manifest that it had before it grew (rule 8), with its `counts` and
        `artifacts`; empty where it did not grow, or had not been finished.
      grew_from: hashes that stages after it knew it by, before it grew.
    """

    name: str
    folder: epath.Path
    complete: bool
    settings: dict[str, Any]
    inputs: dict[str, str]
    earlier: dict[str, Any] = dataclasses.field(default_factory=dict)
    grew_from: list[str] = dataclasses.field(default_factory=list)

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
            "grew_from": self.grew_from,
        }
        files.write_json(self.folder / _FINISHED, manifest)
        (self.folder / _STARTED).unlink(missing_ok=True)
        self.complete = True

    def require_prefix(self, name: str, content: bytes) -> None:
        """A file that only grows must begin with what was there before rule 8.

        Raises:
          UserError: it does not, byte for byte.
        """
        described = self.earlier.get("artifacts", {}).get(name)
        if described is None:
            return
        prefix = content[: described["bytes"]]
        if hashlib.sha256(prefix).hexdigest() != described["sha256"]:
            raise UserError(
                str(self.folder / name),
                wanted="the file of before, and more rows behind it",
                got="other rows for what was there already",
                fix="Another version of a library may draw otherwise: install those "
                f"that {self.folder / _FINISHED} lists, or delete {self.folder} and "
                "the stages after it to make them anew.",
            )

    def abandon(self) -> None:
        """Forgets the settings of a stage that kept nothing: others may follow."""
        if self.earlier:
            files.write_json(self.folder / _FINISHED, self.earlier)
        (self.folder / _STARTED).unlink(missing_ok=True)


def open_stage(
    workdir: epath.PathLike,
    name: str,
    settings: dict[str, Any],
    inputs: Sequence[str] = (),
    *,
    grows: Sequence[str] = (),
    grows_with: Sequence[str] = (),
) -> Stage:
    """Opens `workdir/<name>` by the rules at the top of this file.

    Args:
      workdir: of the run.
      name: of the stage.
      settings: the config sections that shape its output, as plain JSON values.
      inputs: names of the stages whose artifacts it reads; they must be complete.
      grows: settings that may be raised (rule 8), e.g. `mix.per_image`.
      grows_with: inputs with which it grows.

    Raises:
      UserError: an input is missing, or rule 3, 5 or 7 applies.
    """
    workdir = epath.Path(workdir)
    folder = workdir / name
    settings = _as_on_disk(settings)
    read = {stage: read_input(workdir, stage, reader=name) for stage in inputs}
    hashes = {stage: _identity(record) for stage, record in read.items()}
    stage = Stage(name, folder, False, settings, hashes)
    finished, started = folder / _FINISHED, folder / _STARTED
    for path in (finished, started):
        if not path.exists():
            continue
        record = _read(path)
        known = {key: read[key].get("grew_from", []) for key in {*grows_with} & {*read}}
        grew = _require_same_or_grown(path, stage, record, grows, known)
        stage.grew_from = record.get("grew_from", [])
        if path == started:
            stage.earlier = record.get("earlier", {})
        elif grew:
            _all_there(folder, record)
            stage.earlier = record
            stage.grew_from = [*stage.grew_from, _identity(record)]
        else:
            stage.complete = _all_there(folder, record)
        if grew:
            _start(stage)
            finished.unlink(missing_ok=True)
        break
    else:
        _start(stage)
    if not stage.complete:
        files.remove_temporaries(folder)
    return stage


def is_complete(workdir: epath.PathLike, name: str) -> bool:
    return (epath.Path(workdir) / name / _FINISHED).exists()


def read_manifest(workdir: epath.PathLike, name: str) -> dict[str, Any]:
    return files.read_json(epath.Path(workdir) / name / _FINISHED)


def require_unchanged(workdir: epath.PathLike, name: str, suffix: str = "") -> None:
    """Compares all bytes of a stage's artifacts, the largest ones too.

    Args:
      workdir: of the run.
      name: of the stage, which is complete.
      suffix: how the names of the artifacts end that are looked at.

    Raises:
      UserError: one is gone, or is not what the stage wrote.
    """
    folder = epath.Path(workdir) / name
    for file, described in read_manifest(workdir, name)["artifacts"].items():
        if not file.endswith(suffix):
            continue
        path = folder / file
        there = path.exists()
        if not there or files.sha256(path) != described["sha256"]:
            raise UserError(
                str(path),
                wanted="the file that this stage wrote",
                got="one that was changed since" if there else "no such file",
                fix=f"Put it back, or delete {folder} and the stages after it to make "
                "them anew.",
            )


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


def _start(stage: Stage) -> None:
    record = {"settings": stage.settings, "inputs": stage.inputs}
    if stage.grew_from or stage.earlier:
        record |= {"grew_from": stage.grew_from, "earlier": stage.earlier}
    files.write_json(stage.folder / _STARTED, record)


def _require_same_or_grown(
    path: epath.Path,
    stage: Stage,
    earlier: dict,
    grows: Sequence[str],
    known: dict[str, list[str]],
) -> bool:
    """Whether the stage grew by rule 8; raises if it differs in any other way.

    Args:
      path: of the record, for the error.
      stage: as it is to be.
      earlier: the record of what it was.
      grows: settings that may be larger now.
      known: input that may have grown -> the hashes it was known by before.
    """
    larger = [f for f in grows if _is_larger(stage.settings, earlier["settings"], f)]
    changed = [
        line
        for line in differences(stage.settings, earlier["settings"])
        if line.partition(":")[0] not in larger
    ]
    grown = []
    for name in sorted({*stage.inputs, *earlier["inputs"]}):
        before = earlier["inputs"].get(name)
        if before == stage.inputs.get(name):
            continue
        if before in known.get(name, ()):
            grown.append(name)
        else:
            changed.append(f"stage {name} was made anew")
    if changed:
        raise UserError(
            str(path),
            wanted="the settings of this run",
            got=f"a stage made with others ({'; '.join(changed)})",
            fix="Take back these settings or name a new --workdir; or delete "
            f"{stage.folder} and the stages after it to make them anew.",
        )
    return bool(larger or grown)


def _is_larger(new: dict, old: dict, field: str) -> bool:
    *above, last = field.split(".")
    for part in above:
        new, old = new.get(part, {}), old.get(part, {})
    now, before = new.get(last), old.get(last)
    return type(now) is type(before) and isinstance(now, int) and now > before


def read_input(workdir: epath.Path, name: str, reader: str) -> dict:
    """The manifest of a stage that `reader` reads; a `UserError` if it has none."""
    path = workdir / name / _FINISHED
    if not path.exists():
        raise UserError(
            f"stage {reader}",
            wanted=f"the finished stage {name} in {workdir}",
            got="none",
            fix=f"Add {name} to --config.stages or run it first.",
        )
    return _read(path)


def require_made_by(
    workdir: epath.PathLike, name: str, settings: dict[str, Any], reader: str
) -> None:
    """Refuses a finished stage that was not made by these settings of it.

    Raises:
      UserError: it was made by others, or `reader` has no such stage to read.
    """
    made_by = read_input(workdir, name, reader)["settings"]
    differing = differences(_as_on_disk(settings), made_by)
    if differing:
        raise UserError(
            f"stage {reader}",
            wanted=f"a stage {name} that was made by this run's settings",
            got=f"one made by others ({'; '.join(differing)})",
            fix=f"Take these settings back, or run {name} as well: it says whether it "
            "can.",
        )


def _as_on_disk(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))  # tuples become lists


def _identity(manifest: dict) -> str:
    """What the stages after it know it by."""
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
                "by config.caption.file, recipes by config.mix.file). Put the old one "
                f"back, or delete {folder} and the stages after it to make them anew.",
            )
    return complete
