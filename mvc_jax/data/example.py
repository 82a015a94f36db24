"""One labelled image, and the protocol of a source of them."""

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np


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
      remarks: sentences on what is there and is left alone on purpose.
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
