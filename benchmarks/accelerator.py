"""Checks and times this project on one accelerator, most important figures first.

    bash benchmarks/accelerator.sh --minutes=9 --out=runs/accelerator

Each row or few have a process of their own and a time limit, so that a crash,
a lack of memory or a slow compilation costs no other row. Rows are printed as
they are known, as Markdown, and appended to `accelerator.jsonl` in the folder `--out`.
Beside it are the logs of the processes, and a compilation cache (or it is where
JAX_COMPILATION_CACHE_DIR says) with which a second call gets further in the same time.

Exit codes: 1 if a row failed, or there is no accelerator; 2 if a flag is wrong. A lack
of memory or time is a failure in a rehearsal only.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
COLUMNS = {  # heading -> field of a row
    "part": "part",
    "setting": "setting",
    "figure": "figure",
    "unit": "unit",
    "ratio": "ratio",
    "TFLOP/s": "tflops",
    "MFU": "mfu",
    "peak memory, GiB": "memory_gib",
    "compiled, s": "compile_seconds",
    "note": "note",
}
FAILED, MEMORY, TIME, ABSENT = "failed", "out of memory", "not run: time", "not run"
SHORTEST = 3.0  # seconds in which a process can yield anything


@dataclasses.dataclass(frozen=True)
class Run:
    """A process that yields rows of the table.

    Attributes:
      part: its name in the table.
      function: "module:name" in this folder: a generator of rows.
      limit: seconds.
      arguments: of the function.
      toy: arguments of a rehearsal that differ; None: it is not rehearsed, because only
        numbers distinguish it from a run that is.
      fresh: whether the process shares no imports with the others.
      seconds: of a measurement, about.
    """

    part: str
    function: str
    limit: float
    arguments: dict[str, Any]
    toy: dict[str, Any] | None = None
    fresh: bool = False
    seconds: float = 3.0

    @property
    def setting(self) -> str:
        """For rows without one of their own."""
        shown = {k: v for k, v in self.arguments.items() if k not in ("name", "record")}
        return ", ".join(f"{key} {value}" for key, value in shown.items() if value)


CARD = Run(
    "card",
    "card:rates",
    45,
    {"matrix": 16384, "copy_mib": 4096},
    toy={"matrix": 128, "copy_mib": 8, "on_cpu": True},
)
TOY_UNET = {"family": "tiny", "batch": 8, "size": 32}
TOY_CLASSIFIER = {"classifier": "resnet8", "batch": 8, "policy": "none"}


def finetune(
    batch: int, remat: str = "none", limit: float = 150, toy: dict | None = None
) -> Run:
    arguments = {"name": "finetune", "batch": batch, "remat": remat, "record": 128}
    return Run("fine-tuning", "measure:rate", limit, arguments, toy)


def sampling(batch: int, preset: str = "", toy: dict | None = None) -> Run:
    arguments = {"batch": batch, "preset": preset, "record": 2.3, "batches": 2}
    return Run("sampling", "sample:rates", 120, arguments, toy)


def classifier(batch: int, toy: dict | None = None) -> Run:
    arguments = {"name": "classify", "classifier": "wrn28_10", "batch": batch}
    return Run("classifier", "measure:rate", 75, arguments, toy)


RUNS = (  # the main settings of every part, then the others
    Run(
        "right",
        "correctness:block",
        75,
        {"batch": 8, "family": "block", "latents": 64},
        toy={"family": "tiny", "latents": 4},
    ),
    Run(
        "attention",
        "correctness:layers",
        100,
        {"batch": 8},
        toy={"batch": 1, "levels": ((64, 8),)},
    ),
    finetune(32, limit=180, toy=TOY_UNET),
    sampling(16, toy=TOY_UNET | {"batches": 1}),
    classifier(128, toy=TOY_CLASSIFIER),
    Run(
        "PyTorch",
        "finetune_step:theirs",
        75,
        {"batch": 32, "family": "sd15", "size": 512},
        toy=TOY_UNET | {"on_cpu": True},
        fresh=True,
    ),
    finetune(50),
    sampling(16, "fast"),
    Run(
        "augmentation",
        "augment:rates",
        30,
        {"batches": {32: 1024, 224: 128}},
        toy={"batches": {8: 8}},
    ),
    Run(
        "mixing",
        "mix:rates",
        30,
        {"count": 1_000_000, "prompts": 256, "turn": 8192, "batch": 256},
        toy={"count": 1000, "turn": 32, "batch": 16},
    ),
    Run("encoding", "measure:rate", 60, {"name": "encode", "batch": 16}, toy=TOY_UNET),
    Run(
        "seeds",
        "classifier_step:seeds",
        120,
        {"at_once": 3, "classifier": "resnet20", "batch": 128, "steps_at_once": 10},
        toy=TOY_CLASSIFIER | {"at_once": 2, "steps_at_once": 1},
    ),
    finetune(50, "blocks"),
    finetune(64, "blocks"),
    classifier(1024),
    finetune(64),
    finetune(16),
    finetune(8),
    sampling(8),
    sampling(4),
    sampling(8, "fast"),
    sampling(4, "fast"),
    finetune(32, "blocks"),
    finetune(16, "blocks"),
    finetune(8, "blocks"),
)
PARTS = tuple(dict.fromkeys(run.part for run in (CARD, *RUNS)))
LOWERED = {  # functions of programs -> the function that traces their program instead
    "measure:rate": {},
    "sample:rates": {"name": "generate"},
    "classifier_step:seeds": {"name": "classify", "seeds": 3},
}


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    # For spawned processes, and for the server from which the others are forked.
    path = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        file = (flags.out / "accelerator.jsonl").open("a")
    except OSError as error:
        print(f"--out: wanted a folder to write into, got {error}", file=sys.stderr)
        return 2
    with file, contextlib.suppress(KeyboardInterrupt):
        return measure_all(selected(flags), flags, Table(file))
    return 128 + signal.SIGINT


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="accelerator.sh",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts (9)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/accelerator"),
        help="folder of rows, logs and compilation cache (runs/accelerator)",
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--rehearse",
        action="store_true",
        help="every part at a toy size, on any device",
    )
    kinds.add_argument(
        "--lower", action="store_true", help="trace the true programs; run nothing"
    )
    flags = parser.parse_args(arguments)
    unknown = {*flags.parts.split(",")} - {*PARTS}
    if unknown:
        known = ",".join(PARTS)
        parser.error(f"--parts: wanted some of {known}, got {','.join(unknown)}")
    if not flags.minutes > 0:
        parser.error(f"--minutes: wanted more than 0, got {flags.minutes:g}")
    return flags


def selected(flags: argparse.Namespace) -> list[Run]:
    """The runs of the chosen parts, as they are measured, rehearsed or lowered."""
    runs = [run for run in RUNS if run.part in flags.parts.split(",")]
    if flags.lower:
        programs = {}  # of one batch each
        for run in runs:
            if run.function in LOWERED:
                rest = {**run.arguments, "batch": None}
                programs.setdefault(f"{run.function} {rest}", lowered(run))
        return [*programs.values()]
    runs = [CARD, *runs]
    if flags.rehearse:
        return [rehearsed(run) for run in runs if run.toy is not None]
    return runs


def rehearsed(run: Run) -> Run:
    """The run at its toy size; on a slow machine only its compilation takes time."""
    toy = run.arguments | run.toy
    return dataclasses.replace(run, arguments=toy, seconds=0.01, limit=1e4)


def lowered(run: Run) -> Run:
    kept = {
        key: value
        for key, value in run.arguments.items()
        if key not in ("record", "batches", "at_once")
    }
    return dataclasses.replace(
        run, function="measure:lowered", arguments=kept | LOWERED[run.function]
    )


class Table:
    """Prints rows, and appends them to a file."""

    def __init__(self, file):
        self.rows: list[dict[str, Any]] = []
        self._file = file
        print(f"| {' | '.join(COLUMNS)} |")
        print("|---|---|---:|---|---|---:|---:|---:|---:|---|", flush=True)

    def add(self, run: Run, row: dict[str, Any]) -> None:
        """Completes a row of a run and writes it at once."""
        row = {"part": run.part, **row, "setting": row.get("setting") or run.setting}
        if "record" in row:
            row["ratio"] = row["figure"] / row["record"]
            row["ratio_to"] = f"the record, {row['record']:g}"
        if run.part == "PyTorch" and "figure" in row:
            row |= self._ratio_to_ours(run, row["figure"])
        now = datetime.datetime.now(datetime.UTC)
        row["time"] = now.isoformat(timespec="seconds")
        row["arguments"] = run.arguments
        self.rows.append(row)
        print(f"| {' | '.join(cell(row, field) for field in COLUMNS.values())} |")
        sys.stdout.flush()
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # the time of the machine is worth more
            print(f"{self._file.name}: {error}", file=sys.stderr)

    def _ratio_to_ours(self, run: Run, theirs: float) -> dict[str, Any]:
        """Of PyTorch's row: our rate at the same batch over theirs."""
        batch = run.arguments["batch"]
        for row in self.rows:
            same = row["arguments"].get("batch") == batch and "figure" in row
            if row["part"] == "fine-tuning" and same:
                return {"ratio": row["figure"] / theirs, "ratio_to": "ours / PyTorch"}
        return {}


