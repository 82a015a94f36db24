"""Policies by name: `policy("randaugment", magnitude=5)` is a function of (key, image).

The order is that of the papers: flip and crop, then the policy's operations, then
Cutout. (The released codes of AutoAugment, Fast AutoAugment and TrivialAugment crop and
flip after the operations.)

| name | what it does, and where its defaults come from |
|---|---|
| none | nothing |
| flip | left and right, with probability 1/2 |
| flip_crop | flip; a crop after padding by 1/8 of the side: 4 of 32 pixels (ResNet, arXiv 1512.03385) |
| affine | a small rotation, zoom and shift (`affine.py`) |
| cutout | flip_crop; Cutout of half the side: 16 of 32 pixels (arXiv 1708.04552) |
| autoaugment_cifar10 | flip_crop, 25 sub-policies, Cutout of half the side (arXiv 1805.09501) |
| autoaugment_imagenet | random-resized-crop, flip, 25 sub-policies (same) |
| autoaugment_svhn | 25 sub-policies, Cutout of 20/32 of the side (same) |
| fast_autoaugment_cifar10, fast_autoaugment_cifar100 | flip_crop, 493 sub-policies, Cutout of half the side (arXiv 1905.00397) |
| randaugment | flip_crop, N = 2 operations at M = 9 of 30, Cutout of half the side (arXiv 1909.13719) |
| trivialaugment | flip_crop, one operation of the wide space, Cutout of half the side (arXiv 2103.10158) |

Every policy takes the fields of `Frame` and those of its operations' function. Use
`flip=False` for images in which left and right matter (digits, text, some scans).
"""  # noqa: E501

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, Real, UInt8

from mvc_jax.augment import crops
from mvc_jax.augment.affine import random_affine
from mvc_jax.augment.autoaugment import autoaugment
from mvc_jax.augment.fast_autoaugment import fast_autoaugment
from mvc_jax.augment.randaugment import randaugment, trivialaugment

Operations = Callable[..., UInt8[Array, "H W C"]]
Policy = Callable[[Key[Array, ""], Real[Array, "H W C"]], Real[Array, "H W C"]]


@dataclasses.dataclass(frozen=True)
class Frame:
    """What is done before and after a policy's operations.

    Attributes:
      flip: whether half of the images are flipped left and right.
      crop: padding on each side before a crop, as a fraction of the shorter side.
      crop_fill: level of the padding; black, as for images padded by Pillow.
      resized_crop: range of a resized crop's fraction of the area; None for no crop.
      cutout: side of the square, as a fraction of the shorter side.
      cutout_fill: its level; 128 is zero for images in [-1, 1].
    """

    flip: bool = False
    crop: float | int = 0.0
    crop_fill: int = 0
    resized_crop: tuple[float, float] | None = None
    cutout: float | int = 0.0
    cutout_fill: int = 128


def affine(
    key: Key[Array, ""],
    image: UInt8[Array, "H W C"],
    *,
    degrees: float = 15.0,
    zoom: float = 0.1,
    shift: float = 0.1,
) -> UInt8[Array, "H W C"]:
    """`affine.random_affine` of images with levels in [0, 255]."""
    moved = random_affine(
        key, image.astype(jnp.float32), degrees=degrees, zoom=zoom, shift=shift
    )
    return _levels(moved)


_SMALL = Frame(flip=True, crop=1 / 8, cutout=1 / 2)
_POLICIES: dict[str, tuple[Operations | None, Frame]] = {
    "none": (None, Frame()),
    "flip": (None, Frame(flip=True)),
    "flip_crop": (None, Frame(flip=True, crop=1 / 8)),
    "affine": (affine, Frame()),
    "cutout": (None, _SMALL),
    "autoaugment_cifar10": (functools.partial(autoaugment, policy="cifar10"), _SMALL),
    "autoaugment_imagenet": (
        functools.partial(autoaugment, policy="imagenet"),
        Frame(flip=True, resized_crop=(0.08, 1.0)),
    ),
    "autoaugment_svhn": (
        functools.partial(autoaugment, policy="svhn"),
        Frame(cutout=20 / 32),
    ),
    "fast_autoaugment_cifar10": (fast_autoaugment, _SMALL),
    "fast_autoaugment_cifar100": (fast_autoaugment, _SMALL),
    "randaugment": (randaugment, _SMALL),
    "trivialaugment": (trivialaugment, _SMALL),
}


