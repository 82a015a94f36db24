"""The programs that a run compiles, by stage, with the seconds that XLA took.

    python benchmarks/compiles.py --config=configs/digits.py --workdir=runs/compiles

The flags are those of `mvc_jax.train`; the workdir is a new one. Nothing is read from a
compilation cache, so every program of the run is listed. Tracing is not counted.
"""

import collections
import logging
import re
import sys
import time

from mvc_jax import train
from mvc_jax.command import command_line
from mvc_jax.training import console

FINISHED = re.compile(r"Finished XLA compilation of (?:jit\()?(.*?)\)? in ([\d.]+) sec")


class Compilations(logging.Handler):
    """Collects (stage, program, seconds) from JAX's log."""

    def __init__(self):
        super().__init__()
        self.stage = ""
        self.rows: list[tuple[str, str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := FINISHED.match(record.getMessage()):
            self.rows.append((self.stage, found[1], float(found[2])))


def main() -> None:
    console.be_quiet()
    command = command_line.parse(sys.argv)
    command.config.compilation_cache = ""
    compilations = Compilations()
    listen(compilations)
    run_stage = train.run_stage

    def run_and_record(name, *arguments):
        compilations.stage = name
        return run_stage(name, *arguments)

    train.run_stage = run_and_record
    began = time.monotonic()
    train.run(command.config, command.workdir)
    print(f"\nthe whole run: {time.monotonic() - began:.0f} s\n")
    print(table(compilations.rows))


def listen(handler: logging.Handler) -> None:
    """Sends JAX's messages about compilation to `handler`, and nowhere else."""
    logger = logging.getLogger("jax._src.dispatch")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [handler]


def table(rows: list[tuple[str, str, float]]) -> str:
    """Markdown: a row per stage and program, the slowest first; then the stages."""
    programs = collections.defaultdict(list)
    for stage, program, seconds in rows:
        programs[stage, program].append(seconds)
    lines = ["| stage | program | compiled | seconds |", "|---|---|---:|---:|"]
    for (stage, program), taken in sorted(programs.items(), key=lambda x: -sum(x[1])):
        if sum(taken) >= 0.5:
            lines.append(f"| {stage} | {program} | {len(taken)} | {sum(taken):.1f} |")
    for stage in dict.fromkeys(stage for stage, _, _ in rows):
        taken = [seconds for name, _, seconds in rows if name == stage]
        lines.append(f"| {stage} | all | {len(taken)} | {sum(taken):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
