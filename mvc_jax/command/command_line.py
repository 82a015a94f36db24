"""The command line: flags in, a command out; every mistake is one sentence."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import __version__, stage
from mvc_jax.command import run_config
from mvc_jax.configs import common, fields
from mvc_jax.errors import UserError

_REPORT_HELP = """The report of a run whose other stages are finished, made again:
    mvc-jax report --workdir=runs/digits --config.report.title="Digits, 50 a class"
The report before moves to FOLDER/earlier.

  --workdir=FOLDER               of the run
  --config.report.FIELD=VALUE    sets a field of the report
  --dry_run                      prints what would be done, and changes nothing

Fields:"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
      config: with its overrides.
      workdir: the folder of the run's files.
      redo: names of the stages to make again, or `all`.
      source: another workdir, from which finished stages are taken over; None: none.
      dry_run: whether only to print what would be done.
      verify: whether every file of the workdir is hashed first.
    """

    config: ConfigDict
    workdir: epath.Path
    redo: tuple[str, ...] = ()
    source: epath.Path | None = None
    dry_run: bool = False
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process is among those of a run.

    Attributes:
      coordinator: `HOST:PORT` of process 0.
      count: of the processes.
      number: of this one.
    """

    coordinator: str
    count: int
    number: int


def take_place(argv: list[str]) -> tuple[list[str], Place | None]:
    """Takes --coordinator, --num_processes and --process_id out of a command line.

    Returns:
      the other words; what they say, or None without them.

    Raises:
      UserError: one is wrong, or some are missing.
    """
    names = ("coordinator", "num_processes", "process_id")
    rest, found = argv[:1], {}
    words = iter(argv[1:])
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in names:
            found[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if not found:
        return rest, None
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"--{missing[0]}",
            wanted="--coordinator=HOST:PORT, --num_processes=N and --process_id=I",
            got="not all of them",
            fix="Add it; without all three, TPU pods, SLURM, Kubernetes and MPI are "
            "found by themselves.",
        )
    host, _, port = found["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            "--coordinator",
            wanted="HOST:PORT of process 0, as all processes reach it",
            got=repr(found["coordinator"]),
            fix="Write e.g. --coordinator=10.0.0.2:8476.",
        )
    count = _number("num_processes", found, 1, None)
    number = _number("process_id", found, 0, count - 1)
    return rest, Place(found["coordinator"], count, number)


def _number(name: str, found: dict[str, str], low: int, high: int | None) -> int:
    text = found[name]
    if text.isdecimal() and low <= int(text) and (high is None or int(text) <= high):
        return int(text)
    most = f" to {high}" if high is not None else " or more"
    raise UserError(
        f"--{name}",
        wanted=f"a whole number, {low}{most}",
        got=repr(text),
        fix="Number the processes from 0 to num_processes - 1.",
    )


def require_command(argv: Sequence[str], known: Sequence[str]) -> None:
    """Checks that the first word is a flag or a command.

    Raises:
      UserError: it is neither.
    """
    name = argv[1] if len(argv) > 1 else known[0]
    if name.startswith("-") or name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    raise UserError(
        "command line",
        wanted=f"flags, or one of {', '.join(known)}",
        got=repr(name),
        fix=f"Write mvc-jax {close[0]}." if close else "`mvc-jax --help` says more.",
    )


def parse(argv: list[str], about: str = "") -> Command:
    """Parses a command line.

    Without --config, the config is that of the other workdir, else that of this one,
    else the default.

    Args:
      argv: the name of the program, then its flags.
      about: the text that --help starts with.

    Raises:
      UserError: the config cannot be read; a flag or field is unknown or mistyped; or
        two flags exclude each other.
      SystemExit: --help or --version was given.
    """
    path, overrides, rest = None, {}, [argv[0]]
    words = iter(argv[1:])
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in ("help", "h"):
            print_help(value, about)
        elif word.startswith("-") and name == "config":
            path = value if equals else next(words, "")
        elif word.startswith("-") and name.removeprefix("no").startswith("config."):
            field, value = _parse_override(word, words)
            overrides[field] = value
        else:
            rest.append(word)
    values = _parse_others(rest)
    workdir = _folder("workdir", values["workdir"].value, "runs/digits")
    source = values["from"].value
    if source is not None:
        source = _folder("from", source, "runs/digits")
        _check_source(source, workdir, has_config=path is not None)
    if path is None:
        kept = run_config.path_in(workdir if source is None else source)
        path = str(kept) if kept.exists() else run_config.DEFAULT
    config = run_config.load(path)
    for name, value in overrides.items():
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    listed = ",".join(values["redo"].value or ())
    redo = tuple(name.strip() for name in listed.split(",") if name.strip())
    dry_run, verify = values["dry_run"].value, values["verify"].value
    if dry_run and verify:
        raise UserError(
            "--dry_run",
            wanted="one without --verify, which deletes damaged files",
            got="both",
            fix="Leave one of them out.",
        )
    return Command(config, workdir, redo, source, dry_run, verify)


