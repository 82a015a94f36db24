"""Every reading line of the documents and cards, run by the program that it names.

Of programs that the lock does not have, `benchmarks/consumers.sh` runs the lines.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import awkward
import documented
import pytest
import readers
from etils import epath

from mvc_jax.data.sources import open_source

EXCHANGE = documented.ROOT / "docs" / "exchange.md"
HERE = pathlib.Path(__file__).parent
IN_LOCK = ("datasets", "imagefolder", "pandas", "metadata.jsonl", "Keras", "TFDS")
HERE_READ = ("torchvision", *IN_LOCK)
BY_CARD = ("datasets", "imagefolder", "torchvision")
ELSEWHERE = {  # imported module: where its lines are run
    "torchvision": "here by its rule, by itself in benchmarks/consumers.sh",
    "timm": "benchmarks/consumers.sh",
    "duckdb": "benchmarks/consumers.sh",
    "diffusers": "test_export.py",
    "mvc_jax": "its functions in test_api.py",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    awkward.write(folder)
    return folder


@pytest.fixture(scope="module")
def read(work, tensorflow_is_there):
    """(document, program) -> what it read."""
    card = work / "runs" / "parts3" / "generate" / "mixed" / "README.md"
    path = [str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "readers.py"),
            f"{EXCHANGE}={','.join(HERE_READ)}",
            f"{card}={','.join(BY_CARD)}",
        ],
        cwd=work,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = list(map(json.loads, done.stdout.splitlines()))
    return {(x["document"], x["program"]): x for x in found}


@pytest.mark.parametrize(
    ("document", "program"),
    [("exchange.md", program) for program in ("torchvision", *IN_LOCK)]
    + [
        ("README.md", program) for program in ("datasets", "imagefolder", "torchvision")
    ],
)
def test_a_documented_line_reads_all_images_classes_and_numbers(
    read, document, program
):
    found = read[document, program]
    assert "error" not in found, found["error"]
    assert len(found["rows"]) == len(awkward.IMAGES)
    assert awkward.equal(program, found["rows"]) == len(awkward.IMAGES)


def test_all_lines_of_the_documents_are_run():
    """By this file, or where `ELSEWHERE` says."""
    modules = {readers.PROGRAMS[name].module for name in IN_LOCK} | ELSEWHERE.keys()
    for document in documented.DOCUMENTS:
        for block in readers.blocks(str(document)):
            (module,) = {x for x in modules if readers.imports(block, x)}
            is_here = document == EXCHANGE or module in ("diffusers", "mvc_jax")
            assert is_here, f"{document.name}: lines for {module} are in exchange.md"
        inline = re.findall(r"load_dataset\([^)]*\)", document.read_text("utf-8"))
        if document != EXCHANGE:
            assert set(inline) <= {'load_dataset("runs/digits/generate/mixed")'}
    uses = collections.Counter(
        module
        for x in readers.blocks(str(EXCHANGE))
        for module in modules
        if readers.imports(x, module)
    )
    assert set(uses.values()) == {1}


def test_we_read_it_as_the_documents_say(work):
    text = EXCHANGE.read_text("utf-8")
    sources = re.findall(r"\b(?:folder|parquet):runs/[^\s`]+", text)
    assert len(sources) == 2
    images = {x: y for x, (y, _, _) in awkward.expected("datasets").items()}
    for source in sources:
        kind, _, path = source.partition(":")
        found = open_source(f"{kind}:{epath.Path(work) / path}")
        rows = zip(found.ids, found.labels, strict=True)
        assert {
            os.path.basename(id_): found.class_names[label] for id_, label in rows
        } == images
        assert found.is_test is None and found.defects == {}
