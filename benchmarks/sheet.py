"""Runs all benchmarks for the hardware that it finds, and keeps their sheet.

    bash benchmarks/run.sh --minutes=20

On an accelerator these are the parts of `accelerator.py`, on a CPU those of `peers.py`,
each in a process of its own with a time limit, so that what fails costs no other row.
Rows are appended to `sheet.jsonl` as they are known. Of it are made the tables between
two marks of `RESULTS.md`, with the newest row of everything on every hardware, and the
plot `sheet.png`. What is worse than the last time on the same hardware, by more than
twice the deviation that both showed between their turns, is named.

Exit codes: 0; 1 if a row failed; 2 if a flag is wrong; 3 if something is worse.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import accelerator
from accelerator import HERE, Run, cell

LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "diffusers", "numpy", "pillow", "torch", "prdc"
)  # fmt: skip
BEGIN, END = "<!-- sheet: begin -->", "<!-- sheet: end -->"
WORSE = 2.0  # deviations
LEAST_NOISE = 0.02  # of a row, relative: few turns may agree by chance
LESS_IS_BETTER = ("s", "ms", "s to lower")
COLUMNS = {
    "part": "part",
    "setting": "setting",
    "figure": "figure",
    "unit": "unit",
    "noise": "noise",
    "ratio to the peer": "ratio",
    "TFLOP/s": "tflops",
    "MFU": "mfu",
    "of what the hardware allows": "of_ceiling",
    "peak memory, GiB": "memory_gib",
    "date, commit": "date",
    "note": "note",
}
CEILINGS = Run(
    "ceilings",
    "peers:ceilings",
    60,
    {"matrix": 2048, "copy_mib": 256},
    toy={"matrix": 64, "copy_mib": 1},
)
ON_CPU = (  # the limits are those of two slow cores
    Run(
        "reading",
        "peers:reading",
        120,
        {"images": 500, "size": 256, "workers": 2, "count": 5},
        toy={"images": 64, "count": 2},
    ),
    Run(
        "fine-tuning",
        "peers:finetuning",
        240,
        {"model": "small", "batch": 4, "latents": 32, "rounds": 5, "steps": 2},
    ),
    Run(
        "classifier",
        "peers:classifier",
        150,
        {"model": "wrn16_4", "batch": 128, "rounds": 5, "steps": 1},
    ),
    Run(
        "sampling",
        "peers:sampling",
        240,
        {"model": "small", "batch": 2, "size": 256, "ddim_steps": 10, "rounds": 5,
         "steps": 1},
    ),
    Run(
        "augmentation",
        "peers:augmentation",
        90,
        {"batches": {32: 512, 224: 64}, "workers": 2, "seconds": 1.0, "count": 5},
    ),
    Run(
        "mixing",
        "peers:mixing",
        60,
        {"prompts": 256, "turn": 8192, "batch": 32, "count": 5},
        toy={"prompts": 32, "turn": 64, "count": 2},
    ),
    Run(
        "metrics",
        "peers:comparing",
        90,
        {"images": 5000, "dims": 768, "classes": 10, "count": 5},
    ),
    Run("starting", "peers:starting", 45, {"count": 5}),
    Run(
        "reopening",
        "peers:reopening",
        90,
        {"images": 2000, "model_mib": 16, "count": 5},
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What the benchmarks run on: JAX's platform, and a name."""

    platform: str
    name: str


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    path = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if flags.tables:
        write(flags.out, worse=[])
        return 0
    hardware = find_hardware()
    try:
        runs = selected(flags, hardware)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    limits = sum(run.limit for run in runs) / 60
    print(f"{hardware.name}: at most {min(flags.minutes, limits):.0f} minutes\n")
    if flags.dry_run:
        print("| part | function | arguments | at most, s |\n|---|---|---|---:|")
        for run in runs:
            print(f"| {run.part} | {run.function} | {run.setting} | {run.limit:.0f} |")
        return 0
    flags.out.mkdir(parents=True, exist_ok=True)
    before = read(flags.out)
    code = 1
    with contextlib.suppress(KeyboardInterrupt), Sheet(flags, hardware) as sheet:
        code = accelerator.measure_all(runs, with_logs(flags), sheet)
    found = worse(before, sheet.rows)
    print()
    for line in found or [
        "Nothing is worse than the last time by more than the noise."
    ]:
        print(line)
    if not flags.rehearse:
        write(flags.out, worse=found)
    return code or (3 if found else 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ",".join(run.part for run in (CEILINGS, *ON_CPU))
    parser.add_argument("--minutes", type=float, default=20.0, help="for all (20)")
    parser.add_argument(
        "--only",
        default="",
        help=f"parts: some of {parts}; on an accelerator of "
        f"{','.join(accelerator.PARTS)}",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=HERE,
        help="folder of sheet.jsonl, sheet.png and RESULTS.md (benchmarks)",
    )
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("runs/sheet"))
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument(
        "--tables", action="store_true", help="only write tables and plot again"
    )
    parser.add_argument("--rehearse", action="store_true", help="at a toy size")
    flags = parser.parse_args(arguments)
    if not flags.minutes > 0:
        parser.error(f"--minutes: wanted more than 0, got {flags.minutes:g}")
    return flags


