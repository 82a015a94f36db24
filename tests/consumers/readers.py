"""Reads a generated set with one program, as the documents say, and prints what it saw.

    python tests/consumers/readers.py PROGRAM FOLDER

Needs that program alone, none of mvc_jax, so that it runs in any environment. Prints a
line of JSON for its version, then one for every image: `[file, class, number, digest]`:
the name of the file or None, the class's name, its number or None, the pixels' SHA-256.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

Row = tuple[str | None, str, int | None, str]


def digest(image: Any) -> str:
    """SHA-256 of RGB pixels, [H, W, 3]."""
    pixels = np.ascontiguousarray(np.asarray(image))
    assert pixels.dtype == np.uint8 and pixels.ndim == 3, (pixels.dtype, pixels.shape)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def documented(folder: str, *wanted: str) -> dict[str, Any]:
    """Runs the lines of the card's first code block that contain one of `wanted`.

    Returns:
      the variables that they set. The caller is in `folder`.
    """
    card = pathlib.Path(folder, "README.md").read_text("utf-8")
    (block, *_) = re.findall(r"```python\n(.*?)```", card, re.S)
    scope: dict[str, Any] = {}
    lines = [x for x in block.splitlines() if any(word in x for word in wanted)]
    exec("\n".join(lines), scope)
    return scope


def _datasets_rows(dataset: Any) -> Iterator[Row]:
    label = dataset.features["label"]
    for row in dataset:
        name = label.names[row["label"]]
        yield _file(row), name, row["label"], digest(row["image"])


def _file(row: dict) -> str:
    kind = "real-" if row["mode"] == "real" else ""
    return f"{kind}{row['index']:08d}.png"


def datasets_shards(folder: str) -> Iterator[Row]:
    scope = documented(folder, "import", "dataset = ")
    yield from _datasets_rows(scope["dataset"]["train"])


def datasets_folder(folder: str) -> Iterator[Row]:
    scope = documented(folder, "import", "files", "pictures")
    yield from _datasets_rows(scope["pictures"]["train"])


def torchvision_folder(folder: str) -> Iterator[Row]:
    torchvision_without_operators()
    from torchvision.datasets import ImageFolder

    found = ImageFolder(f"{folder}/train")
    for (path, number), (image, _) in zip(found.samples, found, strict=True):
        yield os.path.basename(path), found.classes[number], number, digest(image)


@functools.cache
def torchvision_without_operators() -> Any:
    """Declares the operators of which a CPU build of PyTorch has no kernels."""
    import torch

    where = importlib.util.find_spec("torchvision").origin
    text = pathlib.Path(where).with_name("_meta_registrations.py").read_text()
    names = re.findall(r'torchvision::(\w+)"|register_meta\("(\w+)"', text)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in {a or b for a, b in names}:
        library.define(f"{name}(Tensor x) -> Tensor")
    return library  # the operators end with it


def timm_folder(folder: str) -> Iterator[Row]:
    torchvision_without_operators()
    from timm.data import ImageDataset

    found = ImageDataset(f"{folder}/train")
    names = {number: name for name, number in found.reader.class_to_idx.items()}
    for (path, number), (image, _) in zip(found.reader.samples, found, strict=True):
        yield os.path.basename(path), names[number], number, digest(image)


def keras_folder(folder: str) -> Iterator[Row]:
    import keras

    found = keras.utils.image_dataset_from_directory(
        f"{folder}/train",
        batch_size=None,
        image_size=(8, 6),
        shuffle=False,
        interpolation="nearest",
        verbose=False,
    )
    names = found.class_names
    for path, (image, number) in zip(found.file_paths, found, strict=True):
        pixels = image.numpy().astype(np.uint8)
        yield os.path.basename(path), names[int(number)], int(number), digest(pixels)


def tfds_folder(folder: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    builder = tfds.ImageFolder(folder)
    names = builder.info.features["label"].names
    for row in builder.as_dataset(split="train").as_numpy_iterator():
        path = row["image/filename"].decode()
        number = int(row["label"])
        yield os.path.basename(path), names[number], number, digest(row["image"])


def pandas_shards(folder: str) -> Iterator[Row]:
    import pandas
    from PIL import Image

    table = pandas.read_parquet(f"{folder}/data")
    for row in table.to_dict("records"):
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        name = os.path.dirname(row["image"]["path"])
        yield os.path.basename(row["image"]["path"]), name, row["label"], digest(image)


def pandas_metadata(folder: str) -> Iterator[Row]:
    import pandas
    from PIL import Image

    table = pandas.read_json(f"{folder}/train/metadata.jsonl", lines=True, dtype=False)
    for row in table.to_dict("records"):
        image = Image.open(f"{folder}/train/{row['file_name']}")
        yield os.path.basename(row["file_name"]), row["label"], None, digest(image)


def duckdb_shards(folder: str) -> Iterator[Row]:
    import duckdb
    from PIL import Image

    query = "select image.path, label, image.bytes from read_parquet(?)"
    files = f"{folder}/data/*.parquet"
    for path, number, content in duckdb.execute(query, [files]).fetchall():
        image = Image.open(io.BytesIO(content))
        yield os.path.basename(path), os.path.dirname(path), number, digest(image)


READERS = {  # program: what reads, its package
    "datasets": (datasets_shards, "datasets"),
    "datasets-imagefolder": (datasets_folder, "datasets"),
    "torchvision": (torchvision_folder, "torchvision"),
    "timm": (timm_folder, "timm"),
    "keras": (keras_folder, "keras"),
    "tfds": (tfds_folder, "tensorflow_datasets"),
    "pandas": (pandas_shards, "pandas"),
    "pandas-metadata": (pandas_metadata, "pandas"),
    "duckdb": (duckdb_shards, "duckdb"),
}


def main(program: str, folder: str) -> None:
    read, package = READERS[program]
    folder = os.path.abspath(folder)
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": cache}
        os.chdir(folder)
        rows = list(read(folder))
    print(json.dumps(importlib.metadata.version(package)))
    for row in rows:
        print(json.dumps([x.item() if isinstance(x, np.generic) else x for x in row]))


if __name__ == "__main__":
    main(*sys.argv[1:])
