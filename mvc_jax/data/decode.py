"""Decodes image files to uint8 RGB, and resizes images to the models' square input.

Pillow reads most; `scans.py` reads DICOM, and TIFF that Pillow cannot. Whether the
lowest value is black or white is checked here, since Pillow does so for 8 bits alone.
More than 8 bits are windowed, transparent images are composited over white, the EXIF
orientation is applied, and of several frames the first is used.
"""

import contextlib
import dataclasses
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageOps

from mvc_jax.data import scans

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "AVIF", "HEIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp")
SUFFIXES += (".avif", ".heic", ".heif") + scans.DICOM_SUFFIXES
RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}
RESIZING = ("stretch", "crop", "pad")
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # Pillow's modes over 8 bits


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


_WHITE_IS_ZERO = 0
_PHOTOMETRIC = 262  # TIFF's tag
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")
_FEW_BITS = 14  # 16-bit colours that use no more are windowed, like one channel
_LOW_BYTE = {"16B": "16L", "16L": "16B", "16N": {"little": "16B", "big": "16L"}}


class BadImage(Exception):
    """An image that cannot be used; the text is the reason, in a few words."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes image files to uint8 RGB.

    Attributes:
      max_pixels: larger images are refused as decompression bombs.
      window: (low, high), mapped to 0 and 255 in images of more than 8 bits a channel;
        None: each image's own minimum and maximum.
    """

    max_pixels: int = 89_478_485  # Pillow's own limit
    window: tuple[float | int, float | int] | None = None

    def __call__(
        self, content: bytes, frame: int | None = None
    ) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Decodes a PNG, JPEG, WebP, TIFF, BMP, AVIF, HEIC or DICOM file.

        Args:
          content: of the file.
          frame: of a DICOM file; None: the only one.

        Returns:
          pixels in [0, 255], and a note on what decoding changed, "" if nothing.

        Raises:
          BadImage: with the reason.
        """
        if not content:
            raise BadImage("empty file")
        if content.startswith(LFS_POINTER):
            raise BadImage("a Git LFS pointer, not the image: run `git lfs pull`")
        if scans.is_nifti(content):
            raise BadImage(scans.NIFTI)
        if scans.is_dicom(content):
            return self._scan(scans.read_dicom, content, frame=frame)
        _register(content)
        try:
            try:
                return self._decode(content)
            except ValueError:  # Pillow limits the text in a PNG, which is not used
                if (plain := _without_text(content)) == content:
                    raise
                return self._decode(plain)
        except BadImage:
            raise
        except Image.UnidentifiedImageError as error:
            if scans.is_tiff(content):
                return self._scan(scans.read_tiff, content)
            raise BadImage("not a PNG, JPEG, WebP, TIFF or BMP image") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise BadImage(f"over {self._limit()}") from error
        except Exception as error:  # Pillow's readers raise a dozen kinds
            if scans.is_tiff(content):
                with contextlib.suppress(BadImage):
                    return self._scan(scans.read_tiff, content)
            raise BadImage(f"damaged: {error or type(error).__name__}") from error

    def _decode(self, content: bytes) -> tuple[np.ndarray, str]:
        with Image.open(io.BytesIO(content), formats=_formats()) as picture:
            self._check_size(*picture.size)
            deep = _is_deep_colour(picture)
            inverted = _is_white_zero(picture)
            if deep and (array := _deep_colours(picture, content)) is not None:
                few = int(array.max()).bit_length() <= _FEW_BITS
                if self.window or few:
                    return self.from_array(array)
            note = "16 bits a channel, high byte" if deep else ""
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # avoids a copy
            if picture.mode in _DEEP:
                return self.from_array(np.asarray(picture), inverted=inverted)
            has_alpha = picture.mode in ("RGBA", "RGBa", "LA", "La", "PA")
            if has_alpha or "transparency" in picture.info:
                pixels, alpha_note = _on_white(np.asarray(picture.convert("RGBA")))
                return pixels, note or alpha_note
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
            return np.asarray(rgb), note

    def _scan(
        self, read: Callable[..., scans.Scan], content: bytes, **options: int | None
    ) -> tuple[np.ndarray, str]:
        """Decodes by one of the readers of `scans.py`."""
        try:
            scan = read(content, self._check_size, **options)
            is_deep = scan.array.dtype != np.uint8 or scan.window is not None
            window = (self.window or scan.window) if is_deep else None
            pixels, note = self.from_array(scan.array, window, inverted=scan.inverted)
        except BadImage:
            raise
        except scans.Unreadable as error:
            raise BadImage(str(error)) from error
        except Exception as error:  # of tifffile, pydicom and what they use
            raise BadImage(f"damaged: {error or type(error).__name__}") from error
        return pixels, ", ".join(filter(None, (scan.note, note)))

    def from_array(
        self,
        array: Num[np.ndarray, "..."],
        window: scans.Window | None = None,
        *,
        inverted: bool = False,
    ) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Converts pixels that another library decoded.

        Args:
          array: [H, W] or [H, W, C] with 1 (grey), 3 or 4 (with alpha) channels; any
            dtype but uint8 is windowed.
          window: as the decoder's, which is used if this is None. It applies to uint8,
            too.
          inverted: whether the lowest value is white.

        Returns:
          as `__call__`.

        Raises:
          BadImage: another shape, or values that are not finite.
        """
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
            raise BadImage(f"an array of shape {array.shape}")
        self._check_size(*array.shape[:2])
        note = ""
        if array.dtype != np.uint8 or window is not None:
            array, note = self._windowed(array, window or self.window)
        if inverted:
            array, note = 255 - array, ", ".join(filter(None, (note, "white is zero")))
        if array.shape[2] == 4:
            array, alpha_note = _on_white(array)
            return array, note or alpha_note
        return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))), note

    def _windowed(
        self, array: np.ndarray, window: scans.Window | None
    ) -> tuple[np.ndarray, str]:
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise BadImage("holds values that are not finite")
        low, high = window or (array.min(), array.max())
        scaled = (array - low) / max(high - low, 1e-12)
        eight = np.round(np.clip(scaled, 0.0, 1.0) * 255).astype(np.uint8)
        return eight, "more than 8 bits, windowed"

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise BadImage(f"{width}x{height} pixels, over {self._limit()}")

    def _limit(self) -> str:
        return f"config.data.max_pixels={self.max_pixels}"


