"""The augmented dataset on disk: Parquet shards, and a folder of pictures.

    data/train-00000.parquet   images shard_size * 0 to shard_size * 1 - 1, in order
    data/real-00000.parquet    the training images beside them, if asked for
    train/<class>/00000000.png one picture an image, and train/metadata.jsonl
    redrawn.jsonl              images that were drawn anew, or left out, and why

Shards carry the feature metadata that `datasets.load_dataset` reads, and what they were
made of under the key `mvc_jax`. Their names do not hold their number, so that more
images can follow. A shard is renamed into place after its pictures, so its name means
that all of it is there.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image

from mvc_jax import files
from mvc_jax.data import decode
from mvc_jax.errors import UserError

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
_JPEG = {"quality": 95, "subsampling": 0}
_INTS = pa.list_(pa.int32())
PROVENANCE = {
    "index": pa.int64(),
    "source": pa.string(),
    "partners": pa.list_(pa.string()),
    "mode": pa.string(),
    "positions": _INTS,
    "donors": _INTS,
    "dims": pa.list_(_INTS),
    "dim_donors": _INTS,
    "dim_tokens": _INTS,
    "prompt": pa.string(),
    "seed": pa.int64(),
    "noise_seed": pa.int64(),
    "redraws": pa.int32(),
    "text_scale": pa.float32(),
    "image_scale": pa.float32(),
    "steps": pa.int32(),
    "sampler": pa.string(),
    "guidance_interval": pa.list_(pa.float32()),
    "guidance_rescale": pa.float32(),
    "model": pa.string(),
}
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_OURS = b"mvc_jax"


@dataclasses.dataclass(frozen=True)
class Part:
    """Images `start` to `stop - 1`, which the shard at `path` lacks."""

    path: epath.Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Store:
    """One set: where it lies, and in what form.

    Attributes:
      folder: of the set.
      class_names: of the dataset.
      model: hash of the weights that draw it, kept in each shard.
      shard_size: images in a shard.
      format: a key of `SUFFIXES`.
      pictures: whether there is the folder form, too.
    """

    folder: epath.Path
    class_names: Sequence[str]
    model: str
    shard_size: int
    format: str = "png"
    pictures: bool = True

    def missing(self, count: int) -> list[Part]:
        """What is still to be drawn of images 0 to `count - 1`, shard by shard.

        Raises:
          UserError: a shard is damaged, or another model drew it.
        """
        parts = []
        for shard, start in enumerate(range(0, count, self.shard_size)):
            stop = min(start + self.shard_size, count)
            path = shard_path(self.folder, shard)
            if path.exists():
                record = self._record(path)
                start = record["stop"]
            if start < stop:
                parts.append(Part(path, start, stop))
        return parts

    def write(
        self,
        part: Part,
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        rows: Sequence[dict[str, Any]],
        notes: Sequence[dict[str, Any]] = (),
        removed: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Writes a part, behind what its shard holds already; first the pictures.

        Args:
          part: of `missing`.
          images: in [0, 255], those that are kept.
          rows: of provenance, one an image with the keys of `PROVENANCE` and `label`,
            an index into `class_names`.
          notes: of images that could not be used as they were first drawn, `{"index",
            "reason", "redraws", "kept"}`.
          removed: of images that could, but were judged and left out.
        """
        table = self._table(images, rows)
        record = {"start": part.start, "stop": part.stop, "model": self.model}
        record |= {"notes": list(notes), "removed": list(removed)}
        if part.path.exists():
            before = self._record(part.path)
            record["start"] = before["start"]
            for name in ("notes", "removed"):
                record[name] = before[name] + record[name]
            with part.path.open("rb") as file:
                # Parquet names the items of lists otherwise than Arrow does.
                earlier = pq.read_table(file).cast(table.schema)
            table = pa.concat_tables([earlier, table])
        self._write(part.path, table, record)

    def write_real(
        self,
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        rows: Sequence[dict[str, Any]],
        shard: int,
    ) -> None:
        """Writes training images as shard `real-<shard>`, unless it is there."""
        path = shard_path(self.folder, shard, "real")
        if not path.exists():
            self._write(path, self._table(images, rows), {})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Provenance of all images in order, with `label` and `path` of the picture."""
        for path in self.shards():
            columns = ["label", "image.path", *PROVENANCE]
            with path.open("rb") as file:
                yield from pq.read_table(file, columns=columns).to_pylist()

    def recorded(self, name: str) -> list[dict[str, Any]]:
        """All `notes`, or all `removed`, in order."""
        shards = self.shards(real=False)
        return [row for path in shards for row in self._record(path)[name]]

    def labels(self, *, real: bool = False) -> Int[np.ndarray, " N"]:
        """Labels of the synthetic images that are kept, or of the real ones."""
        found = [np.zeros(0, np.int64)]
        for path in self.folder.glob(f"data/{'real' if real else 'train'}-*"):
            with path.open("rb") as file:
                found.append(pq.read_table(file, columns=["label"])["label"].to_numpy())
        return np.concatenate(found)

    def shards(self, *, real: bool = True) -> list[epath.Path]:
        """Paths of the shards, synthetic images first."""
        kinds = ("train", "real")[: 1 + real]
        data = self.folder / "data"
        return [path for kind in kinds for path in sorted(data.glob(f"{kind}-*"))]

    def restore_pictures(self) -> int:
        """Writes the pictures of the shards that are no longer there; how many."""
        if not self.pictures:
            return 0
        train, restored = self.folder / "train", 0
        folders = [f for f in train.iterdir() if f.is_dir()] if train.exists() else []
        there = {
            f"{folder.name}/{path.name}"
            for folder in folders
            for path in folder.iterdir()
        }
        for shard in self.shards():
            with shard.open("rb") as file:
                named = pq.read_table(file, columns=["image.path"])["path"]
            gone = {*named.to_pylist()} - there
            if not gone:
                continue
            with shard.open("rb") as file:
                cells = pq.read_table(file, columns=["image"])["image"].to_pylist()
            for cell in cells:
                if cell["path"] in gone:
                    files.write_bytes(train / cell["path"], cell["bytes"])
            restored += len(gone)
        return restored

    def finish(self) -> list[str]:
        """Writes `redrawn.jsonl` and the folder's `metadata.jsonl`.

        Returns:
          the files that make up the set, pictures apart, relative to its folder.
        """
        files.write_jsonl(self.folder / "redrawn.jsonl", self.recorded("notes"))
        names = [f"data/{path.name}" for path in self.shards()] + ["redrawn.jsonl"]
        if not self.pictures:
            return names
        rows = []
        for row in self.rows():
            path, label = row.pop("path"), row.pop("label")
            rows.append({"file_name": path, "label": self.class_names[label], **row})
        files.write_jsonl(self.folder / "train" / "metadata.jsonl", rows)
        return [*names, "train/metadata.jsonl"]

    def _table(self, images, rows) -> pa.Table:
        """Encodes images, writes their pictures, and makes a table of them."""
        names = [
            picture_name(
                self.class_names[row["label"]],
                row["index"],
                self.format,
                real=row["mode"] == "real",
            )
            for row in rows
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = list(pool.map(self._encode, images))
        cells = [
            {"bytes": content, "path": name}
            for content, name in zip(contents, names, strict=True)
        ]
        if self.pictures:
            for cell in cells:
                files.write_bytes(self.folder / "train" / cell["path"], cell["bytes"])
        columns = {
            "image": pa.array(cells, _IMAGE),
            "label": pa.array([row["label"] for row in rows], pa.int64()),
        }
        for name, type_ in PROVENANCE.items():
            columns[name] = pa.array([row[name] for row in rows], type_)
        return pa.table(columns)

    def _encode(self, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        options = _JPEG if self.format == "jpeg" else {}
        Image.fromarray(image).save(buffer, self.format, **options)
        return buffer.getvalue()

    def _write(self, path: epath.Path, table: pa.Table, record: dict) -> None:
        features = json.dumps(_features(self.class_names))
        metadata = {"huggingface": features, _OURS: json.dumps(record)}
        table = table.combine_chunks().replace_schema_metadata(metadata)
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            pq.write_table(table, file)

    def _record(self, path: epath.Path) -> dict[str, Any]:
        """What a shard was made of."""
        try:
            with path.open("rb") as file:
                record = json.loads(pq.read_schema(file).metadata[_OURS])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())  # some of it in two lines
            raise UserError(
                str(path),
                wanted="a shard that this stage wrote",
                got=f"a damaged one ({type(error).__name__}: {said})",
                fix="Delete it: the same command draws its images again.",
            ) from error
        if record["model"] != self.model:
            raise UserError(
                str(path),
                wanted=f"images of the present model, {self.model}",
                got=f"some of another, {record['model']}",
                fix="Put that model back, or delete the stage's folder to draw all "
                "images anew.",
            )
        return record


def real_row(index: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row of a real image: no provenance, but that it is real and which it is.

    Args:
      index: of the image.
      row: of it in `prompts.jsonl`.
    """
    nothing = dict.fromkeys(PROVENANCE) | {"mode": "real", "index": index}
    return nothing | {
        "source": row["id"],
        "label": row["label"],
        "prompt": row["prompt"],
    }


