"""Pictures that are in train and in test: found by what they look like.

A perceptual hash (64 bits of the low frequencies, by ImageHash) proposes pairs, a small
copy of both decides: re-encoded and resized copies are found, mere likeness is not.
"""

from typing import NamedTuple

import imagehash
import numpy as np
from jaxtyping import UInt8
from PIL import Image

_BITS = 6  # of 64 in which the hashes of a pair may differ
_SAME = (2.0, 3.0)  # grey levels, root mean square: of brightness, of coarse colour
_SMALL = 16  # pixels along a side of these
_PAIRS = 50_000  # compared at once


class Fingerprint(NamedTuple):
    """What is kept of an image to find its copies.

    `hash` is a uint64, `small` uint8 [16, 16, 3].
    """

    hash: int
    small: np.ndarray


def fingerprint(image: UInt8[np.ndarray, "H W 3"]) -> Fingerprint:
    """Of what is left at some 64 pixels: both parts look at less than that."""
    picture = Image.fromarray(image)
    picture = picture.reduce(max(min(picture.size) // 64, 1))
    bits = imagehash.phash(picture).hash
    small = picture.resize((_SMALL, _SMALL), Image.Resampling.BOX)
    return Fingerprint(
        int.from_bytes(np.packbits(bits).tobytes(), "big"), np.asarray(small)
    )


def find(ours: list[Fingerprint], theirs: list[Fingerprint]) -> list[tuple[int, int]]:
    """Pairs (i, j), ascending, such that `ours[i]` shows the picture of `theirs[j]`.

    Of several `theirs` that one of `ours` shows, the first is named.
    """
    if not ours or not theirs:
        return []
    left, right = _stack(ours), _stack(theirs)
    pairs, block = [], max(2**22 // len(theirs), 1)
    for start in range(0, len(ours), block):
        distance = left[0][start : start + block, None] ^ right[0][None]
        i, j = np.nonzero(np.bitwise_count(distance) <= _BITS)
        i += start
        for first in range(0, len(i), _PAIRS):
            a, b = (x[first : first + _PAIRS] for x in (i, j))
            alike = np.ones(len(a), bool)
            for mine, other, most in zip(left[1:], right[1:], _SAME, strict=True):
                apart = np.mean((mine[a] - other[b]) ** 2, axis=1)
                alike &= np.sqrt(apart) <= most
            pairs += zip(a[alike].tolist(), b[alike].tolist(), strict=True)
    return sorted({i: j for i, j in reversed(pairs)}.items())


def _stack(prints: list[Fingerprint]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes uint64 [N], brightness [N, 256] and coarse colour [N, 48] in grey levels.

    JPEG keeps the brightness of a small image, but its colours only coarsely.
    """
    hashes = np.asarray([p.hash for p in prints], np.uint64)
    small = np.stack([p.small for p in prints]).astype(np.float32)
    brightness = small @ np.asarray([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
    blocks = small.reshape(len(prints), 4, _SMALL // 4, 4, _SMALL // 4, 3)
    colour = blocks.mean((2, 4))
    return hashes, brightness.reshape(len(prints), -1), colour.reshape(len(prints), -1)
