"""The entry: flags, checks, devices, then the stages in order.

    python -m mvc_jax.train --config=configs/digits.py --workdir=runs/digits

`--config=file.py:arg` picks the structure, `--config.section.field=value` sets values.
Exit codes: 0 done, 2 a mistake that the message says how to mend, 75 stopped by SIGTERM
(the same command goes on; a launcher reads "run me again"), 130 interrupted by Ctrl-C.
"""

import ast
import contextlib
import fcntl
import importlib
import importlib.util
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from mvc_jax import files
from mvc_jax.errors import UserError, is_full_disk, require
from mvc_jax.stage import is_complete, require_made_by
from mvc_jax.training import console, preemption, runtime

STAGES = (
    "caption",
    "pretrain",
    "encode",
    "pairs",
    "finetune",
    "mix",
    "generate",
    "classify",
    "evaluate",
    "report",
)
_DEFAULT_CONFIG = "configs/digits.py"
_MOST_DETAILS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    console.be_quiet()
    with preemption.handled():
        try:
            config, workdir = parse_flags(list(sys.argv if argv is None else argv))
            run(config, workdir)
        except UserError as error:
            return _fail(str(error), error.details)
        except preemption.Preempted as stop:
            where = f" in {stop.where}" if stop.where else ""
            print(
                f"stopped by SIGTERM{where}; the same command goes on from there",
                file=sys.stderr,
            )
            return preemption.EXIT_CODE
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        except Exception as error:
            if not is_full_disk(error):
                raise
            return _fail(_disk_message(error, workdir))
        return 0


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Checks everything that needs no device, then runs the selected stages."""
    stages = select_stages(config)
    check_shared(config)
    began = time.monotonic()
    check_workdir(workdir, config.min_free_disk_gib)
    worked = []
    with _alone(workdir):
        for leftover in workdir.glob(".tmp-*"):  # of a run that was killed
            leftover.unlink()
        for name in stages:
            sheet = name == "generate" and config.generate.limit  # drawn of any run
            if sheet or not is_complete(workdir, name):
                _stage(name).check(config)
        mixed = is_complete(workdir, "mix") and "mix" not in stages
        if "generate" in stages and mixed:
            # Recipes of other settings would be drawn under the names of these.
            settings = _stage("mix").settings_of(config)
            require_made_by(workdir, "mix", settings, reader="generate")
        runtime.set_up(config.compilation_cache)
        for name in stages:
            if name != "caption":  # whose captioner may want the accelerator to itself
                runtime.log_devices()
            if name == "generate" and config.generate.limit:
                _stage(name).run(config, workdir)
                print(f"contact sheet: {workdir / 'generate' / 'contact_sheet.png'}")
                return
            if run_stage(name, config, workdir):
                worked.append(name)
    if worked:
        logging.info("%s in %.0f s", ", ".join(worked), time.monotonic() - began)
    else:
        logging.info("nothing to do: %d stages were done before", len(stages))
    if stages == ["caption"]:
        print(_stage("caption").table(workdir))
    else:
        _print_result(workdir)


def check_shared(config: ConfigDict) -> None:
    """Checks what belongs to no stage: `seed` and `mesh`."""
    require(
        config.seed >= 0,
        "config.seed",
        wanted="a whole number of at least 0",
        got=config.seed,
        fix="Take 0, 1, 2, ...",
    )
    data, fsdp = config.mesh.data, config.mesh.fsdp
    require(
        (data == -1 or data > 0) and fsdp > 0,
        "config.mesh",
        wanted="data of -1 or more than 0, fsdp of more than 0",
        got=f"data={data}, fsdp={fsdp}",
        fix="data=-1 and fsdp=1 use every device.",
    )


def run_stage(name: str, config: ConfigDict, workdir: epath.Path) -> bool:
    """Runs one stage and keeps its time; returns whether it had anything to do."""
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

    `pretrain` runs only where `config.base.path` names no model.

    Raises:
      UserError: a name is unknown.
    """
    asked = [name.strip() for name in config.stages.split(",") if name.strip()]
    if asked == ["all"]:
        return [name for name in STAGES if name != "pretrain" or not config.base.path]
    unknown = [name for name in asked if name not in STAGES]
    require(
        bool(asked) and not unknown,
        "config.stages",
        wanted=f"all, or some of {','.join(STAGES)}",
        got=repr(",".join(unknown) or config.stages),
        fix="Mend the list, e.g. --config.stages=generate,classify.",
    )
    return [name for name in STAGES if name in asked]