def shard_path(folder: epath.Path, shard: int, kind: str = "train") -> epath.Path:
    return folder / "data" / f"{kind}-{shard:05d}.parquet"


def picture_name(
    class_name: str, index: int, format: str = "png", *, real: bool = False
) -> str:
    """Path of an image inside `train/`: class folder, then index."""
    kind = "real-" if real else ""
    return f"{class_folder(class_name)}/{kind}{index:08d}{SUFFIXES[format]}"


def class_folder(class_name: str) -> str:
    """A folder name for any class name: itself if it is one, else with a hash of it."""
    safe = re.sub(r"[^\w\- ]", "_", class_name)
    if safe == class_name and 0 < len(safe.encode()) <= 200:
        return safe
    digest = hashlib.sha256(class_name.encode()).hexdigest()[:8]
    return f"{safe[:40]}-{digest}"


def read_rows(
    folder: epath.PathLike, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of all synthetic images of a set, in order; no real ones.

    Args:
      folder: of the set.
      columns: `label`, those of `PROVENANCE`, or `image`, uint8 [H, W, 3].
    """
    for path in sorted((epath.Path(folder) / "data").glob("train-*.parquet")):
        with path.open("rb") as file:
            table = pq.read_table(file, columns=list(columns))
        for row in table.to_pylist():
            if "image" in row:
                row["image"] = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            yield row


def read_images(
    folder: epath.PathLike, size: int = 0, **fit: str
) -> tuple[UInt8[np.ndarray, "N H W 3"], np.ndarray, list[str]]:
    """The synthetic images of all shards of a set, in order; no real ones.

    Args:
      folder: of the set.
      size: pixels along one side, which other sizes are brought to; 0: as they are.
      **fit: `resize` and `resample` of `decode.fit`.

    Returns:
      images, labels int32 [N] and source ids.
    """
    images, labels, sources = [], [], []
    for row in read_rows(folder, ("image", "label", "source")):
        images.append(decode.fit(row["image"], size, **fit) if size else row["image"])
        labels.append(row["label"])
        sources.append(row["source"])
    return np.stack(images), np.asarray(labels, np.int32), sources


def _features(class_names: Sequence[str]) -> dict:
    """The schema as Hugging Face `datasets` describes it."""

    def value(type_: pa.DataType) -> dict:
        if pa.types.is_list(type_):
            return {"feature": value(type_.value_type), "_type": "Sequence"}
        names = {"float": "float32"}
        return {"dtype": names.get(str(type_), str(type_)), "_type": "Value"}

    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    features |= {name: value(type_) for name, type_ in PROVENANCE.items()}
    return {"info": {"features": features}}
