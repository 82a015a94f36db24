"""What every stage guarantees on disk: finished work is kept, conflicts are errors.

1. A stage writes only into `workdir/<stage>/`, and writes its `manifest.json` last.
2. If the manifest exists with the same settings and inputs, the stage is complete and
   nothing is done.
3. If the manifest exists with other settings or inputs, the stage raises an error that
   lists the differences.
4. If there is no manifest but a `started.json` with the same settings, it resumes.
5. If there is no manifest but a `started.json` with other settings, rule 3 applies.
6. If a file listed in the manifest is missing, the stage runs again and writes it; so
   it does if one was damaged that it can make again (`Spec.restores`).
7. If another file listed in the manifest was changed, the stage raises an error and
   overwrites nothing.
8. A stage may name settings that can grow (integers, or False -> True) and inputs that
   it grows with. If all that differs is that such a setting is larger, or that such an
   input has itself grown, the stage resumes as in rule 4: it keeps existing results,
   adds the rest, and lists the hashes of its earlier manifests in the new one. Stages
   that read it treat it as a changed input, unless they grow with it.
9. A stage that has work to do first compares every file of all stages before it with
   their manifests, and their manifests with each other: a damaged or changed input is
   an error. What an unfinished stage has written is known by `Stage.digests`, whose
   records are in `workdir/digests/`.
"""

import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging
from etils import epath

