"""Where labelled images come from: one small protocol, one file a source."""

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np

from mvc_jax.data.decode import Decoder
from mvc_jax.errors import UserError

SOURCES = ("digits", "folder:PATH", "parquet:PATH/*.parquet", "tfds:NAME")


class Example(TypedDict):
    """One labelled image of a source.

    `image` is uint8 [H, W, 3] in [0, 255], at the source's own size; `label` indexes
    `class_names`; `id` is a string that names the image for ever; `note` says what
    decoding had to change, e.g. "16-bit, windowed".
    """

    image: np.ndarray
    label: int
    id: str
    note: NotRequired[str]


@runtime_checkable
class Source(Protocol):
    """A random-access dataset, read by many threads at once.

    Attributes:
      class_names: K distinct strings; `labels` index them.
      labels: int32 [N]; they and `ids` cost no image decoding.
      ids: N distinct strings.
      is_test: bool [N], the source's own test images; None: it has no split.
      defects: what is there but cannot be used, known without decoding: id or path ->
        reason, e.g. `{"cats/a.png": "empty file"}`. None of it is in `ids`.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    ids: tuple[str, ...]
    is_test: np.ndarray | None
    defects: dict[str, str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Decodes one image; raises `decode.BadImage` with the reason if it cannot."""
        ...


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
