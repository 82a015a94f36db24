"""Whether a step fits the device's memory, asked before it runs."""

import contextlib
import resource
from typing import Any

import jax
import psutil

from mvc_jax.errors import UserError

_GIB = 2**30


def compile_step(step: Any, *arguments: Any, limit: int, name: str, fix: str) -> Any:
    """Compiles a jitted step for `arguments`, and refuses it if it is too large.

    Args:
      step: from `jax.jit`.
      *arguments: what it will be called with, placed.
      limit: bytes of one device; 0: what it says it has.
      name: of the loop, for the error.
      fix: the ways out, for the error.

    Raises:
      UserError: by XLA's memory analysis it needs more than a device has.
    """
    device = next(iter(jax.tree.leaves(arguments)[0].devices()))
    with _explained(name, fix):
        compiled = step.lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    held = analysis.argument_size_in_bytes
    made = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    scratch = analysis.temp_size_in_bytes + made + analysis.generated_code_size_in_bytes
    limit = limit or device_bytes(device, held)
    if held + scratch > limit:
        raise UserError(
            name,
            wanted=f"a step that fits the {limit / _GIB:.2f} GiB of "
            f"{device.device_kind} {device.id}",
            got=f"{(held + scratch) / _GIB:.2f} GiB: {held / _GIB:.2f} for parameters, "
            f"optimiser and batch, {scratch / _GIB:.2f} for activations and gradients",
            fix=fix,
        )

    def call(*arguments):
        with _explained(name, fix):
            return compiled(*arguments)

    return call


def device_bytes(device: jax.Device, held: int = 0) -> int:
    """Memory of one device in bytes; for a CPU, its share of what the host has left.

    `held` bytes are counted as there already, on every device of the process.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().available // jax.local_device_count() + held


def in_use() -> dict[str, float]:
    """`memory_gib`: the most that a device of this process, or on a CPU the process
    itself, has held so far."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    most = max(peaks, default=0)
    most = most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory_gib": most / _GIB}


@contextlib.contextmanager
def _explained(name: str, fix: str):
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
            fix=fix,
        ) from error
