"""Datasets of TensorFlow Datasets (TFDS) as a source, read without TensorFlow.

TensorFlow is needed once, by another process that prepares the dataset; the errors here
give the command. After that TFDS reads records at random, and Pillow decodes the images
in them, as for any other source, since TFDS reads palette images as grey and CMYK as
RGBA.
"""

import difflib
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from mvc_jax.data.decode import BadImage, Decoder
from mvc_jax.data.example import Example
from mvc_jax.errors import UserError

SPLITS = ("train", "validation", "test")
_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_RECORDS_AT_ONCE = 256  # when reading labels


class Tfds:
    """A prepared dataset of TFDS as a `Source`; ids are `NAME/SPLIT/INDEX`.

    Test images are those of the split `test` if it is labelled, else of `validation`,
    which otherwise joins `train`. All other splits are ignored. Opening reads the label
    of every record, but decodes no image.

    Args:
      name: `cifar10`, `cifar10:3.0.2` or `my_set/config:1.0.0`; without a version, the
        newest that is prepared.
      decoder: of the image bytes.
      data_dir: TFDS's data directory; "": TFDS's default.
      image_column: name of the feature `Image`; if it is "image" and there is none, the
        first of the dataset's `supervised_keys`.
      label_column: name of the feature `ClassLabel`; if it is "label" and there is
        none, the second of the dataset's `supervised_keys`.
      keep_validation: whether validation images neither join train nor are test.

    Raises:
      UserError: the dataset is unknown, not prepared, not prepared for random access,
        damaged, or does not consist of labelled images.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        *,
        data_dir: str = "",
        image_column: str = "image",
        label_column: str = "label",
        keep_validation: bool = False,
    ):
        folder = _find(name, data_dir)
        if folder is None:
            builder, sources = _open_with_tfds(name, data_dir)
        else:
            builder = _open(folder, name, _root(data_dir))
            sources = _raw_records(builder, folder)
        image, label = _columns(builder.info, image_column, label_column)
        self._decoder, self._image = decoder, image
        self._feature = builder.info.features[image]
        self.class_names = tuple(builder.info.features[label].names)
        self._records, labels = _labelled(sources, label, folder or name)
        splits = list(labels)
        counts = [len(labels[split]) for split in splits]
        every = np.concatenate([np.zeros(0, int), *labels.values()])
        split_of = np.repeat(np.arange(len(splits)), counts)
        row_of = np.concatenate([np.zeros(0, int), *map(np.arange, counts)])
        prefix = name.partition(":")[0]
        places = zip(split_of.tolist(), row_of.tolist(), strict=True)
        ids = [f"{prefix}/{splits[split]}/{row:06d}" for split, row in places]

        good = (every >= 0) & (every < len(self.class_names))
        self.remarks = ()
        self.defects = {
            ids[i]: "no label"
            if every[i] == -1
            else f"no class has the label {every[i]}"
            for i in np.flatnonzero(~good)
        }
        if not good.any():
            raise UserError(
                f"config.data.source=tfds:{name}",
                wanted=f"labelled images in one of the splits {', '.join(SPLITS)}",
                got=f"none in {', '.join(builder.info.splits) or 'no split at all'}",
                fix="Name another dataset.",
            )
        self.labels = every[good].astype(np.int32)
        self.ids = tuple(ids[i] for i in np.flatnonzero(good))
        self._splits, self._rows = split_of[good], row_of[good]
        kept = keep_validation and "validation" in splits
        own = self._splits == splits.index("validation") if kept else None
        self.is_validation = own
        others = ("train", "validation") if kept else ("train",)
        test = [i for i, split in enumerate(splits) if split not in others][-1:]
        self.is_test = self._splits == test[0] if test and len(splits) > 1 else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        records = self._records[self._splits[index]]
        try:
            record = records[int(self._rows[index])]
            array = content = None
            if isinstance(record, dict):
                array = np.asarray(record[self._image])
            else:
                content = _value(record, self._image).bytes_list.value[0]
                if self._feature.np_dtype == np.float32:  # a PNG's channels hold bits
                    array = self._feature.decode_example_np(content)
        except Exception as error:  # of array_record, protobuf, Arrow, TFDS
            raise BadImage(f"its record cannot be read: {error}") from error
        decode = self._decoder
        image, note = decode(content) if array is None else decode.from_array(array)
        label, id_ = int(self.labels[index]), self.ids[index]
        return Example(image=image, label=label, id=id_, note=note)


def _value(record: Any, column: str) -> Any:
    """One feature of a record, which is a serialised `tf.train.Example`."""
    return tf_example_pb2.Example.FromString(record).features.feature[column]


def _find(name: str, data_dir: str) -> epath.Path | None:
    """The folder of the prepared dataset, `DATA_DIR/NAME[/CONFIG]/VERSION`, or None."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            "config.data.source",
            wanted="tfds:NAME, optionally followed by /CONFIG and :1.2.3",
            got=f"tfds:{name}",
            fix="Correct it.",
        )
    dataset, config, version = match.groups()
    root = _root(data_dir)
    home = root / dataset
    places = [home / config] if config else [home, *_folders(home)]
    found = [
        folder
        for place in places
        for folder in _folders(place)
        if _VERSION.fullmatch(folder.name) and (folder / "features.json").exists()
    ]
    chosen = [folder for folder in found if version in (None, folder.name)]
    configs = sorted({folder.parent.name for folder in chosen})
    if not chosen and found:  # another version
        raise _not_prepared(name, data_dir, found)
    if not chosen:
        return None
    if len(configs) > 1:
        raise UserError(
            f"config.data.source=tfds:{name}",
            wanted="the name of a config of this dataset",
            got=f"none, and {', '.join(configs)} are prepared in {root}",
            fix=f"Name one, e.g. tfds:{dataset}/{configs[0]}.",
        )
    return max(chosen, key=lambda folder: [*map(int, folder.name.split("."))])


