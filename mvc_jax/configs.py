"""Makes the folder `configs/` of a checkout importable as `mvc_jax.configs`.

A module with a `__path__` is a package. An installed copy has the real package
`mvc_jax/configs/` next to this file, and Python prefers a package to a module.
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[1] / "configs")]