def with_logs(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags of `accelerator.measure_all`, whose folder is that of the logs."""
    flags.logs.mkdir(parents=True, exist_ok=True)
    return argparse.Namespace(
        minutes=flags.minutes, out=flags.logs, rehearse=flags.rehearse, lower=False
    )


def find_hardware() -> Hardware:
    """Asked in another process, which releases an accelerator again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_hardware)


def _hardware() -> Hardware:
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return Hardware("cpu", f"{len(os.sched_getaffinity(0))} cores, {processor()}")
    return Hardware(devices[0].platform, f"{len(devices)} x {devices[0].device_kind}")


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def selected(flags: argparse.Namespace, hardware: Hardware) -> list[Run]:
    """The runs of the chosen parts, of all if none is chosen, with the ceilings first.

    Raises:
      ValueError: a part is unknown, with the message for the user.
    """
    on_cpu = hardware.platform == "cpu"
    first, *others = (
        (CEILINGS, *ON_CPU) if on_cpu else (accelerator.CARD, *accelerator.RUNS)
    )
    known = list(dict.fromkeys(run.part for run in (first, *others)))
    wanted = flags.only.split(",") if flags.only else known
    if unknown := [part for part in wanted if part not in known]:
        raise ValueError(
            f"--only: wanted some of {','.join(known)}, got {','.join(unknown)}. "
            "Correct it."
        )
    runs = [first, *(run for run in others if run.part in wanted)]
    if flags.rehearse:
        return [accelerator.rehearsed(run) for run in runs if run.toy is not None]
    return runs


class Sheet(accelerator.Table):
    """Prints rows, completes them by what the hardware allows, and keeps them."""

    def __init__(self, flags: argparse.Namespace, hardware: Hardware):
        super().__init__((flags.out / "sheet.jsonl").open("a"))
        now = datetime.datetime.now(datetime.UTC)
        self._common = {
            "sheet": now.isoformat(timespec="seconds"),
            "hardware": hardware.name,
            "commit": commit(),
            "versions": versions(),
            "rehearsed": flags.rehearse,
        }
        self._product = self._copy = 0.0  # FLOP/s and bytes/s of the ceilings

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def add(self, run: Run, row: dict[str, Any]) -> None:
        if "figure" in row:
            row = row | {"load": round(os.getloadavg()[0], 2)} | self.limits(run, row)
        super().add(run, row | self._common)

    def limits(self, run: Run, row: dict[str, Any]) -> dict[str, Any]:
        """TFLOP/s, and the part of the ceiling that a row reaches."""
        found = {}
        if run.function == CEILINGS.function and row["unit"] == "TFLOP/s":
            self._product = 1e12 * row["figure"]
        if run.function == CEILINGS.function and row["unit"].startswith("GB/s"):
            self._copy = 1e9 * row["figure"]
        if run.function == accelerator.CARD.function and "tflops" in row:
            self._product = 1e12 * row["tflops"]
        if "flops" in row:
            found["tflops"] = 1e-12 * row["flops"] * row["figure"]
        if "noise" not in row and (spread := noise(row)) is not None:
            found["noise"] = spread
        flops = 1e12 * found.get("tflops", row.get("tflops", 0.0))
        if "ceiling" in row:
            found["of_ceiling"] = row["figure"] / row["ceiling"]
        elif "bytes" in row and self._copy:
            found["of_ceiling"] = row["figure"] * row["bytes"] / self._copy
        elif flops and self._product and run.part not in ("card", "ceilings"):
            found["of_ceiling"] = flops / self._product
        return found


def noise(row: dict[str, Any]) -> float | None:
    """The relative deviation between turns: of the ratios to a peer, or the figures."""
    values = row.get("ratios") or row.get("turns") or ()
    if len(values) < 2:
        return row.get("noise")
    return statistics.stdev(values) / statistics.median(values)


def commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip()
    return ""


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All rows, the oldest first, without rehearsals."""
    file = folder / "sheet.jsonl"
    if not file.exists():
        return []
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    return [row for row in rows if not row.get("rehearsed")]


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["hardware"], row["part"], row["setting"], row.get("unit", "")


def newest(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The newest row with a figure of everything, in the order of the first ones."""
    return {key(row): row for row in rows if "figure" in row}


