"""The operations of AutoAugment's search space, as rows of numbers.

A policy is a table whose rows are operations at fixed values, computed on the host; the
device draws rows. A row holds the parameters of every part of one fixed program, most
of them neutral. A batch whose images all draw different operations therefore costs one
sampling of pixels and one pass over colours per step.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

from mvc_jax.augment import color, conditional, geometry, shears

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Contrast", "Color", "Sharpness")  # indexed by `Row.blend`
OPERATIONS = (
    "Identity",
    *GEOMETRIC,
    "AutoContrast",
    "Invert",
    "Equalize",
    "Solarize",
    "Posterize",
    *BLENDS,
    "Cutout",
)
Operation = tuple[str, float | int]
_STILL = geometry.fixed_point(geometry.IDENTITY)
_LOOPED = 48 * 48  # pixels of an image from which on a CPU takes one after the other


class Row(NamedTuple):
    """One operation, or many on a leading axis."""

    map: np.ndarray | Array  # int32 [6], of `geometry.fixed_point`
    shear: np.ndarray | Array  # int32 [6], of `shears.of_map`
    span: np.ndarray | Array  # int32 [H, 2], of `geometry.spans`; [0, 2] if nearest
    blend: np.ndarray | Array  # int32, index into BLENDS
    factor: np.ndarray | Array  # float32, of the blend; 1: none
    threshold: np.ndarray | Array  # int32, of Solarize; 256: none
    mask: np.ndarray | Array  # int32, of Posterize; 255: none
    autocontrast: np.ndarray | Array  # bool
    equalize: np.ndarray | Array  # bool
    cutout: np.ndarray | Array  # float32, pixels; 0: none


class Table(NamedTuple):
    """Operations that can be drawn; row 0 is the identity."""

    rows: Row  # NumPy, [R, ...]
    names: frozenset[str]  # operations of its rows; no others are compiled
    bounds: shears.Bounds | None  # of its maps; None if they are not sheared


def row(operation: Operation, height: int, width: int, resampling: str) -> Row:
    """Encodes one operation at one value, as Pillow defines it.

    Args:
      operation: (name of OPERATIONS, value). The value is the matrix's entry for ShearX
        and ShearY, pixels to the left or up for TranslateX and TranslateY, degrees
        counterclockwise for Rotate, the lowest inverted level for Solarize, bits kept
        for Posterize, ImageEnhance's factor for Brightness, Contrast, Color and
        Sharpness, the side in pixels for Cutout; the others ignore it.
      height, width: of the image.
      resampling: "nearest" or "bilinear".

    Raises:
      ValueError: the operation is unknown.
    """
    name, value = operation
    if name not in OPERATIONS:
        raise ValueError(f"operation {name!r}; known: {', '.join(OPERATIONS)}")
    matrix = {
        "ShearX": geometry.shear_x,
        "ShearY": geometry.shear_y,
        "TranslateX": geometry.translate_x,
        "TranslateY": geometry.translate_y,
        "Rotate": functools.partial(geometry.rotate, height=height, width=width),
    }.get(name, lambda _: geometry.IDENTITY)(value)
    map_ = geometry.fixed_point(matrix, resampling)
    spans = geometry.spans(matrix, height, width)
    threshold = {"Solarize": int(np.ceil(value)), "Invert": 0}.get(name, 256)
    return Row(
        map=map_,
        shear=shears.of_map(map_, height),
        span=spans if resampling == "bilinear" else spans[:0],
        blend=np.int32(BLENDS.index(name) if name in BLENDS else 0),
        factor=np.float32(value if name in BLENDS else 1),
        threshold=np.int32(threshold),
        mask=np.int32(color.posterize_mask(int(value)) if name == "Posterize" else 255),
        autocontrast=np.bool_(name == "AutoContrast"),
        equalize=np.bool_(name == "Equalize"),
        cutout=np.float32(value if name == "Cutout" else 0),
    )


def table(
    operations: Sequence[Operation], height: int, width: int, resampling: str
) -> Table:
    """Encodes operations: the identity as row 0, operation i as row i + 1.

    Raises:
      ValueError: an operation or the resampling is unknown.
    """
    if resampling not in geometry.RESAMPLINGS:
        known = ", ".join(geometry.RESAMPLINGS)
        raise ValueError(f"resampling {resampling!r}; known: {known}")
    operations = [("Identity", 0.0), *operations]
    rows = [row(operation, height, width, resampling) for operation in operations]
    stacked = Row(*(np.stack(column) for column in zip(*rows, strict=True)))
    names = frozenset(name for name, _ in operations)
    limits = None
    if resampling == "nearest" and names.intersection(GEOMETRIC):
        limits = shears.bounds(stacked.map, stacked.shear, height, width)
    return Table(stacked, names, limits)


def perform(
    table: Table,
    drawn: Int32[Array, " N"],
    where: Float32[Array, "N 2"],
    image: UInt8[Array, "H W C"],
    *,
    fill: int,
    paint: tuple[int, int, int],
    resampling: str,
) -> UInt8[Array, "H W C"]:
    """Applies rows `drawn` to an image, in order.

    A step either moves pixels or changes colours. With nearest-neighbour sampling the
    maps of two steps with no colour change in between are sampled at once: N steps are
    N passes over colours with N - 1 samplings (one if N is 1) in between.

    Args:
      table: from `table`, for this image's height and width.
      drawn: indices of rows, one per step.
      where: position (y, x) of each step's Cutout, in [0, 1).
      image: in [0, 255].
      fill: level of pixels from outside the image.
      paint: the colour of Cutout.
      resampling: that of `table`.
    """

    def perform_all(image, drawn, where):
        return _perform(table, drawn, where, image, fill, paint, resampling)

    return conditional.one_by_one(perform_all, _LOOPED)(image, drawn, where)


def _perform(table, drawn, where, image, fill, paint, resampling):
    rows = Row(*(jnp.asarray(column)[drawn] for column in table.rows))
    steps = [Row(*(column[i] for column in rows)) for i in range(len(drawn))]
    moving = bool(table.names.intersection(GEOMETRIC))
    after: dict[int, list[Row]] = {}  # recoloring i, the steps whose maps follow
    for i, step in enumerate(steps):
        after.setdefault(max(i - 1, 0), []).append(step)
    for i, step in enumerate(steps):
        if moving and resampling == "bilinear":
            sample = functools.partial(geometry.bilinear, fill=fill)
            image = _where_moved(sample, step.map, image, step.map, step.span)
        image = recolor(image, step, where[i], table.names, paint)
        if moving and resampling == "nearest" and i in after:
            image = _move(image, after[i], table.bounds, fill)
    return image


def _move(
    image: UInt8[Array, "H W C"],
    steps: list[Row],
    bounds: shears.Bounds | None,
    fill: int,
) -> UInt8[Array, "H W C"]:
    """Applies the maps of steps: on a TPU by shears, where the table has bounds."""

    def at_once(image, steps):
        maps = jnp.stack([step.map for step in steps])
        sample = functools.partial(geometry.nearest, fill=fill)
        return _where_moved(sample, maps, image, maps)

    def sheared(image, steps):
        for step in steps:
            image = shears.nearest(image, step.map, step.shear, bounds, fill)
        return image

    if bounds is None:
        return at_once(image, steps)
    return jax.lax.platform_dependent(image, steps, tpu=sheared, default=at_once)


def _where_moved(sample, maps, image, *arguments) -> UInt8[Array, "H W C"]:
    moved = (maps.reshape(-1, 6) != _STILL[None]).any()
    return conditional.apply_where(sample, neutral=True)(moved, image, *arguments)


def recolor(
    image: UInt8[Array, "H W C"],
    step: Row,
    where: Float32[Array, "2"],
    names: frozenset[str],
    paint: tuple[int, int, int],
) -> UInt8[Array, "H W C"]:
    """Applies the colour part of a row; `names` are the operations that can occur."""
    if names.intersection(BLENDS):
        blend = functools.partial(_blend, names=names)
        blends = conditional.apply_where(blend, neutral=True)
        image = blends(step.factor != 1, image, step.blend, step.factor)
    if names.intersection(("Solarize", "Invert")):
        image = color.solarize(image, step.threshold)
    if "Posterize" in names:
        image = color.posterize(image, step.mask)
    if "AutoContrast" in names:
        stretches = conditional.apply_where(color.autocontrast)
        image = stretches(step.autocontrast, image)
    if "Equalize" in names:
        image = conditional.apply_where(color.equalize)(step.equalize, image)
    if "Cutout" in names:
        image = _cut(image, step.cutout, where, paint)
    return image


def _blend(image, blend, factor, *, names: frozenset[str]) -> UInt8[Array, "H W C"]:
    return color.blend(_degenerate(image, blend, names), image, factor)


def _degenerate(image, blend, names) -> Int32[Array, "H W C"]:
    """The image that a row blends with, selected by its index."""
    index = {name: i for i, name in enumerate(BLENDS)}
    chosen = jnp.zeros(image.shape, jnp.int32)
    if "Sharpness" in names:
        sharpen = blend == index["Sharpness"]
        smoothed = conditional.apply_where(color.smooth)(sharpen, image)
        chosen = jnp.where(sharpen, smoothed.astype(jnp.int32), chosen)
    if names.intersection(("Contrast", "Color")):
        grey = color.grey(image)
        chosen = jnp.where(blend == index["Color"], grey, chosen)
    if "Contrast" in names:
        mean = color.mean(grey)
        chosen = jnp.where(blend == index["Contrast"], mean, chosen)
    return chosen


def _cut(image, side: Float32[Array, ""], where, paint) -> UInt8[Array, "H W C"]:
    """Fast AutoAugment's Cutout.

    Its corner is `side / 2` above and left of a point of the image, clipped at the
    border; Pillow's rectangle includes its last pixel.
    """
    height, width, channels = image.shape
    sides = jnp.array([height, width], jnp.float32)
    corner = jnp.maximum(where * sides - side / 2, 0).astype(jnp.int32)
    end = corner + side.astype(jnp.int32) + 1
    end = jnp.where(side > 0, end, corner)
    fill = jnp.asarray(paint, jnp.uint8).reshape(1, 1, 3)
    if channels == 1:
        fill = color.grey(fill)
    return color.paint(image, corner, end, fill)
