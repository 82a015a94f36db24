"""Figures that `generate` has drawn."""

import io
from typing import Any

from etils import epath
from PIL import Image

from mvc_jax import pictures

_FIGURES = {
    "conditionings.png": "The same images and noise under every conditioning",
    "levels.png": "Mixing more and more",
}
_SIZE = 1400  # pixels


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """Reads the figures that `generate` has drawn, with their titles."""
    figures = []
    for name, title in _FIGURES.items():
        if (folder / name).exists():
            image = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
            image.thumbnail((_SIZE, _SIZE), Image.Resampling.LANCZOS)
            uri = pictures.data_uri(image.quantize(256), _SIZE)
            figures.append({"title": title, "uri": uri, "size": image.size})
    return figures
