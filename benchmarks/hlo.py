"""Reads the text of a compiled program: kernels, collectives, copies, bytes.

XLA prints a program as computations of instructions, `%name = type op(operands), ...`.
Instructions of the entry computation, and of the loops and branches that it calls, are
kernels, each of which reads its operands from memory and writes its result there;
those inside of a fusion are not.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|called_computations|branch_computations|"
    r"true_computation|false_computation)=(%[\w.\-]+|\{[^}]*\})"
)
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SLICES = ("dynamic-slice", "gather", "slice")  # they read what they return
# These move nothing: names for parts of other buffers, and the ends of what started.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array of a type.

    Attributes:
      dtype: XLA's name, e.g. `bf16`.
      shape: in elements.
      layout: XLA's text: order of the dimensions, tiles, memory space.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Bytes in memory, with the padding of TPU tiles (8 x 128 elements or more)."""
        digits = re.search(r"\d+", self.dtype)
        bits = 8 if self.dtype == "pred" or not digits else int(digits[0])
        sizes = list(self.shape)
        tile = _TILE.search(self.layout)
        if tile and sizes:
            order = self.layout.split(":")[0].split(",")  # the fastest dimension first
            tiles = [int(size) for size in tile[1].split(",")]
            for dimension, size in zip(order, reversed(tiles), strict=False):
                if dimension:
                    whole = sizes[int(dimension)]
                    sizes[int(dimension)] = -(-whole // size) * size
        return math.prod(sizes) * bits // 8

    @property
    def order(self) -> list[int]:
        """Its dimensions, the fastest first, without those of size 1."""
        layout = self.layout.split(":")[0]
        default = reversed(range(len(self.shape)))
        order = [int(d) for d in layout.split(",")] if layout else default
        return [dimension for dimension in order if self.shape[dimension] > 1]

    @property
    def on_chip(self) -> bool:
        """Whether it is in a memory of the chip, such as a TPU's VMEM."""
        return bool(re.search(r"S\([1-9]\d*\)", self.layout))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      op: e.g. `fusion`.
      buffers: its result, or the parts of its tuple.
      operands: their names.
      text: attributes: called computations, metadata, the backend's configuration.
    """

    name: str
    op: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def origin(self) -> str:
        """Where in the traced function it comes from; "" if XLA does not say."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The library function of a custom call; "" for other instructions."""
        found = _TARGET.search(self.text)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        groups = _CALLED.findall(self.text)
        return [name for group in groups for name in re.findall(r"%([\w.\-]+)", group)]


class Module:
    """A compiled program for one device.

    Attributes:
      computations: the instructions of each, by name.
      entry: name of the first.
    """

    def __init__(self, text: str):
        """`text` is that of `jax.stages.Compiled.as_text()`."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found[1], line[found.end() :])
                current[instruction.name] = instruction

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation outside of fusions runs; loops are multiplied."""
        return self._count(("while", "conditional", "call", "async-start"))

    @functools.cached_property
    def all_runs(self) -> dict[str, float]:
        """The same with the insides of fusions."""
        return self._count(("while", "conditional", "call", "async-start", "fusion"))

    def trips(self, instruction: Instruction) -> int:
        """How often an instruction runs what it calls: a loop's count, else 1.

        XLA for TPUs does not write the count down, but the condition of a counted loop
        is `counter < constant`, from 0 on.
        """
        if found := _TRIPS.search(instruction.text):
            return int(found[1])
        condition = _CONDITION.search(instruction.text)
        if instruction.op != "while" or not condition:
            return 1
        inside = self.computations.get(condition[1], {})
        limits = [
            inside[instruction.operands[1]]
            for instruction in inside.values()
            if instruction.op == "compare" and "direction=LT" in instruction.text
        ]
        constant = len(limits) == 1 and limits[0].op == "constant"
        return int(limits[0].operands[0]) if constant else 1

    def _count(self, callers: tuple[str, ...]) -> dict[str, float]:
        counts: dict[str, float] = collections.Counter()

        def visit(name: str, times: float) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                if instruction.op in callers:
                    for called in instruction.called:
                        if called in self.computations:
                            visit(called, times * self.trips(instruction))

        visit(self.entry, 1)
        return dict(counts)

    def kernels(self) -> Iterator[tuple[Instruction, float, dict]]:
        """Those that access memory: instruction, how often, its computation."""
        for instruction, times, computation in self._running(self.runs):
            done = instruction.op.endswith("-done")
            if instruction.op not in _FREE and not done:
                yield instruction, times, computation

    def instructions(self) -> Iterator[tuple[Instruction, float, dict]]:
        """All that run, also in fusions: instruction, how often, its computation."""
        return self._running(self.all_runs)

    def _running(self, runs: dict[str, float]) -> Iterator[tuple]:
        for name, times in runs.items():
            computation = self.computations[name]
            for instruction in computation.values():
                yield instruction, times, computation

    def bytes_accessed(self) -> float:
        """Bytes that all kernels read from memory and write to it.

        A kernel's operands count once, however often it reads them, and of those that
        a fusion only slices, the slices count. Loops are multiplied.
        """
        return sum(
            times * self._bytes_of(instruction, computation)
            for instruction, times, computation in self.kernels()
        )

    def _bytes_of(self, instruction: Instruction, computation: dict) -> float:
        if instruction.op == "async-start":
            return 0.0  # its computation is visited
        if instruction.op in (*_SLICES, "slice-start"):
            # A start's result comes after its operand.
            part = instruction.buffers[instruction.op == "slice-start"]
            source = computation.get(instruction.operands[0])
            near = bool(source and source.buffers[0].on_chip)
            return float(part.bytes * (2 - near - part.on_chip))
        written = instruction.buffers
        if instruction.op == "copy-start":
            written = written[:1]  # then the operand, and a context
        elif instruction.op.endswith("-start"):
            written = written[-1:]
        written = [buffer for buffer in written if not buffer.on_chip]
        slices: dict[int, float] = {}
        overwritten = 0.0
        if instruction.op == "fusion":
            slices, overwritten = self._sliced(instruction)
        total = overwritten or float(sum(buffer.bytes for buffer in written))
        for place, operand in enumerate(instruction.operands):
            if operand not in computation:
                continue
            buffers = computation[operand].buffers
            size = sum(b.bytes for b in buffers if not b.on_chip)
            total += min(size, slices.get(place, size))
        return total

    def _sliced(self, fusion: Instruction) -> tuple[dict[int, float], float]:
        """Bytes read of the parameters that a fusion only slices, by their place.

        And the bytes written, if the result is a buffer that is updated in place.
        """
        inside = self.computations.get((fusion.called or [""])[0], {})
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in inside.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        slices, overwritten = {}, 0.0
        for instruction in inside.values():
            if instruction.op != "parameter" or not users[instruction.name]:
                continue
            place = int(instruction.operands[0])
            uses = users[instruction.name]
            if all(use.op in _SLICES for use in uses):
                slices[place] = float(sum(use.buffers[0].bytes for use in uses))
            elif len(uses) == 1 and uses[0].op == "dynamic-update-slice":
                update = inside.get(uses[0].operands[1])
                if uses[0].operands[0] == instruction.name and update is not None:
                    slices[place] = 0.0
                    overwritten += update.buffers[0].bytes
        return slices, overwritten


def _instruction(name: str, rest: str) -> Instruction:
    """Parses what follows `%name = `: type, op, operands, attributes."""
    end = _matching(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    op, _, rest = rest.partition("(")
    end = _matching("(" + rest) - 1
    inner, text = rest[: end - 1], rest[end:]
    buffers = tuple(
        Buffer(
            dtype,
            tuple(int(size) for size in shape.split(",") if size),
            layout or "",
        )
        for dtype, shape, layout in _ARRAY.findall(type_)
    )
    operands = re.findall(r"%([\w.\-]+)", inner)
    if op == "parameter" or (op == "constant" and inner.isdigit()):
        operands = [inner]
    return Instruction(name, op, buffers, tuple(operands), text)


def _matching(text: str) -> int:
    """The place after the bracket that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def collectives(module: Module) -> dict[tuple[str, str], tuple[float, float]]:
    """Collectives by kind and dtype: how many run, and their bytes on a device.

    The bytes are those of the operand or of the result, whichever is larger; the dtype
    is the result's, in which XLA sums operands that were to be cast to it. On a TPU a
    collective that runs beside computation is in each fusion that it spans, always with
    the same `channel_id` and `chain_id`; it counts once.
    """
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0])
    chains: set[tuple[str, ...]] = set()
    for instruction, times, computation in module.instructions():
        kind = instruction.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', instruction.text):
            if (kind, *chain.groups()) in chains:
                continue
            chains.add((kind, *chain.groups()))
        results = instruction.buffers
        operands = [
            buffer
            for name in instruction.operands
            if name in computation
            for buffer in computation[name].buffers
        ]
        if instruction.op.endswith("-start") and kind != "all-reduce":
            results = results[len(operands) :]  # it returns its operands too
        sizes: dict[str, float] = collections.Counter()
        for read, wrote in zip(operands, results, strict=False):
            sizes[wrote.dtype] += max(read.bytes, wrote.bytes)
        for dtype, size in sizes.items():
            found[kind, dtype][0] += times
            found[kind, dtype][1] += times * size
    return {key: (count, size) for key, (count, size) in sorted(found.items())}


def library_calls(module: Module) -> dict[tuple[str, str], float]:
    """Convolutions, matrix products and custom calls: how many run, by kind and dtype.

    The dtype is that of the first operand. Custom calls have their library's names.
    """
    found: dict[tuple[str, str], float] = collections.Counter()
    for instruction, times, computation in module.instructions():
        kind = _kind(instruction)
        if kind:
            operand = computation.get((instruction.operands or ("",))[0])
            buffers = operand.buffers if operand else instruction.buffers
            found[kind, buffers[0].dtype if buffers else ""] += times
    return dict(sorted(found.items()))


def _kind(instruction: Instruction) -> str:
    if instruction.op == "custom-call":
        return instruction.target
    if instruction.op == "dot":
        return "matrix product"
    if instruction.op == "convolution":
        # On a TPU matrix products are convolutions without spatial dimensions.
        labels = re.search(r"dim_labels=(\w+)", instruction.text)
        spatial = labels and "0" in labels[1]
        return "convolution" if spatial else "matrix product"
    return ""


def moves(module: Module) -> dict[tuple[str, str], float]:
    """Bytes that copies and transposes write, by `copy` or `transpose` and dtype.

    Transfers between a TPU's memory and its VMEM are not copies.
    """
    found: dict[tuple[str, str], float] = collections.Counter()
    for instruction, size in _moves(module):
        dtype = instruction.buffers[0].dtype
        found[instruction.op.removesuffix("-start"), dtype] += size
    return dict(sorted(found.items()))


def move_origins(module: Module, count: int = 3) -> list[tuple[str, float]]:
    """Where most bytes of copies and transposes come from: origin, bytes."""
    found: dict[str, float] = collections.Counter()
    for instruction, size in _moves(module):
        found[_layer(instruction.origin)] += size
    return sorted(found.items(), key=lambda item: -item[1])[:count]


def _moves(module: Module) -> Iterator[tuple[Instruction, float]]:
    for instruction, times, computation in module.instructions():
        if instruction.op not in ("copy", "copy-start", "transpose"):
            continue
        source = computation.get((instruction.operands or ("",))[0])
        result = instruction.buffers[0]
        start = instruction.op == "copy-start"
        if start and (result.on_chip or (source and source.buffers[0].on_chip)):
            continue
        if instruction.op == "transpose" and source:
            found = re.search(r"dimensions=\{([\d,]*)\}", instruction.text)
            axes = [int(axis) for axis in found[1].split(",") if axis]
            if [axes[axis] for axis in result.order] == source.buffers[0].order:
                continue  # another name for the same bytes
        yield instruction, times * result.bytes


def _layer(origin: str) -> str:
    """The last names of an origin without numbers, equal for layers of a kind."""
    names = [name for name in origin.split("/") if name]
    return re.sub(r"_?\d+", "", "/".join(names[-2:])) or "not recorded"


def branches(module: Module) -> float:
    """How many conditionals run."""
    return sum(
        times
        for instruction, times, _ in module.instructions()
        if instruction.op == "conditional"
    )


def summary(module: Module) -> dict[str, Any]:
    """All of the above, with keys that JSON can hold."""

    def keyed(found: dict[tuple[str, str], Any]) -> dict[str, Any]:
        return {" ".join(filter(None, key)): value for key, value in found.items()}

    return {
        "bytes": module.bytes_accessed(),
        "branches": branches(module),
        "collectives": keyed(collectives(module)),
        "kernels": keyed(library_calls(module)),
        "moves": keyed(moves(module)),
        "origins": dict(move_origins(module)),
    }