def parse_report(argv: list[str]) -> Command:
    """Parses the command line of `mvc-jax report`: the last stage alone, made again.

    Args:
      argv: the name of the program, "report", then flags as `parse` takes them.

    Raises:
      UserError: as `parse`; or the config or other stages are named.
      SystemExit: --help was given.
    """
    if {"--help", "-h"} & {*argv}:
        print(_REPORT_HELP)
        print(fields.help_of(common.FIELDS.find("report"), "report"))
        raise SystemExit(0)
    command = parse([argv[0], *argv[2:]])
    if (command.redo, command.source, command.verify) != ((), None, False):
        raise UserError(
            "report",
            wanted="--workdir, --dry_run and --config.report.FIELD",
            got="--redo, --from or --verify",
            fix="Leave it out; `mvc-jax train` takes it.",
        )
    command.config.stages = "report"
    made = stage.is_complete(command.workdir, "report")
    return dataclasses.replace(command, redo=("report",) if made else ())


def print_help(name: str, about: str) -> NoReturn:
    """Prints the help, or the fields of a section, and exits.

    Raises:
      UserError: there is no such section or field.
      SystemExit: always else.
    """
    if name:
        name = name.removeprefix("config.")
        print(fields.help_of(common.FIELDS.find(name), name))
        raise SystemExit(0)
    own, sections = [], []
    for key, part in common.FIELDS.fields.items():
        if isinstance(part, fields.Section):
            sections.append(f"  {key:<10} {part.help}")
        else:
            own.append(fields.help_of(part, key))
    print(about)
    print("Sections of fields, in detail by --help=SECTION:", *sections, sep="\n")
    print("\nFields of no section:", *own, sep="\n")
    raise SystemExit(0)


def _parse_override(word: str, words: Iterator[str]) -> tuple[str, Any]:
    """Parses `--config.section.field=value` into ("section.field", value).

    Args:
      word: the flag.
      words: those behind it, of which the first may be the value.

    Raises:
      UserError: there is no such field, no value, or one of another type.
    """
    flag, equals, text = word.lstrip("-").partition("=")
    name = flag.removeprefix("no").removeprefix("config.")
    field = common.FIELDS.find(name)
    if isinstance(field, fields.Section):
        raise field.error(f"config.{name}", text or "no field")
    if field.kind is bool and not equals:
        return name, not flag.startswith("no")
    if flag.startswith("no"):
        raise UserError(
            f"--{flag}",
            wanted="a field that is True or False, without a value",
            got=word,
            fix=f"Write --config.{name}={fields.as_flag(field.default)}.",
        )
    if not equals:
        text = next(words, "--")
        if text.startswith("--"):
            raise field.error(f"--{flag}", "no value")
    try:
        return name, field.parse(text)
    except ValueError as error:
        raise field.error(f"config.{name}", repr(text)) from error


def _parse_others(argv: list[str]) -> flags.FlagValues:
    """Parses the flags that are not of the config.

    Raises:
      UserError: a flag is unknown, or a word is none.
      SystemExit: --version was given.
    """
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "the folder of this run's files", **own)
    flags.DEFINE_multi_string("redo", None, "stages to make again", **own)
    flags.DEFINE_string("from", None, "workdir to take stages over from", **own)
    flags.DEFINE_boolean("dry_run", False, "print what would be done", **own)
    flags.DEFINE_boolean("verify", False, "hash every file", **own)
    flags.DEFINE_boolean("version", False, "print the version", **own)
    try:
        positional = values(argv)[1:]
    except flags.Error as error:
        raise UserError(
            "command line",
            wanted="--config=FILE, --workdir=DIR and --config.FIELD=VALUE",
            got=str(error),
            fix="Correct that flag; --help lists all.",
        ) from error
    if values["version"].value:
        print(f"mvc_jax {__version__}")
        raise SystemExit(0)
    if positional:
        raise UserError(
            "command line",
            wanted="only flags",
            got=repr(" ".join(positional)),
            fix="Write --config.field=value, with the equals sign.",
        )
    return values


def _folder(flag: str, value: str | None, example: str) -> epath.Path:
    """The folder that a flag names.

    Raises:
      UserError: it names none.
    """
    if not value:
        raise UserError(
            f"--{flag}",
            wanted="a folder for this run" if flag == "workdir" else "a workdir",
            got="none",
            fix=f"Add e.g. --{flag}={example}; --help lists all commands and flags.",
        )
    try:
        return epath.Path(value).expanduser()
    except (ImportError, KeyError) as error:  # no library for its scheme
        raise UserError(
            f"--{flag}={value}",
            wanted="a path that etils.epath can open",
            got=str(error),
            fix="Install the library of that file system, or use a local folder.",
        ) from error


def _check_source(source: epath.Path, workdir: epath.Path, has_config: bool) -> None:
    """Checks that stages can be taken over from `source`.

    Raises:
      UserError: it is no folder, or the workdir itself, or its config is not known.
    """
    if not source.is_dir():
        got, fix = "no such folder", "Correct the path."
    elif source.resolve() == workdir.resolve():
        got, fix = "the workdir itself", "Leave it out, or choose a new --workdir."
    elif not has_config and not run_config.path_in(source).exists():
        got = "one without config.json"
        fix = f"Add the config that it was made with: --config={run_config.DEFAULT}."
    else:
        return
    raise UserError(f"--from={source}", wanted="another workdir", got=got, fix=fix)
