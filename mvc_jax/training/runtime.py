"""Settings of the process: JAX, XLA and the C library."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile

from absl import logging
from etils import epath

from mvc_jax import processes
from mvc_jax.errors import UserError
from mvc_jax.training import cuda_libraries

_compile_seconds = [0.0]
_program_bytes: dict[str, int] = {}
_total: list[int] = []  # devices of all processes, once they were counted
_CPU_DEVICES = "--xla_force_host_platform_device_count"
_ASK = """
import json, jax
devices = jax.local_devices()
limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
print(json.dumps([devices[0].device_kind, len(devices), sum(limits)]))
"""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that JAX would use.

    Attributes:
      kind: JAX's name for it.
      count: how many there are.
      bytes: memory of all together; 0: that of the host, for CPUs.
    """

    kind: str
    count: int
    bytes: int


def set_up(compilation_cache: str) -> None:
    """Sets what must be set before JAX starts its backend; does not import JAX.

    Args:
      compilation_cache: the folder of the persistent compilation cache; "" leaves
        JAX's own setting, and so does, with a warning, one that cannot be written.
    """
    _keep_freed_memory()
    _collect_garbage_less_often()
    # JAX reserves 75 % of a GPU's memory by default, and the rest would stay unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    _schedule_depth_first()
    _convolve_by_eigen()
    _enlarge_compiler_stacks()
    if not cuda_libraries.has_driver():
        # JAX asks each library of CUDA for its version, and CUPTI 13.2 crashes then.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not compilation_cache:
        return
    try:
        folder = epath.Path(compilation_cache).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if "://" not in str(folder):
            tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ImportError, KeyError) as error:
        logging.warning(
            "config.compilation_cache=%s cannot be written (%s): every run compiles "
            "its programs again",
            compilation_cache,
            getattr(error, "strerror", None) or error,
        )
        return
    _set_jax("compilation_cache_dir", folder)
    _set_jax("persistent_cache_min_compile_time_secs", 0.05)


def _set_jax(name: str, value: epath.Path | float) -> None:
    """Sets JAX's option `jax_<name>`, whether it has been imported or not."""
    os.environ[f"JAX_{name.upper()}"] = f"{value}"
    if "jax" in sys.modules:
        import jax

        value = value if isinstance(value, float) else f"{value}"
        jax.config.update(f"jax_{name}", value)


