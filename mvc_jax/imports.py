"""Imports of libraries without what they would import on our behalf."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Context in which packages cannot be found, unless they are imported already.

    Libraries that import PyTorch or TensorFlow wherever they are installed, which takes
    seconds, then behave as if they were not.
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # None: `import` and `find_spec` fail
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