from mvc_jax import files
from mvc_jax.configs import common, fields
from mvc_jax.digests import Digests
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
_NONE = "(none)"
_FINISHED, _STARTED = "manifest.json", "started.json"
_SMALL = 1 << 20  # bytes of files that are hashed whenever they are compared


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a stage depends on.

    Attributes:
      name: of the stage.
      settings: the config sections that affect its output.
      inputs: names of the stages whose artifacts it reads; they must be complete.
      grows: settings that may be raised (rule 8), e.g. `mix.per_image`.
      grows_with: those of `inputs` with which it grows (rule 8).
      restores: patterns of the artifacts that it makes again when they were damaged
        (rule 6), and that nobody edits.
    """

    name: str
    settings: dict[str, Any]
    inputs: Sequence[str] = ()
    grows: Sequence[str] = ()
    grows_with: Sequence[str] = ()
    restores: Sequence[str] = ()

    def __post_init__(self):
        object.__setattr__(self, "settings", _as_on_disk(self.settings))


@dataclasses.dataclass
class Stage:
    """An opened stage: where it writes, and whether any work is left.

    Attributes:
      name: the stage's name.
      folder: the folder of its files.
      complete: whether no work is left.
      settings: its settings, as JSON values.
      inputs: name of each input stage -> hash of its manifest.
      digests: what each of its files held when it was written.
      earlier: the manifest before it grew (rule 8), including its `counts` and
        `artifacts`; empty if it did not grow, or was not finished before it grew.
      grew_from: the manifest hashes it had before it grew, oldest first.
    """

    name: str
    folder: epath.Path
    complete: bool
    settings: dict[str, Any]
    inputs: dict[str, str]
    digests: Digests
    earlier: dict[str, Any] = dataclasses.field(default_factory=dict)
    grew_from: list[str] = dataclasses.field(default_factory=list)

    def finish(self, artifacts: Sequence[str], **counts: int) -> None:
        """Writes the manifest, which marks the stage as complete.

        Args:
          artifacts: paths of the files written, relative to the stage's folder.
          **counts: how many items were made, e.g. `images=800`.
        """
        described = {name: self.digests.describe(name) for name in sorted(artifacts)}
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
        """Checks that `content` starts with the file `name` as it was before rule 8.

        Args:
          name: path of the file, relative to the stage's folder.
          content: what is about to be written to it.

        Raises:
          UserError: the first bytes differ from those of the earlier file.
        """
        described = self.earlier.get("artifacts", {}).get(name)
        if described is None:
            return
        prefix = content[: described["bytes"]]
        if hashlib.sha256(prefix).hexdigest() != described["sha256"]:
            raise UserError(
                str(self.folder / name),
                wanted="the earlier file with new rows appended",
                got="different rows where the earlier ones were",
                fix="Another version of a library may draw differently: install the "
                f"versions listed in {self.folder / _FINISHED}, or delete "
                f"{self.folder} and the stages after it to run them again.",
            )

    def abandon(self) -> None:
        """Forgets the settings of a run that wrote nothing, so that others are allowed.

        A stage that was about to grow gets its earlier manifest back.
        """
        if self.earlier:
            files.write_json(self.folder / _FINISHED, self.earlier)
        (self.folder / _STARTED).unlink(missing_ok=True)


def open_stage(workdir: epath.PathLike, spec: Spec) -> Stage:
    """Opens `workdir/<name>` by the rules at the top of this file.

    Args:
      workdir: the run's folder.
      spec: of the stage.

    Raises:
      UserError: an input is missing, or rule 3, 5 or 7 applies.
    """
    workdir = epath.Path(workdir)
    folder = workdir / spec.name
    read = {name: read_input(workdir, name, reader=spec.name) for name in spec.inputs}
    hashes = {name: _identity(record) for name, record in read.items()}
    stage = Stage(spec.name, folder, False, spec.settings, hashes, _digests(folder))
    finished, started = folder / _FINISHED, folder / _STARTED
    for path in (finished, started):
        if not path.exists():
            continue
        record = _read(path)
        known = {name: read[name].get("grew_from", []) for name in spec.grows_with}
        grew = _require_same_or_grown(path, stage, record, spec.grows, known)
        if not grew:  # without the fields that are newer than this stage's files
            stage.settings = record["settings"]
        stage.grew_from = record.get("grew_from", [])
        if path == started:
            stage.earlier = record.get("earlier", {})
            require_inputs(workdir, spec)
        elif grew:
            _require_artifacts(stage, record, spec.restores)
            require_inputs(workdir, spec)
            stage.earlier = record
            stage.grew_from = [*stage.grew_from, _identity(record)]
        else:
            stage.complete = _require_artifacts(stage, record, spec.restores)
            _require_no_strangers(folder, record["artifacts"])
            if not stage.complete:
                require_inputs(workdir, spec)
        if grew:
            _start(stage)
            finished.unlink(missing_ok=True)
        break
    else:
        require_inputs(workdir, spec)
        _start(stage)
    if not stage.complete:
        files.remove_temporaries(folder)
    return stage


def require_inputs(workdir: epath.PathLike, spec: Spec) -> None:
    """Checks the artifacts of all stages that a stage directly or indirectly reads.

    Raises:
      UserError: a stage is not finished, or was made from other inputs than the present
        ones; or a file is missing or was changed.
    """
    workdir, todo, seen = epath.Path(workdir), [*spec.inputs], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        manifest = read_input(workdir, name, reader=spec.name)
        digests = _digests(workdir / name)
        for file, described in manifest["artifacts"].items():
            if not _holds(digests, file, described):
                raise _damaged_input(workdir / name / file, name, spec.name)
        _require_no_strangers(workdir / name, manifest["artifacts"])
        for input_, identity in manifest["inputs"].items():
            record = read_input(workdir, input_, reader=name)
            if identity not in (_identity(record), *record.get("grew_from", ())):
                raise UserError(
                    str(workdir / name),
                    wanted=f"a stage made from the present stage {input_}, for the "
                    f"stage {spec.name}",
                    got=f"one made before {input_} was run again",
                    fix=f"Add {name} to --config.stages: it says what to do.",
                )
            todo.append(input_)


def _require_no_strangers(folder: epath.Path, artifacts: Iterable[str]) -> None:
    """Raises a `UserError` for a Parquet file beside those that the stage wrote.

    Readers, other people's as well, take all such files of a folder for one dataset.
    """
    shards = {name for name in artifacts if name.endswith(".parquet")}
    for place in sorted({name.rpartition("/")[0] for name in shards}):
        for path in files.matching(folder, f"{place}/*.parquet"):
            if f"{place}/{path.name}" not in shards:
                raise UserError(
                    str(path),
                    wanted=f"only the files that the stage {folder.name} wrote",
                    got="another one",
                    fix="Move it to another folder.",
                )


def verify(workdir: epath.PathLike, spec: Spec) -> int:
    """Hashes every file that a stage wrote, and deletes those that it makes again.

    Args:
      workdir: the run's folder.
      spec: of the stage, which may be unfinished.

    Returns:
      the number of files.

    Raises:
      UserError: other files are damaged; `details` lists them.
    """
    folder = epath.Path(workdir) / spec.name
    digests, manifest = _digests(folder), {}
    if is_complete(workdir, spec.name):
        manifest = _read(folder / _FINISHED)["artifacts"]
    wanted = {**digests.recorded(), **manifest}
    there = {x: content for x, content in wanted.items() if (folder / x).exists()}
    damaged = [
        folder / name
        for name, content in there.items()
        if not digests.holds(name, content, again=True)
    ]
    kept = [
        path
        for path in damaged
        if str(path.relative_to(folder)) in manifest
        and not _restores(folder, path, spec.restores)
    ]
    if kept:
        raise UserError(
            f"stage {spec.name}",
            wanted="the files that it wrote",
            got=f"{len(kept)} that were changed since",
            fix=f"Restore them, or delete {folder} and the stages after it to run them "
            "again.",
            details=[str(path) for path in kept],
        )
    _delete_damaged(damaged)
    return len(there)


def _damaged_input(path: epath.Path, stage: str, reader: str) -> UserError:
    there = path.exists()
    return UserError(
        str(path),
        wanted=f"the file that the stage {stage} wrote, for the stage {reader}",
        got="one that was changed since" if there else "no such file",
        fix=f"Restore it, or add {stage} to --config.stages: it makes files again that "
        "are missing.",
    )


def is_complete(workdir: epath.PathLike, name: str) -> bool:
    """Whether the stage has a manifest; its settings and files are not compared."""
    return (epath.Path(workdir) / name / _FINISHED).exists()


def read_manifest(workdir: epath.PathLike, name: str) -> dict[str, Any]:
    return files.read_json(epath.Path(workdir) / name / _FINISHED)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result.

    They are read from the packages' metadata; nothing is imported.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            found[name] = "not installed"
    return found


def differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    """One line `field: old -> new` for each leaf in which two nested dicts differ.

    A config field that the old dict lacks, since it is newer, had its default value.
    """
    if not (isinstance(new, dict) and isinstance(old, dict)):
        return [] if new == old else [f"{prefix}: {old!r} -> {new!r}"]
    lines = []
    for key in sorted({*new, *old}):
        inner = f"{prefix}.{key}" if prefix else key
        before = old[key] if key in old else _default(inner)
        lines += differences(new.get(key, _NONE), before, inner)
    return lines


def _default(name: str) -> Any:
    """A config field's default as on disk; {} for a section, `_NONE` for others."""
    part: Any = common.FIELDS
    for key in name.split("."):
        part = getattr(part, "fields", {}).get(key)
    if part is None:
        return _NONE
    return _as_on_disk(part.default) if isinstance(part, fields.Field) else {}


