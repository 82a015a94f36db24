"""Opens the source of labelled images that `config.data.source` names."""

import os
import re
from collections.abc import Sequence

import numpy as np
from absl import logging

from mvc_jax.data import remote
from mvc_jax.data.captions import readable
from mvc_jax.data.decode import Decoder
from mvc_jax.data.digits import Digits
from mvc_jax.data.example import Example, Source
from mvc_jax.data.folder import Folder, FolderOptions
from mvc_jax.data.layout import class_key
from mvc_jax.errors import UserError

SOURCES = ("digits", "folder:PATH", "parquet:PATH/*.parquet", "tfds:NAME")


def open_source(
    name: str,
    decoder: Decoder | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    data_dir: str = "",
    keep_validation: bool = False,
    folder: FolderOptions | None = None,
) -> Source:
    """Opens a source without decoding an image.

    >>> source = open_source("digits")
    >>> len(source), source.class_names[:3]
    (1797, ('zero', 'one', 'two'))
    >>> example = source[0]
    >>> example["image"].shape, example["image"].dtype, example["label"]
    ((8, 8, 3), dtype('uint8'), 0)
    >>> open_source("digit")
    Traceback (most recent call last):
    mvc_jax.errors.UserError: config.data.source: wanted one of ...

    Args:
      name: of a form in `SOURCES`, e.g. `"folder:/data/parts"`.
      decoder: of image files; None: one with its defaults.
      image_column: of a Parquet file or TFDS dataset.
      label_column: of a Parquet file or TFDS dataset.
      data_dir: TFDS's data directory; "": TFDS's default.
      keep_validation: whether the source's own validation images neither join train
        nor are test.
      folder: what the user says of a folder; None: nothing.

    Raises:
      UserError: the name has another form, or the dataset cannot be read.
    """
    decoder = decoder or Decoder()
    kind, colon, rest = str(name).partition(":")
    columns = {"image_column": image_column, "label_column": label_column}
    keep = {"keep_validation": keep_validation}
    if name == "digits":
        return Digits()
    if kind == "folder" and rest:
        return Folder(rest, decoder, folder or FolderOptions(), **keep)
    if kind == "parquet" and rest:
        from mvc_jax.data.parquet import Parquet  # pyarrow takes 0.3 s to import

        return Parquet(rest, decoder, **columns, **keep)
    if kind == "tfds" and rest:
        from mvc_jax.data.tfds import Tfds  # TFDS takes 0.5 s to import

        return Tfds(rest, decoder, data_dir=data_dir, **columns, **keep)
    raise UserError(
        "config.data.source",
        wanted=f"one of {', '.join(SOURCES)}",
        got=repr(name),
        fix="Name one of these.",
    )


def require_outside(name: str, workdir: str) -> None:
    """Checks that a workdir is not in the folder that a source reads.

    Args:
      name: of the source.
      workdir: a local path.

    Raises:
      UserError: what a run writes would be read as images.
    """
    kind, _, rest = name.partition(":")
    root = os.path.expanduser(rest)
    if kind == "parquet" and not os.path.isdir(root):
        root = root.partition("**")[0] if "**" in root else ""
    if kind not in ("folder", "parquet") or not root or remote.is_remote(rest):
        return
    root, inside = (os.path.join(os.path.realpath(p), "") for p in (root, workdir))
    if inside.startswith(root):
        raise UserError(
            "--workdir",
            wanted=f"a folder outside of the images, {rest}",
            got=workdir,
            fix="Choose another, e.g. --workdir=runs/NAME beside it.",
        )


