"""Datasets of TensorFlow Datasets (TFDS), read without TensorFlow.

TensorFlow is needed once, by another process that prepares the dataset; the errors here
give its command. Then TFDS reads records at random, and Pillow decodes the images in
them, as those of any other source: TFDS would take palettes for grey and CMYK for RGBA.
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
from mvc_jax.errors import UserError, require

SPLITS = ("train", "validation", "test")
_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_AT_ONCE = 256  # records of which labels are read together


class Tfds:
    """A prepared dataset of TFDS as a `Source`; ids are `NAME/SPLIT/INDEX`.

    Test images are those of the split `test` if it is labelled, else of `validation`,
    which otherwise joins `train`. All other splits are left alone. Opening reads every
    record for its label, but decodes none.

    Args:
      name: `cifar10`, `cifar10:3.0.2` or `my_set/config:1.0.0`; without a version, the
        newest that is prepared.
      decoder: of the image bytes.
      data_dir: where TFDS keeps its datasets; "": its own default.
      image_column: name of the feature `Image`; where there is no "image", the first of
        the dataset's `supervised_keys`.
      label_column: name of the feature `ClassLabel`; likewise, the second.

    Raises:
      UserError: the dataset is unknown, not prepared, not prepared for random access,
        damaged, or not one of labelled images.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        *,
        data_dir: str = "",
        image_column: str = "image",
        label_column: str = "label",
    ):
        folder = _find(name, data_dir)
        if folder is None:
            builder, sources = _ask_tfds(name, data_dir)
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
        require(
            bool(good.any()),
            f"config.data.source=tfds:{name}",
            wanted=f"labelled images in one of the splits {', '.join(SPLITS)}",
            got=f"none in {', '.join(builder.info.splits) or 'no split at all'}",
            fix="Name another dataset.",
        )
        self.labels = every[good].astype(np.int32)
        self.ids = tuple(ids[i] for i in np.flatnonzero(good))
        self._splits, self._rows = split_of[good], row_of[good]
        test = [i for i, split in enumerate(splits) if split != "train"][-1:]
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
    """A feature of a record, which is a serialised `tf.train.Example`."""
    return tf_example_pb2.Example.FromString(record).features.feature[column]


def _find(name: str, data_dir: str) -> epath.Path | None:
    """The folder of the prepared dataset, `DATA_DIR/NAME[/CONFIG]/VERSION`, or None."""
    match = _NAME.fullmatch(name)
    require(
        match is not None,
        "config.data.source",
        wanted="tfds:NAME, with /CONFIG and :1.2.3 behind it if need be",
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
    require(
        len(configs) == 1,
        f"config.data.source=tfds:{name}",
        wanted="the name of a config of this dataset",
        got=f"none, and {', '.join(configs)} are prepared in {root}",
        fix=f"Name one, e.g. tfds:{dataset}/{configs[0]}.",
    )
    return max(chosen, key=lambda folder: [*map(int, folder.name.split("."))])


def _ask_tfds(name: str, data_dir: str) -> tuple[Any, dict[str, Sequence]]:
    """TFDS's builder, and split -> examples, of a dataset that is found by TFDS alone.

    It knows of folders that were registered with it, and `tfds.testing.mock_data`
    stands in for it; its examples are decoded.
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
    except Exception as error:  # of half a dozen libraries: it is not there
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
    there = ", ".join(str(folder.relative_to(root)) for folder in found)
    got = f"only {there}" if there else "none of this name"
    first, prepare, module = "If it lies elsewhere, set config.data.dir.", "it", ""
    if dataset not in known:
        prepare, module = "one of your own, by the MODULE of its builder", "MODULE"
        close = difflib.get_close_matches(dataset.lower(), known, cutoff=0.7)
        if close and not found:
            first = f"Did you mean {' or '.join(close)}?"
        if not found:
            got = f"{got}, nor does TFDS know one"
    command = _command(name, data_dir=str(root) if data_dir else "", module=module)
    return UserError(
        f"config.data.source=tfds:{name}",
        wanted=f"a dataset prepared in {root}",
        got=got,
        fix=f"{first} Prepare {prepare}: {command}",
    )


def _command(
    name: str, *, data_dir: str = "", downloads: str = "", module: str = ""
) -> str:
    """What to type to prepare a dataset for random access; "" are TFDS's defaults.

    Not `tfds build`: it does not start without Apache Beam, which would take protobuf
    and pyarrow back to older versions.
    """
    modules = [*([module] if module else []), "tensorflow_datasets as tfds"]
    place = f", data_dir={json.dumps(data_dir)}" if data_dir else ""
    kept = f"download_dir={json.dumps(downloads)}" if downloads else ""
    code = (
        f"import {', '.join(modules)}; "
        f'tfds.builder({json.dumps(name)}, file_format="array_record"{place})'
        f".download_and_prepare({kept})"
    )
    return f'pip install "mvc_jax[prepare]" && python -c {shlex.quote(code)}'


def _open(folder: epath.Path, name: str, root: epath.Path) -> Any:
    """TFDS's builder of a dataset in `folder`, which is prepared below `root`.

    Raises:
      UserError: it is damaged, or cannot be read at random.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        formats = builder.info.available_file_formats()
    except Exception as error:  # whatever its JSON files made TFDS do
        raise _damaged(folder, error) from error
    if formats & tfds.core.FileFormat.with_random_access():
        return builder
    beside, module = str(root / "array_record"), builder.__module__
    own = "" if module.startswith("tensorflow_datasets.") else module
    command = _command(
        name,
        data_dir=beside,
        downloads=str(root / "downloads"),  # TFDS downloads nothing twice
        module=own.replace("__main__", "MODULE"),
    )
    raise UserError(
        str(folder),
        wanted="a dataset that is prepared for random access",
        got=f"one in the format {', '.join(x.value for x in formats) or 'of no name'}",
        fix=f"Set config.data.dir={beside} and prepare it there, too: {command}",
    )


def _damaged(folder: epath.PathLike, error: Exception) -> UserError:
    return UserError(
        str(folder),
        wanted="a whole dataset as TFDS prepares it",
        got=f"{type(error).__name__}: {error}",
        fix="Delete this folder and try again: then you are told how to prepare it.",
    )


def _columns(info: Any, image: str, label: str) -> tuple[str, str]:
    """Names of the features that hold images and labels."""
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
        require(
            isinstance(kinds.get(column), kind),
            f"config.data.{field}",
            wanted=f"a feature {kind.__name__} called {column!r}",
            got=", ".join(f"{x}: {type(kinds[x]).__name__}" for x in kinds),
            fix="Name one of these, or another dataset of labelled images.",
        )
    return image, label


def _raw_records(builder: Any, folder: epath.Path) -> dict[str, Sequence]:
    """Split -> its records, serialised.

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
    """Records of the splits that have labels, and these as they are, int64 [N].

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
    """int64 [N], of serialised records without decoding anything else."""
    if isinstance(records[0], dict):
        rows = range(len(records))
        return np.asarray([records[row][column] for row in rows], np.int64)
    labels = np.empty(len(records), np.int64)
    for start in range(0, len(records), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(records)))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            labels[row] = _value(record, column).int64_list.value[0]
    return labels
