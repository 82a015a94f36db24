"""Two sides of a benchmark that take turns, each in a process of its own.

A side is a function of the parsed arguments, of which `rounds` (turns), `steps` (in a
turn) and `batch` count here. It compiles, takes one step, and returns `step(times)` and
`peak()`, bytes.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np


def in_turns(
    sides: Mapping[str, Callable], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, float]]:
    """Seconds to the first step's end, a step in each turn; bytes at the peak."""
    with contextlib.ExitStack() as stack:
        turns = {
            name: stack.enter_context(apart(side, arguments))
            for name, side in sides.items()
        }
        compiling = {name: turn() for name, turn in turns.items()}
        seconds = {name: [] for name in turns}
        for _ in range(arguments.rounds):
            for name, turn in turns.items():
                seconds[name].append(turn() / arguments.steps)
        memory = {name: turn() for name, turn in turns.items()}
    return compiling, seconds, memory


def accelerator() -> bool:
    """Whether JAX has one, asked in a process of its own: this one keeps none."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_backend) != "cpu"


def _backend() -> str:
    import jax

    return jax.default_backend()


@contextlib.contextmanager
def apart(side: Callable, arguments: argparse.Namespace) -> Iterator[Callable]:
    """A function that lets `side`, in a fresh process, go on to its next number."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, arguments))
    process.start()
    there.close()

    def turn() -> float:
        here.send("go on")
        return here.recv()

    try:
        yield turn
    finally:
        here.close()
        process.join()


def _serve(pipe, side: Callable, arguments: argparse.Namespace) -> None:
    """Sends seconds to the first step's end, those of each turn, bytes at the peak."""
    with contextlib.suppress(EOFError):
        pipe.recv()
        start = time.perf_counter()
        step, peak = side(arguments)
        pipe.send(time.perf_counter() - start)
        for _ in range(arguments.rounds):
            pipe.recv()
            start = time.perf_counter()
            step(arguments.steps)
            pipe.send(time.perf_counter() - start)
        pipe.recv()
        pipe.send(peak())


def peak() -> float:
    """Bytes that JAX's device, or on a CPU the process, has held at the most."""
    import jax

    if jax.default_backend() == "cpu":
        return resident()
    return float(jax.devices()[0].memory_stats()["peak_bytes_in_use"])


def resident() -> float:
    """Bytes of the process at its largest."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def results(
    arguments: argparse.Namespace,
    compiling: dict[str, float],
    seconds: dict[str, list[float]],
    memory: dict[str, float],
) -> str:
    """Markdown: settings, then one row a side; the ratio is that of the turns."""
    settings = ", ".join(f"{key} {value}" for key, value in vars(arguments).items())
    lines = [
        settings,
        f"load of the machine: {os.getloadavg()[0]:.2f}\n",
        "| | examples/s | seconds a step, median | fastest | to the end of the first "
        "step, s | peak memory, GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in seconds.items():
        middle = float(np.median(found))
        lines.append(
            f"| {name} | {arguments.batch / middle:.2f} | {middle:.3f} | "
            f"{min(found):.3f} | {compiling[name]:.1f} | {memory[name] / 2**30:.2f} |"
        )
    if "torch" in seconds:
        pairs = zip(seconds["torch"], seconds["ours"], strict=True)
        ratios = sorted(theirs / mine for theirs, mine in pairs)
        lines.append(
            f"\nspeed, ours / torch, turn by turn: median {np.median(ratios):.2f}, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )
    return "\n".join(lines)