def cell(row: dict[str, Any], field: str) -> str:
    """A field of a row as text."""
    if field == "note":
        return "; ".join(filter(None, (row.get("status"), row.get("note"))))
    value = row.get(field)
    if value is None:
        return ""
    if field == "ratio":
        return f"{value:.2f} ({row['ratio_to']})"
    if field == "mfu":
        return f"{value:.1%}"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def measure_all(runs: Sequence[Run], flags: argparse.Namespace, table: Table) -> int:
    """Runs all in order, until the time is over; the exit code."""
    ends = time.monotonic() + 60 * flags.minutes
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["preloaded"])
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(flags.out / "xla"))
    for number, run in enumerate(runs):
        left = ends - time.monotonic()
        if left < SHORTEST:
            table.add(run, {"status": TIME})
            continue
        context = multiprocessing.get_context("spawn") if run.fresh else forked
        log = flags.out / f"{number:02}-{run.part}.log"
        limit = min(run.limit, left)
        for row in rows_of(run, context, log, cache, limit):
            table.add(run, row)
        if run.function == CARD.function and table.rows[-1].get("status") == FAILED:
            print("\nWithout this nothing else is run.", file=sys.stderr)
            return 1
    bad = {FAILED, MEMORY, TIME} if flags.rehearse or flags.lower else {FAILED}
    return int(any(row.get("status") in bad for row in table.rows))


