"""Duplicates of test among training images, and of two labels, by their appearance.

A perceptual hash (64 bits of the low frequencies, by ImageHash) proposes pairs, and a
comparison of thumbnails confirms them: re-encoded and resized copies are found, images
that are merely similar are not.
"""

from collections.abc import Sequence
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
            same = _look_the_same(left, right, a, b)
            pairs += zip(a[same].tolist(), b[same].tolist(), strict=True)
    return sorted({i: j for i, j in reversed(pairs)}.items())


def find_conflicts(
    prints: list[Fingerprint], labels: Sequence[int]
) -> list[tuple[int, int]]:
    """Finds images that show the same picture under two labels.

    Hashes that differ in at most 6 bits agree in one of 7 parts, so only images that
    agree in a part are compared.

    Returns:
      pairs (i, j), ascending, with j < i, where j is the first such image.
    """
    if not prints:
        return []
    stacked, label_of = _stack(prints), np.asarray(labels)
    found: dict[int, int] = {}
    for part in range(_HASH_DISTANCE + 1):
        start, stop = (64 * k // (_HASH_DISTANCE + 1) for k in (part, part + 1))
        mask = np.uint64((1 << (stop - start)) - 1)
        keys = (stacked[0] >> np.uint64(start)) & mask
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for same in np.split(order, edges):
            if len(np.unique(label_of[same])) > 1:
                _compare(stacked, label_of, same, found)
    return sorted(found.items())


def _compare(
    stacked: tuple[np.ndarray, ...],
    labels: np.ndarray,
    among: np.ndarray,
    found: dict[int, int],
) -> None:
    """Adds to `found` the pairs of `among` with the same picture and other labels."""
    block = max(2**22 // len(among), 1)
    for start in range(0, len(among), block):
        rows = among[start : start + block]
        differing = np.bitwise_count(stacked[0][rows, None] ^ stacked[0][None, among])
        near = differing <= _HASH_DISTANCE
        near &= labels[rows, None] != labels[None, among]
        near &= rows[:, None] > among[None]
        i, j = np.nonzero(near)
        for first in range(0, len(i), _PAIRS_AT_ONCE):
            a, b = (x[first : first + _PAIRS_AT_ONCE] for x in (i, j))
            a, b = rows[a], among[b]
            same = _look_the_same(stacked, stacked, a, b)
            for x, y in zip(a[same].tolist(), b[same].tolist(), strict=True):
                found[x] = min(y, found.get(x, y))


def _look_the_same(
    left: tuple[np.ndarray, ...],
    right: tuple[np.ndarray, ...],
    a: np.ndarray,
    b: np.ndarray,
) -> np.ndarray:
    """Whether thumbnails `a` of `left` and `b` of `right` agree, bool [P]."""
    same = np.ones(len(a), bool)
    for query, reference, limit in zip(left[1:], right[1:], _MAX_RMS, strict=True):
        mean_square = np.mean((query[a] - reference[b]) ** 2, axis=1)
        same &= np.sqrt(mean_square) <= limit
    return same


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
