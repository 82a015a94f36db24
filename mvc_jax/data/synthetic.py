"""The augmented dataset on disk: Parquet shards, and a folder of PNGs.

Shards carry the feature metadata that `datasets.load_dataset("parquet")` reads; the
folder is `train/<class>/*.png` with `train/metadata.jsonl`. A shard's Parquet file is
renamed into place after its PNGs, so its name means that all of it is there.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mvc_jax import files

_FIELDS = {
    "index": pa.int64(),
    "source": pa.string(),
    "partners": pa.list_(pa.string()),
    "mode": pa.string(),
    "positions": pa.list_(pa.int32()),
    "donors": pa.list_(pa.int32()),
    "dims": pa.list_(pa.list_(pa.int32())),
    "dim_donors": pa.list_(pa.int32()),
    "dim_tokens": pa.list_(pa.int32()),
    "noise_seed": pa.int64(),
    "prompt": pa.string(),
    "seed": pa.int64(),
    "text_scale": pa.float32(),
    "image_scale": pa.float32(),
    "steps": pa.int32(),
    "sampler": pa.string(),
    "model": pa.string(),
}


def shard_path(folder: epath.Path, shard: int, shards: int) -> epath.Path:
    return folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet"


def png_name(class_name: str, index: int) -> str:
    """Path of an image inside `train/`: class folder, then index."""
    return f"{class_folder(class_name)}/{index:08d}.png"


def class_folder(class_name: str) -> str:
    """A folder name for any class name: itself if it is one, else with a hash of it."""
    safe = re.sub(r"[^\w\- ]", "_", class_name)
    if safe == class_name and 0 < len(safe.encode()) <= 200:
        return safe
    digest = hashlib.sha256(class_name.encode()).hexdigest()[:8]
    return f"{safe[:40]}-{digest}"


def write_shard(
    path: epath.Path,
    images: UInt8[np.ndarray, "N H W 3"],
    rows: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    *,
    pictures: epath.Path | None,
) -> None:
    """Writes one Parquet shard and, if `pictures` is a folder, its PNGs below it.

    Args:
      path: of the shard.
      images: in [0, 255].
      rows: provenance, one dict an image with the keys of the schema and `label`, an
        index into `class_names`.
      class_names: of the dataset.
      pictures: the folder form's `train/`.
    """
    cells = []
    for image, row in zip(images, rows, strict=True):
        name = png_name(class_names[row["label"]], row["index"])
        content = _png(image)
        cells.append({"bytes": content, "path": name})
        if pictures is not None:
            files.write_bytes(pictures / name, content)
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "image": pa.array(cells, image_type),
        "label": pa.array([row["label"] for row in rows], pa.int64()),
    }
    for name, type_ in _FIELDS.items():
        columns[name] = pa.array([row[name] for row in rows], type_)
    table = pa.table(columns)
    metadata = {"huggingface": json.dumps(_features(class_names))}
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)


def restore_pictures(path: epath.Path, pictures: epath.Path) -> None:
    """Writes the PNGs of a finished shard that are no longer there."""
    with path.open("rb") as file:
        table = pq.read_table(file, columns=["image"])
    for cell in table["image"].to_pylist():
        if not (pictures / cell["path"]).exists():
            files.write_bytes(pictures / cell["path"], cell["bytes"])


def read_rows(folder: epath.PathLike, columns: Sequence[str]) -> Iterator[dict]:
    """Rows of all shards of `folder`, in order; an `image` as uint8 [H, W, 3]."""
    for path in sorted((epath.Path(folder) / "data").glob("train-*.parquet")):
        with path.open("rb") as file:
            table = pq.read_table(file, columns=list(columns))
        for row in table.to_pylist():
            if "image" in row:
                row["image"] = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            yield row


def read_images(
    folder: epath.PathLike,
) -> tuple[UInt8[np.ndarray, "N H W 3"], np.ndarray, list[str]]:
    """Images, labels int32 [N] and source ids of all shards of `folder`, in order."""
    shards = sorted((epath.Path(folder) / "data").glob("train-*.parquet"))
    images, labels, sources = [], [], []
    for path in shards:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=["image", "label", "source"])
        for cell in table["image"].to_pylist():
            images.append(np.asarray(Image.open(io.BytesIO(cell["bytes"]))))
        labels += table["label"].to_pylist()
        sources += table["source"].to_pylist()
    return np.stack(images), np.asarray(labels, np.int32), sources


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _features(class_names: Sequence[str]) -> dict:
    """The schema as Hugging Face `datasets` describes it."""

    def value(type_: pa.DataType) -> dict:
        if pa.types.is_list(type_):
            return {"feature": value(type_.value_type), "_type": "List"}
        names = {"float": "float32"}
        return {"dtype": names.get(str(type_), str(type_)), "_type": "Value"}

    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    features |= {name: value(type_) for name, type_ in _FIELDS.items()}
    return {"info": {"features": features}}
