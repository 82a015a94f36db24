"""Command line: reads flags, checks the config, then runs the stages in order.

The digits, from scratch to a report (configs/*.py has other datasets):
    python -m mvc_jax.train --config=configs/digits.py --workdir=runs/digits
A summary of your own images, in a folder (docs/your-own-images.md has the rest):
    python -m mvc_jax.train --config=configs/folder.py:path=/data/parts \\
      --workdir=runs/parts --config.stages=caption
A preview of 16 synthetic images, and some stages only:
    python -m mvc_jax.train --workdir=runs/digits --config.generate.limit=16
    python -m mvc_jax.train --workdir=runs/digits --config.stages=generate,classify
A run that was stopped is resumed by the same command.

Flags:
  --config=FILE[:ARGUMENT]         a Python file, whose get_config() takes ARGUMENT
  --config.SECTION.FIELD=VALUE     sets one field
  --workdir=FOLDER                 of this run's files
  --help, --help=SECTION           prints this, or every field of a section
  --version                        prints the version

Exit codes:
  0    success
  2    an error, whose message says how to fix it
  75   stopped by SIGTERM: launchers retry on it, and the same command resumes
  130  stopped by Ctrl-C
"""

import contextlib
import fcntl
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import __version__, configs, files
from mvc_jax.configs import common, fields
from mvc_jax.errors import UserError, is_full_disk
from mvc_jax.stage import is_complete, require_made_by
from mvc_jax.training import console, preemption, runtime

with epy.lazy_imports():  # imported at first use: a mistyped flag need not wait for JAX
    from mvc_jax import (
        caption,
        classify,
        encode,
        evaluate,
        finetune,
        generate,
        mix,
        pairs,
        pretrain,
        report,
    )
    from mvc_jax.training import sharding