def _open_with_tfds(name: str, data_dir: str) -> tuple[Any, dict[str, Sequence]]:
    """TFDS's builder, and split -> decoded examples, of a dataset that only TFDS finds.

    These are datasets in folders that are registered with TFDS, and those that
    `tfds.testing.mock_data` simulates.
    """
    try:
        builder = tfds.builder(name, **({"data_dir": data_dir} if data_dir else {}))
        splits = [name for name in SPLITS if name in builder.info.splits]
        found = {
            split: builder.as_data_source(split)
            for split in splits or ("train", "test")
        }
        for source in found.values():
            source[0]
    except Exception as error:  # half a dozen libraries raise their own
        raise _not_prepared(name, data_dir, ()) from error
    return builder, found


def _root(data_dir: str) -> epath.Path:
    home = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return epath.Path(home).expanduser()


def _folders(folder: epath.Path) -> list[epath.Path]:
    return [x for x in folder.iterdir() if x.is_dir()] if folder.is_dir() else []


def _not_prepared(name: str, data_dir: str, found: Sequence[epath.Path]) -> UserError:
    dataset = _NAME.fullmatch(name)[1]
    root, known = _root(data_dir), tfds.list_builders(with_community_datasets=False)
    present = ", ".join(str(folder.relative_to(root)) for folder in found)
    got = f"only {present}" if present else "none of this name"
    hint, what, module = "If it is elsewhere, set config.data.dir.", "it", ""
    if dataset not in known:
        what, module = "your own dataset, with the MODULE of its builder", "MODULE"
        close = difflib.get_close_matches(dataset.lower(), known, cutoff=0.7)
        if close and not found:
            hint = f"Did you mean {' or '.join(close)}?"
        if not found:
            got = f"{got}, which TFDS does not know either"
    command = _command(name, data_dir=str(root) if data_dir else "", module=module)
    return UserError(
        f"config.data.source=tfds:{name}",
        wanted=f"a dataset prepared in {root}",
        got=got,
        fix=f"{hint} Prepare {what}: {command}",
    )


