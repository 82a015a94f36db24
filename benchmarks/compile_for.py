"""Compiles the programs of the stages for accelerators that are not here.

    python benchmarks/compile_for.py --target=h100 --program=finetune --batch=32
    python benchmarks/compile_for.py --target=v5e --devices=8 --program=generate
    python benchmarks/compile_for.py --all --target=h100,v5e --out=runs/compiled

XLA compiles for a device from its description, and the compiled program tells what it
will hold, move and call. Nothing runs: seconds are those of the roofline, the larger of
FLOPs over the peak in bfloat16 and bytes over the bandwidth of memory, and no program
reaches them. A row is printed as soon as it is known, and with `--out` appended to
`compiled.jsonl`; the text of each program can be kept beside it by `--text`. On TPUs
most of the time goes into the code of each kernel: `--no-code` stops before, when
kernels and buffers are known, so that its memory lacks that of the code.

The compilers are packages, in an environment of their own:

    pip install -c requirements.lock -e '.[aot-tpu]'         # v5e, v5p, v6e
    pip install -c requirements-cuda.lock -e '.[aot-gpu]'    # h100, ..., l4; 5 GB
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import targets

from mvc_jax import augment
from mvc_jax.errors import UserError
from mvc_jax.models.classifiers import VARIANTS

GIB = 2**30
_PROGRAMS = ("finetune", "lora", "generate", "encode", "classify", "pretrain")
_FAMILIES = ("sd15", "sd21", "sdxl", "small", "tiny")
_REMAT = ("none", "blocks", "full")
_ATTENTION = ("auto", "xla", "mapped", "cudnn", "pallas")
_COLUMNS = {  # how each is aligned
    "program": "---",
    "device": "---",
    "settings": "---",
    "compiled in, s of the processor": "---:",
    "memory, GiB: arguments + temporary = peak of all": "---",
    "TFLOP": "---:",
    "GB accessed": "---:",
    "roofline, ms, and its bound": "---",
    "kernels": "---",
    "collectives": "---",
    "copies and transposes, GB, and where most come from": "---",
}
_LIBRARIES = {
    "__cublas$lt$matmul": "cuBLAS",
    "__cublas$gemm": "cuBLAS",
    "__cudnn$convBackwardFilter": "conv. kernel gradient",
    "__cudnn$convBackwardInput": "conv. input gradient",
    "__cudnn$convBiasActivationForward": "conv.",
    "__cudnn$convForward": "conv.",
    "__cudnn$fmhaSoftmax": "attention",
    "__cudnn$fmhaSoftmaxBackward": "attention gradient",
    "convolution": "conv.",
    "tpu_custom_call": "Pallas",
}
# Of TPUs, which compute nothing.
_NO_KERNELS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")


def main() -> None:
    arguments = parse()
    try:
        chosen = [targets.find(name) for name in arguments.target.split(",")]
        if arguments.all:
            sheet(arguments, chosen)
            return
        if arguments.no_code and chosen[0].gpu:
            raise UserError(
                "--no-code",
                wanted="a TPU: programs of GPUs compile in two minutes",
                got=f"--target={chosen[0].name}",
                fix="Leave it out.",
            )
        print(header(), flush=True)
        row = compile_one(arguments, chosen[0])
    except UserError as error:
        sys.exit(str(error))
    print(line(row), flush=True)
    record(arguments, row)
    if arguments.no_code:
        os._exit(0)  # the compiler cannot be stopped


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="h100", help="of devices.toml")
    parser.add_argument("--devices", type=_from(1), default=1)
    parser.add_argument(
        "--fsdp", type=_from(1), default=1, help="devices a copy of weights"
    )
    parser.add_argument("--program", choices=_PROGRAMS, default="finetune")
    parser.add_argument("--family", choices=_FAMILIES, default="sd15")
    parser.add_argument(
        "--batch", type=_from(0), default=0, help="on all devices; 0: the default"
    )
    parser.add_argument("--size", type=_from(1), default=512, help="pixels")
    parser.add_argument("--remat", choices=_REMAT, default="none")
    parser.add_argument("--accumulate", type=_from(1), default=1)
    parser.add_argument("--ema", type=float, default=0.0, help="decay; 0: no average")
    parser.add_argument("--attention", choices=_ATTENTION, default="auto")
    parser.add_argument("--preset", choices=("", "fast"), default="")
    parser.add_argument(
        "--classifier", choices=VARIANTS, default="wrn28_10", metavar="NAME"
    )
    parser.add_argument("--classifier-size", type=_from(1), default=32, help="pixels")
    parser.add_argument(
        "--policy",
        choices=augment.NAMES,
        default="randaugment",
        metavar="NAME",
        help="of the classifier",
    )
    parser.add_argument("--seeds", type=_from(1), default=1, help="side by side")
    parser.add_argument(
        "--no-code", action="store_true", help="stop before it, on TPUs"
    )
    parser.add_argument("--all", action="store_true", help="the sheet of the targets")
    parser.add_argument("--limit", type=int, default=1200, help="s, a row of --all")
    parser.add_argument("--out", type=pathlib.Path, help="folder of compiled.jsonl")
    parser.add_argument("--text", type=pathlib.Path, help="file for the program's text")
    return parser.parse_args()


def _from(least: int) -> Callable[[str], int]:
    """The type of a flag: whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"wanted a whole number from {least} on, got {text}"
            )
        return int(text)

    return parse


