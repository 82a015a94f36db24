"""Where labelled images come from: one small protocol, one file a source."""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from mvc_jax.errors import UserError

SOURCES = ("digits",)


class Example(TypedDict):
    """One labelled image of a source.

    `image` is uint8 [H, W, 3] in [0, 255], at the source's own size; `label` indexes
    `class_names`; `id` is a string that names the image for ever.
    """

    image: np.ndarray
    label: int
    id: str


@runtime_checkable
class Source(Protocol):
    """A random-access dataset. `labels` [N] and `ids` cost no image decoding."""

    class_names: tuple[str, ...]
    labels: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(name: str) -> Source:
    """Opens the source that `config.data.source` names.

    Raises:
      UserError: the name is none of `SOURCES`.
    """
    if name == "digits":
        from mvc_jax.data.digits import Digits  # scikit-learn takes 3 s to import

        return Digits()
    raise UserError(
        "config.data.source",
        wanted=f"one of {', '.join(SOURCES)}",
        got=repr(name),
        fix="Name one of these.",
    )
