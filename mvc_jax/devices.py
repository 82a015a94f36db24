"""The kind of the devices that a program is compiled for, be they present or not."""

import jax
from jax.sharding import Mesh

# GPUs whose cuDNN has flash attention: NVIDIA's from compute capability 8.0.
NVIDIA = ("hopper", "cuda")


def platform(mesh: Mesh | None = None) -> str:
    """`cpu`, `gpu` or `tpu`: JAX's name for the devices of a mesh, or the default."""
    return _first(mesh).platform


def backend(mesh: Mesh | None = None) -> str:
    """`cpu`, `tpu`, `hopper`, `cuda` or `gpu`: the devices of a mesh, or the default.

    `hopper` are NVIDIA's GPUs of compute capability 9.x, `cuda` its others from 8.0 on,
    `gpu` all others.
    """
    device = _first(mesh)
    if device.platform != "gpu":
        return device.platform
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:  # AMD's is a name such as gfx942
        return "gpu"
    return "hopper" if int(major) == 9 else "cuda"


def activations_dtype(dtype: str, mesh: Mesh | None = None) -> str:
    """`dtype`; for `auto` float32 on CPUs, bfloat16 on other devices."""
    if dtype != "auto":
        return dtype
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def _first(mesh: Mesh | None) -> jax.Device:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]