_MODULES = {  # in the order of the pipeline
    "caption": caption,
    "pretrain": pretrain,
    "encode": encode,
    "pairs": pairs,
    "finetune": finetune,
    "mix": mix,
    "generate": generate,
    "classify": classify,
    "evaluate": evaluate,
    "report": report,
}
STAGES = tuple(_MODULES)
_MESH_STAGES = ("pretrain", "encode", "finetune", "generate", "classify")
_DEFAULT_CONFIG = "configs/digits.py"
_MAX_DETAILS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    console.be_quiet()
    with preemption.handled():
        workdir = None
        try:
            config, workdir = parse_flags(list(sys.argv if argv is None else argv))
            run(config, workdir)
        except UserError as error:
            return _fail(str(error), error.details)
        except preemption.Preempted as stop:
            where = f" in {stop.where}" if stop.where else ""
            print(
                f"stopped by SIGTERM{where}; rerun the same command to resume",
                file=sys.stderr,
            )
            return preemption.EXIT_CODE
        except KeyboardInterrupt:
            print("interrupted; rerun the same command to resume", file=sys.stderr)
            return 130
        except Exception as error:
            if workdir is None or not is_full_disk(error):
                raise
            return _fail(_full_disk_message(error, workdir))
        return 0


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Checks everything that needs no device, then runs the selected stages."""
    common.FIELDS.check(config)
    stages = select_stages(config)
    began = time.monotonic()
    if "caption" in stages and not is_complete(workdir, "caption"):
        caption.require_outside(config, workdir)
    check_workdir(workdir, config.min_free_disk_gib)
    runtime.set_up(config.compilation_cache)
    with _locked(workdir):
        for leftover in files.matching(workdir, ".tmp-*"):  # of a killed run
            leftover.unlink()
        check_stages(stages, config, workdir)
        worked = []
        for name in stages:
            if name == "generate" and config.generate.limit:
                _stage(name).run(config, workdir)
                print(f"contact sheet: {workdir / 'generate' / 'contact_sheet.png'}")
                return
            if run_stage(name, config, workdir):
                worked.append(name)
    if worked:
        logging.info("%s in %.0f s", ", ".join(worked), time.monotonic() - began)
    else:
        logging.info("nothing to do: all %d stages are complete", len(stages))
    if stages == ["caption"]:
        print(_stage("caption").table(workdir))
    else:
        _print_result(workdir)


def check_stages(
    stages: Sequence[str], config: ConfigDict, workdir: epath.Path
) -> None:
    """Checks every selected stage that is not complete; starts no JAX backend.

    Raises:
      UserError: a field is wrong, or the recipes to be read have other settings.
    """
    # A contact sheet is drawn even where the stage is complete.
    sheet = "generate" in stages and config.generate.limit
    checked = [
        name
        for name in stages
        if not is_complete(workdir, name) or (name == "generate" and sheet)
    ]
    for name in checked:
        _stage(name).check(config)
    if "classify" in checked and is_complete(workdir, "caption"):
        _stage("classify").require_classes(workdir)
    if "generate" in stages and "mix" not in stages and is_complete(workdir, "mix"):
        # Images of other recipes must not be written under these settings.
        require_made_by(workdir, _stage("mix").stage_spec(config), reader="generate")
    if any(name in _MESH_STAGES for name in checked):
        check_mesh(config.mesh.data, config.mesh.fsdp)


def check_mesh(data: int, fsdp: int) -> None:
    """Checks that the mesh fits the devices, unless it is the one that always fits.

    The devices are counted in another process: in this one JAX would hold them from now
    on, and a captioner that runs in a process of its own needs their memory.
    """
    if (data, fsdp) == (-1, 1):
        return
    count = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
    )
    if count.returncode:
        raise UserError(
            "config.mesh",
            wanted="devices that JAX can use",
            got=(count.stderr.strip().splitlines() or ["a crash of JAX"])[-1],
            fix="Install JAX for this machine's devices, or set JAX_PLATFORMS=cpu.",
        )
    sharding.mesh_shape(data, fsdp, int(count.stdout))


def run_stage(name: str, config: ConfigDict, workdir: epath.Path) -> bool:
    """Runs one stage and records its time; returns whether there was any work."""
    path = workdir / name / "manifest.json"
    before = path.stat().mtime if path.exists() else None
    began, compiled = time.monotonic(), runtime.compile_seconds()
    try:
        _stage(name).run(config, workdir)
    except preemption.Preempted as stop:
        stop.where = stop.where or name
        raise
    if path.stat().mtime == before:
        return False
    seconds = time.monotonic() - began
    timings = workdir / "timings.json"
    record = files.read_json(timings) if timings.exists() else {}
    record[name] = {
        "seconds": round(seconds, 2),
        "compile_seconds": round(runtime.compile_seconds() - compiled, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    files.write_json(timings, record)
    files.write_json(workdir / "config.json", config.to_dict())
    logging.info("%s: done in %.1f s", name, seconds)
    return True


def select_stages(config: ConfigDict) -> list[str]:
    """The stages of `config.stages`, in the pipeline's order.

    `all` includes `pretrain` only if `config.base.path` is empty.

    Raises:
      UserError: a name is unknown.
    """
    names = [name.strip() for name in config.stages.split(",") if name.strip()]
    if names == ["all"]:
        return [name for name in STAGES if name != "pretrain" or not config.base.path]
    unknown = [name for name in names if name not in STAGES]
    if not names or unknown:
        raise UserError(
            "config.stages",
            wanted=f"all, or some of {','.join(STAGES)}",
            got=repr(",".join(unknown) or config.stages),
            fix="Correct the list, e.g. --config.stages=generate,classify.",
        )
    return [name for name in STAGES if name in names]


def parse_flags(argv: list[str]) -> tuple[ConfigDict, epath.Path]:
    """Parses the command line into (config with its overrides, workdir).

    Raises:
      UserError: the config cannot be read, or a flag or field is unknown or mistyped.
      SystemExit: --help or --version was given.
    """
    path, overrides, rest = _DEFAULT_CONFIG, {}, [argv[0]]
    words = iter(argv[1:])
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in ("help", "h"):
            print_help(value)
        elif word.startswith("-") and name == "config":
            path = value if equals else next(words, "")
        elif word.startswith("-") and name.removeprefix("no").startswith("config."):
            field, value = _parse_override(word, words)
            overrides[field] = value
        else:
            rest.append(word)
    workdir = _parse_workdir(rest)
    config = load_config(path)
    for name, value in overrides.items():
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    return config, workdir


def print_help(name: str) -> NoReturn:
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
    print(__doc__)
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


def _parse_workdir(argv: list[str]) -> epath.Path:
    """Parses the flags that are not of the config.

    Raises:
      UserError: a flag is unknown, or there is no workdir.
      SystemExit: --version was given.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "the folder of this run's files", flag_values=values
    )
    flags.DEFINE_boolean("version", False, "print the version", flag_values=values)
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
    workdir = values["workdir"].value
    if not workdir:
        raise UserError(
            "--workdir",
            wanted="a folder for this run",
            got="none",
            fix="Add e.g. --workdir=runs/digits.",
        )
    try:
        return epath.Path(workdir).expanduser()
    except (ImportError, KeyError) as error:  # no library for its scheme
        raise UserError(
            f"--workdir={workdir}",
            wanted="a path that etils.epath can open",
            got=str(error),
            fix="Install the library of that file system, or use a local folder.",
        ) from error


