"""What 64 devices send each other in compiled programs; test_devices has 8 of them."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CACHE, ROOT

SCRIPT = f"""
import json
import jax, hlo, programs
from mvc_jax.training import sharding

jax.config.update("jax_compilation_cache_dir", {str(CACHE)!r})

def counted(name, data, fsdp):
    options = programs.Options(family="tiny", size=16, batch=64, dtype="float32")
    built = programs.build(name, options, sharding.make_mesh(data, fsdp))
    module = hlo.Module(built.function.lower(*built.arguments).compile().as_text())
    found = {{kind: row for (kind, _), row in hlo.collectives(module).items()}}
    state = built.arguments[0]
    leaves = jax.tree.leaves(getattr(state, "params", ()))
    sharded = [x.size for x in leaves if not x.sharding.is_fully_replicated]
    return found, sharded, sum(x.size for x in leaves)

print(json.dumps([counted("finetune", 8, 8), counted("generate", 64, 1)]))
"""


@pytest.fixture(scope="module")
def programs():
    """Of the fine-tuning step over 8 x 8, and of drawing: what is sent; parameters."""
    devices = "--xla_force_host_platform_device_count=64"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{devices} --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_step_gathers_a_leaf_once_a_pass_and_sums_each_gradient_once(programs):
    """Bytes in float32; a sum over a shard is followed by one over the other axis."""
    (sent, sharded, parameters), _ = programs
    assert set(sent) == {"all-gather", "reduce-scatter", "all-reduce"}
    gathers, gathered = sent["all-gather"]
    passes = 2
    assert len(sharded) <= gathers <= passes * len(sharded)
    assert gathered <= passes * 4 * sum(sharded)
    assert sent["reduce-scatter"] == [len(sharded), 4 * sum(sharded)]
    shards, metrics = sum(sharded) // 8, 4096
    replicated = parameters - sum(sharded)
    assert sent["all-reduce"][1] <= 4 * (shards + replicated) + metrics
    assert sent["all-reduce"][0] <= 5


def test_drawing_images_sends_nothing(programs):
    _, (sent, _, _) = programs
    assert sent == {}
