"""The stages' programs, compiled for a TPU that is absent, at toy sizes.

libtpu, its compiler, is installed by launch/test.sh into a folder of its own: beside
JAX it would be asked for a TPU by every process.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

LIBTPU = pathlib.Path(sys.prefix) / "libtpu"
TOY = ("--family=tiny", "--size=64", "--batch=8", "--devices=4", "--target=v5e")
PROGRAMS = {  # the others share their steps, and take a minute more
    "finetune": (),
    "generate": ("--preset=fast",),
    "encode": (),
    "classify": ("--classifier=resnet8", "--policy=none"),
}


def need_libtpu():
    """Fails without libtpu, or skips if a variable says so."""
    if LIBTPU.is_dir():
        return
    if os.environ.get("MVC_JAX_WITHOUT_LIBTPU") == "1":
        pytest.skip("MVC_JAX_WITHOUT_LIBTPU=1, and libtpu is not installed")
    pytest.fail(f"no libtpu in {LIBTPU}: bash launch/test.sh installs it")


def compile_for(*flags):
    paths = (ROOT, ROOT / "benchmarks", LIBTPU)
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compile_for.py", *flags],
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


def test_gradients_are_summed_in_float32(compiled):
    assert list(compiled("finetune")["collectives"]) == ["all-reduce f32"]


@pytest.mark.parametrize("name", ["finetune", "classify"])
def test_the_state_is_updated_in_place(compiled, name):
    row = compiled(name)
    assert row["branches"] == 0
    metrics = 4096  # bytes at most
    assert row["in_place"] >= row["results"] - metrics > 0


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
