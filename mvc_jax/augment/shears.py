"""Maps close to the identity as three integer shears and a small window, for TPUs.

Sampling a pixel by its index costs a TPU a product with one-hot matrices of the whole
side. A rotation is three shears (Paeth, "A fast algorithm for general raster rotation",
1986), and a shear moves each row, or column, by a whole number of pixels: a few shifts
by powers of two. Rounding leaves each pixel within a window around its place, where it
is selected by its exact index, so that no pixel differs from that of a gather.

A shear is a slope and an offset in 16.16 fixed point: line v moves by
(v slope + offset) >> 16 pixels.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt8

_ONE = 1 << 16  # 1.0 in fixed point
_MOST_BITS = 8  # of the shifts of a shear: beyond, products are no worse
_MOST_PLACES = 5  # of a window along each side, likewise


class Range(NamedTuple):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int


class Bounds(NamedTuple):
    """What the maps of a table need at most.

    Attributes:
      shifts: ranges of the pixels by which the first, second and third shear move.
      columns: of the first shear's result that are read.
      rows, places: of a pixel in the third shear's result, relative to its own row and
        column.
    """

    shifts: tuple[Range, Range, Range]
    columns: Range
    rows: Range
    places: Range


def of_map(coefficients: Int32[np.ndarray, "6"], height: int) -> Int32[np.ndarray, "6"]:
    """Slope and offset of the three shears that make up a map, nearly.

    They sample one after the other: along the image's rows, its columns, its rows.

    Args:
      coefficients: of `geometry.fixed_point`, for nearest-neighbour sampling.
      height: of the image.
    """
    a, b, c, d, e, f = (int(number) / _ONE for number in coefficients)
    c, f = c - 0.5, f - 0.5  # shears round to the nearest pixel
    if d:  # a rotation, or a shear along columns
        last, first = (e - 1) / d, (a - 1) / d
        start = -last * height / 2
        numbers = (first, c - start - first * f, d, f - d * start, last, start)
    else:
        numbers = (0.0, 0.0, 0.0, f, b, c)
    half = (0, 0.5) * 3
    return np.array(
        [
            np.floor((number + more) * _ONE + 0.5)
            for number, more in zip(numbers, half, strict=True)
        ],
        np.int32,
    )


def bounds(
    maps: Int32[np.ndarray, "R 6"],
    shears: Int32[np.ndarray, "R 6"],
    height: int,
    width: int,
) -> Bounds | None:
    """The bounds of a table's maps; None where one of them is too far from shears."""
    pairs = np.unique(np.concatenate([maps, shears], axis=1), axis=0)
    far = np.abs(pairs[:, [0, 1, 3, 4]] - [_ONE, 0, 0, _ONE]).sum(axis=1)
    y, x = np.ogrid[:height, :width]
    y, x = y.astype(np.int32), x.astype(np.int32)
    columns = rows = places = Range(0, 0)
    for pair in pairs[np.argsort(-far)]:  # those that are refused come first
        from_y, from_x, *found = _places(pair[:6], pair[6:], y, x)
        valid = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        columns, rows, places = (
            _joined(whole, part[valid])
            for whole, part in zip((columns, rows, places), found, strict=True)
        )
        if max(rows.high - rows.low, places.high - places.low) >= _MOST_PLACES:
            return None
    lines = (
        np.arange(height),
        np.arange(columns.low, columns.high + 1),
        np.arange(rows.low, height + rows.high),
    )
    shifts = tuple(
        _joined(Range(0, 0), _amounts(slope, offset, line[:, None]))
        for slope, offset, line in zip(
            shears[:, ::2].T, shears[:, 1::2].T, lines, strict=True
        )
    )
    if any(x.high - x.low >= 1 << _MOST_BITS for x in shifts):
        return None
    return Bounds(shifts, columns, rows, places)


def _joined(whole: Range, part: np.ndarray) -> Range:
    """The range that holds another one and an array as well."""
    low, high = part.min(initial=whole.low), part.max(initial=whole.high)
    return Range(int(low), int(high))


def nearest(
    image: UInt8[Array, "H W C"],
    map_: Int32[Array, "6"],
    shear: Int32[Array, "6"],
    limits: Bounds,
    fill: int,
) -> UInt8[Array, "H W C"]:
    """`geometry.nearest` of one map, given its `of_map` and the table's `bounds`."""
    height, width, _ = image.shape
    first, second, third = limits.shifts
    columns, rows, places = limits.columns, limits.rows, limits.places
    tall = Range(rows.low, height - 1 + rows.high)
    wide = Range(places.low, width - 1 + places.high)

    def amounts(k: int, lines: Range) -> Int32[Array, " L"]:
        numbers = jnp.arange(lines.low, lines.high + 1, dtype=jnp.int32)
        return _amounts(shear[2 * k], shear[2 * k + 1], numbers)

    inside = Range(0, height - 1)
    image = _shift(image, amounts(0, inside)[:, None], 1, 0, columns, first)
    image = _shift(image, amounts(1, columns)[None], 0, 0, tall, second)
    image = _shift(image, amounts(2, tall)[:, None], 1, columns.low, wide, third)
    y, x = jnp.mgrid[:height, :width].astype(jnp.int32)
    from_y, from_x, _, row, place = _places(map_, shear, y, x)
    valid = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    chosen = jnp.full((height, width, image.shape[2]), fill, jnp.uint8)
    for dy in range(rows.high - rows.low + 1):
        for dx in range(places.high - places.low + 1):
            here = valid & (row == dy + rows.low) & (place == dx + places.low)
            there = image[dy : dy + height, dx : dx + width]
            chosen = jnp.where(here[..., None], there, chosen)
    return chosen


def _places(map_, shear, y, x) -> tuple:
    """Where the pixels (y, x) are in the image, and after the shears.

    Returns:
      row and column in the image, column after the first shear, and row and column
      after the third, relative to y and x.
    """
    a, b, c, d, e, f = map_
    from_y, from_x = (y * e + x * d + f) >> 16, (y * b + x * a + c) >> 16
    column = from_x - _amounts(shear[0], shear[1], from_y)
    row = from_y - _amounts(shear[2], shear[3], column)
    place = column - _amounts(shear[4], shear[5], row)
    return from_y, from_x, column, row - y, place - x


def _amounts(slope, offset, line):
    """Pixels by which a shear moves each line."""
    return (line * slope + offset) >> 16


def _shift(image, amounts, axis: int, start: int, wanted: Range, shifts: Range):
    """Moves each line of an image along `axis`; what comes from outside is 0.

    Args:
      image: [H, W, C].
      amounts: the pixel at i + amount comes to i; [H, 1] or [1, W].
      axis: 0 or 1.
      start: index of the first pixel that the image has along the axis.
      wanted: the pixels to return.
      shifts: the range of `amounts`.
    """
    bits = (shifts.high - shifts.low).bit_length()
    first = wanted.low + shifts.low
    last = wanted.high + shifts.low + (1 << bits) - 1
    end = start + image.shape[axis] - 1
    padding = [(0, 0, 0)] * 3
    padding[axis] = (start - first, last - end, 0)  # negative ones cut off
    image = lax.pad(image, jnp.uint8(0), padding)
    amounts = (amounts - shifts.low)[..., None]
    for bit in reversed(range(bits)):
        step, size = 1 << bit, image.shape[axis]
        near = lax.slice_in_dim(image, 0, size - step, axis=axis)
        far = lax.slice_in_dim(image, step, size, axis=axis)
        image = jnp.where((amounts >> bit) & 1 == 1, far, near)
    return image
