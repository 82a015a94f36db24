"""Runs the lines of a document with the program that they name; prints what it read.

    python tests/consumers/readers.py DOCUMENT=PROGRAM,PROGRAM...

The lines of a card run in its folder, others in the current one. Needs the programs
alone, none of mvc_jax, so that it runs in any environment. Prints a line of JSON for
each program: `{"document", "program", "version", "rows"}`, or with an `error` in place
of `rows`. A row is `[file, class, number, pixels]`: the name of the file, the class's
name, its number or None, the pixels' SHA-256.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Row = tuple[str, str, int | None, str]
Scope = dict[str, Any]
SHAPE = (8, 6)  # height and width of the images


def digest(image: Any) -> str:
    """SHA-256 of RGB pixels, uint8 [H, W, 3]."""
    pixels = np.ascontiguousarray(np.asarray(image))
    assert pixels.dtype == np.uint8 and pixels.ndim == 3, (pixels.dtype, pixels.shape)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def blocks(document: str) -> list[str]:
    """The Python code in a document."""
    text = pathlib.Path(document).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def is_card(document: str) -> bool:
    return os.path.basename(document) == "README.md"


def imports(block: str, module: str) -> bool:
    return bool(re.search(rf"^(import|from) {module}\b", block, re.M))


@functools.cache
def run(document: str, module: str) -> Scope:
    """Runs the first block of a document that imports `module`.

    The blocks of a card continue each other: those before it run as well.

    Returns:
      the variables that they set.
    """
    code = blocks(document)
    last = next(k for k, block in enumerate(code) if imports(block, module))
    first = 0 if is_card(document) else last
    scope: Scope = {}
    for block in code[first : last + 1]:
        exec(block.replace("(256, 256)", str(SHAPE)), scope)
    return scope


def _file(row: dict) -> str:
    kind = "real-" if row["mode"] == "real" else ""
    return f"{kind}{row['index']:08d}.png"


def _of_datasets(dataset: Any) -> Iterator[Row]:
    names = dataset.features["label"].names
    for row in dataset:
        yield _file(row), names[row["label"]], row["label"], digest(row["image"])


def _datasets(scope: Scope) -> Iterator[Row]:
    yield from _of_datasets(scope["dataset"])


def _imagefolder(scope: Scope) -> Iterator[Row]:
    yield from _of_datasets(scope["pictures"])


def _torchvision(scope: Scope) -> Iterator[Row]:
    found = scope["pictures"]
    for (path, own), (image, number) in zip(found.samples, found, strict=True):
        yield os.path.basename(path), found.classes[own], number, digest(image)


def _timm(scope: Scope) -> Iterator[Row]:
    found = scope["pictures"]
    names = {number: name for name, number in found.reader.class_to_idx.items()}
    for (path, _), (image, number) in zip(found.reader.samples, found, strict=True):
        yield os.path.basename(path), names[number], number, digest(image)


def _keras(scope: Scope) -> Iterator[Row]:
    found, names = scope["pictures"], scope["pictures"].class_names
    for path, (image, number) in zip(found.file_paths, found.unbatch(), strict=True):
        pixels = image.numpy().astype(np.uint8)
        yield os.path.basename(path), names[int(number)], int(number), digest(pixels)


def _tfds(scope: Scope) -> Iterator[Row]:
    for row in scope["pictures"].as_numpy_iterator():
        file = os.path.basename(row["image/filename"].decode())
        number = int(row["label"])
        yield file, scope["names"][number], number, digest(row["image"])


def _pandas(scope: Scope) -> Iterator[Row]:
    for row in scope["table"].to_dict("records"):
        yield _parquet_row(row["image"]["path"], row["label"], row["image"]["bytes"])


def _parquet_row(path: str, number: int, content: bytes) -> Row:
    from PIL import Image

    name, file = os.path.split(path)
    return file, name, int(number), digest(Image.open(io.BytesIO(content)))


def _metadata(scope: Scope) -> Iterator[Row]:
    from PIL import Image

    for row in scope["rows"].to_dict("records"):
        path = row["file_name"]
        image = Image.open(f"runs/parts3/generate/mixed/train/{path}")
        yield os.path.basename(path), row["label"], None, digest(image)


def _duckdb(scope: Scope) -> Iterator[Row]:
    for number, path, content in scope["table"].fetchall():
        yield _parquet_row(path, number, bytes(content))


class Program(NamedTuple):
    """Attributes:
    module: that its lines import.
    package: whose version is printed.
    rows: from the variables that the lines set.
    """

    module: str
    package: str
    rows: Callable[[Scope], Iterator[Row]]


PROGRAMS = {
    "datasets": Program("datasets", "datasets", _datasets),
    "imagefolder": Program("datasets", "datasets", _imagefolder),
    "torchvision": Program("torchvision", "torchvision", _torchvision),
    "timm": Program("timm", "timm", _timm),
    "Keras": Program("keras", "keras", _keras),
    "TFDS": Program("tensorflow_datasets", "tensorflow_datasets", _tfds),
    "pandas": Program("pandas", "pandas", _pandas),
    "metadata.jsonl": Program("pandas", "pandas", _metadata),
    "DuckDB": Program("duckdb", "duckdb", _duckdb),
}


@functools.cache
def declare_operators_of_torchvision() -> Any:
    """Declares torchvision's operators where its library is of another PyTorch.

    Its wheel on PyPI is for CUDA: a CPU build of PyTorch cannot load its kernels.
    """
    import torch

    with contextlib.suppress(RuntimeError):  # an operator that does not exist
        return importlib.import_module("torchvision")
    for name in [x for x in sys.modules if x.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    where = importlib.util.find_spec("torchvision").origin
    registered = pathlib.Path(where).with_name("_meta_registrations.py").read_text()
    names = re.findall(r'torchvision::(\w+)"|register_meta\("(\w+)"', registered)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in {a or b for a, b in names}:
        library.define(f"{name}(Tensor x) -> Tensor")
    return library  # the operators end with it


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "stand-in"


def read(document: str, name: str) -> dict[str, Any]:
    program = PROGRAMS[name]
    found: dict[str, Any] = {
        "document": os.path.basename(document),
        "program": name,
        "version": version(program.package),
    }
    if {program.module} & {"timm", "torchvision"} and found["version"] != "stand-in":
        declare_operators_of_torchvision()
    try:
        rows = list(program.rows(run(document, program.module)))
    except Exception as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    return found | {"rows": rows}


def main(*arguments: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": cache}
        for argument in arguments:
            path, _, names = argument.rpartition("=")
            document = os.path.abspath(path)
            where = os.path.dirname(document) if is_card(document) else "."
            with contextlib.chdir(where):
                for name in names.split(","):
                    with contextlib.redirect_stdout(sys.stderr):
                        found = read(document, name)
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
