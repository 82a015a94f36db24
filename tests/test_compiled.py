"""The stages' programs, compiled for a TPU that is absent, at toy sizes.

libtpu, its compiler, is installed by launch/test.sh into a folder of its own: beside
JAX it would be asked for a TPU by every process.
"""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

from mvc_jax.errors import UserError

sys.path.append(str(ROOT / "benchmarks"))
import programs  # noqa: E402

LIBTPU = pathlib.Path(sys.prefix) / "libtpu"
TOY = ("--family=tiny", "--size=16", "--batch=8", "--devices=4", "--target=v5e")
PROGRAMS = {
    "finetune": (),
    "lora": (),
    "generate": ("--preset=fast",),
    "encode": (),
    "classify": ("--classifier=resnet8", "--policy=none"),
    "pretrain": (),
}


def need_libtpu():
    """Fails without libtpu, or skips if a variable says so."""
    if LIBTPU.is_dir():
        return
    if os.environ.get("MVC_JAX_WITHOUT_LIBTPU") == "1":
        pytest.skip("MVC_JAX_WITHOUT_LIBTPU=1, and libtpu is not installed")
    pytest.fail(f"no libtpu in {LIBTPU}: bash launch/test.sh installs it")


def compile_for(*flags):
    return run(ROOT / "benchmarks" / "compile_for.py", *flags)


def run(*arguments):
    """Python, with the benchmarks and libtpu on its path."""
    paths = (ROOT, ROOT / "benchmarks", LIBTPU)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a program once: name -> its row."""
    need_libtpu()
    rows = {}

    def row(name):
        if name not in rows:
            folder = tmp_path_factory.mktemp(name)
            flags = (f"--program={name}", f"--out={folder}", *TOY, *PROGRAMS[name])
            done = compile_for(*flags)
            assert done.returncode == 0, done.stderr[-2000:]
            assert f"| {name} | 4 v5e |" in done.stdout
            (line,) = (folder / "compiled.jsonl").read_text().splitlines()
            rows[name] = json.loads(line)
        return rows[name]

    return row


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_compiles_fits_and_exchanges_no_activations(compiled, name):
    row = compiled(name)
    assert row["fits"] and row["flops"] > 0
    assert {key.split()[0] for key in row["collectives"]} <= {"all-reduce"}


@pytest.mark.parametrize("name", ["finetune", "lora", "pretrain"])
def test_gradients_are_summed_in_float32(compiled, name):
    assert list(compiled(name)["collectives"]) == ["all-reduce f32"]


@pytest.mark.parametrize("name", ["finetune", "lora", "classify", "pretrain"])
def test_the_state_is_updated_in_place(compiled, name):
    row = compiled(name)
    assert row["branches"] == 0
    metrics = 4096  # bytes at most
    assert row["in_place"] >= row["results"] - metrics > 0


SUMMED = """
import jax, jax.numpy as jnp
import hlo, targets
from jax.sharding import NamedSharding, PartitionSpec
from mvc_jax.models import sharded_layers

targets.set_environment()
mesh = targets.mesh(targets.find("v5e"), devices=16, fsdp=16)
spec, stages = PartitionSpec("fsdp"), sharded_layers.summing_stages(mesh)

def gradient(shard, cotangent):
    gather = lambda shard: sharded_layers.gather(shard, spec, jnp.bfloat16, stages)
    return jax.vjp(gather, shard)[1](cotangent)[0]

specs = spec, PartitionSpec(("data", "fsdp"))
gradient = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=spec)
shapes = [
    jax.ShapeDtypeStruct((size, 1280), dtype, sharding=NamedSharding(mesh, spec))
    for size, dtype, spec in zip((1280, 16 * 1280), (jnp.float32, jnp.bfloat16), specs)
]
compiled = jax.jit(gradient).lower(*shapes).compile()
print(hlo.collectives(hlo.Module(compiled.as_text())))
"""


def test_on_a_square_slice_each_chip_receives_its_part_of_a_gradient():
    """libtpu makes a sum of which each keeps all of a single one over 4x4."""
    need_libtpu()
    done = run("-c", SUMMED)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = 1280 * 1280 * 4  # bytes
    assert ast.literal_eval(done.stdout) == {
        ("reduce-scatter", "f32"): (2, whole + whole / 4)  # rows, then columns
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target=v9",), "wanted one of h100, "),
        (("--target=v5e", "--devices=3"), "wanted 1, 2 or 4, "),
        (("--target=v5e", "--devices=8", "--batch=12"), "Try --batch=16"),
        (
            ("--target=h100",),
            "pip install -c requirements-cuda.lock -e '.[aot-gpu]'",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(flags, words):
    if "v5e" in flags[0]:
        need_libtpu()
    done = compile_for(*flags)
    assert done.returncode == 1 and words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_size_that_the_networks_cannot_halve_is_refused():
    with pytest.raises(UserError, match="--size=128"):
        programs.architecture(programs.Options(family="sd15", size=100))
