"""JAX and the C library, as one process of ours wants them."""

import contextlib
import ctypes
import functools
import os

from absl import logging
from etils import epath

_compiled = [0.0]


def set_up(compilation_cache: str) -> None:
    """What must be set before JAX looks for devices, which it does at first use.

    Args:
      compilation_cache: a folder that outlives the process; `""`: none.
    """
    import jax  # here and below: a mistyped flag need not wait for it

    _keep_freed_memory()
    # Of a GPU JAX takes three quarters if it is not asked; the rest would lie idle.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    _schedule_depth_first()
    if compilation_cache:
        folder = epath.Path(compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    _listen()


@functools.cache
def log_devices() -> None:
    """Names the devices, once; from here on JAX holds them."""
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    logging.info("%d device(s): %s", jax.device_count(), ", ".join(kinds))


def compile_seconds() -> float:
    """Seconds that this process has spent on tracing, lowering and compiling."""
    return _compiled[0]


@functools.cache
def _listen() -> None:
    import jax

    def add(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            _compiled[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(add)


def return_freed_memory() -> None:
    """Gives what was freed and kept back to the kernel, once."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Tells glibc to keep what it frees: XLA's scratch memory on a CPU, every step.

    Returned to the kernel and mapped again, 44 MiB of it cost the digits' UNet 11,000
    page faults a step, a fifth of its 77 ms on two cores.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing to tell
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


def _schedule_depth_first() -> None:
    """Tells XLA's CPU backend, unless the user did, to finish what it has begun.

    By default it starts whatever could run at the same time, recomputed activations
    too: they all lie in memory at once, and rematerialisation saves nothing. Depth
    first, the small Stable Diffusion of `benchmarks/finetune_step.py` needs less.
    """
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()