class ClassSubset:
    """A source restricted to some of its classes.

    Args:
      source: all classes.
      class_names: the classes to keep; labels index them in this order.

    Raises:
      UserError: a class is unknown or named twice.
    """

    def __init__(self, source: Source, class_names: Sequence[str]):
        unknown = [name for name in class_names if name not in source.class_names]
        if unknown or len(set(class_names)) != len(class_names):
            raise UserError(
                "config.data.classes",
                wanted=f"classes of the source, each once: {_list(source.class_names)}",
                got=", ".join(map(repr, unknown or class_names)),
                fix="Name some of these, or () for all.",
            )
        self._source = source
        new_label = np.full(len(source.class_names), -1, np.int32)
        for label, name in enumerate(class_names):
            new_label[source.class_names.index(name)] = label
        labels = new_label[source.labels]
        self._indices = np.flatnonzero(labels >= 0)
        self.class_names = tuple(class_names)
        self.labels = labels[self._indices]
        self.ids = tuple(source.ids[i] for i in self._indices)
        is_test = source.is_test
        self.is_test = None if is_test is None else is_test[self._indices]
        kept = validation_of(source)
        self.is_validation = None if kept is None else kept[self._indices]
        folder_of = dict(zip(source.class_names, folders_of(source), strict=True))
        self.class_folders = tuple(folder_of[name] for name in class_names)
        self.defects, self.remarks = source.defects, source.remarks
        self.is_remote = getattr(source, "is_remote", False)

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> list[str] | None:
        column = getattr(self._source, "column", lambda name: None)(name)
        return None if column is None else [column[i] for i in self._indices]

    def __getitem__(self, index: int) -> Example:
        example = self._source[int(self._indices[index])]
        return example | {"label": int(self.labels[index])}


def folders_of(source: Source) -> tuple[str, ...]:
    """What the source calls the folder of each class; its name where it has none."""
    return getattr(source, "class_folders", source.class_names)


def validation_of(source: Source) -> np.ndarray | None:
    """bool [N], the source's own images for validation; None: it keeps none."""
    return getattr(source, "is_validation", None)


def group_names(source: Source, by: str) -> tuple[str, ...] | None:
    """The group of each image, e.g. its patient; None if `by` is empty.

    Args:
      source: of the images.
      by: the name of a column of the source, or a regular expression that is searched
        in file names, then in ids; its groups in brackets, if it has any, are the name.
        An image that it does not match is a group of its own.

    Raises:
      UserError: `by` is neither, or matches no image.
    """
    if not by:
        return None
    column = getattr(source, "column", lambda name: None)(by)
    if column is not None:
        return tuple(
            value or id_ for value, id_ in zip(column, source.ids, strict=True)
        )
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise _no_group(by, f"neither: {error}") from error
    found = []
    for id_ in source.ids:
        match = pattern.search(id_.rpartition("/")[2]) or pattern.search(id_)
        parts = (match.groups("") or (match[0],)) if match else ()
        found.append("/".join(parts))
    count = sum(not name for name in found)
    if count == len(found):
        raise _no_group(by, f"neither: no image, such as {source.ids[0]}, matches")
    if count:
        logging.warning(
            "%d of %d images do not match config.data.group=%s: each is a group of "
            "its own",
            count,
            len(found),
            by,
        )
    return tuple(name or id_ for name, id_ in zip(found, source.ids, strict=True))


def _no_group(by: str, got: str) -> UserError:
    return UserError(
        f"config.data.group={by}",
        wanted="a column of the source, or a regular expression for file names",
        got=got,
        fix=r"Write e.g. --config.data.group='patient(\d+)'.",
    )


def check_class_names(class_names: Sequence[str]) -> None:
    """Checks that each class has words for a prompt, and no two have the same.

    Words are the same if they differ in case, width and separators only: text encoders
    read them alike, and some file systems and users do, too.

    Raises:
      UserError: a class has no words, or those of another class.
    """
    first: dict[str, str] = {}
    for name in class_names:
        words = readable(name)
        if not words:
            raise UserError(
                f"class {name!r}",
                wanted="a name with at least one letter or digit",
                got="no word for a prompt",
                fix="Rename it.",
            )
        other = first.setdefault(class_key(name), name)
        if other != name:
            raise UserError(
                f"class {name!r}",
                wanted="a name that differs from all others in the prompt",
                got=f"{words!r}, as for class {other!r}",
                fix="Rename one of the two, or leave one out with config.data.classes.",
            )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"
