"""Images and labels: sources, decoding, splits, captions, batch order. NumPy only."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from mvc_jax.data.sources import open_source

__all__ = ["open_source"]