def worse(
    before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[str]:
    """Sentences of what is worse than the newest earlier row by more than the noise.

    Where both have turns beside a peer the ratio is compared, which other work on the
    machine changes less; otherwise the figure.
    """
    earlier = newest(before)
    found = []
    for name, row in newest(rows).items():
        old = earlier.get(name)
        if old is None:
            continue
        what = "ratio" if "ratios" in row and "ratios" in old else "figure"
        change = row[what] / old[what] - 1
        if what == "figure" and row["unit"] in LESS_IS_BETTER:
            change = old[what] / row[what] - 1
        spread = math.hypot(*(max(noise(x) or 0.0, LEAST_NOISE) for x in (old, row)))
        if change < -WORSE * spread:
            unit = f"x of {row['ratio_to']}" if what == "ratio" else f" {row['unit']}"
            found.append(
                f"Worse: {row['part']}, {row['setting']}: {row[what]:.3g}{unit}, "
                f"{old[what]:.3g} on {old['sheet'][:10]} ({old['commit']}): "
                f"{100 * change:+.0f} %, noise {100 * spread:.0f} %"
            )
    return found


def tables(rows: Sequence[dict[str, Any]], found: Sequence[str]) -> str:
    """Markdown: a table for each hardware, and what is worse."""
    lines = [
        "## The sheet (`run.sh`)",
        "",
        "```bash",
        "bash benchmarks/run.sh",
        "```",
        "",
    ]
    by_hardware: dict[str, list[dict[str, Any]]] = {}
    for row in newest(rows).values():
        by_hardware.setdefault(row["hardware"], []).append(row)
    for hardware, shown in by_hardware.items():
        last = max(shown, key=lambda row: row["sheet"])
        packages = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
        loads = [row["load"] for row in shown if "load" in row]
        lines += [
            f"{hardware}; {packages}. Load of the machine while it ran: "
            f"{min(loads):.1f} to {max(loads):.1f}. Noise: the deviation between "
            "turns, of the ratio where there is a peer.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---|---|---:|---|---:|---|---:|---:|---:|---:|---|---|",
        ]
        lines += [
            f"| {' | '.join(text(row, field) for field in COLUMNS.values())} |"
            for row in shown
        ]
        lines.append("")
    lines += [f"- {line}" for line in found]
    if by_hardware:
        lines += ["", "![Ratio to the peer, and to the hardware](sheet.png)"]
    return "\n".join(lines).strip() + "\n"


def text(row: dict[str, Any], field: str) -> str:
    if field in ("noise", "of_ceiling") and row.get(field) is not None:
        return f"{row[field]:.0%}" if row[field] >= 0.1 else f"{row[field]:.1%}"
    if field == "date":
        return f"{row['sheet'][:10]}, {row['commit']}"
    return cell(row, field)


def write(folder: pathlib.Path, worse: Sequence[str]) -> None:
    """Writes the tables and the plot."""
    rows = read(folder)
    made = f"{BEGIN}\n{tables(rows, worse)}{END}"
    file = folder / "RESULTS.md"
    old = file.read_text("utf-8") if file.exists() else "# Results of the benchmarks\n"
    if BEGIN in old:
        new = old[: old.index(BEGIN)] + made + old[old.index(END) + len(END) :]
    else:
        title, _, rest = old.partition("\n")
        new = f"{title}\n\n{made}\n{rest}"
    replace(file, new.encode())
    if rows:
        plot([*newest(rows).values()], folder / "sheet.png")


def replace(file: pathlib.Path, content: bytes) -> None:
    temporary = file.with_name(f"{file.name}.new")
    temporary.write_bytes(content)
    temporary.rename(file)


def plot(rows: Sequence[dict[str, Any]], file: pathlib.Path) -> None:
    """Two panels: the ratio to the peer with its turns, and the part of the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("ratio", "ratio to the peer (dots: turns)", 1.0),
        ("of_ceiling", "of what the hardware allows", None),
    )
    height = 1.2 + 0.3 * max(sum(k in row for row in rows) for k, _, _ in panels)
    figure, axes = pyplot.subplots(1, 2, figsize=(14, max(height, 2.0)))
    for axis, (field, title, line) in zip(axes, panels, strict=True):
        shown = [row for row in reversed(rows) if field in row]
        places = range(len(shown))  # two machines may have the same label
        axis.barh(places, [row[field] for row in shown], color="#9bb7d4")
        axis.set_yticks(places, [label(row) for row in shown])
        for place, row in enumerate(shown):
            if field == "ratio":
                found = row.get("ratios", [])
                axis.plot(found, [place] * len(found), "k.", markersize=4)
        if line:
            axis.axvline(line, color="#444444", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    temporary = file.with_name(f"{file.name}.new")
    figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)
    temporary.rename(file)


def label(row: dict[str, Any]) -> str:
    return f"{row['part']}: {row['setting']}, {row['hardware']}"


if __name__ == "__main__":
    sys.exit(main())
