"""What every selected stage would do, given what the ones before it would do.

Nothing is written: a run that a later stage would refuse does not start.
"""

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from typing import Literal

from etils import epath
from ml_collections import ConfigDict

from mvc_jax import pipeline, stage
from mvc_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Step:
    """What one stage would do.

    Attributes:
      name: of the stage.
      state: done: nothing; resume: finish what is there; grow: add to what is there;
        run: start from nothing; refused: raise an error.
      reason: why, in words; "" where the state says it all.
      error: why it is refused; None also where another refused stage is the reason.
      taken_over: whether its files are taken over from another workdir first.
      also: stages that are not selected and would have to be; of a refused one.
    """

    name: str
    state: Literal["done", "resume", "grow", "run", "refused"]
    reason: str = ""
    error: UserError | None = None
    taken_over: bool = False
    also: tuple[str, ...] = ()


def make(
    stages: Sequence[str],
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    redo: Collection[str] = (),
    source: epath.PathLike | None = None,
) -> list[Step]:
    """Plans a run; changes nothing.

    Args:
      stages: the selected ones.
      config: of the run.
      workdir: of the run; it need not exist.
      redo: stages that are moved aside first: with each, all that depend on it.
      source: another workdir, from which finished stages that agree are taken over.

    Returns:
      a step for each selected stage, in the pipeline's order, and for each stage that
      is taken over because a selected one reads it. A preview ends with `generate`.
    """
    planner = _Planner(config, epath.Path(workdir), redo, source)
    selected, steps = [*stages], planner.steps(stages)
    if not any(step.also for step in steps):
        return steps
    while more := {name for step in steps for name in step.also}:
        selected = pipeline.in_order([*selected, *more])
        steps = planner.steps(selected)
    planner.fix = f"Use --config.stages={','.join(selected)}"
    if refused := [step.name for step in steps if step.error]:
        planner.fix += f", and {stage.way_out(*refused)}"
    return planner.steps(stages)


def require_possible(steps: Sequence[Step], workdir: epath.PathLike) -> None:
    """Raises the `UserError` of a plan in which a stage is refused.

    Its message has what makes the whole run possible, not only the first such stage.
    """
    refused = [step for step in steps if step.error]
    if first := next((step for step in refused if step.also), None):
        raise first.error
    if len(refused) == 1:
        raise refused[0].error
    if refused:
        reasons = "; ".join(f"{step.name}: {step.reason}" for step in refused)
        raise UserError(
            f"--workdir={workdir}",
            wanted="stages that agree with this run",
            got=f"others ({reasons})",
            fix=f"Undo these changes; or {stage.way_out(*[s.name for s in refused])}; "
            "or choose a new --workdir and add "
            f"--from={shlex.quote(str(workdir))}, which takes over all other stages.",
        )


class _Planner:
    """Goes through the stages in order; knows what each will be to its readers."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        redo: Collection[str],
        source: epath.PathLike | None,
    ):
        self._config, self._workdir, self._redo = config, workdir, redo
        self._source = None if source is None else epath.Path(source)
        self.fix = ""  # of what stages lack that are not selected

    def steps(self, stages: Sequence[str]) -> list[Step]:
        self._known: dict[str, stage.Input] = {}  # stages that exist then
        self._wrong: dict[str, str] = {}  # stages that cannot be read -> why
        self._unselected: set[str] = set()
        self._not_taken: dict[str, str] = {}  # from the source -> why
        steps = []
        for name in pipeline.needed(stages, self._config):
            spec = pipeline.module(name).stage_spec(self._config)
            if name not in stages:
                step = self._look_at(spec)
            else:
                step = self._blocked(spec) or self._step(spec)
            if step and step.state == "refused":
                self._wrong[name] = step.reason
            if step and (name in stages or step.taken_over):
                steps.append(step)
            if name == "generate" and name in stages and self._config.generate.limit:
                break
        return steps

    def _look_at(self, spec: stage.Spec) -> Step | None:
        """A stage that is not selected: it must not differ where it exists."""
        self._unselected.add(spec.name)
        inputs = {n: self._known.get(n, stage.Input(None)) for n in spec.inputs}
        try:
            found = self._find(spec, inputs)
        except UserError as error:
            return Step(spec.name, "refused", str(error))
        if not found.finished:
            return None
        wrong = [self._wrong[name] for name in spec.inputs if name in self._wrong]
        if lines := wrong or [*found.changed, *found.growth]:
            return Step(spec.name, "refused", "; ".join(lines))
        self._known[spec.name] = found.as_input()
        return Step(spec.name, "done", taken_over=self._is_taken_over(found))

    def _blocked(self, spec: stage.Spec) -> Step | None:
        """The step of a stage that one of its inputs keeps from running."""
        for name in spec.inputs:
            if name in self._known:
                continue
            if name not in self._unselected:
                return Step(spec.name, "refused", f"needs the stage {name}")
            if name in self._wrong:
                reason = self._wrong[name]
                error = UserError(
                    f"stage {spec.name}",
                    wanted=f"a stage {name} that agrees with this run",
                    got=f"one that does not ({reason})",
                    fix=f"Undo these changes, or: {self.fix}.",
                )
            else:
                reason = f"needs the stage {name}"
                error = stage.missing_input(
                    self._workdir, name, spec.name, f"{self.fix}."
                )
            return Step(spec.name, "refused", reason, error, also=(name,))
        return None

    def _step(self, spec: stage.Spec) -> Step:
        """The step of a stage whose inputs will be there."""
        name = spec.name
        if name == "generate" and self._config.generate.limit:
            return Step(name, "run", "a contact sheet only")
        if name in self._redo:
            self._known[name] = stage.Input(None)
            return Step(name, "run", "the old one is moved aside")
        try:
            found = self._find(spec, {n: self._known[n] for n in spec.inputs})
            if found.changed:
                reason = "; ".join(found.changed)
                return Step(name, "refused", reason, found.error())
            missing = found.missing() if found.finished else []
        except UserError as error:
            return Step(name, "refused", str(error), error)
        self._known[name] = found.as_input()
        if found.path is None:
            return Step(name, "run", self._not_taken.get(name, ""))
        taken = self._is_taken_over(found)
        if found.grows:
            return Step(name, "grow", "; ".join(found.growth), taken_over=taken)
        if not found.finished:
            return Step(name, "resume", "it is unfinished")
        if missing:
            return Step(name, "resume", f"missing: {', '.join(missing)}")
        return Step(name, "done", taken_over=taken)

    def _find(self, spec: stage.Spec, inputs: dict[str, stage.Input]) -> stage.Found:
        """The stage in the workdir; where there is none, the source's if it agrees.

        Raises:
          UserError: the record in the workdir is damaged.
        """
        found = stage.compare(self._workdir, spec, inputs)
        if found.path or not self._source or spec.name in self._redo:
            return found
        folder = self._workdir / spec.name
        if folder.exists() and [*folder.iterdir()]:
            self._not_taken[spec.name] = f"not taken over: {folder} is not empty"
            return found
        try:
            other = stage.compare(self._source, spec, inputs)
            if not other.finished:
                return found
            wrong = [*other.changed] or [f"no {name}" for name in other.missing()]
        except UserError as error:
            wrong = [str(error)]
        if wrong:
            self._not_taken[spec.name] = f"not taken over: {'; '.join(wrong)}"
        return found if wrong else other

    def _is_taken_over(self, found: stage.Found) -> bool:
        return bool(found.path) and found.path.parent.parent == self._source
