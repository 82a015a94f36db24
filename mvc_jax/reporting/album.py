"""The pictures of a page, each stored once however often it is shown.

A page has a list of all pictures, as images of an SVG element that is not shown, and
refers to them by their ids: small in a row, and large where one is opened.
"""

import base64
import dataclasses
import hashlib
import io

from PIL import Image

from mvc_jax import pictures

_LARGEST = 384  # pixels along the longer side, as stored
_LOSSLESS = 64  # up to so many pixels a PNG is as small as anything


@dataclasses.dataclass(frozen=True)
class Picture:
    """A stored picture.

    Attributes:
      id: of its element in the page.
      width: pixels, as stored.
      height: pixels, as stored.
      uri: its content, inline.
    """

    id: str
    width: int
    height: int
    uri: str

    @property
    def smooth(self) -> bool:
        """Whether it is enlarged with interpolation; a small image shows its pixels."""
        return max(self.width, self.height) > _LOSSLESS


class Album:
    """The pictures that a page shows, in the order in which they were added."""

    def __init__(self):
        self._found: dict[str, Picture] = {}

    @property
    def pictures(self) -> list[Picture]:
        return [*self._found.values()]

    def add(self, image: Image.Image) -> Picture:
        """Stores an image, if its like is not there, at most `_LARGEST` a side."""
        image = image.convert("RGB")
        key = hashlib.sha256(image.tobytes()).hexdigest() + f"{image.size}"
        if key not in self._found:
            id_ = f"p{len(self._found)}"
            small = image.copy()
            small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
            self._found[key] = Picture(id_, *small.size, inline(small))
        return self._found[key]


def inline(image: Image.Image) -> str:
    """An image as a data URI: without loss where it is small, else as WebP."""
    if max(image.size) <= _LOSSLESS:
        return pictures.data_uri(image, _LOSSLESS)
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=82, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
