"""Fast AutoAugment (Lim et al., arXiv 1905.00397): the authors' policy for CIFAR.

`fast_autoaugment_cifar.csv` holds the 493 sub-policies of `fa_reduced_cifar10` in
`archive.py` of the authors' repository, kakaobrain/fast-autoaugment (MIT licence). They
were found on reduced CIFAR-10; the authors train on CIFAR-10 and CIFAR-100 with them.
"""

import csv
import functools
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt8

from mvc_jax.augment import autoaugment, magnitudes, operations

FILE = pathlib.Path(__file__).with_name("fast_autoaugment_cifar.csv")
# Values at level 0 and level 1 (`augment_list` of the authors' augmentations.py).
RANGES = {
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "TranslateX": (-0.45, 0.45),  # of the width
    "TranslateY": (-0.45, 0.45),  # of the height
    "Rotate": (-30, 30),
    "AutoContrast": (0, 1),
    "Invert": (0, 1),
    "Equalize": (0, 1),
    "Solarize": (0, 256),
    "Posterize": (4, 8),  # truncated to an integer
    "Contrast": (0.1, 1.9),
    "Color": (0.1, 1.9),
    "Brightness": (0.1, 1.9),
    "Sharpness": (0.1, 1.9),
    "Cutout": (0, 0.2),  # of the width
}
GREY = (125, 123, 114)  # of Cutout


@functools.cache
def sub_policies() -> autoaugment.SubPolicies:
    """Reads ((operation, probability, level), ...) of each; levels are in [0, 1]."""
    with FILE.open(newline="", encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    return tuple(
        tuple((line[i], float(line[i + 1]), float(line[i + 2])) for i in (0, 3))
        for line in lines
    )


def values(
    name: str, level: float, height: int, width: int
) -> tuple[operations.Operation, operations.Operation]:
    """The operation at a level, in both directions if it is geometric."""
    low, high = RANGES[name]
    value = level * (high - low) + low
    value *= {"TranslateX": width, "TranslateY": height, "Cutout": width}.get(name, 1)
    return (name, value), (name, -value if name in magnitudes.SIGNED else value)


@functools.lru_cache
def _tables(height: int, width: int, resampling: str):
    rows = [
        value
        for steps in sub_policies()
        for name, _, level in steps
        for value in values(name, level, height, width)
    ]
    chances = [[chance for _, chance, _ in steps] for steps in sub_policies()]
    table = operations.table(rows, height, width, resampling)
    return table, np.array(chances, np.float32)


def fast_autoaugment(
    key: Key[Array, ""],
    image: UInt8[Array, "H W C"],
    *,
    fill: int = 0,
    resampling: str = "nearest",
) -> UInt8[Array, "H W C"]:
    """Applies to one image a sub-policy drawn from 493.

    Args:
      key: of this image.
      image: in [0, 255].
      fill: level of pixels from outside the image; black in the authors' code.
      resampling: "nearest", as in the authors' code, or "bilinear".
    """
    height, width, _ = image.shape
    table, chances = _tables(height, width, resampling)
    drawn, where = autoaugment.draw(key, jnp.asarray(chances))
    return operations.perform(
        table, drawn, where, image, fill=fill, paint=GREY, resampling=resampling
    )
