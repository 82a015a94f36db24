"""How fast a loop is: examples a second, TFLOP/s, and the share of what is possible."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Dense bf16 peak of one device in TFLOP/s, from the makers' data sheets, by the
# beginning of JAX's name of its kind; the longest match counts.
_PEAK = {
    "NVIDIA A100": 312,
    "NVIDIA A10G": 70,
    "NVIDIA H100": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "Tesla T4": 65,
    "Tesla V100": 125,
    "TPU v4": 275,
    "TPU v5": 459,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


def peak_tflops(kind: str) -> float | None:
    """Of one device in bf16; None where it is not known."""
    known = [name for name in _PEAK if kind.startswith(name)]
    return float(_PEAK[max(known, key=len)]) if known else None


class Throughput:
    """A stopwatch over steps of `batch_size` examples, `flops` each (0: not known)."""

    def __init__(self, batch_size: int, flops: float):
        self._batch_size, self._flops = batch_size, flops
        devices = jax.devices()
        peak = peak_tflops(devices[0].device_kind)
        self._peak = peak * len(devices) if peak else None
        self._began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the watch, e.g. during a save."""
        stopped = time.monotonic()
        yield
        self._began += time.monotonic() - stopped

    def over(self, steps: int) -> dict[str, float]:
        """Rates over the `steps` since the last call.

        Returns:
          `examples_per_s`; with known FLOPs `tflops`, a second and on all devices; and
          on known devices `mfu`, the model's FLOPs as a share of the peak.
        """
        began, self._began = self._began, time.monotonic()
        seconds = max(self._began - began, 1e-9)
        rate = steps * self._batch_size / seconds
        rates = {"examples_per_s": rate}
        if self._flops:
            rates["tflops"] = rate * self._flops / 1e12
            if self._peak:
                rates["mfu"] = rates["tflops"] / self._peak
        return rates


def count_flops(function: Callable, *arguments: Any) -> float:
    """FLOPs of the matrix products and convolutions of one call; no arithmetic is done.

    Two for each multiply-add, padding counted, as the field counts them. `arguments`
    are arrays or shapes.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [jaxpr for value in eqn.params.values() for jaxpr in _jaxprs_of(value)]
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeats * sum(_flops(jaxpr) for jaxpr in inner)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2.0 * depth * eqn.outvars[0].aval.size
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * kernel.size / outputs * eqn.outvars[0].aval.size
    return total


def _jaxprs_of(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, tuple | list) else (value,):
        item = getattr(item, "jaxpr", item)  # a closed one
        if hasattr(item, "eqns"):
            yield item
