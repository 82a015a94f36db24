"""Checks that a compiled step fits the device's memory before it runs."""

import contextlib
import dataclasses
import re
import resource
from collections.abc import Callable, Iterator
from typing import Any

import jax
import psutil

from mvc_jax.errors import UserError
from mvc_jax.training import runtime

_GIB = 2**30
# Compilers for TPUs refuse what does not fit, arguments included.
_REFUSED = re.compile(r"memory required for HLO temporaries \(([\d.]+)G\)")


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """The memory that a step may take on one device.

    Attributes:
      size: in bytes; 0: the device's limit.
      hint: how to reduce the memory, for the error.
      estimate: (bytes of the arguments, further bytes, bytes of the budget) -> what
        would fit, in a sentence that is added to the hint.
    """

    size: int
    hint: str
    estimate: Callable[[int, int, int], str] = lambda held, new, size: ""

    def compile(self, step: Any, *arguments: Any, name: str) -> Callable:
        """Compiles a jitted step for `arguments`, if it fits the budget.

        Args:
          step: a function from `jax.jit`.
          *arguments: device arrays like those it will be called with.
          name: the loop's name, for the error.

        Returns:
          the compiled step, which reports a lack of memory as a `UserError` too.

        Raises:
          UserError: by XLA's memory analysis it needs more than the budget.
        """
        device = jax.tree.leaves(arguments)[0].addressable_shards[0].device
        with self._explain_out_of_memory(name):
            try:
                compiled = step.lower(*arguments).compile()
            except jax.errors.JaxRuntimeError as error:
                if not (found := _REFUSED.search(str(error))):
                    raise
                held = sum(
                    x.addressable_data(0).nbytes for x in jax.tree.leaves(arguments)
                )
                new = int(float(found[1]) * _GIB) - held
                raise self._too_large(name, held, new, device) from error
        held, new = program_bytes(compiled)
        runtime.note_program(name, held + new)
        if held + new > (self.size or device_bytes(device, held)):
            raise self._too_large(name, held, new, device)

        def call(*arguments):
            with self._explain_out_of_memory(name):
                return compiled(*arguments)

        return call

    def _too_large(
        self, name: str, held: int, new: int, device: jax.Device
    ) -> UserError:
        size = self.size or device_bytes(device, held)
        return UserError(
            name,
            wanted=f"a step that fits the {size / _GIB:.2f} GiB of "
            f"{device.device_kind} {device.id}",
            got=f"{(held + new) / _GIB:.2f} GiB: {held / _GIB:.2f} for "
            f"parameters, optimiser and batch, {new / _GIB:.2f} for activations "
            "and gradients",
            fix=" ".join((self.hint, self.estimate(held, new, size))).strip(),
        )

    @contextlib.contextmanager
    def _explain_out_of_memory(self, name: str) -> Iterator[None]:
        """Turns XLA's error about exhausted memory into a `UserError` with the hint."""
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


WHOLE_DEVICE = MemoryBudget(0, "Lower the batch size.")


def program_bytes(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Memory of a compiled program on one device, by XLA's analysis, in bytes.

    Returns:
      what its arguments take, and what it takes in addition: results that are not
      written over arguments, temporary arrays and its code.
    """
    analysis = compiled.memory_analysis()
    new = (
        analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
    return analysis.argument_size_in_bytes, new


def device_bytes(device: jax.Device, held: int = 0) -> int:
    """Memory of one device in bytes.

    For a CPU device: its fraction of the host's available memory, plus `held` bytes
    that the process has already allocated for it.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    runtime.return_freed_memory()  # the kernel counts it as used
    return psutil.virtual_memory().available // jax.local_device_count() + held


def in_use() -> dict[str, float]:
    """Peak memory as `memory_gib`, of the fullest device or, on a CPU, the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    peak = max(peaks, default=0)
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory_gib": peak / _GIB}
