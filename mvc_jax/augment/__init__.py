"""Image augmentation policies, as operations that are jitted and vmapped on the device.

Importing this package does not import JAX: checks of a config need only the names.
"""

from collections.abc import Callable

__all__ = ["NAMES", "fields", "policy"]

NAMES = (
    "none",
    "flip",
    "flip_crop",
    "affine",
    "cutout",
    "autoaugment_cifar10",
    "autoaugment_imagenet",
    "autoaugment_svhn",
    "fast_autoaugment_cifar10",
    "fast_autoaugment_cifar100",
    "randaugment",
    "trivialaugment",
)


def fields(name: str) -> dict[str, object]:
    """Returns `policies.fields(name)`: a policy's fields and their defaults."""
    from mvc_jax.augment import policies

    return policies.fields(name)


def policy(name: str, **values) -> Callable:
    """Returns `policies.policy(name, **values)`: a function (key, image) -> image."""
    from mvc_jax.augment import policies

    return policies.policy(name, **values)
