"""The settings of a process that trains on a CPU."""

import os
import subprocess
import sys

PAGES = """
import resource
from mvc_jax.training import runtime

runtime.set_up("")
runtime.start()
import jax
import jax.numpy as jnp

def sums(x):
    return jnp.sort(jnp.cumsum(jnp.outer(x, x), axis=0), axis=-1)[5]

x = jnp.ones(5000)
program = jax.jit(sums).lower(x).compile()
jax.block_until_ready(program(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    x = jax.block_until_ready(program(x))
mapped = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
scratch = program.memory_analysis().temp_size_in_bytes
print(mapped * resource.getpagesize(), 4 * scratch)
"""


def test_the_scratch_of_a_program_is_mapped_once():
    """Also of more than the 64 MiB at which glibc gives back another thread's."""
    environment = {key: os.environ[key] for key in os.environ if key != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PAGES],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    mapped, scratch = map(int, run.stdout.split())
    assert scratch > 4 * (64 << 20)
    assert mapped < 0.3 * scratch
