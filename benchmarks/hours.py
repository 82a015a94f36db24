"""Hours and dollars to enlarge a dataset three times: bounds, not measurements.

    python benchmarks/hours.py            prints the tables
    python benchmarks/hours.py --write    writes them into docs/scaling.md

Seconds are the rooflines of the programs that `compile_for.py` compiled, as they stand
in `RESULTS.md`: nothing can be faster, and nothing of it ran. Prices are those of
`prices.toml`. Counted are `encode`, `finetune` and `generate`; not counted are
captions, classifiers, metrics, compilation, and the time to get and set up a machine.
"""

import argparse
import dataclasses
import math
import pathlib
import tomllib

import targets
from rows import compiled, marks, peak, table, write

HERE = pathlib.Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "scaling.md"
BEGIN, END = marks("hours")
PER_IMAGE = 3
STEPS, BATCH = 1000, 50  # of `finetune`, the defaults
FAST = 46 / 150  # rows of the UNet with preset=fast, of those with 50 steps of DDIM
GRADIENTS = 3.44e9  # bytes in float32 that a step sums (compiled, 8 H100)
FIXED = 59e9  # bytes of a step besides those of its examples (8 H100: 64 GB with one)
DATASETS = {  # name -> (training images, pixels)
    "CIFAR-100, 256": (50_000, 256),
    "Brain Tumor MRI, 512": (5_022, 512),
    "ImageNet, 256": (1_281_167, 256),
    "ImageNet, 512": (1_281_167, 512),
}
MACHINES = {  # name -> (kind, chips)
    "v5e-8": ("v5e", 8),
    "v5e-16": ("v5e", 16),
    "v5p-8 (4 chips)": ("v5p", 4),
    "v6e-8": ("v6e", 8),
    "8 x H100": ("h100", 8),
    "2 x 8 x H100": ("h100", 16),
    "8 x H200": ("h200", 8),
}
SAME_CHIP = {"h200": "h100"}  # with another memory


def seconds(program: str, kind: str, size: int) -> tuple[float, str]:
    """The bound of an example on one chip, and of what it is: "" or a letter.

    a: as compiled for the same chip with another memory; b: compiled at another size,
    or for another kind, whose FLOPs are divided by the peak.
    """
    of_program = [
        row for row in compiled() if row.program == program and row.chips == 1
    ]
    for source, mark in ((kind, ""), (SAME_CHIP.get(kind), "a")):
        rows = [x for x in of_program if x.kind == source and x.size == size]
        if rows:
            return min(row.seconds(kind) for row in rows), mark
    of_size = [x for x in of_program if x.size == size and x.plain]
    if of_size:
        return min(x.tflop / x.examples for x in of_size) / peak(kind), "b"
    other = min((x for x in of_program if x.plain), key=lambda x: x.tflop / x.examples)
    scale = (size / other.size) ** 2
    return scale * other.tflop / other.examples / peak(kind), "b"


@dataclasses.dataclass(frozen=True)
class Hours:
    """Hours of a machine's time for the stages of a dataset, and of what they are."""

    encode: float
    finetune: float
    generate: float
    marks: str

    @property
    def all(self) -> float:
        return self.encode + self.finetune + self.generate


def hours(kind: str, chips: int, images: int, size: int) -> Hours:
    """The bounds on so many chips; of a step also its sum of gradients."""
    encode, mark_1 = seconds("encode", kind, size)
    example, mark_2 = seconds("finetune", kind, size)
    image, mark_3 = seconds("generate", kind, size)
    target = targets.descriptions()[kind]
    # A sum passes each chip twice, but for its own part; `interconnect` is both ways.
    wire = 2 * (chips - 1) / chips * GRADIENTS / (target["interconnect"] * 1e9 / 2)
    step = max(
        math.ceil(BATCH / chips) * example, FIXED / (target["bandwidth"] * 1e9), wire
    )
    return Hours(
        encode=images * encode / chips / 3600,
        finetune=STEPS * step / 3600,
        generate=PER_IMAGE * images * image / chips / 3600,
        marks="".join(sorted({mark_1, mark_2, mark_3} - {""})),
    )


def prices() -> dict[str, dict]:
    return tomllib.loads((HERE / "prices.toml").read_text("utf-8"))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def tables() -> str:
    """The tables as Markdown."""
    parts = (of_datasets(), of_chips(), of_several_chips())
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def of_datasets() -> list[str]:
    lines = table(
        2,
        "dataset, px",
        "machine",
        "`encode`, `finetune`, minutes",
        "`generate`, hours",
        "on demand, $",
        "spot, $",
        "`preset=fast`, hours",
        "on demand, $",
        "spot, $",
    )
    costs = prices()
    for name, (images, size) in DATASETS.items():
        for machine, (kind, chips) in MACHINES.items():
            found = hours(kind, chips, images, size)
            fast = found.all - (1 - FAST) * found.generate
            first = 60 * (found.encode + found.finetune)
            cells = [name, machine + marked(found.marks), number(first)]
            for all_hours, generate in (
                (found.all, found.generate),
                (fast, FAST * found.generate),
            ):
                cells.append(number(generate))
                for price in ("dollars", "spot"):
                    cells.append(number(all_hours * chips * costs[kind][price]))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def marked(marks: str) -> str:
    return f" ({marks})" if marks else ""


def of_chips() -> list[str]:
    lines = table(
        2,
        "chip",
        "where",
        "an hour, on demand, $",
        "spot, $",
        "an image of 512 px, s",
        "images for a dollar, on demand",
        "spot",
    )
    for kind, price in prices().items():
        image, mark = seconds("generate", kind, 512)
        cells = [
            kind + marked(mark),
            price["where"],
            f"{price['dollars']:.2f}",
            f"{price['spot']:.2f}",
            f"{image:.3f}",
            number(3600 / image / price["dollars"]),
            number(3600 / image / price["spot"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_several_chips() -> list[str]:
    lines = [
        "| program | chips | examples | memory of one, GiB | sent and received |",
        "|---|---|---:|---|---|",
    ]
    for row in compiled():
        if row.chips > 1:
            cells = [
                f"`{row.program}`, {row.size} px",
                f"{row.chips} {row.kind}",
                f"{row.examples}",
                row.memory,
                row.collectives or "nothing",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    flags = parser.parse_args()
    if not flags.write:
        print(tables(), end="")
        return
    write(DOCUMENT, "hours", tables())


if __name__ == "__main__":
    main()
