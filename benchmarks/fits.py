"""What fits which card: the largest batches, by the memory of compiled programs.

    python benchmarks/fits.py            prints the tables
    python benchmarks/fits.py --write    writes them into docs/scaling.md

Nothing ran. The memory of a program grows with its batch; between two batches that were
compiled, it is taken to be on the line between them, and beyond them on that of the
nearest two. Where one batch was compiled, what is always held is that of the same
program with images of another size, or on the GPUs of another class.
"""

import argparse
import dataclasses
import itertools
import pathlib

from rows import compiled, marks, table, write

HERE = pathlib.Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "scaling.md"
BEGIN, END = marks("fits")
RESERVED = 0.92  # of a GPU's memory: `runtime.set_up`
CODE = 1.0  # GiB of a TPU: that of the kernels, which the rows lack
# Kinds whose programs are the same: GPUs by the kernels of their compute capability.
CLASSES = {
    "9.0": ("h100", "h200"),
    "8.x": ("a100", "l4"),
    "TPU": ("v5e", "v6e", "v5p"),
}
OTHERWISE = {"8.x": "9.0"}  # of which class programs are that were not compiled
CARDS = {  # name -> (class, GiB that are there, of GPUs by nvidia-smi)
    "16 GiB": ("8.x", 15.75),
    "24 GiB, L4 or A10": ("8.x", 22.5),
    "24 GiB, GeForce": ("8.x", 23.9),
    "48 GiB": ("8.x", 47.5),
    "80 GiB, A100": ("8.x", 80.0),
    "80 GiB, H100": ("9.0", 79.6),
    "141 GiB, H200": ("9.0", 140.4),
    "v5e": ("TPU", 15.75),
    "v6e": ("TPU", 31.25),
    "v5p": ("TPU", 95.74),
}
SIZES = (512, 256)
PROGRAMS = {  # what the table calls it -> (program, other settings)
    "full": ("finetune", ""),
    "full, `remat=blocks`": ("finetune", "remat blocks"),
    "LoRA": ("lora", ""),
    "LoRA, `remat=blocks`": ("lora", "remat blocks"),
    "drawn": ("generate", ""),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a program of one chip by its batch.

    Attributes:
      points: (examples, GiB, kind of the chip), from the fewest examples on; two at
        least, of which the first may be that of no example.
    """

    points: tuple[tuple[int, float, str], ...]

    @property
    def compiled(self) -> tuple[tuple[int, float, str], ...]:
        return tuple(point for point in self.points if point[0])

    @property
    def example(self) -> float:
        """GiB of one example more than the largest batch."""
        (fewer, less, _), (more, gib, _) = self.points[-2:]
        return (gib - less) / (more - fewer)

    @property
    def held(self) -> float:
        """GiB of no example, by the line of the largest batches."""
        more, gib, _ = self.points[-1]
        return gib - more * self.example

    def largest(self, room: float) -> int:
        """The largest batch that takes at most `room` GiB; 0: none does."""
        found = 0
        lines = [*itertools.pairwise(self.points)]
        for line in lines:
            (fewer, less, _), (more, gib, _) = line
            count = int(fewer + (room - less) * (more - fewer) / (gib - less))
            if count >= (1 if line == lines[0] else fewer):
                found = count if line == lines[-1] else min(count, more)
        return found


def memory(kinds: str, program: str, others: str, size: int) -> Memory | None:
    """The memory of a program of a class; None if it was not compiled."""
    points = _points(kinds, program, others, size)
    if len(points) > 1:
        return Memory(tuple(points))
    instead = OTHERWISE.get(kinds, kinds)
    if not points:
        return memory(instead, program, others, size) if instead != kinds else None
    if program == "generate":  # the decoder takes more images at once if they are small
        return None
    for other, side in itertools.product((kinds, instead), SIZES):
        line = _points(other, program, others, side)
        if len(line) > 1:
            return Memory(((0, Memory(tuple(line)).held, ""), *points))
    return None


def _points(
    kinds: str, program: str, others: str, size: int
) -> list[tuple[int, float, str]]:
    """Of all chips of a class; of a batch that several have compiled, the first's."""
    found: dict[int, tuple[int, float, str]] = {}
    for row in compiled():
        wanted = (row.program, row.others, row.size) == (program, others, size)
        if wanted and row.chips == 1 and row.kind in CLASSES[kinds]:
            found.setdefault(row.examples, (row.examples, row.gib, row.kind))
    return [found[examples] for examples in sorted(found)]


def tables() -> str:
    """The tables as Markdown."""
    return "\n\n".join("\n".join(lines) for lines in (of_cards(), of_programs())) + "\n"


def of_cards() -> list[str]:
    columns = [(name, size) for name in PROGRAMS for size in SIZES]
    headings = [f"{name}, {size} px" for name, size in columns]
    lines = table(1, "card (GiB usable)", *headings)
    for card, (kinds, there) in CARDS.items():
        room = there - CODE if kinds == "TPU" else RESERVED * there
        cells = [f"{card} ({room:.1f})"]
        for name, size in columns:
            found = memory(kinds, *PROGRAMS[name], size)
            cells.append(f"{found.largest(room):,}" if found else "not compiled")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_programs() -> list[str]:
    lines = table(
        2,
        "program on one chip",
        "GiB in all, by batch (and chip)",
        "always held, GiB",
        "an example more, GiB",
    )
    for kinds, name, size in itertools.product(CLASSES, PROGRAMS, SIZES):
        program, others = PROGRAMS[name]
        points = _points(kinds, program, others, size)
        if not points:
            continue
        shown = ", ".join(f"{count}: {gib:.1f} ({kind})" for count, gib, kind in points)
        found = memory(kinds, program, others, size)
        label = f"`{program}`, {others or 'no remat'}, {size} px, {kinds}"
        if program == "generate":
            label = f"`{program}`, {size} px, {kinds}"
        line = [f"{found.held:.1f}", f"{found.example:.2f}"] if found else ["", ""]
        cells = [label, shown, *line]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    if parser.parse_args().write:
        write(DOCUMENT, "fits", tables())
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
