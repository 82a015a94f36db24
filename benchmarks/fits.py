"""What fits which card: the largest batches, by the memory of compiled programs.

    python benchmarks/fits.py            prints the tables
    python benchmarks/fits.py --write    writes them into docs/scaling.md

Nothing ran. The memory of a program grows with its batch; between two batches that were
compiled, it is taken to be on the line between them, and beyond them on that of the
nearest two. Where one batch was compiled, what is always held is that of the same
program with images of another size, or on the GPUs of another class. Where only images
of another size were, examples take memory in proportion to their pixels.
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
      estimated: by images of another size.
      least: GiB of an example more than the largest batch, at least.
    """

    points: tuple[tuple[int, float, str], ...]
    estimated: bool = False
    least: float = 0.0

    @property
    def example(self) -> float:
        """GiB of one example more than the largest batch."""
        (fewer, less, _), (more, gib, _) = self.points[-2:]
        return max((gib - less) / (more - fewer), self.least)

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
                found = min(count, more)
        more, gib, _ = self.points[-1]
        return found if gib > room else int(more + (room - gib) / self.example)

    def of_size(self, size: int, compiled: int) -> "Memory":
        """That of images with a side of `size` pixels, by those of `compiled`."""
        more, gib, kind = self.points[-1]
        more = round(more * (compiled / size) ** 2)
        return Memory(((0, self.held, kind), (more, gib, kind)), estimated=True)


def memory(kinds: str, program: str, others: str, size: int) -> Memory | None:
    """The memory of a program of a class; None if it was not compiled."""
    points = _points(kinds, program, others, size)
    (side,) = (side for side in SIZES if side != size)
    line = _points(kinds, program, others, side)
    # The decoder takes more images at once if they are small.
    other = Memory(tuple(line)) if len(line) > 1 and program != "generate" else None
    if len(points) > 1:  # of small batches the line is flatter: gradients outlive them
        least = other.example * (size / side) ** 2 if other else 0.0
        return Memory(tuple(points), least=least)
    instead = OTHERWISE.get(kinds, kinds)
    if not points and instead != kinds:
        return memory(instead, program, others, size)
    if not points:
        return other and other.of_size(size, side)
    if not other and instead != kinds:
        other = memory(instead, program, others, size)
    return other and Memory(((0, other.held, ""), *points))


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
            cells.append(_largest(kinds, *PROGRAMS[name], size, room))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _largest(kinds: str, program: str, others: str, size: int, room: float) -> str:
    """The largest batch, as a cell of the table; ~: estimated by another size."""
    if found := memory(kinds, program, others, size):
        return f"{'~' if found.estimated else ''}{found.largest(room):,}"
    points = [
        point
        for same in (kinds, OTHERWISE.get(kinds, kinds))
        for point in _points(same, program, others, size)
        if point[1] <= room
    ]
    return f"at least {points[-1][0]}" if points else "not compiled"


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
