"""What every selected stage would do, given what the ones before it would do.

Nothing is written: a run that a later stage would refuse does not start.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

from etils import epath
from ml_collections import ConfigDict

from mvc_jax import stage
from mvc_jax.command import pipeline, run_config
from mvc_jax.errors import UserError, shell_word


@dataclasses.dataclass(frozen=True)
class Step:
    """What one stage would do.

    Attributes:
      name: of the stage.
      state: done: nothing; resume: finish what is there; grow: add to what is there;
        run: start from nothing; refused: raise an error.
      reason: why, in words; "" where the state says it all.
      error: why it is refused; None also where another refused stage is the reason.
      source: the other workdir from which its files are taken over first; None: none.
      also: of a refused stage, the one that would have to be selected, too.
    """

    name: str
    state: Literal["done", "resume", "grow", "run", "refused"]
    reason: str = ""
    error: UserError | None = None
    source: epath.Path | None = None
    also: tuple[str, ...] = ()


def make(
    stages: Sequence[str],
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    redo: Collection[str] = (),
    sources: Sequence[epath.Path] = (),
) -> list[Step]:
    """Plans a run; changes nothing.

    Args:
      stages: the selected ones.
      config: of the run.
      workdir: of the run; it need not exist.
      redo: stages that are moved aside first: with each, all that depend on it.
      sources: other workdirs: a finished stage that agrees is taken over from the first
        that has one.

    Returns:
      a step for each selected stage, in the pipeline's order, and for each stage that
      is taken over because a selected one reads it. A preview ends with `generate`.
    """
    planner = _Planner(config, epath.Path(workdir), redo, sources)
    steps = planner.steps(stages)
    refused = [step for step in steps if step.error]
    if not refused:
        return steps
    selected, again = planner.way_to(stages)
    stays = [*stages] == selected
    planner.fix = stage.way_out(*again) if stays else _flags(selected, again)
    if any(step.also for step in refused):
        return planner.steps(stages)
    if stays and len(refused) == len(again) == 1:
        return steps  # the stage's own message has all that it takes
    error = UserError(
        f"--workdir={workdir}",
        wanted="stages that agree with this run",
        got=f"others ({'; '.join(f'{x.name}: {x.reason}' for x in refused)})",
        fix=f"Undo these changes; or {planner.fix}; or choose a new --workdir and add "
        f"--from={shell_word(str(workdir))}, which takes over all other stages.",
    )
    return [dataclasses.replace(x, error=error) if x.error else x for x in steps]


def require_possible(steps: Sequence[Step]) -> None:
    """Raises the `UserError` of a plan in which a stage is refused.

    Its message has what makes the whole run possible, not only the first such stage.
    """
    refused = [step for step in steps if step.error]
    if refused:
        raise next((step for step in refused if step.also), refused[0]).error


def behind(
    names: Sequence[str], config: ConfigDict, workdir: epath.PathLike
) -> tuple[dict[str, str], str]:
    """Which finished stages are not what a run with this config would end with.

    Returns:
      (name -> why, of those that are behind; how to bring them up to date).
    """
    planner = _Planner(config, epath.Path(workdir), (), ())
    wrong = planner.wrong(names)
    return wrong, _flags(*planner.way_to([*wrong])) if wrong else ""


def _flags(selected: Sequence[str], redo: Sequence[str]) -> str:
    """The flags that select stages and make some of them again, in words."""
    fix = f"use --config.stages={','.join(selected)}"
    return f"{fix} and {stage.way_out(*redo)}" if redo else fix


class _Planner:
    """Goes through the stages in order; knows what each will be to its readers."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        redo: Collection[str],
        sources: Sequence[epath.Path],
    ):
        self._config, self._workdir, self._redo = config, workdir, redo
        self._sources = sources
        self._before = run_config.read(workdir)
        self._damaged: dict[str, str] = {}  # stages -> what is wrong with their files
        self.fix = ""  # for what the selected stages lack

    def steps(self, stages: Sequence[str]) -> list[Step]:
        """The steps of `make`."""
        self._start(stages)
        steps = []
        for name in pipeline.needed(stages, self._config):
            selected = name in stages
            step = self._select(name) if selected else self._look_at(name)
            if step and (selected or step.source):
                steps.append(step)
            if selected and name == "generate" and self._config.generate.limit:
                break
        return steps

    def way_to(self, stages: Sequence[str]) -> tuple[list[str], list[str]]:
        """The stages to select and those to redo, so that no stage is refused."""
        selected, redo, before = [*stages], [], self._redo
        while True:
            hanging = pipeline.dependents(redo, self._config, self._workdir)
            self._redo = {*before, *hanging}
            steps = self.steps(selected)
            if not any(step.error for step in steps):
                break
            lacking = [name for step in steps for name in step.also]
            selected = pipeline.in_order([*selected, *lacking])
            redo += [step.name for step in steps if step.error and not step.also]
        self._redo = before
        return selected, redo

    def wrong(self, names: Sequence[str]) -> dict[str, str]:
        """Name -> why, of these stages that are behind or have a damaged artifact."""
        self._start(())
        for name in pipeline.needed(names, self._config):
            self._look_at(name, with_files=name in names)
        return {name: self._wrong[name] for name in names if name in self._wrong}

    def _start(self, stages: Sequence[str]) -> None:
        self._selected = {*stages}
        self._known: dict[str, stage.Input] = {}  # stages that can be read then
        self._wrong: dict[str, str] = {}  # stages that are there, but cannot -> why
        self._refused: set[str] = set()  # selected ones
        self._running: set[str] = set()  # selected ones that may end with other files
        self._found: dict[str, stage.Found] = {}  # finished ones, not selected
        self._not_taken: dict[str, str] = {}  # from the source -> why

    def _spec(self, name: str) -> stage.Spec:
        return pipeline.module(name).stage_spec(self._config)

    def _look_at(self, name: str, *, with_files: bool = False) -> Step | None:
        """Looks at a stage that is not selected: it is read as it is.

        Returns:
          a step without work; None where it is not there, or cannot be read.
        """
        spec = self._spec(name)
        if name in self._redo:
            return None
        inputs = {n: self._known.get(n, stage.Input(None)) for n in spec.inputs}
        try:
            found = self._find(spec, inputs)
            if found.path is None:
                return None
            lines = [*found.changed, *found.growth]
            if not found.finished:
                lines.append("it is unfinished")
            elif with_files:
                lost = found.lost(spec.restores)
                lines += [f"{file} is missing or damaged" for file in lost]
        except UserError as error:
            lines = [str(error)]
        others = [self._wrong[n] for n in spec.inputs if n in self._wrong]
        if lines or others:
            own = f"stage {name} is behind ({'; '.join(lines)})"
            self._wrong[name] = others[0] if others else own
            return None
        self._known[name], self._found[name] = found.as_input(), found
        return Step(name, "done", source=self._source_of(found))

    def _select(self, name: str) -> Step:
        """The step of a selected stage."""
        spec = self._spec(name)
        step = self._blocked(spec) or self._step(spec)
        if step.state not in ("done", "refused"):
            step = self._lacking(name) or step
        if step.state == "refused":
            self._refused.add(name)
        return step

    def _blocked(self, spec: stage.Spec) -> Step | None:
        """The step of a stage that one of its inputs keeps from running."""
        for name in spec.inputs:
            if name in self._known:
                continue
            if name in self._refused:
                return Step(spec.name, "refused", f"needs the stage {name}")
            return self._needs(name, spec.name, self._wrong.get(name, "none"))
        return None

    def _lacking(self, name: str) -> Step | None:
        """The step of a stage with work, all of whose inputs are read (rule 9)."""
        for input_ in pipeline.needed([name], self._config)[:-1]:
            if input_ in self._selected:
                continue
            if got := self._wrong.get(input_) or self._damage(input_):
                return self._needs(input_, name, got)
        return None

    def _damage(self, name: str) -> str:
        """What is wrong with the files of a stage that is not selected; "": nothing."""
        if name not in self._found:
            return "none"
        if name not in self._damaged:
            try:
                lost = self._found[name].lost(self._spec(name).restores)
                why = f"one without {', '.join(lost)}" if lost else ""
            except UserError as error:
                why = str(error)
            self._damaged[name] = why
        return self._damaged[name]

    def _needs(self, name: str, reader: str, got: str) -> Step:
        """The step of a stage that needs another one, which is not selected."""
        fix = f"To run it, {self.fix}."
        error = stage.missing_input(self._workdir, name, reader, got, fix)
        return Step(reader, "refused", f"needs the stage {name}", error, also=(name,))

    def _step(self, spec: stage.Spec) -> Step:
        """The step of a stage whose inputs will be there."""
        name = spec.name
        if name == "generate" and self._config.generate.limit:
            return Step(name, "run", "a contact sheet only")
        if name in self._redo:
            self._known[name] = stage.Input(None)
            return Step(name, "run", "what is there is moved aside")
        try:
            found = self._find(spec, {n: self._known[n] for n in spec.inputs})
            if found.changed:
                reason = "; ".join(found.changed)
                return Step(name, "refused", reason, found.error())
            lost = found.lost(spec.restores) if found.finished else []
        except UserError as error:
            return Step(name, "refused", str(error), error)
        self._known[name] = found.as_input()
        if self._known[name].identity is None:
            self._running.add(name)
        if found.path is None:
            if self._differs_from_before(spec):
                self._known[name] = stage.Input("")
            return Step(name, "run", self._not_taken.get(name, ""))
        source = self._source_of(found)
        if found.grows:
            return Step(name, "grow", "; ".join(found.growth), source=source)
        if not found.finished:
            return Step(name, "resume", "it is unfinished")
        if lost:
            return Step(name, "resume", f"missing or damaged: {', '.join(lost)}")
        return Step(name, "done", source=source)

    def _find(self, spec: stage.Spec, inputs: dict[str, stage.Input]) -> stage.Found:
        """The stage in the workdir; where there is none, that of a source if it agrees.

        Raises:
          UserError: the record in the workdir is damaged.
        """
        found = stage.compare(self._workdir, spec, inputs)
        if found.path or not self._sources or spec.name in self._redo:
            return found
        if self._running & {*spec.inputs}:  # what they end with is not known
            return found
        folder = self._workdir / spec.name
        if folder.exists() and [*folder.iterdir()]:
            self._not_taken[spec.name] = f"not taken over: {folder} is not empty"
            return found
        for source in self._sources:
            other, wrong = self._agrees(source, spec, inputs)
            if other:
                self._not_taken.pop(spec.name, None)
                return other
            if wrong:
                reason = f"not taken over: {'; '.join(wrong)}"
                self._not_taken.setdefault(spec.name, reason)
        return found

    def _agrees(
        self, source: epath.Path, spec: stage.Spec, inputs: dict[str, stage.Input]
    ) -> tuple[stage.Found | None, list[str]]:
        """The stage of another workdir if it can be taken over, else why it cannot."""
        try:
            other = stage.compare(source, spec, inputs)
            if not other.finished:
                return None, []
            lost = other.lost(spec.restores)
        except UserError as error:
            return None, [str(error)]
        lines = [f"{name} is missing or damaged" for name in lost]
        wrong = [*other.changed] or lines
        return None if wrong else other, wrong

    def _source_of(self, found: stage.Found) -> epath.Path | None:
        folder = None if found.path is None else found.path.parent.parent
        return folder if folder in self._sources else None

    def _differs_from_before(self, spec: stage.Spec) -> bool:
        """Whether a stage that is no longer there had other settings."""
        if self._before is None:
            return False
        before = pipeline.module(spec.name).stage_spec(self._before)
        return before.settings != spec.settings