def _command(
    name: str, *, data_dir: str = "", downloads: str = "", module: str = ""
) -> str:
    """The command that prepares a dataset for random access; "" for TFDS's defaults.

    It avoids `tfds build`, which requires Apache Beam, which in turn requires older
    versions of protobuf and pyarrow.
    """
    modules = [*([module] if module else []), "tensorflow_datasets as tfds"]
    data_option = f", data_dir={json.dumps(data_dir)}" if data_dir else ""
    download_option = f"download_dir={json.dumps(downloads)}" if downloads else ""
    code = (
        f"import {', '.join(modules)}; "
        f'tfds.builder({json.dumps(name)}, file_format="array_record"{data_option})'
        f".download_and_prepare({download_option})"
    )
    return f'pip install "mvc_jax[prepare]" && python -c {shlex.quote(code)}'


def _open(folder: epath.Path, name: str, root: epath.Path) -> Any:
    """TFDS's builder of the dataset in `folder`, which is below `root`.

    Raises:
      UserError: it is damaged, or its format has no random access.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        formats = builder.info.available_file_formats()
    except Exception as error:  # depends on what its JSON files contain
        raise _damaged(folder, error) from error
    if formats & tfds.core.FileFormat.with_random_access():
        return builder
    new_dir, module = str(root / "array_record"), builder.__module__
    own = "" if module.startswith("tensorflow_datasets.") else module
    command = _command(
        name,
        data_dir=new_dir,
        downloads=str(root / "downloads"),  # TFDS reuses what it downloaded before
        module=own.replace("__main__", "MODULE"),
    )
    raise UserError(
        str(folder),
        wanted="a dataset prepared for random access",
        got=f"the format {', '.join(x.value for x in formats) or '(unknown)'}",
        fix=f"Set config.data.dir={new_dir} and prepare it there, too: {command}",
    )


def _damaged(folder: epath.PathLike, error: Exception) -> UserError:
    return UserError(
        str(folder),
        wanted="a complete dataset as TFDS prepares it",
        got=f"{type(error).__name__}: {error}",
        fix="Delete this folder and try again: the next message has the command that "
        "prepares it.",
    )


def _columns(info: Any, image: str, label: str) -> tuple[str, str]:
    """Names of the features that contain images and labels."""
    features = info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    kinds = dict(features.items()) if is_dict else {"": features}
    keys = info.supervised_keys or (None, None)
    if image == "image" and image not in kinds and isinstance(keys[0], str):
        image = keys[0]
    if label == "label" and label not in kinds and isinstance(keys[1], str):
        label = keys[1]
    for field, column, kind in (
        ("image_column", image, tfds.features.Image),
        ("label_column", label, tfds.features.ClassLabel),
    ):
        if not isinstance(kinds.get(column), kind):
            raise UserError(
                f"config.data.{field}",
                wanted=f"a feature {kind.__name__} called {column!r}",
                got=", ".join(f"{x}: {type(kinds[x]).__name__}" for x in kinds),
                fix="Name one of these, or another dataset of labelled images.",
            )
    return image, label


def _raw_records(builder: Any, folder: epath.Path) -> dict[str, Sequence]:
    """Serialised records by split.

    Raises:
      UserError: records are missing.
    """
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        return {
            split: builder.as_data_source(split, deserialize_method=raw)
            for split in SPLITS
            if counts.get(split)
        }
    except Exception as error:  # of array_record, protobuf, Arrow, TFDS
        raise _damaged(folder, error) from error


def _labelled(
    sources: dict[str, Sequence], label: str, place: epath.PathLike
) -> tuple[list[Sequence], dict[str, np.ndarray]]:
    """Records of the splits that have labels, and split -> raw labels, int64 [N].

    Raises:
      UserError: records are damaged.
    """
    records, labels = [], {}
    for split, source in sources.items():
        try:
            found = _labels(source, label)
        except Exception as error:  # of array_record, protobuf, Arrow, TFDS
            raise _damaged(place, error) from error
        if (found != -1).any():
            records.append(source)
            labels[split] = found
    return records, labels


def _labels(records: Sequence, column: str) -> np.ndarray:
    """Reads the labels, int64 [N], without decoding any image."""
    if isinstance(records[0], dict):
        rows = range(len(records))
        return np.asarray([records[row][column] for row in rows], np.int64)
    labels = np.empty(len(records), np.int64)
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        rows = range(start, min(start + _RECORDS_AT_ONCE, len(records)))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            labels[row] = _value(record, column).int64_list.value[0]
    return labels