def compile_one(arguments: argparse.Namespace, target: targets.Target) -> dict:
    """Compiles one program; returns its row."""
    dumped = None
    if arguments.no_code:
        dumped = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    targets.set_environment(dumped.name if dumped else "")
    import compiled
    import hlo
    import programs

    known = {field.name for field in dataclasses.fields(programs.Options)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    options = programs.Options(**given)
    mesh = targets.mesh(target, arguments.devices, arguments.fsdp)
    program = programs.build(arguments.program, options, mesh)
    row = {
        "target": target.name,
        "program": arguments.program,
        "devices": arguments.devices,
        "settings": settings(arguments, program.examples),
        "memory": target.memory,
    }
    plain = dataclasses.replace(options, attention="xla")
    # On one device: what a `shard_map` computes would count once, not on each device.
    alone = programs.build(arguments.program, plain, targets.mesh(target, 1))
    flops = alone.flops() / mesh.size
    lowered = program.function.lower(*program.arguments)
    try:
        done = compiled.compile_(lowered, pathlib.Path(dumped.name) if dumped else None)
    except compiled.TooLarge as error:
        return row | {"error": f"does not fit: {error}"}
    finally:
        if dumped:
            dumped.cleanup()
    if arguments.text:
        arguments.text.write_text(done.text)
    found = hlo.summary(hlo.Module(done.text))
    moved = sum(size for _, size in found["collectives"].values())
    times = {
        "FLOPs": flops / target.peak,
        "memory": found["bytes"] / target.bandwidth,
        "interconnect": moved / target.interconnect,
    }
    return {
        **row,
        **done.fields(),
        "fits": done.arguments + done.temporary <= target.memory,
        "flops": flops,
        "roofline_seconds": max(times.values()),
        "bound": max(times, key=times.get),
        **found,
    }


def settings(arguments: argparse.Namespace, examples: int) -> str:
    """What differs from the defaults, and the batch."""
    shown = [f"batch {examples}"]
    if arguments.program == "classify":
        shown += [arguments.classifier, arguments.policy]
        shown += [f"{arguments.classifier_size} px"]
        shown += [f"{arguments.seeds} seeds"] if arguments.seeds > 1 else []
    else:
        shown += [arguments.family, f"{arguments.size} px"]
    if arguments.fsdp > 1:
        shown.append(f"fsdp {arguments.fsdp}")
    defaults = {"remat": "none", "accumulate": 1, "ema": 0.0, "attention": "auto"}
    defaults["preset"] = ""
    for name, default in defaults.items():
        if getattr(arguments, name) != default:
            shown.append(f"{name} {getattr(arguments, name)}")
    return ", ".join(shown)


# What the sheet holds for every target, what compiles soonest first: the sizes that
# the stages take by default, and pairs of batches, whose difference is what an example
# takes (fits.py).
_SHEET = (
    {"program": "encode"},
    {"program": "encode", "size": 256},
    {"program": "classify", "batch": 128},
    {"program": "generate"},
    {"program": "generate", "batch": 4},
    {"program": "generate", "size": 256},
    {"program": "generate", "batch": 64, "size": 256},
    {"program": "finetune", "batch": 8},
    {"program": "finetune", "batch": 32},
    {"program": "finetune", "batch": 8, "size": 256},
    {"program": "finetune", "batch": 50, "size": 256},
    {"program": "finetune", "batch": 8, "remat": "blocks"},
    {"program": "finetune", "batch": 50, "remat": "blocks"},
    {"program": "finetune", "batch": 50, "remat": "blocks", "size": 256},
    {"program": "lora", "batch": 8},
    {"program": "lora", "batch": 32},
    {"program": "lora", "batch": 50, "size": 256},
    {"program": "lora", "batch": 8, "remat": "blocks"},
    {"program": "lora", "batch": 32, "remat": "blocks"},
    {"program": "lora", "batch": 50, "remat": "blocks", "size": 256},
)


def sheet(arguments: argparse.Namespace, chosen: list[targets.Target]) -> None:
    """Compiles the sheet, each program in a process of its own: compilers crash."""
    print(header(), flush=True)
    for target in chosen:
        for options in _SHEET:
            flags = [f"--{key}={value}" for key, value in options.items()]
            command = [sys.executable, __file__, f"--target={target.name}", *flags]
            if arguments.no_code and not target.gpu:
                command.append("--no-code")
            if arguments.out:
                command.append(f"--out={arguments.out}")
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=arguments.limit
                )
                reason = _reason(done)
            except subprocess.TimeoutExpired:
                reason = f"not compiled: more than {arguments.limit} s"
            if not reason:
                print(done.stdout.splitlines()[-1], flush=True)
                continue
            row = {"target": target.name, "devices": 1, **options}
            row |= {"settings": " ".join(flags[1:]), "error": reason}
            print(line(row), flush=True)
            record(arguments, row)


