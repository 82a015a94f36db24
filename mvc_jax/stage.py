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

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mvc_jax import artifacts, files, processes
from mvc_jax.artifacts import digests_of
from mvc_jax.configs import common, fields
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError, shell_word

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
_GROWN = "(grown)"  # in place of the hash of a manifest that is yet to be written
_FINISHED, _STARTED = "manifest.json", "started.json"
_ENTRIES = {  # that are read
    _FINISHED: {"settings", "inputs", "artifacts"},
    _STARTED: {"settings", "inputs"},
}


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
      earlier: dotted setting -> what a stage was made with whose record lacks it, as it
        is newer; by default that is the field's default.
      remarks: dotted setting -> what to say where it has changed.
      named_files: dotted setting of a user's file -> that of its sha256, by which alone
        it is known: it may be moved, and after the stage is finished, deleted.
    """

    name: str
    settings: dict[str, Any]
    inputs: Sequence[str] = ()
    grows: Sequence[str] = ()
    grows_with: Sequence[str] = ()
    restores: Sequence[str] = ()
    earlier: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    named_files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "settings", _as_on_disk(self.settings))


@dataclasses.dataclass(frozen=True)
class Part:
    """Files of a finished stage that one with other settings would make again.

    Attributes:
      name: for people; also that of its rows in `metrics.jsonl`: `<stage>/<name>/...`.
      paths: of its files and folders, relative to the stage's folder.
    """

    name: str
    paths: Sequence[str]

    def has(self, file: str) -> bool:
        """Whether a file, by its path relative to the stage's folder, is in it."""
        return any(file == path or file.startswith(f"{path}/") for path in self.paths)


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

        The first process writes it, once all of them are here.

        Args:
          artifacts: paths of the files written, by any process, relative to the stage's
            folder.
          **counts: how many items were made, e.g. `images=800`.
        """
        processes.barrier(f"the end of {self.name}")
        processes.on_first(
            f"the manifest of {self.name}",
            lambda: self._write_manifest(artifacts, counts),
        )
        self.complete = True

    def _write_manifest(
        self, artifacts: Sequence[str], counts: Mapping[str, int]
    ) -> None:
        if processes.hosts:  # others have written records since it was opened
            self.digests = digests_of(self.folder)
        self.digests.collect()
        described = {name: self.digests.describe(name) for name in sorted(artifacts)}
        self.digests.forget_missing()
        manifest = {
            "stage": self.name,
            "settings": self.settings,
            "settings_hash": hash_of(self.settings),
            "inputs": self.inputs,
            "artifacts": described,
            "counts": counts,
            "versions": versions(),
            "grew_from": self.grew_from,
        }
        files.write_json(self.folder / _FINISHED, manifest)
        (self.folder / _STARTED).unlink(missing_ok=True)

    def reload_digests(self) -> None:
        """Reads the records again, after other processes have written some."""
        if processes.count() > 1:
            self.digests = digests_of(self.folder)

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
                f"versions listed in {self.folder / _FINISHED}, or "
                f"{way_out(self.name)}.",
            )

    def abandon(self) -> None:
        """Forgets the settings of a run that wrote nothing, so that others are allowed.

        A stage that was about to grow gets its earlier manifest back. It is for all
        processes to call, or for none.
        """
        if not processes.is_first():
            return
        if self.earlier:
            files.write_json(self.folder / _FINISHED, self.earlier)
        (self.folder / _STARTED).unlink(missing_ok=True)


def open_stage(workdir: epath.PathLike, spec: Spec) -> Stage:
    """Opens `workdir/<name>` by the rules at the top of this file.

    The first process opens it, and all have what it found.

    Args:
      workdir: the run's folder.
      spec: of the stage.

    Raises:
      UserError: an input is missing, or rule 3, 5 or 7 applies; or the settings of a
        process differ, such as the content of a file that they name.
    """
    workdir = epath.Path(workdir)
    if processes.count() == 1:
        return _open(workdir, spec)
    processes.require_same(
        f"the settings of {spec.name}",
        flat(spec.settings),
        "Every process needs the same config and the same files.",
    )
    opened: list[Stage] = []
    names = ("complete", "settings", "inputs", "earlier", "grew_from")

    def on_first() -> dict[str, Any]:
        opened.append(_open(workdir, spec))
        return {name: getattr(opened[0], name) for name in names}

    found = processes.on_first(f"opening {spec.name}", on_first)
    folder = workdir / spec.name
    digests = digests_of(folder)
    return opened[0] if opened else Stage(spec.name, folder, digests=digests, **found)


def _open(workdir: epath.Path, spec: Spec) -> Stage:
    folder = workdir / spec.name
    read = {name: read_input(workdir, name, reader=spec.name) for name in spec.inputs}
    inputs = {name: Input.of(manifest) for name, manifest in read.items()}
    found = compare(workdir, spec, inputs)
    if found.changed:
        raise found.error()
    for path in found.deleted:
        logging.warning(
            "%s is no longer there; the stage %s, which is finished, was made from it",
            path,
            spec.name,
        )
    hashes = {name: input_.identity for name, input_ in inputs.items()}
    digests = digests_of(folder)
    stage = Stage(spec.name, folder, False, spec.settings, hashes, digests)
    if found.path is None:
        require_inputs(workdir, spec)
        _start(stage)
    else:
        record = found.record
        # Without the fields that are newer than its files.
        stage.settings = record["settings"]
        if found.growth:
            stage.settings = _known_to(record["settings"], spec.settings)
        stage.grew_from = record.get("grew_from", [])
        if not found.finished:
            stage.earlier = record.get("earlier", {})
            require_inputs(workdir, spec)
        elif found.growth:
            _require_artifacts(stage, record, spec.restores)
            require_inputs(workdir, spec)
            stage.earlier = record
            stage.grew_from = [*stage.grew_from, _identity(record)]
        else:
            stage.complete = _require_artifacts(stage, record, spec.restores)
            artifacts.require_no_strangers(folder, record["artifacts"])
            if not stage.complete:
                require_inputs(workdir, spec)
            elif (folder / _STARTED).exists():  # of one killed right at its end
                (folder / _STARTED).unlink(missing_ok=True)
        if found.growth:
            _start(stage)
            (folder / _FINISHED).unlink(missing_ok=True)
    if not stage.complete:
        files.remove_temporaries(folder)
    return stage


def begin(workdir: epath.PathLike, spec: Spec, folder: epath.Path) -> None:
    """Makes `folder` one of a stage that was begun, and is resumed (rule 4).

    Args:
      workdir: of the run, with all inputs of the stage.
      spec: of the stage.
      folder: that will be the stage's.
    """
    read = {name: read_input(workdir, name, reader=spec.name) for name in spec.inputs}
    inputs = {name: _identity(manifest) for name, manifest in read.items()}
    record = {"settings": spec.settings, "inputs": inputs}
    files.write_json(folder / _STARTED, record)


def same(name: str, workdir: epath.PathLike, other: epath.PathLike) -> bool:
    """Whether two workdirs have the same finished stage, with the same files."""
    ours, theirs = (read_manifest(folder, name) for folder in (workdir, other))
    return _identity(ours) == _identity(theirs)


def without(
    settings: dict[str, Any], section: str, names: Collection[str]
) -> dict[str, Any]:
    """Settings without some fields of a section."""
    kept = {key: value for key, value in settings[section].items() if key not in names}
    return settings | {section: kept}


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
        folder = workdir / name
        digests = digests_of(folder)
        for path in artifacts.lost(digests, folder, manifest["artifacts"]):
            raise _damaged_input(path, name, spec.name)
        artifacts.require_no_strangers(folder, manifest["artifacts"])
        for input_, identity in manifest["inputs"].items():
            record = read_input(workdir, input_, reader=name)
            if identity not in (_identity(record), *record.get("grew_from", ())):
                raise UserError(
                    str(folder),
                    wanted=f"a stage made from the present stage {input_}, for the "
                    f"stage {spec.name}",
                    got=f"one made before {input_} was run again",
                    fix=f"Add {name} to --config.stages: it says what to do.",
                )
            todo.append(input_)


def verify(workdir: epath.PathLike, spec: Spec) -> tuple[int, list[epath.Path]]:
    """Hashes every file that a stage wrote, and deletes those that it makes again.

    Args:
      workdir: the run's folder.
      spec: of the stage, which may be unfinished.

    Returns:
      the number of files; the paths of other ones that are missing or were changed.
    """
    folder = epath.Path(workdir) / spec.name
    digests, listed = digests_of(folder), {}
    if is_complete(workdir, spec.name):
        listed = _read(folder / _FINISHED)["artifacts"]
    known = {**digests.recorded(), **listed}
    there = {x: known[x] for x in known if x in listed or (folder / x).exists()}
    lost = [x for x in there if not digests.holds(folder / x, there[x], again=True)]
    kept = [
        folder / name
        for name in lost
        if name in listed
        and not artifacts.is_restored(folder, folder / name, spec.restores)
    ]
    again = {folder / name for name in lost} - {*kept}
    artifacts.delete_damaged(sorted(path for path in again if path.exists()))
    return len(there), kept


def _damaged_input(path: epath.Path, stage: str, reader: str) -> UserError:
    there = path.exists()
    again = f"add {stage} to --config.stages: it makes missing files again"
    return UserError(
        str(path),
        wanted=f"the file that the stage {stage} wrote, for the stage {reader}",
        got="one that was changed since" if there else "no such file",
        fix=f"Restore it, or {way_out(stage) if there else again}.",
    )


@dataclasses.dataclass(frozen=True)
class Input:
    """What a stage knows of another one that it reads.

    Attributes:
      identity: hash of its manifest; None: not known before it has run again, and so
        taken for the one that the reader knows.
      earlier: the hashes that it had before it grew (rule 8).
    """

    identity: str | None
    earlier: Sequence[str] = ()

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Input":
        return cls(_identity(manifest), manifest.get("grew_from", []))


@dataclasses.dataclass(frozen=True)
class Found:
    """The record of a stage, compared with what the stage depends on now.

    Attributes:
      name: of the stage.
      path: the record: a manifest, or the `started.json` of an unfinished stage; None:
        there is none.
      record: its content.
      changed: a line for each setting and input with which rule 3 or 5 applies.
      growth: a line for each with which rule 8 applies.
      deleted: the user's files that are no longer there, which it was made from.
    """

    name: str
    path: epath.Path | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    changed: Sequence[str] = ()
    growth: Sequence[str] = ()
    deleted: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        return self.path is not None and self.path.name == _FINISHED

    @property
    def grows(self) -> bool:
        """Whether rule 8 applies, now or since the stage was last finished."""
        return bool(self.growth or self.record.get("earlier"))

    def as_input(self) -> Input:
        """What stages that read this one will know of it once it is up to date."""
        earlier = self.record.get("grew_from", [])
        if self.finished and not self.growth:
            return Input(_identity(self.record), earlier)
        if self.finished:
            return Input(_GROWN, [*earlier, _identity(self.record)])
        return Input(_GROWN if self.grows else None, earlier)

    def lost(self, restores: Sequence[str]) -> list[str]:
        """Files of a finished stage that rule 6 would write again.

        Args:
          restores: those of its spec.

        Raises:
          UserError: rule 7 applies.
        """
        folder = self.path.parent
        digests = digests_of(folder, read_only=True)
        lost = _lost(digests, folder, self.record, restores)
        return [str(path.relative_to(folder)) for path in lost]

    def error(self) -> UserError:
        """The error of rule 3 or 5."""
        workdir = shell_word(str(self.path.parent.parent))
        return UserError(
            str(self.path),
            wanted="the settings of this run",
            got=f"a stage made with others ({'; '.join(self.changed)})",
            fix=f"Undo these changes; or {way_out(self.name)}; or choose a new "
            f"--workdir and add --from={workdir}, which takes over all other stages.",
        )


def compare(workdir: epath.PathLike, spec: Spec, inputs: Mapping[str, Input]) -> Found:
    """Compares a stage on disk with its spec and its inputs; changes nothing.

    Its artifacts are not looked at.

    Args:
      workdir: the run's folder.
      spec: of the stage.
      inputs: name -> what is known of it, or will be, for all of `spec.inputs`.

    Raises:
      UserError: the record is damaged.
    """
    for file in (_FINISHED, _STARTED):
        path = epath.Path(workdir) / spec.name / file
        if not path.exists():
            continue
        record = _read(path)
        settings, deleted = _by_content(spec, record["settings"], file == _FINISHED)
        lines = differences(settings, record["settings"], earlier=spec.earlier)
        larger = [
            f"{name}:"
            for name in spec.grows
            if _is_larger(spec.settings, record["settings"], name)
        ]
        growth = [line for line in lines if line.startswith((*larger,))]
        changed = [line for line in lines if line not in growth]
        changed += [
            remark
            for name, remark in spec.remarks.items()
            if any(line.startswith(f"{name}:") for line in changed)
        ]
        for name in sorted({*inputs, *record["inputs"]}):
            before, now = record["inputs"].get(name), inputs.get(name, Input(""))
            if before is not None and now.identity in (before, None):
                continue
            if name in spec.grows_with and before in now.earlier:
                growth.append(f"stage {name} has grown")
            elif now.identity == _GROWN:
                changed.append(f"stage {name} grows")
            else:
                changed.append(f"stage {name} was run again")
        return Found(spec.name, path, record, changed, growth, deleted)
    return Found(spec.name)


def way_out(*names: str) -> str:
    """How to make stages again, as a clause of an error's `fix`."""
    it = "it" if len(names) == 1 else "them"
    return (
        f"add --redo={','.join(names)} to make {it} and what depends on {it} again "
        "(the old files are moved aside)"
    )


