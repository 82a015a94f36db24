"""Runs the sides of a benchmark alternately, each in its own process.

A side is a function of the parsed arguments. It compiles, takes one step and returns
`step(times)` and `peak()`, in bytes. This module reads the arguments `rounds` (turns of
each side), `steps` (steps of a turn) and `batch`.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

SECONDS, ROUNDS = 3.0, 5  # of `seconds_per_call`
_rounds: list[float] = []  # the seconds of each round of its last call


def in_turns(
    sides: Mapping[str, Callable], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, float]]:
    """Measures every side.

    Returns:
      by side: seconds until the first step ended, seconds per step of each turn, and
      peak memory in bytes.
    """
    with contextlib.ExitStack() as stack:
        turns = {
            name: stack.enter_context(in_process(side, arguments))
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
    """Whether JAX has an accelerator; queried in another process, which releases it."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_backend) != "cpu"


def _backend() -> str:
    import jax

    return jax.default_backend()


@contextlib.contextmanager
def in_process(side: Callable, arguments: argparse.Namespace) -> Iterator[Callable]:
    """Starts `side` in a new process; yields a function that gets its next number."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, arguments))
    process.start()
    there.close()

    def turn() -> float:
        here.send("next")
        return here.recv()

    try:
        yield turn
    finally:
        here.close()
        process.join()


def _serve(pipe, side: Callable, arguments: argparse.Namespace) -> None:
    """Answers each message: seconds to the first step, of each turn; peak bytes."""
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


def seconds_per_call(run: Callable[[int], None]) -> float:
    """Median over some rounds, of about three seconds in all, of a call's seconds.

    Args:
      run: makes so many calls, and waits for them; it has been called before, so that
        nothing compiles.
    """

    def seconds(times: int) -> float:
        began = time.perf_counter()
        run(times)
        return (time.perf_counter() - began) / times

    first = seconds(1)
    rounds = min(max(round(SECONDS / first), 1), ROUNDS)
    times = max(round(SECONDS / rounds / first), 1)
    _rounds[:] = [seconds(times) for _ in range(rounds)]
    return float(np.median(_rounds))


def noise() -> float | None:
    """The relative deviation of the rounds of the last `seconds_per_call`."""
    if len(_rounds) < 2:
        return None
    return float(np.std(_rounds, ddof=1) / np.median(_rounds))


def peak() -> float:
    """Peak memory in bytes, of JAX's device or, on a CPU, of the process."""
    import jax

    if jax.default_backend() == "cpu":
        return resident()
    return float(jax.devices()[0].memory_stats()["peak_bytes_in_use"])


def resident() -> float:
    """Peak resident memory of the process in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def results(
    arguments: argparse.Namespace,
    compiling: dict[str, float],
    seconds: dict[str, list[float]],
    memory: dict[str, float],
) -> str:
    """A Markdown table with a row per side; ratios are of turns taken together."""
    settings = ", ".join(f"{key} {value}" for key, value in vars(arguments).items())
    lines = [
        settings,
        f"machine load: {os.getloadavg()[0]:.2f}\n",
        "| | examples/s | seconds per step, median | fastest | seconds until the first "
        "step ended | peak memory, GiB |",
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