def load_config(path_and_argument: str) -> ConfigDict:
    """Calls `get_config(arg)` of `file.py:arg` and locks the result.

    Files in `configs/` that are part of the package are found from any directory.

    Raises:
      UserError: there is no such file, or it cannot be run.
    """
    path, _, argument = path_and_argument.partition(":")
    found = epath.Path(path)
    if not found.exists() and found.parts[:1] == ("configs",):
        for folder in configs.__path__:
            found = epath.Path(folder).joinpath(*epath.Path(path).parts[1:])
    if not found.is_file() or found.suffix != ".py":
        raise UserError(
            f"--config={path}",
            wanted="a Python file with get_config()",
            got="a folder" if found.is_dir() else "no such file",
            fix=f"Try --config={_DEFAULT_CONFIG}.",
        )
    try:
        spec = importlib.util.spec_from_file_location(f"config_{found.stem}", found)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*[argument] if argument else [])
        if not isinstance(config, ConfigDict) or "stages" not in config:
            raise TypeError(
                f"get_config() returned {type(config).__name__} without stages"
            )
        common.FIELDS.check_names(config)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--config={path_and_argument}",
            wanted="a Python file whose get_config() returns a ConfigDict",
            got=f"{type(error).__name__}: {error}",
            fix="Correct the file; configs/digits.py is an example.",
        ) from error
    return config.lock()


def check_workdir(workdir: epath.Path, min_free_gib: float) -> None:
    """Creates the workdir; raises if it is not writable or its disk is too full."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(workdir / ".writable", "")
        (workdir / ".writable").unlink()
    except (OSError, ImportError) as error:
        if is_full_disk(error):
            raise
        raise UserError(
            f"--workdir={workdir}",
            wanted="a folder that can be written",
            got=getattr(error, "strerror", None) or str(error),
            fix="Choose another folder, or fix its permissions.",
        ) from error
    if not _is_local(workdir):
        return
    free = shutil.disk_usage(workdir).free / 2**30
    if free < min_free_gib:
        raise UserError(
            f"--workdir={workdir}",
            wanted=f"{min_free_gib:g} GiB of free disk (config.min_free_disk_gib)",
            got=f"{free:.2f} GiB",
            fix="Free some, or choose a folder on another disk.",
        )


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    """Locks the workdir; raises if another process of this machine has locked it.

    Otherwise each would delete the other's temporary files, as if left by a killed run.
    The lock is released when its process ends, however it ends, and leaves no file.
    """
    if not _is_local(workdir):
        yield
        return
    folder = os.open(workdir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--workdir={workdir}",
                    wanted="a folder that no other run is using",
                    got="one in use by another process",
                    fix="Wait until it has ended, or choose another folder.",
                ) from error
        yield
    finally:
        os.close(folder)


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path) and not str(path).startswith("gs:")


def _stage(name: str) -> Any:
    return _MODULES[name]


def _print_result(workdir: epath.Path) -> None:
    metrics = workdir / "evaluate" / "metrics.json"
    if metrics.exists():
        print(_stage("evaluate").table(files.read_json(metrics)))
    report = workdir / "report" / "report.html"
    if report.exists():
        print(f"\nreport: {report}")


def _fail(message: str, details: Sequence[str] = ()) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    for line in details[:_MAX_DETAILS]:
        print(f"  {' '.join(line.split())}", file=sys.stderr)
    if len(details) > _MAX_DETAILS:
        print(f"  ... and {len(details) - _MAX_DETAILS} more", file=sys.stderr)
    return 2


def _full_disk_message(error: BaseException, workdir: epath.Path) -> str:
    path = getattr(error, "filename", None) or workdir
    free = shutil.disk_usage(workdir).free if _is_local(workdir) else 0
    return str(
        UserError(
            str(path),
            wanted="space to write",
            got=f"a full disk ({free} bytes free)",
            fix="Free some, then rerun the same command to resume.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
