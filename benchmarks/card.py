"""What the accelerator is, and its two ceilings: matrix products and memory."""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator

from mvc_jax.errors import UserError

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "diffusers", "transformers", "numpy")


def rates(*, matrix: int, copy_mib: int, on_cpu: bool = False) -> Iterator[dict]:
    """The card, a square matrix product in bfloat16, and a copy.

    Args:
      matrix: its side.
      copy_mib: bytes of the array that is copied, in MiB.
      on_cpu: whether a CPU will do.
    """
    import jax
    import jax.numpy as jnp
    import measure

    device = jax.devices()[0]
    if device.platform == "cpu" and not on_cpu:
        raise UserError(
            "accelerator.sh",
            wanted="an accelerator that JAX finds",
            got=f"{jax.device_count()} CPU device(s) and JAX {jax.__version__}",
            fix="Install JAX for it (jax[cuda12], jax[cuda13] or jax[tpu]) and its "
            "driver, or rehearse on the CPU: --rehearse",
        )
    stats = device.memory_stats() or {}
    yield {
        "setting": device.device_kind,
        "figure": stats.get("bytes_limit", 0) / 2**30,
        "unit": "GiB usable",
        "note": "; ".join(versions(device)),
    }
    key = jax.random.key(0)
    left, right = jax.jit(
        lambda key: jax.random.normal(key, (2, matrix, matrix), jnp.bfloat16)
    )(key)
    product = jax.jit(jnp.matmul)
    seconds = measure.seconds_of(product, left, right)
    yield measure.row(
        f"bfloat16 product of {matrix} x {matrix} matrices",
        1e3 * seconds,
        "ms",
        tflops=2e-12 * matrix**3 / seconds,
    )
    array = jax.random.bits(key, (copy_mib, 2**20), "uint8")
    seconds = measure.seconds_of(jax.jit(jnp.invert), array)
    yield measure.row(
        f"copy of {copy_mib} MiB", 2e-9 * array.nbytes / seconds, "GB/s, both ways"
    )


def versions(device) -> list[str]:
    """Driver, platform and libraries."""
    found = [" ".join(device.client.platform_version.split())]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20)
        found.append(f"driver {output.stdout.split()[0] if output.stdout else '?'}")
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found
