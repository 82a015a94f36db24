"""`mvc-jax sweep`: a run for each value of a field, and what the value changes.

A point of the sweep is an ordinary workdir. It takes over every stage that another one
has finished with the same settings and inputs, and of other stages the parts that the
value does not change (`take_over.py`), so that only what differs is made again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax.command import (
    command_line,
    plan,
    price,
    run_config,
    run_folder,
    vary,
)
from mvc_jax.errors import UserError

with epy.lazy_imports():
    from mvc_jax.command import sweep_report

HELP = """A run for each value of a field, each in a folder of its own, compared:
    mvc-jax sweep --vary mix.tokens=1,2,4,7 --config=configs/digits.py \\
      --workdir=runs/tokens
makes runs/tokens/mix.tokens=1 and so on, and writes runs/tokens/sweep.html (.md,
.json, .png): accuracies with intervals, and paired differences.

  --vary FIELD=V1,V2,...   a field and its values, as --config.FIELD=VALUE takes them;
                           several --vary make a grid. Where there are semicolons, they
                           separate the values; those of a list always need them:
                           --vary 'mix.modes=coarse;fine;coarse,fine'
  --workdir=FOLDER         of the sweep
  --from=WORKDIR           starts from the config of a run, and takes over its stages
  --dry_run                prints what each point would take over and make

The other flags are those of a single run (`mvc-jax --help`), for all points. Stages
that are the same for several points are made once, as are synthetic sets and
classifiers that a value does not change. What was stopped is resumed, and a value is
added, by the same command. `mvc-jax repeat` varies the seed.
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a single run is: functions of `train`.

    Attributes:
      planned: (config, workdir, redo=, sources=) -> the config as it would be used, and
        its plan; raises `UserError`.
      run: (config, workdir, redo=, sources=, verify=, announce=) makes it.
    """

    planned: Callable[..., tuple[ConfigDict, list[plan.Step]]]
    run: Callable[..., None]


def run(argv: Sequence[str], program: Program) -> epath.Path:
    """Runs the program once for each point, then compares them.

    Args:
      argv: the name of the program, "sweep", and its flags.
      program: what a single run is.

    Returns:
      the folder of the sweep.

    Raises:
      UserError: a flag or a value is wrong, or the field changes nothing; or a point is
        refused, which may be known only when its inputs are made: then the others are
        made and compared first.
    """
    texts, flags = _take_vary(argv[2:])
    command = command_line.parse([argv[0], *flags], about=HELP)
    axes = [vary.parse(text) for text in texts]
    if not axes:
        raise UserError(
            "--vary",
            wanted="a field and its values",
            got="none",
            fix="Add e.g. --vary mix.tokens=1,2,4,8; `mvc-jax sweep --help` says more.",
        )
    points = vary.points(axes, command.config)
    sweep = _Sweep(points, command, program)
    prices = sweep.prices()
    if command.dry_run:
        print(sweep.table(prices))
        return command.workdir
    everything = [each for mine in prices.values() for each in mine]
    price.require_room(everything, command.workdir)
    run_folder.check(command.workdir, command.config.min_free_disk_gib)
    with run_folder.locked(command.workdir):
        run_config.write(command.config, command.workdir)
        if any(each.work for each in everything):
            logging.info("%d points: %s", len(points), sweep.line(prices))
        refused = sweep.run()
        axes, points = vary.without(axes, points, refused)
        if all(len(axis.values) > 1 for axis in axes):
            sweep_report.write(axes, points, command.config, command.workdir)
    if refused:
        _refuse(refused)
    return command.workdir


def _take_vary(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes every --vary out of the flags, with or without an equals sign."""
    texts, rest, words = [], [], iter(flags)
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == "vary":
            texts.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return texts, rest


