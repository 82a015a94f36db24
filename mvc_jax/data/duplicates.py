"""Duplicates between the training and the test images, found by their appearance.

A perceptual hash (64 bits of the low frequencies, by ImageHash) proposes pairs, and a
comparison of thumbnails confirms them: re-encoded and resized copies are found, images
that are merely similar are not.
"""

from typing import NamedTuple

import imagehash
import numpy as np
from jaxtyping import UInt8
from PIL import Image

_HASH_DISTANCE = 6  # bits of 64 in which the hashes of a pair may differ
# RMS grey levels by which the brightness and the coarse colour of a pair may differ.
_MAX_RMS = (2.0, 3.0)
_THUMBNAIL = 16  # pixels along one side
_PAIRS_AT_ONCE = 50_000


class Fingerprint(NamedTuple):
    """The part of an image that is kept for finding its duplicates.

    `hash` is a uint64, `thumbnail` uint8 [16, 16, 3].
    """

    hash: int
    thumbnail: np.ndarray


def fingerprint(image: UInt8[np.ndarray, "H W 3"]) -> Fingerprint:
    """Computes hash and thumbnail of an image."""
    picture = Image.fromarray(image)
    # Both look at fewer than 64 pixels a side; reducing first is faster.
    picture = picture.reduce(max(min(picture.size) // 64, 1))
    bits = imagehash.phash(picture).hash
    thumbnail = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return Fingerprint(
        int.from_bytes(np.packbits(bits).tobytes(), "big"), np.asarray(thumbnail)
    )


def find(
    queries: list[Fingerprint], references: list[Fingerprint]
) -> list[tuple[int, int]]:
    """Finds the queries that duplicate a reference.

    Returns:
      pairs (i, j), ascending, where `queries[i]` shows the same picture as
      `references[j]`; j is the first such reference.
    """
    if not queries or not references:
        return []
    left, right = _stack(queries), _stack(references)
    pairs, block = [], max(2**22 // len(references), 1)
    for start in range(0, len(queries), block):
        differing = left[0][start : start + block, None] ^ right[0][None]
        i, j = np.nonzero(np.bitwise_count(differing) <= _HASH_DISTANCE)
        i += start
        for first in range(0, len(i), _PAIRS_AT_ONCE):
            a, b = (x[first : first + _PAIRS_AT_ONCE] for x in (i, j))
            same = np.ones(len(a), bool)
            for query, reference, limit in zip(
                left[1:], right[1:], _MAX_RMS, strict=True
            ):
                mean_square = np.mean((query[a] - reference[b]) ** 2, axis=1)
                same &= np.sqrt(mean_square) <= limit
            pairs += zip(a[same].tolist(), b[same].tolist(), strict=True)
    return sorted({i: j for i, j in reversed(pairs)}.items())


def _stack(prints: list[Fingerprint]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes uint64 [N], brightness [N, 256] and coarse colour [N, 48] in grey levels.

    JPEG keeps the brightness of a small image, but its colours only coarsely.
    """
    hashes = np.asarray([p.hash for p in prints], np.uint64)
    small = np.stack([p.thumbnail for p in prints]).astype(np.float32)
    brightness = small @ np.asarray([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
    blocks = small.reshape(len(prints), 4, _THUMBNAIL // 4, 4, _THUMBNAIL // 4, 3)
    colour = blocks.mean((2, 4))
    return hashes, brightness.reshape(len(prints), -1), colour.reshape(len(prints), -1)