def recorded_inputs(workdir: epath.PathLike, name: str) -> set[str]:
    """Names of the stages that a stage read; empty without a record of it."""
    return {*recorded(workdir, name).get("inputs", ())}


def recorded(workdir: epath.PathLike, name: str) -> dict[str, Any]:
    """The record of a stage, finished or not; {} without one that can be read."""
    for file in (_FINISHED, _STARTED):
        with contextlib.suppress(OSError, UserError):
            return _read(epath.Path(workdir) / name / file)
    return {}


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


def differences(
    new: Any, old: Any, prefix: str = "", *, earlier: Mapping[str, Any] | None = None
) -> list[str]:
    """One line `field: old -> new` for each leaf in which two nested dicts differ.

    A config field that the old dict lacks, since it is newer, had its value in
    `earlier`, or else its default.
    """
    if not (isinstance(new, dict) and isinstance(old, dict)):
        return [] if new == old else [f"{prefix}: {old!r} -> {new!r}"]
    known, lines = earlier or {}, []
    for key in sorted({*new, *old}):
        inner = f"{prefix}.{key}" if prefix else key
        before = old[key] if key in old else known.get(inner, _default(inner))
        lines += differences(new.get(key, _NONE), before, inner, earlier=known)
    return lines


def _known_to(record: Any, settings: Any) -> Any:
    """Settings without the fields that a record does not have."""
    if not (isinstance(record, dict) and isinstance(settings, dict)):
        return settings
    return {k: _known_to(record[k], v) for k, v in settings.items() if k in record}