@contextlib.contextmanager
def strict_pillow(max_pixels: int) -> Iterator[None]:
    """Makes Pillow refuse more than `max_pixels` before decoding, and not warn.

    Pillow's limit and Python's warning filters are global to the process: enter this in
    one thread, around all threads that decode.
    """
    before = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = max_pixels
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def fit(
    image: UInt8[np.ndarray, "H W 3"],
    size: int,
    *,
    resize: str = "stretch",
    resample: str = "lanczos",
) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes an image to `size` x `size`, antialiased.

    Args:
      image: in [0, 255].
      size: S, in pixels.
      resize: `"stretch"` both sides, `"crop"` the longer one around the centre, or
        `"pad"` the shorter one with black.
      resample: a key of `RESAMPLING`.
    """
    if image.shape[:2] == (size, size):
        return image
    picture, box, method = Image.fromarray(image), (size, size), RESAMPLING[resample]
    if resize == "crop":
        return np.asarray(ImageOps.fit(picture, box, method))
    if resize == "pad":
        if round(min(picture.size) / max(picture.size) * size) == 0:
            # Of a narrow image Pillow would leave nothing: one row or column stays.
            wide = picture.width > picture.height
            picture = picture.resize((size, 1) if wide else (1, size), method)
        return np.asarray(ImageOps.pad(picture, box, method))
    return np.asarray(picture.resize(box, method))


def undo_fit(
    image: UInt8[np.ndarray, "S S 3"], width: int, height: int, *, resize: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Restores the aspect ratio that an image had before `fit`, without enlarging it.

    Args:
      image: in [0, 255].
      width: before `fit`, in pixels.
      height: before `fit`, in pixels.
      resize: as passed to `fit`. A cropped image stays square.

    Returns:
      the image in its original size, or with its longer side reduced to S pixels if it
      was longer; resampled by area.
    """
    size = image.shape[0]
    if resize == "crop":
        width = height = min(width, height)
    scale = min(1.0, size / max(width, height))
    box = (max(round(width * scale), 1), max(round(height * scale), 1))
    picture = Image.fromarray(image)
    if resize == "pad":
        inner = size / max(width, height)
        inside = [max(round(side * inner), 1) for side in (width, height)]
        left, top = (round((size - side) * 0.5) for side in inside)
        picture = picture.crop((left, top, left + inside[0], top + inside[1]))
    return np.asarray(picture.resize(box, RESAMPLING["area"]))


