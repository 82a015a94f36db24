"""Compiles a lowered program for an absent device: its text and its memory."""

import dataclasses
import os
import pathlib
import re
import threading
import time
from typing import Any

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_USED = re.compile(r"Used \S+ of \S+ hbm")
_AFTER = "*.after_optimizations{}.txt"
_SECONDS = 5.0  # in which XLA has written its last file


class TooLarge(Exception):
    """The compiler says that the program does not fit the device, and by how much."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      text: of its instructions.
      arguments: bytes of its arguments.
      temporary: bytes of everything else: see `memory.program_bytes`.
      code: bytes of its code, which are part of `temporary`; None: not generated.
      results: bytes of its results.
      in_place: bytes of those that are written over arguments.
      seconds: that it took.
      processor_seconds: of all threads.
    """

    text: str
    arguments: int
    temporary: int
    code: int | None
    results: int | None
    in_place: int | None
    seconds: float = 0.0
    processor_seconds: float = 0.0

    def fields(self) -> dict[str, Any]:
        """All but the text."""
        found = dataclasses.asdict(self)
        del found["text"]
        return found


def compile_(lowered: Any, folder: pathlib.Path | None = None) -> Compiled:
    """Compiles what `jax.jit(...).lower` returned.

    Args:
      lowered: the program.
      folder: into which XLA writes what it has compiled so far. With one, this returns
        before code is generated, and a thread goes on.

    Raises:
      TooLarge: see there.
    """
    import jax

    began, used = time.monotonic(), sum(os.times()[:4])
    try:
        found = _without_code(lowered, folder) if folder else _whole(lowered)
    except jax.errors.JaxRuntimeError as error:
        if words := _USED.search(str(error)):
            raise TooLarge(words[0]) from error
        raise
    return dataclasses.replace(
        found,
        seconds=time.monotonic() - began,
        processor_seconds=sum(os.times()[:4]) - used,
    )


def _whole(lowered: Any) -> Compiled:
    from mvc_jax.training import memory

    compiled = lowered.compile()
    analysis = compiled.memory_analysis()
    return Compiled(
        compiled.as_text(),
        *memory.program_bytes(compiled),
        code=analysis.generated_code_size_in_bytes,
        results=analysis.output_size_in_bytes,
        in_place=analysis.alias_size_in_bytes,
    )


def _without_code(lowered: Any, folder: pathlib.Path) -> Compiled:
    failed = []

    def work():
        try:
            lowered.compile()
        except Exception as error:
            failed.append(error)

    earlier = {*folder.glob("*")}  # of small programs
    threading.Thread(target=work, daemon=True).start()
    last = _AFTER.format("_after_buffer_assignment")
    while not (texts := {*folder.glob(last)} - earlier):
        if failed:
            raise failed[0]
        time.sleep(1)
    time.sleep(_SECONDS)
    (buffers,) = {*folder.glob(_AFTER.format("-buffer-assignment"))} - earlier
    held = new = 0
    for size, kind in _ALLOCATION.findall(buffers.read_text()):
        if "color" not in kind and "thread-local" not in kind:  # the device's memory
            held += int(size) * ("parameter" in kind)
            new += int(size) * ("parameter" not in kind)
    return Compiled(texts.pop().read_text(), held, new, None, None, None)
