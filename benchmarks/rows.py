"""The programs that `compile_for.py` compiled, as they stand in `RESULTS.md`."""

import dataclasses
import functools
import pathlib
import re

import targets

from mvc_jax.training import throughput

FILE = pathlib.Path(__file__).with_name("RESULTS.md")
_BATCH = re.compile(r"batch (\d+), sd15, (\d+) px(?:, (.*))?")
_MEMORY = re.compile(r"([\d.]+) of [\d.]+")


@dataclasses.dataclass(frozen=True)
class Row:
    """A program of Stable Diffusion 1.5 that was compiled.

    Attributes:
      program: its name.
      chips: how many there are.
      kind: of these.
      examples: of a call, on all chips.
      size: of the images in pixels.
      others: its other settings, as the table says them.
      tflop: of a call and chip.
      gigabytes: accessed, of a call and chip.
      memory: what the table says of it.
      collectives: what the table says of them.
    """

    program: str
    chips: int
    kind: str
    examples: int
    size: int
    others: str
    tflop: float
    gigabytes: float
    memory: str
    collectives: str

    @property
    def plain(self) -> bool:
        """Whether no activations are recomputed."""
        return "remat" not in self.others

    @property
    def gib(self) -> float:
        """Memory of one chip: arguments and everything else."""
        return float(_MEMORY.search(self.memory)[1])

    def seconds(self, kind: str) -> float:
        """The bound of an example on one chip, by FLOPs and by bytes."""
        target = targets.descriptions()[kind]
        by_flops = self.tflop / peak(kind)
        by_bytes = self.gigabytes / target["bandwidth"]
        return max(by_flops, by_bytes) * self.chips / self.examples


def peak(kind: str) -> float:
    """TFLOP/s of a kind in bfloat16."""
    return throughput.peak_tflops(targets.descriptions()[kind]["kind"])


def read(text: str) -> list[Row]:
    """The rows of the tables of compiled programs."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        device = re.fullmatch(r"(\d+) (\w+)", cells[1]) if len(cells) > 9 else None
        batch = device and _BATCH.fullmatch(cells[2])
        if not batch:
            continue
        tflop, gigabytes = (
            float(cell.removeprefix("at least ").replace(",", ""))
            for cell in cells[5:7]
        )
        found.append(
            Row(
                program=cells[0],
                chips=int(device[1]),
                kind=device[2],
                examples=int(batch[1]),
                size=int(batch[2]),
                others=batch[3] or "",
                tflop=tflop,
                gigabytes=gigabytes,
                memory=cells[4],
                collectives=cells[9],
            )
        )
    return found


@functools.cache
def compiled() -> tuple[Row, ...]:
    return tuple(read(FILE.read_text("utf-8")))


def write(document: pathlib.Path, name: str, tables: str) -> None:
    """Replaces what a document has between the marks of a name."""
    begin, end = marks(name)
    old = document.read_text("utf-8")
    start, stop = old.index(begin) + len(begin), old.index(end)
    document.write_text(f"{old[:start]}\n\n{tables}\n{old[stop:]}", "utf-8")


def marks(name: str) -> tuple[str, str]:
    """The lines around the tables of a name."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def table(words: int, *headings: str) -> list[str]:
    """The first lines of a table whose columns after `words` are numbers."""
    aligned = ["---"] * words + ["---:"] * (len(headings) - words)
    return [f"| {' | '.join(headings)} |", f"|{'|'.join(aligned)}|"]