class _Sweep:
    """Plans and makes the points, in an order in which they can share most."""

    def __init__(
        self,
        points: Sequence[vary.Point],
        command: command_line.Command,
        program: Program,
    ):
        self._command, self._program = command, program
        # What grows, as images per real one, is taken over from a smaller one.
        self._points = sorted(points, key=_growth)
        self._folders = {each.name: command.workdir / each.name for each in points}

    def prices(self) -> dict[str, list[price.Price]]:
        """What each point takes; a stage that two points share counts once.

        Raises:
          UserError: points are refused; its details are those of each.
        """
        found: dict[str, list[price.Price]] = {}
        made: dict[tuple[str, str], epath.Path] = {}
        errors: dict[str, UserError] = {}
        for point in self._points:
            folder = self._folders[point.name]
            try:
                config, steps = self._program.planned(
                    point.config,
                    folder,
                    redo=self._command.redo,
                    sources=self._sources(point),
                )
                plan.require_possible(steps)
            except UserError as error:
                errors[point.name] = error
                continue
            hashes = vary.chain(config)
            shared = [
                _shared(step, made.get((step.name, hashes[step.name])))
                for step in steps
            ]
            for step in steps:
                made.setdefault((step.name, hashes[step.name]), folder)
            found[point.name] = price.make(shared, config, folder)
        if errors:
            _refuse(errors)
        return found

    def run(self) -> dict[str, UserError]:
        """Makes every point; those that are finished have nothing to do.

        Returns:
          the errors of points that were refused, by name.
        """
        refused = {}
        for number, point in enumerate(self._points, start=1):
            count = f"{number} of {len(self._points)}"
            announce = functools.partial(self._announce, f"{point.name} ({count})")
            try:
                self._program.run(
                    point.config,
                    self._folders[point.name],
                    redo=self._command.redo,
                    sources=self._sources(point),
                    verify=self._command.verify,
                    announce=announce,
                )
            except UserError as error:
                logging.warning("%s: %s", point.name, error)
                refused[point.name] = error
        return refused

    def _announce(self, name: str, steps: Sequence[plan.Step]) -> None:
        logging.info("%s: %s", name, self._in_words(steps))

    def line(self, prices: dict[str, list[price.Price]]) -> str:
        """What the whole sweep takes, in one line."""
        everything = [each for mine in prices.values() for each in mine]
        return price.line(everything, self._command.workdir)

    def table(self, prices: dict[str, list[price.Price]]) -> str:
        """What each point takes over and makes, and the whole sweep."""
        lines = []
        for name, mine in prices.items():
            lines.append(f"{name}: {self._in_words([each.step for each in mine])}")
            if any(each.work for each in mine):
                lines.append(f"  {price.line(mine, self._folders[name])}")
        lines += ["", f"all {len(prices)} points: {self.line(prices)}"]
        if any(each.step.source for mine in prices.values() for each in mine):
            lines.append(
                "at most: sets and classifiers that a value does not change are taken "
                "over, too"
            )
        return "\n".join(lines)

    def _sources(self, point: vary.Point) -> list[epath.Path]:
        """Workdirs that a point may take stages over from."""
        own, first = self._folders[point.name], self._command.source
        known = [self._folders[each.name] for each in self._points]
        others = run_folder.workdirs(self._command.workdir)
        there = [x for x in dict.fromkeys([*known, *others]) if x != own and x.is_dir()]
        return there if first is None else [first, *there]

    def _in_words(self, steps: Sequence[plan.Step]) -> str:
        """What is taken over from where, and what is made."""
        todo = [step.name for step in steps if step.state != "done"]
        said = []
        sources = dict.fromkeys(step.source for step in steps if step.source)
        for source in sources:
            names = [step.name for step in steps if step.source == source]
            inside = source.parent == self._command.workdir
            place = source.name if inside else source
            said.append(f"{', '.join(names)} from {place}")
        said.append(f"makes {', '.join(todo)}" if todo else "nothing to make")
        return "; ".join(said)


def _shared(step: plan.Step, folder: epath.Path | None) -> plan.Step:
    """A step whose files another point will have made by then."""
    if step.state != "run" or folder is None:
        return step
    return dataclasses.replace(step, state="done", source=folder)


def _growth(point: vary.Point) -> tuple[Any, ...]:
    """Sort key of points: by numbers, which may grow; others keep their order."""
    numbers = (int, float)
    return tuple(v for v in point.values.values() if type(v) in numbers)


def _refuse(errors: dict[str, UserError]) -> None:
    """Raises the first error; its details name all points that are refused."""
    first, *others = errors.items()
    error = first[1]
    lines = [f"{name}: {each}" for name, each in others if str(each) != str(error)]
    same = [name for name, each in errors.items() if str(each) == str(error)]
    error.details = (*error.details, f"so at {', '.join(same)}", *lines)
    raise error
