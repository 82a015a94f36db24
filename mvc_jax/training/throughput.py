"""Speed of a loop: examples per second, TFLOP/s and MFU (model FLOPs utilisation)."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Dense bf16 peak of one device in TFLOP/s, from the vendors' data sheets, by a prefix
# of JAX's `device_kind`; the longest matching prefix is used.
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
    """Peak TFLOP/s of one device in bf16; None if unknown."""
    known = [name for name in _PEAK if kind.startswith(name)]
    return float(_PEAK[max(known, key=len)]) if known else None


class Throughput:
    """Measures rates over steps of `batch_size` examples, `flops` each (0: unknown)."""

    def __init__(self, batch_size: int, flops: float):
        self._batch_size, self._flops = batch_size, flops
        devices = jax.devices()
        peak = peak_tflops(devices[0].device_kind)
        self._peak = peak * len(devices) if peak else None
        self._began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the block, e.g. in a save."""
        stopped = time.monotonic()
        yield
        self._began += time.monotonic() - stopped

    def lap(self, steps: int) -> dict[str, float]:
        """Rates over the time since the last call, in which `steps` steps were taken.

        Returns:
          `examples_per_s`; with known FLOPs also `tflops`, TFLOP/s of all devices; on
          known devices also `mfu`, the fraction of the peak.
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


def count_flops(function: Callable, *arguments: Any, platform: str = "") -> float:
    """FLOPs of the matrix products and convolutions of one call, without running it.

    A multiply-add counts as two, and padding counts, by convention.

    Args:
      function: of arrays.
      *arguments: arrays or shapes.
      platform: of the devices it is for, of `lax.platform_dependent`'s alternatives;
        by default that of JAX's default devices.
    """
    platform = platform or jax.default_backend()
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr, platform)


def _flops(jaxpr: Any, platform: str) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        values = eqn.params.values()
        if chosen := eqn.params.get("branches_platforms"):
            name = {"gpu": "cuda"}.get(platform, platform)
            ours = (k for k, names in enumerate(chosen) if not names or name in names)
            values = [eqn.params["branches"][next(ours)]]
        inner = [jaxpr for value in values for jaxpr in _jaxprs_of(value)]
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeats * sum(_flops(jaxpr, platform) for jaxpr in inner)
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
        item = getattr(item, "jaxpr", item)  # a ClosedJaxpr
        if hasattr(item, "eqns"):
            yield item
