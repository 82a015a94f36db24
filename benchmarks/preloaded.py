"""What the parts of `accelerator.py` import, imported once and then forked.

No backend is started. What cannot be imported fails again in the part that needs it,
which then says so.
"""

import contextlib
import importlib

for name in ("jax", "programs", "mvc_jax.generate", "mvc_jax.generation.set_writer"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
