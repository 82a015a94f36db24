"""How long the command line takes to answer where no stage has any work to do.

    python benchmarks/startup.py --workdir=runs/digits --starts=9

`--workdir` is a finished run of the digits config. Each case is a fresh process; the
cases take turns; an exit code other than the expected one stops the benchmark.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

CASES = {  # name -> (arguments, exit code); {finished} and {new} are workdirs
    "`--help`": ("--help", 0),
    "`--version`": ("--version", 0),
    "a mistyped flag": ("--wrokdir={new}", 2),
    "a mistyped field": ("--workdir={new} --config.data.sise=16", 2),
    "a value of the wrong type": ("--workdir={new} --config.seed=abc", 2),
    "a value that `train` refuses": ("--workdir={new} --config.seed=-1", 2),
    "one that the first stage refuses": ("--workdir={new} --config.data.size=18", 2),
    "one that the last stage refuses": (
        "--workdir={new} --config.report.grid_scale=9",
        2,
    ),
    "nothing to do": ("--workdir={finished}", 0),
    "other settings in a finished workdir": ("--workdir={finished} --config.seed=1", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--starts", type=int, default=9)
    arguments = parser.parse_args()
    seconds = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as new:
        for _ in range(arguments.starts):
            for name in CASES:
                seconds[name].append(start(name, finished=arguments.workdir, new=new))
    print(f"machine load: {os.getloadavg()[0]:.2f}\n")
    print("| case | seconds, median | fastest | slowest |")
    print("|---|---:|---:|---:|")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(f"| {name} | {middle:.2f} | {min(taken):.2f} | {max(taken):.2f} |")


def start(name: str, **folders: str) -> float:
    """Seconds that one case takes; raises if its exit code is not the expected one."""
    words, expected = CASES[name]
    flags = [word.format(**folders) for word in words.split()]
    command = [sys.executable, "-m", "mvc_jax.train", "--config=configs/digits.py"]
    began = time.perf_counter()
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    taken = time.perf_counter() - began
    if done.returncode != expected:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    return taken


if __name__ == "__main__":
    main()
