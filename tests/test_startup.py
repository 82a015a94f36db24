"""What a process imports and starts before a stage has work: nothing that is slow."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from mvc_jax import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAVY = (
    "jax",
    "flax",
    "optax",
    "orbax",
    "transformers",
    "diffusers",
    "torch",
    "tensorflow",
    "scipy",
    "sklearn",
    "skimage",
    "grain",
    "matplotlib",
    "pyarrow",
    "tensorboardX",
)
REPORT = """
print(json.dumps([name for name in HEAVY if name in sys.modules]), file=sys.stdout)
"""


def python(script, *arguments):
    """Runs a script in a process like a user's; returns its output and its errors."""
    ours = ("XLA_FLAGS", "JAX_PLATFORMS")
    environment = {key: v for key, v in os.environ.items() if key not in ours}
    preamble = f"import json, sys\nHEAVY = {HEAVY}\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_checks_of_the_digits_import_nothing_heavy(tmp_path):
    """All ten stages are imported, and every field and the source are checked."""
    script = """
from mvc_jax import train
from mvc_jax.command import command_line, plan
flags = ["train", "--config=configs/digits.py", f"--workdir={sys.argv[1]}"]
command = command_line.parse(flags)
train.common.FIELDS.check(command.config)
steps = plan.make(train.STAGES, command.config, command.workdir)
train.check_stages([step.name for step in steps], command.config)
assert all(f"mvc_jax.{name}" in sys.modules for name in train.STAGES)
"""
    output, errors = python(script + REPORT, tmp_path)
    assert json.loads(output) == []
    assert errors == ""


def test_a_dry_run_starts_no_backend(tmp_path):
    script = """
from mvc_jax import train
code = train.main(["train", f"--workdir={sys.argv[1]}/run", "--dry_run"])
from jax._src import xla_bridge
assert not code and not xla_bridge.backends_are_initialized()
"""
    output, errors = python(script, tmp_path)
    assert output.startswith("stage ")
    assert errors == ""
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", train.STAGES)
def test_importing_a_stage_imports_nothing_heavy(name):
    output, errors = python(f"from mvc_jax import {name}\n" + REPORT)
    assert json.loads(output) == []
    assert errors == ""


PROBE = """
from mvc_jax import caption, train

def run(config, workdir):
    import os
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    assert flag in os.environ["XLA_FLAGS"]
    import importlib.metadata
    flag = "--xla_cpu_experimental_ynn_fusion_type=-"
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    assert (flag in os.environ["XLA_FLAGS"]) == known
    flag = "--fibers_default_thread_stack_size=1048576"
    assert flag in os.environ["LIBTPU_INIT_ARGS"]
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    import jax
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    assert jax.config.jax_compilation_cache_dir == config.compilation_cache
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.05
    print("captioning starts")
    sys.exit(0)

caption.run = run
train.main(["train", *sys.argv[1:]])
"""


@pytest.mark.parametrize("checked", ["fields", "networks", "mesh"])
def test_no_backend_exists_when_captioning_starts(checked, original, tmp_path):
    """Else XLA's flags were set too late, and on a GPU BLIP-2 found no memory.

    Checks that read a base model or build a network import JAX, but start no backend.
    """
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    flags.append(f"--config.compilation_cache={tmp_path}")
    if checked == "networks":
        flags += [f"--config.base.path={original}", "--config.classify.model=wrn16_4"]
        flags += ["--config.classify.width=0", "--config.data.size=8"]
        flags += ["--config.classify.size=8", "--config.classify.stem_stride=1"]
    elif checked == "mesh":
        flags.append("--config.mesh.data=1")
    output, errors = python(PROBE, *flags)
    assert output.splitlines() == ["captioning starts"], errors