def _by_content(
    spec: Spec, recorded: dict[str, Any], finished: bool
) -> tuple[dict[str, Any], list[str]]:
    """The settings with the recorded names of the user's files that are the same.

    Returns:
      these settings; the files that are no longer there, which count as the same.
    """
    settings, deleted = _as_on_disk(spec.settings), []
    for path, digest in spec.named_files.items():
        new, old = (
            [_get(s, name) for name in (path, digest)] for s in (settings, recorded)
        )
        if not old[1]:
            continue
        gone = finished and new[0] == old[0] and new[1] == ""
        deleted += [old[0]] if gone else []
        if gone or new[1] == old[1]:
            _set(settings, path, old[0])
            _set(settings, digest, old[1])
    return settings, deleted


def _get(settings: Any, name: str) -> Any:
    """A setting by its dotted name; None where there is none."""
    for key in name.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    *above, last = name.split(".")
    for key in above:
        settings = settings[key]
    settings[last] = value


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


def _is_larger(new: dict, old: dict, field: str) -> bool:
    now, before = _get(new, field), _get(old, field)
    return type(now) is type(before) and isinstance(now, int) and now > before


def read_input(workdir: epath.Path, name: str, reader: str) -> dict:
    """The manifest of stage `name`, which stage `reader` reads.

    Raises:
      UserError: the stage is not finished, or its manifest is damaged.
    """
    path = workdir / name / _FINISHED
    if not path.exists():
        fix = f"Add {name} to --config.stages or run it first."
        raise missing_input(workdir, name, reader, "none", fix)
    return _read(path)


