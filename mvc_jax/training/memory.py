"""Whether a step fits the device's memory, asked before it runs."""

import contextlib
import dataclasses
import resource
from collections.abc import Callable, Iterator
from typing import Any

import jax
import psutil

from mvc_jax.errors import UserError
from mvc_jax.training import runtime

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """What a step may take.

    Attributes:
      size: bytes of one device; 0: what it says it has.
      hint: what to say about a step that takes more.
    """

    size: int
    hint: str

    def compile(self, step: Any, *arguments: Any, name: str) -> Callable:
        """Compiles a jitted step for `arguments`, and refuses it if it is too large.

        Args:
          step: from `jax.jit`.
          *arguments: what it will be called with, placed.
          name: of the loop, for the error.

        Raises:
          UserError: by XLA's memory analysis it needs more than a device has.
        """
        device = next(iter(jax.tree.leaves(arguments)[0].devices()))
        with self._explained(name):
            compiled = step.lower(*arguments).compile()
        analysis = compiled.memory_analysis()
        held = analysis.argument_size_in_bytes
        made = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        made += analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
        size = self.size or device_bytes(device, held)
        if held + made > size:
            raise UserError(
                name,
                wanted=f"a step that fits the {size / _GIB:.2f} GiB of "
                f"{device.device_kind} {device.id}",
                got=f"{(held + made) / _GIB:.2f} GiB: {held / _GIB:.2f} for "
                f"parameters, optimiser and batch, {made / _GIB:.2f} for activations "
                "and gradients",
                fix=self.hint,
            )

        def call(*arguments):
            with self._explained(name):
                return compiled(*arguments)

        return call

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """XLA's own report that memory ran out, with the ways out."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                name,
                wanted="a step that fits the device's memory",
                got=str(error).splitlines()[0],
                fix=self.hint,
            ) from error


DEVICE = MemoryBudget(0, "Lower the batch size.")


def device_bytes(device: jax.Device, held: int = 0) -> int:
    """Memory of one device in bytes; for a CPU, its share of what the host has left.

    `held` bytes are counted as there already, on every device of the process.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    runtime.return_freed_memory()  # it counts as used
    return psutil.virtual_memory().available // jax.local_device_count() + held


def in_use() -> dict[str, float]:
    """`memory_gib`: the most that a device of this process, or on a CPU the process
    itself, has held so far."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    most = max(peaks, default=0)
    most = most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory_gib": most / _GIB}
