"""Accelerators that are absent: their descriptions, and meshes to compile for.

The descriptions are data, in `devices.toml`. Compilers for TPUs and GPUs come as
packages, the extras `aot-tpu` and `aot-gpu`, and need no device.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import tomllib
from typing import Any

from mvc_jax.errors import UserError
from mvc_jax.training import runtime

_FILE = pathlib.Path(__file__).with_name("devices.toml")
# Of requirements-cuda.lock; kernels are chosen for them.
_CUDA, _CUDNN = (13, 2), (9, 26)
_PER_HOST = 8  # GPUs
# Libraries look for a TPU and its metadata server otherwise, and wait for minutes.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Without a device to tune on, Triton's matrix products get a tiling that does not
# compile; cuBLAS computes them instead.
_GPU_FLAGS = "--xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of accelerator.

    Attributes:
      name: of its section in `devices.toml`.
      kind: JAX's `device_kind`.
      memory: that a program may use on one device, in bytes.
      bandwidth: of that memory, in bytes/s.
      interconnect: between devices, in bytes/s.
      gpu: what XLA's description of a GPU needs; None for a TPU.
      layouts: of a TPU's slices, by number of chips.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    interconnect: float
    gpu: dict[str, Any] | None
    layouts: dict[int, str]

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16."""
        from mvc_jax.training import throughput

        return 1e12 * throughput.peak_tflops(self.kind)


@functools.cache
def descriptions() -> dict[str, Any]:
    """The sections of `devices.toml`."""
    return tomllib.loads(_FILE.read_text("utf-8"))


def find(name: str) -> Target:
    """The target of a name.

    Raises:
      UserError: it is unknown, or its compiler is not installed.
    """
    if name not in descriptions():
        raise UserError(
            "--target",
            wanted=f"one of {', '.join(descriptions())}",
            got=name,
            fix=f"Describe it in benchmarks/{_FILE.name}.",
        )
    section = descriptions()[name]
    gpu = section.get("gpu")
    module, extra, lock = (
        ("jax_plugins.xla_cuda13", "aot-gpu", "requirements-cuda.lock")
        if gpu
        else ("libtpu", "aot-tpu", "requirements.lock")
    )
    if not _installed(module):
        raise UserError(
            f"--target={name}",
            wanted=f"a compiler for it, the module {module}",
            got="it is not installed",
            fix=f"In an environment of its own: pip install -c {lock} -e '.[{extra}]'",
        )
    return Target(
        name=name,
        kind=section["kind"],
        memory=section["memory_gib"] * 2**30,
        bandwidth=section["bandwidth"] * 1e9,
        interconnect=section["interconnect"] * 1e9,
        gpu=gpu,
        layouts={int(k): v for k, v in section.get("layouts", {}).items()},
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def set_environment(dump: str = "") -> None:
    """Sets what the compilers read, before JAX is imported.

    Args:
      dump: folder into which XLA writes what it has compiled so far, if any.
    """
    runtime.set_up("")
    os.environ.update(_ENVIRONMENT)
    flags = [os.environ.get("XLA_FLAGS", ""), _GPU_FLAGS]
    if dump:
        flags += [f"--xla_dump_to={dump}", "--xla_dump_hlo_as_text"]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))


def mesh(target: Target, devices: int, fsdp: int = 1) -> Any:
    """A mesh of `devices` absent devices, `fsdp` of which share the parameters.

    Raises:
      UserError: there is no such slice, or the numbers do not divide.
    """
    from mvc_jax.training import sharding

    found = _gpus(target, devices) if target.gpu else _chips(target, devices)
    return sharding.make_mesh(-1, fsdp, devices=found)


def _chips(target: Target, count: int) -> list[Any]:
    from jax.experimental import topologies

    enough = [size for size in target.layouts if size >= count]
    if not enough or (count != enough[0] and count not in (1, 2)):
        raise UserError(
            "--devices",
            wanted=f"1, 2 or {', '.join(map(str, target.layouts))} for {target.name}",
            got=f"{count}",
            fix="Choose one of these.",
        )
    name = f"{target.name}:{target.layouts[enough[0]]}"
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return topology.devices[:count]


def _gpus(target: Target, count: int) -> list[Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    capability = tuple(target.gpu["capability"])
    # JAX asks the default backend, which is a CPU here.
    cudnn.check_compute_capability = lambda least: (
        capability >= tuple(map(int, least.split(".")))
    )
    hosts = max(count // _PER_HOST, 1)
    if count < 1 or count % hosts:
        raise UserError(
            "--devices",
            wanted=f"up to {_PER_HOST} GPUs, or a multiple of {_PER_HOST}",
            got=f"{count}",
            fix="Choose one of these.",
        )
    return topologies.get_topology_desc(
        platform="cuda",
        target_config=_gpu_text(target),
        topology=f"1x{hosts}x{count // hosts}",
    ).devices


def _gpu_text(target: Target) -> str:
    """XLA's `GpuTargetConfigProto` of a GPU, as text."""
    gpu = target.gpu
    major, minor = gpu["capability"]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu["shared_kib"] * 1024}
  threads_per_core_limit: {gpu["threads"]}
  core_count: {gpu["multiprocessors"]}
  fpus_per_core: {gpu["lanes"]}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth:.0f}
  l2_cache_size: {gpu["l2_mib"] * 2**20}
  clock_rate_ghz: {gpu["clock_ghz"]}
  device_memory_size: {target.memory:.0f}
  shared_memory_per_block_optin: {(gpu["shared_kib"] - 1) * 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }}
device_description_str: "{target.kind}"
"""
