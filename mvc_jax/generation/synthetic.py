"""A set of synthetic images on disk: Parquet shards, and a folder of image files.

    data/train-00000.parquet   synthetic images 0 to shard_size - 1, in order
    data/real-00000.parquet    the training images, if requested
    train/<class>/00000000.png the same images as files, with train/metadata.jsonl
    redrawn.jsonl              images that were redrawn or left out, with the reason

Shards carry the feature metadata that `datasets.load_dataset` reads, and a record of
what is in them under the key `mvc_jax`. Their names do not contain their number, so
that shards can be added. A shard is written after its image files, so that a shard that
exists is complete.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from jaxtyping import Float, Int, UInt8
from PIL import Image

from mvc_jax import files, object_store
from mvc_jax.data import decode
from mvc_jax.data.class_folders import class_folder, class_folders
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError

with epy.lazy_imports():  # a complete set is recognised without it
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
_JPEG = {"quality": 95, "subsampling": 0}
PROVENANCE = {  # column -> its type; in brackets, of a list's items
    "index": "int64",
    "source": "string",
    "partners": ["string"],
    "mode": "string",
    "positions": ["int32"],
    "donors": ["int32"],
    "dims": [["int32"]],
    "dim_donors": ["int32"],
    "dim_tokens": ["int32"],
    "prompt": "string",
    "seed": "int64",
    "noise_seed": "int64",
    "redraws": "int32",
    "text_scale": "float32",
    "image_scale": "float32",
    "steps": "int32",
    "sampler": "string",
    "guidance_interval": ["float32"],
    "guidance_rescale": "float32",
    "model": "string",
}
OF_XL = {"pooled": "string"}  # as PROVENANCE, of Stable Diffusion XL
_RECORD = b"mvc_jax"


@dataclasses.dataclass(frozen=True)
class Part:
    """Images `start` to `stop - 1`, which are missing in a shard of a set.

    Attributes:
      folder: of the set.
      shard: its number.
      start, stop: of the images.
    """

    folder: epath.Path
    shard: int
    start: int
    stop: int

    @property
    def path(self) -> epath.Path:
        return shard_path(self.folder, self.shard)


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder of a set.

    Attributes:
      folder: of the set.
      digests: of the files in its folder.
      class_names: of the dataset.
      model: hash of the weights that draw the set, recorded in each shard.
      shard_size: images per shard.
      format: of the image files, a key of `SUFFIXES`.
      pictures: whether the images are also written as files.
      class_folders: what the folder of each class is called; (): by its name.
      further: columns of this set beside `PROVENANCE`, with their types: `OF_XL`, or
        those of images that start from their sources (`generation/edits.py`).
    """

    folder: epath.Path
    digests: Digests
    class_names: Sequence[str]
    model: str
    shard_size: int
    format: str = "png"
    pictures: bool = True
    class_folders: Sequence[str] = ()
    further: Mapping[str, str | list] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> dict[str, str | list]:
        """Columns of provenance -> their types."""
        return PROVENANCE | self.further

    @functools.cached_property
    def folders(self) -> Sequence[str]:
        """What the folder of each class is called."""
        return self.class_folders or class_folders(self.class_names)

    def missing(self, count: int) -> list[Part]:
        """The parts of images 0 to `count - 1` that are not on disk, by shard.

        A damaged shard is not: it is deleted.

        Raises:
          UserError: a shard was drawn by another model, or is of another dataset.
        """
        parts = []
        for shard, start in enumerate(range(0, count, self.shard_size)):
            stop = min(start + self.shard_size, count)
            path = shard_path(self.folder, shard)
            if self._is_there(path):
                start = self._record(path)["stop"]
            if start < stop:
                parts.append(Part(self.folder, shard, start, stop))
        return parts

    def write(
        self,
        part: Part,
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        rows: Sequence[dict[str, Any]],
        notes: Sequence[dict[str, Any]] = (),
        removed: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Writes the image files of a part, then appends it to its shard.

        Args:
          part: one of `missing`.
          images: in [0, 255], those that are kept.
          rows: the provenance of each image, with the keys of `columns` and `label`,
            an index into `class_names`.
          notes: of images that were unusable at first, `{"index", "reason", "redraws",
            "kept"}`.
          removed: rows of `removed.jsonl`, of images that the filters removed.
        """
        table = self._table(images, rows)
        record = {
            "start": part.start,
            "stop": part.stop,
            "model": self.model,
            "notes": list(notes),
            "removed": list(removed),
        }
        if part.path.exists():
            earlier = self._record(part.path)
            record["start"] = earlier["start"]
            for name in ("notes", "removed"):
                record[name] = earlier[name] + record[name]
            with part.path.open("rb") as file:
                # Parquet and Arrow name the items of lists differently.
                earlier_table = pq.read_table(file).cast(table.schema)
            table = pa.concat_tables([earlier_table, table])
        self._write(part.path, table, record)

    def write_real(
        self,
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        rows: Sequence[dict[str, Any]],
        shard: int,
    ) -> None:
        """Writes training images as shard `real-<shard>`, unless it exists."""
        path = shard_path(self.folder, shard, "real")
        if not self._is_there(path):
            self._write(path, self._table(images, rows), {})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Provenance of all images in order, with `label` and `path` of the file."""
        for path in self.shards():
            columns = ["label", "image.path", *self.columns]
            with path.open("rb") as file:
                yield from pq.read_table(file, columns=columns).to_pylist()

    def recorded(self, name: str) -> list[dict[str, Any]]:
        """All recorded `notes`, or all `removed`, in order."""
        shards = self.shards(real=False)
        return [row for path in shards for row in self._record(path)[name]]

    def labels(self, *, real: bool = False) -> Int[np.ndarray, " N"]:
        """Labels of the synthetic images, or of the real ones."""
        found = [np.zeros(0, np.int64)]
        for path in _shards(self.folder, ("real" if real else "train",)):
            with path.open("rb") as file:
                found.append(pq.read_table(file, columns=["label"])["label"].to_numpy())
        return np.concatenate(found)

    def shards(self, *, real: bool = True) -> list[epath.Path]:
        """Paths of the shards, those of synthetic images first."""
        return _shards(self.folder, ("train", "real") if real else ("train",))

    def finish(self) -> list[str]:
        """Writes the lists of a set whose shards are complete, and missing image files.

        Returns:
          the files of the set except image files, relative to its folder.
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
        listed = [row["file_name"] for row in rows]
        restore_pictures(self.folder, self.digests, listed)
        return [*names, "train/metadata.jsonl"]

    def _table(
        self,
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        rows: Sequence[dict[str, Any]],
    ) -> pa.Table:
        """Encodes images, writes their files, and returns the table of a shard."""
        names = [
            _picture(
                self.folders[row["label"]],
                row["index"],
                self.format,
                row["mode"] == "real",
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
            _write_pictures(self.folder / "train", cells, self.digests)
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {
            "image": pa.array(cells, image),
            "label": pa.array([row["label"] for row in rows], pa.int64()),
        }
        for name, type_ in self.columns.items():
            columns[name] = pa.array([row.get(name) for row in rows], arrow_type(type_))
        return pa.table(columns)

    def _encode(self, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        options = _JPEG if self.format == "jpeg" else {}
        Image.fromarray(image).save(buffer, self.format, **options)
        return buffer.getvalue()

    def _write(self, path: epath.Path, table: pa.Table, record: dict) -> None:
        features = json.dumps(_features(self.class_names, self.columns))
        metadata = {"huggingface": features, _RECORD: json.dumps(record)}
        table = table.combine_chunks().replace_schema_metadata(metadata)
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            pq.write_table(table, file)
        self.digests.add(path)

    def _is_there(self, path: epath.Path) -> bool:
        """Whether a shard was written; one that was damaged since is deleted."""
        if self.digests.intact(path):
            return True
        if path.exists():
            logging.warning("%s was damaged: drawing its images again", path)
            path.unlink()
        return False

    def _record(self, path: epath.Path) -> dict[str, Any]:
        """The record in a shard."""
        try:
            with path.open("rb") as file:
                record = json.loads(pq.read_schema(file).metadata[_RECORD])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            message = " ".join(str(error).split())  # pyarrow's may have two lines
            raise UserError(
                str(path),
                wanted="a shard that this stage wrote",
                got=f"a damaged one ({type(error).__name__}: {message})",
                fix="Delete it and rerun the same command to draw its images again.",
            ) from error
        if record["model"] != self.model:
            raise UserError(
                str(path),
                wanted=f"images of the present model, {self.model}",
                got=f"images of another model, {record['model']}",
                fix="Restore that model, or delete the stage's folder to draw all "
                "images again.",
            )
        return record


def raw_bytes(images: int, side: int, *, pictures: bool) -> int:
    """Bytes of images on disk if compression saved nothing.

    Args:
      images: how many.
      side: pixels along a side.
      pictures: whether they are also written as files.
    """
    return images * (2 if pictures else 1) * 3 * side**2


def restore_pictures(
    folder: epath.Path, digests: Digests, listed: Iterable[str]
) -> int:
    """Writes image files that were deleted from the folder of a set, or damaged.

    Args:
      folder: of a set with image files.
      digests: of its files.
      listed: paths of all image files inside `train/`.

    Returns:
      the number of files written.
    """
    train = folder / "train"
    start = f"{train}/"  # made once: there are many
    with object_store.listed(train):
        lost = {name for name in listed if not digests.intact(start + name)}
    for shard in _shards(folder, ("train", "real")) if lost else ():
        with shard.open("rb") as file:
            paths = pq.read_table(file, columns=["image.path"])["path"].to_pylist()
        if lost.isdisjoint(paths):
            continue
        with shard.open("rb") as file:
            cells = pq.read_table(file, columns=["image"])["image"].to_pylist()
        _write_pictures(train, [x for x in cells if x["path"] in lost], digests)
    return len(lost)


def listed_pictures(folder: epath.Path, digests: Digests) -> list[str]:
    """Paths inside `train/` of all image files of a complete set."""
    train = f"{folder.name}/train/"
    names = [x.removeprefix(train) for x in digests.recorded() if x.startswith(train)]
    found = [name for name in names if "/" in name]  # in the folder of a class
    if found:
        return found
    rows = files.read_jsonl(folder / "train" / "metadata.jsonl")  # slow, if it is long
    return [row["file_name"] for row in rows]


def _write_pictures(
    train: epath.Path, cells: Sequence[dict[str, Any]], digests: Digests
) -> None:
    """Writes the image files of some rows into the folder `train`."""
    files.write_all({train / cell["path"]: cell["bytes"] for cell in cells})
    start = f"{train}/"
    digests.add(*(start + cell["path"] for cell in cells))


def real_row(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a training image: its id as `source`, mode "real", no recipe.

    Args:
      index: of the image.
      row: of the image in `prompts.jsonl`.
    """
    return {
        **dict.fromkeys(PROVENANCE),
        "mode": "real",
        "index": index,
        "source": row["id"],
        "label": row["label"],
        "prompt": row["prompt"],
    }


def _shards(folder: epath.Path, kinds: Sequence[str]) -> list[epath.Path]:
    numbered = "-" + 5 * "[0-9]" + ".parquet"
    return [x for y in kinds for x in files.matching(folder, f"data/{y}{numbered}")]


def shard_path(folder: epath.Path, shard: int, kind: str = "train") -> epath.Path:
    return folder / "data" / f"{kind}-{shard:05d}.parquet"


def picture_name(
    class_name: str, index: int, format: str = "png", *, real: bool = False
) -> str:
    """Path of an image file inside `train/`: class folder, then index."""
    return _picture(class_folder(class_name), index, format, real)


def _picture(folder: str, index: int, format: str, real: bool) -> str:
    kind = "real-" if real else ""
    return f"{folder}/{kind}{index:08d}{SUFFIXES[format]}"


def earlier_class_folder(class_name: str) -> str:
    """What the folder of a class is called in a dataset that does not say so.

    Its name if that has letters, digits, blanks, `_` and `-` only, else with a hash.
    """
    safe = re.sub(r"[^\w\- ]", "_", class_name)
    if safe == class_name and 0 < len(safe.encode()) <= 200:
        return safe
    digest = hashlib.sha256(class_name.encode()).hexdigest()[:8]
    return f"{safe[:40]}-{digest}"


def read_rows(
    folder: epath.PathLike,
    columns: Sequence[str],
    *,
    start: int = 0,
    indices: Collection[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the synthetic images of a set, in order, without the real ones.

    Args:
      folder: of the set.
      columns: `label`, columns of `PROVENANCE`, or `image`, uint8 [H, W, 3].
      start: rows to leave out at the beginning.
      indices: of the images to read; None: all.
    """
    keep = None if indices is None else pc.field("index").isin(sorted(indices))
    for path in _shards(epath.Path(folder), ("train",)):
        with path.open("rb") as file:
            count = pq.read_metadata(file).num_rows
            if count <= start:
                start -= count
                continue
            table = pq.read_table(file, columns=list(columns), filters=keep)
        table, start = table.slice(start), 0
        for row in table.to_pylist():
            if "image" in row:
                row["image"] = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            yield row


def read_soft_labels(
    folder: epath.PathLike, classes: int
) -> Float[np.ndarray, "N K"] | None:
    """The soft labels of the synthetic images of a set; None where they have none.

    Args:
      folder: of the set.
      classes: K.
    """
    shards = _shards(epath.Path(folder), ("train",))
    if not shards:
        return None
    with shards[0].open("rb") as file:
        if "soft_label" not in pq.read_schema(file).names:
            return None
    found = [row["soft_label"] for row in read_rows(folder, ("soft_label",))]
    if all(each is None for each in found):
        return None
    return np.asarray(found, np.float32).reshape(len(found), classes)


def read_images(
    folder: epath.PathLike, size: int = 0, **fit: str
) -> tuple[UInt8[np.ndarray, "N H W 3"], np.ndarray, list[str]]:
    """The synthetic images of a set, in order, without the real ones.

    Args:
      folder: of the set.
      size: pixels along one side, to which images are resized; 0: they are not.
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


def arrow_type(type_: str | list) -> pa.DataType:
    """The Arrow type of a column, as `PROVENANCE` names it."""
    if isinstance(type_, list):
        return pa.list_(arrow_type(type_[0]))
    return pa.type_for_alias(type_)


def _feature(type_: str | list) -> dict[str, Any]:
    """The same for Hugging Face `datasets`."""
    if isinstance(type_, list):
        return {"feature": _feature(type_[0]), "_type": "Sequence"}
    return {"dtype": type_, "_type": "Value"}


def _features(class_names: Sequence[str], columns: Mapping[str, Any]) -> dict:
    """The schema as Hugging Face `datasets` describes it."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        **{name: _feature(type_) for name, type_ in columns.items()},
    }
    return {"info": {"features": features}}