def fields(name: str) -> dict[str, object]:
    """The fields that `policy(name, ...)` takes, with their defaults.

    Raises:
      ValueError: there is no such policy.
    """
    if name not in _POLICIES:
        raise ValueError(f"policy {name!r}; known: {', '.join(_POLICIES)}")
    operations, frame = _POLICIES[name]
    found = dataclasses.asdict(frame)
    if operations is not None:
        bound = getattr(operations, "keywords", {})
        for parameter in inspect.signature(operations).parameters.values():
            if parameter.kind == parameter.KEYWORD_ONLY and parameter.name not in bound:
                found[parameter.name] = parameter.default
    return found


@functools.lru_cache
def policy(name: str, **values: Any) -> Policy:
    """Returns the policy of a name, with some of its fields changed.

    >>> augment = policy("randaugment", magnitude=5, flip=False)
    >>> images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> augmented = jax.jit(jax.vmap(augment))(keys, images)
    >>> augmented.shape, augmented.dtype
    ((2, 8, 8, 3), dtype('uint8'))
    >>> sorted(fields("affine"))[:4]
    ['crop', 'crop_fill', 'cutout', 'cutout_fill']

    Args:
      name: one of `augment.NAMES`.
      **values: of `fields(name)`.

    Returns:
      a pure function of a key and one image [H, W, C] with levels in [0, 255], C = 1 or
      3, uint8 or float. Its result has the same shape and dtype, and integer levels
      (float images are rounded first). vmap it over a batch, with a key per image.

    Raises:
      ValueError: there is no such policy, field or value.
    """
    known = fields(name)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name}: no field {unknown[0]!r}; known: {', '.join(known)}")
    operations, frame = _POLICIES[name]
    in_frame = {field.name for field in dataclasses.fields(frame)} & values.keys()
    frame = dataclasses.replace(frame, **{key: values.pop(key) for key in in_frame})
    for field in ("crop", "cutout"):
        if not 0 <= getattr(frame, field) <= 1:
            raise ValueError(f"{field}: in [0, 1], not {getattr(frame, field)}")
    if operations is not None:
        operations = functools.partial(operations, **values)
    if operations is None and frame == Frame():
        return lambda key, image: image
    augment = functools.partial(_augment, frame=frame, operations=operations)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(augment, key, jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8))
    return augment


def _augment(key, image, *, frame: Frame, operations: Operations | None):
    image = jnp.asarray(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"image: one, [H, W, 1] or [H, W, 3], not {[*image.shape]}; for a batch "
            "use jax.vmap, with a key for each image"
        )
    keys = jax.random.split(key, 4)
    levels = image if image.dtype == jnp.uint8 else _levels(image)
    side = min(image.shape[:2])
    padding, hole = round(frame.crop * side), round(frame.cutout * side)
    if frame.resized_crop:
        levels = crops.random_resized_crop(keys[1], levels, scale=frame.resized_crop)
    if padding:
        levels = crops.pad_crop(keys[1], levels, padding=padding, fill=frame.crop_fill)
    if frame.flip:
        levels = crops.flip(keys[0], levels)
    if operations is not None:
        levels = operations(keys[2], levels)
    if hole:
        levels = crops.cutout(keys[3], levels, side=hole, fill=frame.cutout_fill)
    return levels.astype(image.dtype)


def _levels(image) -> UInt8[Array, "H W C"]:
    return jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8)