def parse_flags(argv: list[str]) -> tuple[ConfigDict, epath.Path]:
    """Command line -> (config with its overrides, workdir).

    Raises:
      UserError: the config cannot be read, or a flag or field is unknown or mistyped.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "where the run keeps it all", flag_values=values
    )
    flags.DEFINE_boolean("help", False, "print this help", flag_values=values)
    path, rest = _DEFAULT_CONFIG, []
    words = iter(argv[1:])
    for word in words:
        if word.startswith(("--config=", "-config=")):
            path = word.partition("=")[2]
        elif word in ("--config", "-config"):
            path = next(words, "")
        else:
            rest.append(word)
    config = load_config(path)
    rest = [argv[0], *(_check_override(config, word) for word in rest)]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    try:
        positional = values(rest)[1:]
    except flags.Error as error:
        raise UserError(
            "command line",
            wanted="--config=FILE, --workdir=DIR and --config.FIELD=VALUE",
            got=str(error),
            fix="Mend that flag.",
        ) from error
    if values["help"].value:
        print(f"{__doc__}\nEvery field and its default: configs/common.py")
        raise SystemExit(0)
    require(
        not positional,
        "command line",
        wanted="flags alone",
        got=repr(" ".join(positional)),
        fix="Write --config.field=value, with the equals sign.",
    )
    require(
        bool(values["workdir"].value),
        "--workdir",
        wanted="a folder for this run",
        got="none",
        fix="Add e.g. --workdir=runs/digits.",
    )
    workdir = values["workdir"].value
    try:
        return values["config"].value, epath.Path(workdir).expanduser()
    except (ImportError, KeyError) as error:  # no library for its scheme
        raise UserError(
            f"--workdir={workdir}",
            wanted="a path that etils.epath can open",
            got=str(error),
            fix="Install the library of that file system, or name a local folder.",
        ) from error


def load_config(path_and_argument: str) -> ConfigDict:
    """`get_config(arg)` of `file.py:arg`; a shipped config is found from anywhere.

    Raises:
      UserError: there is no such file, or it cannot be run.
    """
    path, _, argument = path_and_argument.partition(":")
    found = epath.Path(path)
    if not found.exists() and found.parts[:1] == ("configs",):
        for folder in importlib.import_module("mvc_jax.configs").__path__:
            found = epath.Path(folder).joinpath(*epath.Path(path).parts[1:])
    require(
        found.is_file() and found.suffix == ".py",
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
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--config={path_and_argument}",
            wanted="a Python file whose get_config() returns a ConfigDict",
            got=f"{type(error).__name__}: {error}",
            fix="Mend the file; configs/digits.py shows the form.",
        ) from error
    return config.lock()


def _check_override(config: ConfigDict, word: str) -> str:
    """Refuses `--config.x.y=v` if there is no x.y; writes lists as the library does."""
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("-") or not name.removeprefix("no").startswith("config."):
        return word
    section, *parts = config, *name.removeprefix("no").split(".")[1:]
    for depth, part in enumerate(parts):
        where = ".".join(["config", *parts[:depth]])
        if not isinstance(section, ConfigDict) or part not in section:
            known = sorted(section) if isinstance(section, ConfigDict) else []
            raise UserError(
                f"{where}.{part}",
                wanted=f"a field of {where}: {', '.join(known) or '(it has none)'}",
                got=repr(part),
                fix="Name one of these.",
            )
        section = section[part]
    texts = isinstance(section, tuple) and all(isinstance(x, str) for x in section)
    if equals and texts and not value.startswith(("(", "[")):
        items = tuple(item.strip() for item in value.split(",") if item.strip())
        return f"--{name}={items!r}"
    if equals and isinstance(section, tuple) and value.startswith(("(", "[")):
        try:
            return f"--{name}={tuple(ast.literal_eval(value))!r}"
        except (ValueError, SyntaxError, TypeError) as error:
            raise UserError(
                name,
                wanted="values between commas, or a Python tuple",
                got=value,
                fix=f"Write e.g. --{name}={','.join(map(str, section))}.",
            ) from error
    return word


def check_workdir(workdir: epath.Path, min_free_gib: float) -> None:
    """Makes the workdir; refuses one that cannot be written, or a disk too full."""
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
            fix="Name another folder, or mend its permissions.",
        ) from error
    if not _is_local(workdir):
        return
    free = shutil.disk_usage(workdir).free / 2**30
    require(
        free >= min_free_gib,
        f"--workdir={workdir}",
        wanted=f"{min_free_gib:g} GiB of free disk (config.min_free_disk_gib)",
        got=f"{free:.2f} GiB",
        fix="Free some, or name a folder on another disk.",
    )


@contextlib.contextmanager
def _alone(workdir: epath.Path) -> Iterator[None]:
    """Refuses a workdir in which another process of this machine is at work.

    Each would take the other's files under way for leftovers of a kill. The lock ends
    with its process, however that ends, and leaves no file.
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
                    wanted="a folder in which no other run is at work",
                    got="one in which another process is",
                    fix="Wait until it has ended, or name another folder.",
                ) from error
        yield
    finally:
        os.close(folder)


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path) and not str(path).startswith("gs:")


def _stage(name: str) -> ModuleType:
    return importlib.import_module(f"mvc_jax.{name}")


def _print_result(workdir: epath.Path) -> None:
    metrics = workdir / "evaluate" / "metrics.json"
    if metrics.exists():
        print(_stage("evaluate").table(files.read_json(metrics)))
    report = workdir / "report" / "report.html"
    if report.exists():
        print(f"\nreport: {report}")


def _fail(message: str, details: Sequence[str] = ()) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    for line in details[:_MOST_DETAILS]:
        print(f"  {' '.join(line.split())}", file=sys.stderr)
    if len(details) > _MOST_DETAILS:
        print(f"  ... and {len(details) - _MOST_DETAILS} more", file=sys.stderr)
    return 2


def _disk_message(error: BaseException, workdir: epath.Path) -> str:
    path = getattr(error, "filename", None) or workdir
    free = shutil.disk_usage(workdir).free if _is_local(workdir) else 0
    return str(
        UserError(
            str(path),
            wanted="room to write",
            got=f"a full disk ({free} bytes free)",
            fix="Free some; the same command goes on from what is whole.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
