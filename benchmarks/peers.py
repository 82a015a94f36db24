"""The benchmarks beside another program, as rows of `sheet.py`, for a CPU.

A row may have, besides those of `accelerator.py`:

    turns    figures of each turn
    ratios   ours over the peer's speed, of turns taken together
    flops    that one unit of the figure takes, and
    bytes    that it has to move: of these follows what the hardware allows at most
    ceiling  that, where it is known in another way, in the unit of the figure
"""

import argparse
import importlib.util
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import turns


def row(
    setting: str,
    figures: Sequence[float],
    unit: str,
    *,
    theirs: Sequence[float] = (),
    peer: str = "",
    faster_is_less: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A row of figures of several turns.

    Args:
      setting: what was measured.
      figures: ours, a number for each turn.
      unit: of them.
      theirs: the peer's, of the same turns.
      peer: its name.
      faster_is_less: the figures are times, not rates.
      **more: fields of the row.
    """
    found = {"setting": setting, "figure": float(np.median(figures)), "unit": unit}
    found["turns"] = [float(x) for x in figures]
    if len(theirs):
        pairs = zip(figures, theirs, strict=True)
        ratios = [(b / a if faster_is_less else a / b) for a, b in pairs]
        found |= {"ratio": float(np.median(ratios)), "ratios": ratios}
        found["ratio_to"] = peer
    return found | more


def ceilings(*, matrix: int, copy_mib: int) -> Iterator[dict]:
    """What the processor does at best: a matrix product in float32, and a copy.

    Args:
      matrix: side of the matrices.
      copy_mib: bytes that are copied, in MiB.
    """
    import jax
    import measure

    left, right = jax.random.normal(jax.random.key(0), (2, matrix, matrix))
    seconds = rounds(measure.repeated(jax.jit(jax.numpy.matmul), (left, right)))
    rates = [2e-12 * matrix**3 / x for x in seconds]
    yield row(f"float32 product of {matrix} x {matrix} matrices", rates, "TFLOP/s")
    source = np.ones(copy_mib << 20, np.uint8)
    target = np.empty_like(source)
    seconds = rounds(lambda times: [np.copyto(target, source) for _ in range(times)])
    rates = [2e-9 * source.nbytes / x for x in seconds]
    yield row(f"copy of {copy_mib} MiB", rates, "GB/s, both ways")


def rounds(run: Callable[[int], Any], count: int = 5) -> list[float]:
    """Seconds of a call in each of some rounds, once it was called."""
    once = seconds_of(lambda: run(1))
    times = max(round(turns.SECONDS / count / once), 1)
    return [seconds_of(lambda: run(times)) / times for _ in range(count)]


def against_torch(
    name: str, sides: Mapping[str, Callable], arguments: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """The row of a benchmark whose sides take turns."""
    compiling, seconds, memory = turns.in_turns(sides, arguments)
    rates = {
        key: [arguments.batch / x for x in found] for key, found in seconds.items()
    }
    return row(
        name,
        rates["ours"],
        "examples/s",
        theirs=rates.get("torch", ()),
        peer="PyTorch",
        memory_gib=memory["ours"] / 2**30,
        compile_seconds=compiling["ours"],
        **more,
    )


def without_torch(sides: dict[str, Callable]) -> dict[str, Callable]:
    """The sides that can run here."""
    if importlib.util.find_spec("torch") is None:
        sides.pop("torch")
    return sides


def finetuning(**options: Any) -> Iterator[dict]:
    """The fine-tuning step. Args: those of `finetune_step.py`."""
    import finetune_step
    import measure
    import programs

    given = argparse.Namespace(
        precision="float32", attention="auto", remat="none", **options
    )
    sides = without_torch({"ours": finetune_step.ours, "torch": finetune_step.torch_s})
    name = f"UNet {given.model}, batch {given.batch}, {given.latents} x {given.latents}"
    program = programs.Options(family=given.model, size=8 * given.latents)
    flops = measure.flops("finetune", program)
    yield against_torch(name, sides, given, flops=flops)


def sampling(**options: Any) -> Iterator[dict]:
    """Drawing images. Args: those of `sample.py`."""
    import architectures
    import sample

    given = argparse.Namespace(attention="auto", **options)
    sides = without_torch({"ours": sample.ours, "torch": sample.torch_s})
    name = (
        f"{given.model}, batch {given.batch}, {given.size} px, {given.ddim_steps} DDIM"
    )
    with tempfile.TemporaryDirectory() as folder:
        given.folder = pathlib.Path(folder)
        architectures.write(given.folder, given.model)
        found = against_torch(name, sides, given)
        if "torch" in sides:
            sample.compare(given)
    yield found | {"unit": "images/s"}


def classifier(**options: Any) -> Iterator[dict]:
    """A classifier's step. Args: those of `classifier_step.py`."""
    import classifier_step

    given = argparse.Namespace(precision="float32", size=32, **options)
    sides = without_torch(
        {"ours": classifier_step.ours, "torch": classifier_step.theirs}
    )
    flops = 3 * classifier_step.forward_flops(classifier_step.options_of(given))
    yield against_torch(
        f"{given.model}, batch {given.batch}", sides, given, flops=flops
    )


def augmentation(
    *, batches: Mapping[int, int], workers: int, seconds: float, count: int
) -> Iterator[dict]:
    """RandAugment beside Pillow in processes. Args: those of `augment.py`."""
    import multiprocessing

    import augment

    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        for side, batch in batches.items():
            ours, mine, theirs = augment.ours(side, batch), [], []
            for _ in range(count):
                mine.append(augment.rate(ours, batch, seconds))
                work = [(side, seconds)] * workers
                theirs.append(sum(pool.map(augment.rate_of_pillow, work)))
            peer = f"Pillow in {workers} processes"
            name = f"RandAugment, {side} px, batch {batch}"
            moved = 2 * 3 * side**2  # read, and written
            yield row(name, mine, "images/s", theirs=theirs, peer=peer, bytes=moved)


def mixing(*, prompts: int, turn: int, batch: int, count: int) -> Iterator[dict]:
    """Mixing text states beside a loop in NumPy. Args: those of `mix.py`."""
    import mix

    from mvc_jax.training import runtime

    runtime.set_up("")
    work = mix.Turn(prompts, turn, batch)
    work.run()
    mine, theirs = [], []
    for _ in range(count):
        mine.append(len(work.made) / seconds_of(work.run))
        theirs.append(len(work.made) / seconds_of(work.run_loop))
    moved = 2 * 4 * mix.SHAPE["length"] * mix.SHAPE["width"]
    name = f"text states of 77 x 768, batch {batch}"
    yield row(name, mine, "states/s", theirs=theirs, peer="NumPy, a loop", bytes=moved)


def seconds_of(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def reading(*, images: int, size: int, workers: int, count: int) -> Iterator[dict]:
    """Reading JPEG files beside a `DataLoader`. Args: those of `read_images.py`."""
    import read_images

    sides = {
        "ours": (read_images.read_ours, 0),
        "torch": (read_images.read_torch, workers),
    }
    sides = without_torch(sides)
    rates = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        paths = read_images.make(pathlib.Path(folder), images)
        for _ in range(count):
            for name, (read, option) in sides.items():
                found = read_images.measure(read, folder, images, size, option)
                rates[name].append(found[0])
        seconds = read_images.seconds_of_pillow(paths[:50], size)
    yield row(
        f"JPEG of 512 px to {size} px",
        rates["ours"],
        "images/s",
        theirs=rates.get("torch", ()),
        peer="PyTorch's DataLoader",
        ceiling=len(os.sched_getaffinity(0)) / seconds,
        note="at most: Pillow's decoding and resizing alone",
    )


def comparing(*, images: int, dims: int, classes: int, count: int) -> Iterator[dict]:
    """All metrics of two sets beside `prdc`'s four. Args: those of `metrics.py`."""
    import metrics

    sets = [metrics.drawn(images, dims, seed, 0.05 * seed) for seed in (0, 1)]
    peer, theirs = importlib.util.find_spec("prdc") is not None, []
    metrics.everything(*sets, classes)
    mine = []
    for _ in range(count):
        mine.append(seconds_of(lambda: metrics.everything(*sets, classes)))
        if peer:
            theirs.append(seconds_of(lambda: metrics.by_prdc(*sets)))
    yield row(
        f"all metrics of two sets of {images:,} x {dims}",
        mine,
        "s",
        theirs=theirs,
        peer="prdc, its four metrics",
        faster_is_less=True,
        memory_gib=metrics.peak(),
        note="" if peer else "prdc is not installed",
    )


def starting(*, count: int) -> Iterator[dict]:
    """The command line where nothing is to do. Args: starts of each case."""
    import startup

    cases = ["`--help`", "a mistyped field", "one that the last stage refuses"]
    with tempfile.TemporaryDirectory() as new:
        for case in cases:
            taken = [startup.start(case, new=new, finished="") for _ in range(count)]
            yield row(case, taken, "s")


def reopening(*, images: int, model_mib: int, count: int) -> Iterator[dict]:
    """A finished workdir with many images. Args: those of `reopen.py`."""
    import reopen
    from etils import epath

    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        reopen.make(workdir, images, model_mib)
        taken = [reopen.start(workdir) for _ in range(count + 1)][1:]
    yield row(f"nothing to do, {images:,} images", taken, "s")
