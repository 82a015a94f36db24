"""Where labelled images come from: one small protocol, one file a source."""

from collections.abc import Sequence

import numpy as np

from mvc_jax.data.captions import readable
from mvc_jax.data.decode import Decoder
from mvc_jax.data.example import Example, Source
from mvc_jax.errors import UserError, require

SOURCES = ("digits", "folder:PATH", "parquet:PATH/*.parquet", "tfds:NAME")


def open_source(
    name: str,
    decoder: Decoder | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    data_dir: str = "",
) -> Source:
    """Opens the source that `config.data.source` names, and decodes nothing.

    Args:
      name: one of `SOURCES`, e.g. `"folder:/data/parts"`.
      decoder: of image bytes.
      image_column: of a Parquet file or TFDS dataset.
      label_column: likewise.
      data_dir: where TFDS keeps its datasets; "": its own default.

    Raises:
      UserError: the name is none of `SOURCES`, or what it names cannot be read.
    """
    decoder = decoder or Decoder()
    kind, colon, rest = name.partition(":")
    columns = {"image_column": image_column, "label_column": label_column}
    if name == "digits":
        from mvc_jax.data.digits import Digits  # scikit-learn takes 3 s to import

        return Digits()
    if kind == "folder" and rest:
        from mvc_jax.data.folder import Folder

        return Folder(rest, decoder)
    if kind == "parquet" and rest:
        from mvc_jax.data.parquet import Parquet

        return Parquet(rest, decoder, **columns)
    if kind == "tfds" and rest:
        from mvc_jax.data.tfds import Tfds  # and TFDS half a second

        return Tfds(rest, decoder, data_dir=data_dir, **columns)
    raise UserError(
        "config.data.source",
        wanted=f"one of {', '.join(SOURCES)}",
        got=repr(name),
        fix="Name one of these.",
    )


class OfClasses:
    """The images of some classes of a source; labels count these alone, in this order.

    Raises:
      UserError: a class is unknown or named twice.
    """

    def __init__(self, source: Source, class_names: Sequence[str]):
        unknown = [name for name in class_names if name not in source.class_names]
        require(
            not unknown and len(set(class_names)) == len(class_names),
            "config.data.classes",
            wanted=f"classes of the source, each once: {_some(source.class_names)}",
            got=", ".join(map(repr, unknown or class_names)),
            fix="Name these, or () for all.",
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
        own = source.is_test
        self.is_test = None if own is None else own[self._indices]
        self.defects, self.remarks = source.defects, source.remarks

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        example = self._source[int(self._indices[index])]
        return example | {"label": int(self.labels[index])}


def check_class_names(class_names: Sequence[str]) -> None:
    """Raises a `UserError` if two classes read the same in a prompt, or one is mute."""
    first: dict[str, str] = {}
    for name in class_names:
        words = readable(name)
        require(
            bool(words),
            f"class {name!r}",
            wanted="a name with at least one letter or digit",
            got="none that a prompt could say",
            fix="Rename it.",
        )
        other = first.setdefault(words, name)
        require(
            other == name,
            f"class {name!r}",
            wanted="a name of its own in the prompt",
            got=f"{words!r}, as class {other!r} has",
            fix="Rename one of the two, or leave one out by config.data.classes.",
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"