def _on_white(rgba: UInt8[np.ndarray, "H W 4"]) -> tuple[np.ndarray, str]:
    """Composites over white, since fully transparent colours are arbitrary."""
    alpha = rgba[..., 3:].astype(np.uint16)
    if (alpha == 255).all():
        return np.ascontiguousarray(rgba[..., :3]), ""
    mixed = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8), "transparent, put on white"


def _without_text(content: bytes) -> bytes:
    """A PNG without its chunks of text; other files as they are."""
    if not content.startswith(_PNG):
        return content
    kept, start = [_PNG], len(_PNG)
    while start < len(content):
        stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] not in _TEXT_CHUNKS:
            kept.append(content[start:stop])
        start = stop
    return b"".join(kept)


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _register(content: bytes) -> None:
    """Makes Pillow read HEIC, or raises `BadImage` with the way to.

    Raises:
      BadImage: what reads this format is not installed.
    """
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    if brand in _AVIF and "AVIF" not in _formats():
        raise BadImage("AVIF: `pip install --upgrade pillow` reads it")
    if brand in _HEIC and "HEIF" not in _formats():
        try:
            import pillow_heif
        except ImportError as error:
            raise BadImage("HEIC: `pip install pillow-heif` reads it") from error
        pillow_heif.register_heif_opener()


def _is_white_zero(picture: Image.Image) -> bool:
    """Whether a TIFF shows its lowest value in white."""
    return getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _is_deep_colour(picture: Image.Image) -> bool:
    """Whether Pillow will reduce 16-bit channels to their high byte."""
    return any(";16" in str(tile) for tile in getattr(picture, "tile", ()))


def _deep_colours(picture: Image.Image, content: bytes) -> np.ndarray | None:
    """Colours of 16 bits a channel, uint16 [H, W, C]; None: Pillow cannot give them.

    Pillow keeps the high byte; of bytes that are marked as swapped, the low one.
    """
    if picture.mode not in ("RGB", "RGBA"):
        return None
    parts = []
    for low in (False, True):
        with Image.open(io.BytesIO(content), formats=_formats()) as part:
            if low:
                part.tile = [_of_low_byte(tile) for tile in part.tile]
            part.load()
            ImageOps.exif_transpose(part, in_place=True)
            parts.append(np.asarray(part).astype(np.uint16))
    return parts[0] << 8 | parts[1]


def _of_low_byte(tile: Any) -> Any:
    given = (tile.args,) if isinstance(tile.args, str) else tuple(tile.args)
    mode, _, order = given[0].partition(";")
    other = _LOW_BYTE[order]
    other = other if isinstance(other, str) else other[sys.byteorder]
    args = (f"{mode};{other}", *given[1:])
    return tile._replace(args=args[0] if isinstance(tile.args, str) else args)
