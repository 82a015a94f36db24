"""What Stable Diffusion XL is given about the size of an image (arXiv 2307.01952, 2.2).

Six numbers, its "time ids": height and width before resizing; the top and left corner
of the crop, in pixels after resizing; height and width of what the model sees.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int


def time_ids(
    rows: Sequence[Mapping], size: int, *, resize: str
) -> Int[np.ndarray, "N 6"]:
    """The time ids of images as `decode.fit` resized them.

    A mirrored image has those of the original, since crops are centred.

    Args:
      rows: of `images.jsonl`: `height` and `width` of an image as it was decoded.
      size: S, pixels a side after resizing.
      resize: as passed to `decode.fit`. Stretched and padded images are not cropped.
    """
    return np.asarray(
        [_of(row["height"], row["width"], size, resize) for row in rows], np.int32
    ).reshape(-1, 6)


def _of(height: int, width: int, size: int, resize: str) -> tuple[int, ...]:
    top = left = 0
    if resize == "crop":
        scale = size / min(height, width)
        top, left = (int((side * scale - size) / 2) for side in (height, width))
    return height, width, top, left, size, size