def _reason(done: subprocess.CompletedProcess) -> str:
    """Why a process failed, in one line; "" if it did not."""
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"does not compile: the compiler crashed ({name})"
    lines = done.stderr.strip().splitlines() or ["no message"]
    return f"does not compile: {lines[-1][:200]}"


def header() -> str:
    return f"| {' | '.join(_COLUMNS)} |\n|{'|'.join(_COLUMNS.values())}|"


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    cells = [row["program"], f"{row['devices']} {row['target']}", row["settings"]]
    if "error" in row:
        cells += ["", row["error"]]
        return f"| {' | '.join(cells + [''] * (len(_COLUMNS) - len(cells)))} |"
    held, new = row["arguments"] / GIB, row["temporary"] / GIB
    memory = f"{held:.1f} + {new:.1f} = {held + new:.1f} of {row['memory'] / GIB:.1f}"
    memory += "" if row["fits"] else ": does not fit"
    memory += ", without code" if row["code"] is None else ""
    moved = [f"{name} {size / 1e9:.1f}" for name, size in _large(row["moves"])]
    origins = [_layer(name) for name, _ in _large(row["origins"])]
    cells += [
        f"{row['processor_seconds']:.0f}",
        memory,
        f"{row['flops'] / 1e12:,.2f}",
        f"{row['bytes'] / 1e9:,.0f}",
        f"{1e3 * row['roofline_seconds']:,.0f}, {row['bound']}",
        ", ".join(_kernels(row["kernels"])),
        ", ".join(
            f"{count:,.0f} {name}, {size / 1e9:.2f} GB"
            for name, (count, size) in row["collectives"].items()
        ),
        "; ".join(filter(None, (", ".join(moved), ", ".join(dict.fromkeys(origins))))),
    ]
    return f"| {' | '.join(cells)} |"


def _kernels(counts: dict[str, float]) -> list[str]:
    """Kernels and how often they run, those of one kind and dtype as one."""
    found: dict[str, float] = collections.Counter()
    for name, count in counts.items():
        kind, _, dtype = name.partition(" ")
        if " " in dtype:  # "matrix product bf16"
            kind, _, dtype = name.rpartition(" ")
        if kind not in _NO_KERNELS and not kind.startswith("AsyncCollective"):
            found[f"{_LIBRARIES.get(kind, kind)} {dtype}"] += count
    return [f"{count:,.0f} {name}" for name, count in found.items()]


def _large(sizes: dict[str, float]) -> list[tuple[str, float]]:
    """Those of 0.05 GB and more, as the table rounds."""
    return [(name, size) for name, size in sizes.items() if size > 5e7]


def _layer(origin: str) -> str:
    """The last two names of a layer or a parameter."""
    keys = re.findall(r"\['(\w+)'\]", origin.replace("\\'", "'"))
    return "/".join(keys[-2:]) or origin


def record(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Appends a row to `compiled.jsonl` in `--out`, if it is given."""
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "compiled.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