def _start(stage: Stage) -> None:
    record = {"settings": stage.settings, "inputs": stage.inputs}
    if stage.grew_from or stage.earlier:
        record["grew_from"] = stage.grew_from
        record["earlier"] = stage.earlier
    files.write_json(stage.folder / _STARTED, record)


def _require_same_or_grown(
    path: epath.Path,
    stage: Stage,
    earlier: dict,
    grows: Sequence[str],
    known: dict[str, list[str]],
) -> bool:
    """Whether the stage grew by rule 8; raises if anything else differs.

    Args:
      path: the file that `earlier` was read from, for the error.
      stage: the stage with its new settings and inputs.
      earlier: the record of its old settings and inputs.
      grows: settings that may be larger now.
      known: name of an input that may have grown -> its earlier manifest hashes.

    Raises:
      UserError: a setting or an input changed in another way.
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
            changed.append(f"stage {name} was run again")
    if changed:
        raise UserError(
            str(path),
            wanted="the settings of this run",
            got=f"a stage made with others ({'; '.join(changed)})",
            fix="Undo these changes or choose a new --workdir; or delete "
            f"{stage.folder} and the stages after it to run them again.",
        )
    return bool(larger or grown)


def _is_larger(new: dict, old: dict, field: str) -> bool:
    *above, last = field.split(".")
    for part in above:
        new, old = new.get(part, {}), old.get(part, {})
    now, before = new.get(last), old.get(last)
    return type(now) is type(before) and isinstance(now, int) and now > before


def read_input(workdir: epath.Path, name: str, reader: str) -> dict:
    """The manifest of stage `name`, which stage `reader` reads.

    Raises:
      UserError: the stage is not finished, or its manifest is damaged.
    """
    path = workdir / name / _FINISHED
    if not path.exists():
        raise UserError(
            f"stage {reader}",
            wanted=f"the finished stage {name} in {workdir}",
            got="none",
            fix=f"Add {name} to --config.stages or run it first.",
        )
    return _read(path)


def require_made_by(workdir: epath.PathLike, spec: Spec, reader: str) -> None:
    """Checks that a finished stage was made with these settings.

    Args:
      workdir: the run's folder.
      spec: of the stage that is read.
      reader: the stage that reads it, for the error.

    Raises:
      UserError: it was made with other settings, or is not finished.
    """
    made_by = read_input(epath.Path(workdir), spec.name, reader)["settings"]
    differing = differences(spec.settings, made_by)
    if differing:
        raise UserError(
            f"stage {reader}",
            wanted=f"a stage {spec.name} that was made with this run's settings",
            got=f"one made with others ({'; '.join(differing)})",
            fix=f"Undo these changes, or add {spec.name} to --config.stages: it may be "
            "able to add what is missing.",
        )


def _as_on_disk(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples become lists


def _identity(manifest: dict) -> str:
    """Hash by which later stages recognise this one as their input."""
    # Without versions: equal artifacts are equal inputs, whichever version made them.
    return _hash([manifest[key] for key in ("settings", "inputs", "artifacts")])


def _read(path: epath.Path) -> dict:
    try:
        return files.read_json(path)
    except ValueError as error:
        raise UserError(
            str(path),
            wanted="the JSON that this stage wrote",
            got=f"a damaged file ({error})",
            fix=f"Delete {path.parent} to run the stage again.",
        ) from error


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _digests(folder: epath.Path) -> Digests:
    return Digests(folder, folder.parent / "digests" / f"{folder.name}.jsonl")


def _holds(digests: Digests, name: str, described: dict[str, Any]) -> bool:
    """Whether an artifact is as its manifest describes it."""
    return digests.holds(name, described, again=described["bytes"] <= _SMALL)


def _require_artifacts(stage: Stage, manifest: dict, restores: Sequence[str]) -> bool:
    """Whether all artifacts are there (rule 6); raises if one was changed (rule 7).

    Those that the stage makes again when they were damaged are deleted if they were.
    """
    lost = [
        stage.folder / name
        for name, described in manifest["artifacts"].items()
        if not _holds(stage.digests, name, described)
    ]
    damaged = [path for path in lost if path.exists()]
    for path in damaged:
        if not _restores(stage.folder, path, restores):
            raise UserError(
                str(path),
                wanted="the file that this stage wrote",
                got="one that was changed since",
                fix="Restore it, or delete "
                f"{stage.folder} and the stages after it to run them again. If you "
                "meant the change, copy the file first: captions can be passed as "
                "config.caption.file, recipes as config.mix.file.",
            )
    _delete_damaged(damaged)
    return not lost


def _restores(folder: epath.Path, path: epath.Path, patterns: Sequence[str]) -> bool:
    name = str(path.relative_to(folder))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _delete_damaged(paths: Sequence[epath.Path]) -> None:
    for path in paths:
        logging.warning("%s was damaged: making it again", path)
        path.unlink()
