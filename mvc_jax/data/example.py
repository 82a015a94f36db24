"""A labelled image, and the protocol of a source of labelled images."""

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np


class Example(TypedDict):
    """One labelled image of a source.

    `image` is uint8 [H, W, 3] in [0, 255] at its original size; `label` indexes
    `class_names`; `id` is a permanent, unique string; `note` describes what decoding
    changed, e.g. "more than 8 bits, windowed".
    """

    image: np.ndarray
    label: int
    id: str
    note: NotRequired[str]


@runtime_checkable
class Source(Protocol):
    """A random-access dataset, read by many threads at once.

    Attributes:
      class_names: K distinct strings, indexed by `labels`.
      labels: int32 [N], available without decoding an image, as are `ids`.
      ids: N distinct strings.
      is_test: bool [N], marks the source's own test images; None: it has no test split.
      defects: id or path -> reason, for images that are known to be unusable before
        decoding, e.g. `{"cats/a.png": "empty file"}`. Their ids are not in `ids`.
      remarks: sentences about data that is ignored on purpose.

    One whose reading waits for a server has `is_remote` True.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    ids: tuple[str, ...]
    is_test: np.ndarray | None
    defects: dict[str, str]
    remarks: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Decodes one image; raises `decode.BadImage` with the reason if it cannot."""
        ...
