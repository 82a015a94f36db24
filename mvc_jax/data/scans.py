"""Pixels of the files that Pillow cannot read: DICOM, and some TIFF."""

import io
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Window = tuple[float | int, float | int]
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO = 0  # a value of TIFF's tag PhotometricInterpretation
_PALETTE = 3
DICOM_SUFFIXES = (".dcm", ".dicom")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
NIFTI = (
    "a NIfTI volume, not an image: save its slices as images, e.g. with nibabel: "
    "Image.fromarray(nibabel.load(path).get_fdata()[:, :, k].astype('int32'))"
    ".save(f'{k}.tif')"
)


class Unreadable(Exception):
    """A scan that cannot be used; the text is the reason."""


class Scan(NamedTuple):
    """Pixels as they are stored, and how they are shown.

    Attributes:
      array: [H, W] or [H, W, C].
      window: the values shown as black and white; None: not said.
      inverted: whether the lowest value is white.
      note: on what was selected, "" if nothing.
    """

    array: np.ndarray
    window: Window | None = None
    inverted: bool = False
    note: str = ""


def is_tiff(content: bytes) -> bool:
    return content.startswith(_TIFF)


def is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM"


def is_nifti(content: bytes) -> bool:
    return content[344:348] in (b"n+1\0", b"ni1\0") or content[4:8] == b"n+2\0"


def read_tiff(content: bytes, check_size: Callable[[int, int], None]) -> Scan:
    """Reads the first page of a TIFF file by tifffile.

    Of more than three bands without alpha the first three are used, of two the first.

    Args:
      content: of the file.
      check_size: raises if width and height are too large.
    """
    import tifffile  # takes 0.1 s to import

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        check_size(page.imagewidth, page.imagelength)
        array = np.asarray(page.asarray())
        if page.photometric == _PALETTE:
            array = np.moveaxis(page.colormap[:, array] >> 8, 0, -1).astype(np.uint8)
        if page.planarconfig == 2 and array.ndim == 3:  # bands before rows
            array = np.moveaxis(array, 0, -1)
        has_alpha = bool(page.extrasamples) and page.extrasamples[0] in (1, 2)
    note, bands = "", array.shape[2] if array.ndim == 3 else 1
    if bands == 2 or bands > 4 or (bands == 4 and not has_alpha):
        used = 1 if bands == 2 else 3
        array, note = array[:, :, :used], f"the first {used} of {bands} bands"
    return Scan(array, None, page.photometric == _WHITE_IS_ZERO, note)


def frames_of_dicom(content: bytes) -> int:
    """The number of frames that a DICOM file says it has."""
    header = _pydicom().dcmread(io.BytesIO(content), stop_before_pixels=True)
    return int(header.get("NumberOfFrames") or 1)


def read_dicom(
    content: bytes, check_size: Callable[[int, int], None], frame: int | None = None
) -> Scan:
    """Reads one frame of a DICOM file, in the units of its modality.

    Args:
      content: of the file.
      check_size: raises if width and height are too large.
      frame: which; None: the only one.

    Raises:
      Unreadable: pydicom is not installed, or the file has several frames, none, or a
        compression that needs another package.
    """
    pydicom = _pydicom()
    scan = pydicom.dcmread(io.BytesIO(content), force=False)
    if "Rows" not in scan:
        raise Unreadable("a DICOM file without an image")
    check_size(int(scan.Columns), int(scan.Rows))
    frames = int(scan.get("NumberOfFrames") or 1)
    if frames > 1 and frame is None:
        raise Unreadable(
            f"a DICOM file of {frames} frames: --config.data.frames=each makes an "
            "image of each"
        )
    try:
        array = pydicom.pixels.pixel_array(scan, index=frame or 0)
    except (RuntimeError, NotImplementedError) as error:
        name = scan.file_meta.TransferSyntaxUID.name
        raise Unreadable(
            f"a DICOM file compressed by {name}: `pip install pylibjpeg "
            f"pylibjpeg-libjpeg pylibjpeg-openjpeg` may read it ({error})"
        ) from error
    kind = scan.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(array, scan)
        return Scan((colours >> 8).astype(np.uint8) if colours.max() > 255 else colours)
    if array.ndim == 3:
        return Scan(array)
    array = pydicom.pixels.apply_modality_lut(array, scan)  # rescale slope, intercept
    array, window = _values_of_interest(scan, array, pydicom)
    return Scan(array, window, kind == "MONOCHROME1")


def _values_of_interest(
    scan: Any, array: np.ndarray, pydicom: Any
) -> tuple[np.ndarray, Window | None]:
    """The values to show and their window, by PS3.3 C.11.2; None: not said."""
    if scan.get("VOILUTSequence"):
        bits = int(scan.VOILUTSequence[0].LUTDescriptor[2])
        looked_up = pydicom.pixels.apply_voi(array.astype(int), scan)
        return looked_up, (0, 2**bits - 1)
    centre, width = (_first(scan.get(f"Window{x}")) for x in ("Center", "Width"))
    if centre is None or width is None or not width > 0:
        return array, None
    function = str(scan.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (array - centre) / width)), (0, 1)
    if function == "LINEAR_EXACT":
        return array, (centre - width / 2, centre + width / 2)
    return array, (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _first(value: Any) -> float | None:
    values = (
        value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    )
    try:
        number = float(next(iter(values)))
    except (TypeError, ValueError, StopIteration):
        return None
    return number if math.isfinite(number) else None


def _pydicom() -> Any:
    try:
        import pydicom.pixels
    except ImportError as error:
        raise Unreadable(
            "a DICOM file: `pip install pydicom`, or the extra `medical`, reads it"
        ) from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # the reason says it all
    return pydicom
