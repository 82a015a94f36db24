"""Mixing visual concepts: the operations, and the recipes that they follow.

Importing this package does not import JAX.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from mvc_jax.mixing.operations import coarse_mix, fine_mix

__all__ = ["coarse_mix", "fine_mix"]