def missing_input(
    workdir: epath.Path, name: str, reader: str, got: str, fix: str
) -> UserError:
    """The error where stage `reader` cannot read stage `name`."""
    return UserError(
        f"stage {reader}",
        wanted=f"the finished stage {name} in {workdir}",
        got=got,
        fix=fix,
    )


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every leaf of nested dicts."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _as_on_disk(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples become lists


def _identity(manifest: dict) -> str:
    """Hash by which later stages recognise this one as their input."""
    # Without versions: equal artifacts are equal inputs, whichever version made them.
    return hash_of([manifest[key] for key in ("settings", "inputs", "artifacts")])


def _read(path: epath.Path) -> dict:
    try:
        record = files.read_json(path)
        if not isinstance(record, dict) or not _ENTRIES[path.name] <= record.keys():
            raise ValueError("some entries are missing")
        return record
    except ValueError as error:
        raise UserError(
            str(path),
            wanted="the JSON that this stage wrote",
            got=f"a damaged file ({error})",
            fix=f"Restore it, or {way_out(path.parent.name)}.",
        ) from error


def hash_of(value: Any) -> str:
    """Sixteen hex digits of a hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _require_artifacts(stage: Stage, manifest: dict, restores: Sequence[str]) -> bool:
    """Whether all artifacts are there (rule 6); raises if one was changed (rule 7).

    Those that the stage makes again when they were damaged are deleted if they were.
    """
    lost = _lost(stage.digests, stage.folder, manifest, restores)
    artifacts.delete_damaged([path for path in lost if path.exists()])
    return not lost


def _lost(
    digests: Digests, folder: epath.Path, manifest: dict, restores: Sequence[str]
) -> list[epath.Path]:
    """Paths of the artifacts that rule 6 makes again; raises if rule 7 applies."""
    lost = artifacts.lost(digests, folder, manifest["artifacts"])
    for path in lost:
        if path.exists() and not artifacts.is_restored(folder, path, restores):
            raise UserError(
                str(path),
                wanted="the file that this stage wrote",
                got="one that was changed since",
                fix=f"Restore it, or {way_out(folder.name)}. If you meant the change, "
                "copy the file first: captions can be passed as config.caption.file, "
                "recipes as config.mix.file.",
            )
    return lost
