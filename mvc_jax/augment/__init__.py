"""Image augmentation as jitted vmap ops on the device."""

from mvc_jax.augment.policies import fields, names, policy

__all__ = ["fields", "names", "policy"]