def rows_of(
    run: Run, context: Any, log: pathlib.Path, cache: str, limit: float
) -> Iterator[dict[str, Any]]:
    """The rows of a run, the last of which says how it failed, if it did."""
    ends = time.monotonic() + limit
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(there, run, str(log), cache))
    process.start()
    there.close()
    try:
        while True:
            if not here.poll(max(ends - time.monotonic(), 0)):
                note = f"its limit of {limit:.0f} s was over"
                yield {"status": TIME, "note": note}
                return
            yield here.recv()
    except (EOFError, OSError):  # the process has ended, perhaps within a row
        process.join(10)
        if process.exitcode:
            yield {"status": FAILED, "note": ending(process.exitcode, log)}
    finally:
        kill(process)
        here.close()


def kill(process: multiprocessing.Process) -> None:
    """Ends a process and those that it started, so that they leave the accelerator."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)


def ending(code: int, log: pathlib.Path) -> str:
    """Why a process ended, in a line."""
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    return one_line(f"{how}; its log ends: {last}" if last else how)


def serve(rows: Any, run: Run, log: str, cache: str) -> None:
    """The process of a run: sends its rows, and an exception as a row."""
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    try:
        import turns

        from mvc_jax.training import runtime

        turns.SECONDS = run.seconds
        runtime.set_up(cache)
        if not run.fresh:
            runtime.start()
        module, _, name = run.function.partition(":")
        for row in getattr(importlib.import_module(module), name)(**run.arguments):
            if "error" in row:
                row |= failure(row.pop("error"))
            rows.send(row)
    except Exception as error:
        traceback.print_exc()
        rows.send(failure(error))


def failure(error: BaseException) -> dict[str, str]:
    """What a row says of an exception."""
    text, name = str(error), type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return {"status": ABSENT, "note": one_line(text)}
    memory = re.search("RESOURCE_EXHAUSTED|out of memory|that fits", text)
    note = text if name == "UserError" else f"{name}: {text}"
    return {"status": MEMORY if memory else FAILED, "note": one_line(note)}


def one_line(text: str, longest: int = 300) -> str:
    """Text for a cell of the table."""
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= longest else f"{text[:longest]}..."


if __name__ == "__main__":
    sys.exit(main())