@functools.cache
def start() -> None:
    """Starts JAX's backend, which holds the devices from then on, and logs their names.

    Logs which cuDNN was loaded, on NVIDIA's GPUs. Warns of what keeps JAX from using a
    GPU. `compile_seconds` counts from here. Further calls do nothing.
    """
    import jax  # here: flags are parsed and checked without it

    def add(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            _compile_seconds[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(add)
    # A program on a CPU then takes its scratch from the main thread's memory, which is
    # kept, and not from another's, of which glibc returns what is over 64 MiB. JAX
    # reads this option from no environment variable.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    kinds = sorted({device.device_kind for device in jax.devices()})
    cudnn = cuda_libraries.loaded_cudnn()
    logging.info(
        "%d device(s)%s: %s%s",
        jax.device_count(),
        f" of {processes.count()} processes" if processes.count() > 1 else "",
        ", ".join(kinds),
        f"; cuDNN {cudnn}" if cudnn else "",
    )
    _warn_of_cuda()


def _warn_of_cuda() -> None:
    """Warns of libraries for two versions of CUDA, and of a driver that is missing."""
    if twice := cuda_libraries.for_two_versions(cuda_libraries.installed()):
        logging.warning(
            "libraries for two versions of CUDA are installed, of which some overwrite "
            "each other's files: %s. Make a new environment with the extra cuda and "
            "requirements-cuda.lock, or with cuda12 and requirements-cuda12.lock",
            "; ".join(" and ".join(packages) for packages in twice.values()),
        )
    asked = os.environ.get("JAX_PLATFORMS", "")
    wanted = (not asked or "cuda" in asked) and cuda_libraries.has_plugin()
    if wanted and not cuda_libraries.has_driver():
        logging.warning(
            "JAX for NVIDIA GPUs is installed, but their driver is not: no "
            "libcuda.so.1 was found"
        )


def ask_devices() -> Devices:
    """Asks a child which devices this process has, and starts no backend in this one.

    In this one JAX would hold them from then on, and a captioner that runs in a process
    of its own needs their memory. CPUs are known without asking.

    Raises:
      UserError: JAX cannot use the devices.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        forced = re.findall(rf"{_CPU_DEVICES}=(\d+)", os.environ.get("XLA_FLAGS", ""))
        return Devices("cpu", int((forced or ["1"])[-1]), 0)
    answer = subprocess.run(
        [sys.executable, "-c", _ASK],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise UserError(
            "config.mesh",
            wanted="devices that JAX can use",
            got=(answer.stderr.strip().splitlines() or ["a crash of JAX"])[-1],
            fix="Install JAX for this machine's devices, or set JAX_PLATFORMS=cpu.",
        )
    return Devices(*json.loads(answer.stdout.strip().splitlines()[-1]))


def count_devices() -> None:
    """Counts the devices of all processes, which all call this, for `device_count`."""
    if processes.count() > 1:
        own = processes.on_all("devices", ask_devices)
        _total[:] = [sum(processes.gather("the number of devices", own.count))]


def device_count() -> int:
    """Devices of all processes; starts no backend."""
    return _total[0] if _total else ask_devices().count


def own_devices() -> Devices | None:
    """The devices of the run; None if this process has not started a backend."""
    if not start.cache_info().currsize:
        return None
    import jax

    devices = jax.devices()
    return Devices(devices[0].device_kind, len(devices), 0)


def note_program(name: str, size: int) -> None:
    """Notes the bytes that a compiled training step takes on a device."""
    _program_bytes[name] = max(size, _program_bytes.get(name, 0))


def program_bytes(stage: str) -> int:
    """Bytes of the largest program that this process compiled in a stage; 0: none."""
    sizes = (n for k, n in _program_bytes.items() if k.split("/")[0] == stage)
    return max(sizes, default=0)


def compile_seconds() -> float:
    """Seconds that this process has spent on tracing, lowering and compiling."""
    return _compile_seconds[0]


def return_freed_memory() -> None:
    """Returns memory that glibc has freed but kept to the kernel, this once."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory, as XLA on a CPU frees its scratch every step.

    Returning 44 MiB of it to the kernel and mapping it again cost the digits' UNet
    11,000 page faults a step, a fifth of its 77 ms on two cores.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # constants of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


def _collect_garbage_less_often() -> None:
    """Lets Python look for cycles of unreachable objects every 10,000 objects, not 700.

    JAX makes millions of objects while it traces, and nearly all stay. Looking through
    them took a fifth of the time of tracing and a sixth of that of the imports; the
    peak of memory is the same.
    """
    if 0 < gc.get_threshold()[0] < 10_000:  # else it is off, or somebody's choice
        gc.set_threshold(10_000)


def _schedule_depth_first() -> None:
    """Selects XLA's memory-saving schedule on CPUs, unless XLA_FLAGS sets this option.

    The default schedule starts whatever can run concurrently, including recomputed
    activations: they are all in memory at once, and rematerialisation saves nothing.
    Measured with the small Stable Diffusion of `benchmarks/finetune_step.py`.
    """
    _add_flag("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler", "false")


def _convolve_by_eigen() -> None:
    """Keeps XLA on CPUs from convolving by YNNPACK, unless XLA_FLAGS sets the option.

    With jaxlib 0.10 that takes up to twice as long as by Eigen, and gradients with
    respect to the kernel up to four times (benchmarks/RESULTS.md). Other versions are
    left alone: an option that they do not know would end the process.
    """
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        option = "--xla_cpu_experimental_ynn_fusion_type"
        convolution = "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
        _add_flag("XLA_FLAGS", option, f"-{convolution}")  # all but these


def _enlarge_compiler_stacks() -> None:
    """Gives the threads of the TPU's compiler 1 MiB of stack, unless it is set.

    It fuses attention's chain of matrix products, and prices each inside of the price
    of the next. With libtpu 0.0.42.1's default that overflows for 4,096 tokens and 12
    or more rows on a v5e, as XLA's own attention has them: a segmentation fault.
    """
    _add_flag("LIBTPU_INIT_ARGS", "--fibers_default_thread_stack_size", f"{1 << 20}")


def _add_flag(variable: str, flag: str, value: str) -> None:
    """Adds `flag=value` to an environment variable that does not have the flag yet."""
    flags = os.environ.get(variable, "")
    if flag not in flags:
        os.environ[variable] = f"{flags} {flag}={value}".strip()
