"""Scans: the right value of known pixels in every form, or a reason that helps.

The table of formats in docs/your-own-images.md is made of the cases here.
"""

import io
import pathlib
import sys

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from mvc_jax.data.decode import BadImage, Decoder
from mvc_jax.data.folder import Folder, FolderOptions
from mvc_jax.errors import UserError

RAMP = np.arange(64).reshape(8, 8) * 60  # 0 to 3780, 12 bits
EIGHT = np.round(RAMP / RAMP.max() * 255).astype(np.uint8)
GREY = np.repeat(EIGHT[..., None], 3, 2)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], 2)
EIGHT_COLOUR = np.round(COLOUR / COLOUR.max() * 255).astype(np.uint8)


def tiff(array, **options) -> bytes:
    buffer = io.BytesIO()
    options = {"photometric": "minisblack"} | options
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def dicom(
    array, kind="MONOCHROME2", *, bits=16, frames=0, syntax=None, **tags
) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    scan = FileDataset("x.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
    height, width = array.shape[1:3] if frames else array.shape[:2]
    scan.Rows, scan.Columns, scan.PhotometricInterpretation = height, width, kind
    scan.SamplesPerPixel = 3 if kind == "RGB" else 1
    scan.BitsAllocated = scan.BitsStored = bits
    scan.HighBit = bits - 1
    scan.PixelRepresentation = int(array.dtype.kind == "i")
    if kind == "RGB":
        scan.PlanarConfiguration = 0
    if frames:
        scan.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(scan, name, value)
    scan.PixelData = array.tobytes()
    scan["PixelData"].VR = "OB" if bits == 8 else "OW"
    if syntax:
        meta.TransferSyntaxUID = syntax
        scan.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 60])
    buffer = io.BytesIO()
    scan.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def pillow(array, kind, mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(array) -> bytes:
    import struct
    import zlib

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    colour = {3: 2, 4: 6}[array.shape[2]]
    rows = b"".join(b"\0" + row.tobytes() for row in array.astype(">u2"))
    header = struct.pack(
        ">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0
    )
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


U16 = RAMP.astype(np.uint16)
RGB16 = COLOUR.astype(np.uint16)
WINDOWED = np.round(np.clip((RAMP - 1000) / 1000, 0, 1) * 255).astype(np.uint8)
HU = RAMP.astype(np.int16) - 1000  # as slope 1 and intercept -1000 give


def grey(values):
    return np.repeat(values[..., None], 3, 2)


# What it is, the file, the pixels that come of it.
READ = [
    ("PNG, 8 bits", pillow(EIGHT, "png"), GREY),
    ("PNG, 16 bits, grey", pillow(U16, "png"), GREY),
    ("PNG, 16 bits, colour, of which 12 are used", png_of_16_bits(RGB16), EIGHT_COLOUR),
    (
        "PNG, 16 bits, colour",
        png_of_16_bits(EIGHT_COLOUR.astype(np.uint16) * 257),
        EIGHT_COLOUR,
    ),
    ("JPEG", pillow(np.full((8, 8, 3), 90, np.uint8), "jpeg"), np.full((8, 8, 3), 90)),
    ("WebP", pillow(EIGHT_COLOUR, "webp", lossless=True), EIGHT_COLOUR),
    ("BMP", pillow(EIGHT_COLOUR, "bmp"), EIGHT_COLOUR),
    (
        "AVIF",
        pillow(np.full((8, 8, 3), 90, np.uint8), "avif", quality=100),
        np.full((8, 8, 3), 90),
    ),
    ("TIFF, 8 bits, white is zero", tiff(255 - EIGHT, photometric="miniswhite"), GREY),
    ("TIFF, 16 bits", tiff(U16), GREY),
    (
        "TIFF, 16 bits, white is zero",
        tiff(U16.max() - U16, photometric="miniswhite"),
        GREY,
    ),
    ("TIFF, 16 bits, big-endian", tiff(U16, byteorder=">"), GREY),
    ("TIFF, 16 bits, signed", tiff(HU), GREY),
    ("TIFF, 32-bit integers", tiff(RAMP.astype(np.uint32)), GREY),
    ("TIFF, float32", tiff(RAMP.astype(np.float32)), GREY),
    ("TIFF, float32, big-endian", tiff(RAMP.astype(np.float32), byteorder=">"), GREY),
    ("TIFF, float64", tiff(RAMP.astype(np.float64)), GREY),
    ("TIFF, 16 bits, colour", tiff(RGB16, photometric="rgb"), EIGHT_COLOUR),
    (
        "TIFF, float32, colour",
        tiff(COLOUR.astype(np.float32), photometric="rgb"),
        EIGHT_COLOUR,
    ),
    (
        "TIFF, colour, a plane for each channel",
        tiff(
            np.moveaxis(EIGHT_COLOUR, 2, 0).copy(),
            photometric="rgb",
            planarconfig="separate",
        ),
        EIGHT_COLOUR,
    ),
    (
        "TIFF, 5 bands: the first 3",
        tiff(
            np.concatenate([RGB16, RGB16[..., :2]], 2),
            photometric="minisblack",
            planarconfig="contig",
        ),
        EIGHT_COLOUR,
    ),
    (
        "TIFF, 7 bands, bands first: the first 3",
        tiff(
            np.moveaxis(np.concatenate([RGB16, RGB16, RGB16[..., :1]], 2), 2, 0).copy(),
            photometric="minisblack",
            planarconfig="separate",
        ),
        EIGHT_COLOUR,
    ),
    ("BigTIFF", tiff(U16, bigtiff=True), GREY),
    ("DICOM, its own range", dicom(U16), GREY),
    ("DICOM, 8 bits", dicom(EIGHT, bits=8), GREY),
    ("DICOM, signed", dicom(HU), GREY),
    ("DICOM, MONOCHROME1", dicom(U16.max() - U16, "MONOCHROME1"), GREY),
    (
        "DICOM, window of the file",
        dicom(U16, WindowCenter=1500.5, WindowWidth=1001),
        grey(WINDOWED),
    ),
    (
        "DICOM, rescale slope and intercept, window in those units",
        dicom(
            U16,
            RescaleSlope=2,
            RescaleIntercept=-1000,
            WindowCenter=2000.5,
            WindowWidth=2001,
        ),
        grey(WINDOWED),
    ),
    (
        "DICOM, several windows: the first",
        dicom(U16, WindowCenter=[1500.5, 9], WindowWidth=[1001, 9]),
        grey(WINDOWED),
    ),
    ("DICOM, colour", dicom(EIGHT_COLOUR, "RGB", bits=8), EIGHT_COLOUR),
]
# What it is, the file, the reason that is given.
REFUSED = [
    (
        "DICOM, several frames",
        dicom(np.stack([U16, U16]), frames=2),
        "data.frames=each",
    ),
    (
        "DICOM, JPEG-LS, without a package that reads it",
        dicom(U16, syntax=JPEGLSLossless),
        "pip install pylibjpeg",
    ),
    ("DICOM without pydicom", dicom(U16), "pip install pydicom"),
    ("NIfTI", b"\x5c\x01\0\0" + b"\0" * 340 + b"n+1\0" + b"\0" * 99, "nibabel"),
    (
        "HEIC without pillow-heif",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99,
        "pip install pillow-heif",
    ),
    ("GIF", b"GIF89a\1\0\1\0\0\0\0;", "not a PNG, JPEG"),
    (
        "Git LFS pointer",
        b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
        "git lfs pull",
    ),
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case[0])
def test_a_format_that_is_read(case):
    _, content, wanted = case
    pixels, _ = Decoder()(content)
    assert pixels.dtype == np.uint8 and pixels.shape == wanted.shape
    np.testing.assert_allclose(pixels.astype(int), wanted, atol=1)


def refusal(name, content) -> str:
    """The reason, in a process without the package that a case is without."""
    with pytest.MonkeyPatch.context() as patch:
        package = name.partition("without ")[2].replace("-", "_")
        for module in (package, f"{package}.pixels"):
            patch.setitem(sys.modules, module, None)
        with pytest.raises(BadImage) as error:
            Decoder()(content)
    return str(error.value)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_a_format_that_is_refused(case):
    name, content, reason = case
    assert reason in refusal(name, content)


def test_the_table_of_formats_in_the_documents():
    rows = ["| file | |", "|---|---|"]
    for name, content, _ in READ:
        note = Decoder()(content)[1]
        rows.append(f"| {name} | read{f': {note}' if note else ''} |")
    for name, content, _ in REFUSED:
        reason = refusal(name, content).partition(" (")[0].partition(", e.g.")[0]
        rows.append(f"| {name} | refused: {reason} |")
    path = pathlib.Path(__file__).parents[1] / "docs" / "your-own-images.md"
    table = "\n".join(rows)
    assert table in path.read_text(), f"the table is now:\n{table}"


def test_a_window_of_the_user_is_used_for_all_of_more_than_8_bits():
    window = Decoder(window=(1000, 2000))
    for content in (tiff(U16), dicom(U16), dicom(U16, WindowCenter=5, WindowWidth=9)):
        np.testing.assert_array_equal(window(content)[0], grey(WINDOWED))
    colour = np.round(np.clip((COLOUR - 1000) / 1000, 0, 1) * 255)
    for content in (png_of_16_bits(RGB16), tiff(RGB16, photometric="rgb")):
        np.testing.assert_allclose(window(content)[0].astype(int), colour, atol=1)
    for content in (tiff(EIGHT), pillow(EIGHT, "png")):
        np.testing.assert_array_equal(window(content)[0], GREY)
    whole = Decoder(window=(0, 65535))(tiff(U16, photometric="miniswhite"))[0]
    np.testing.assert_allclose(whole.astype(int), grey(255 - U16 // 257), atol=1)


def test_windows_of_dicom_that_are_not_linear():
    exact = dicom(
        U16, WindowCenter=1500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT"
    )
    np.testing.assert_array_equal(Decoder()(exact)[0], grey(WINDOWED))
    sigmoid = dicom(U16, WindowCenter=1500, WindowWidth=800, VOILUTFunction="SIGMOID")
    wanted = np.round(255 / (1 + np.exp(-4 * (RAMP - 1500) / 800)))
    np.testing.assert_allclose(
        Decoder()(sigmoid)[0][..., 0].astype(int), wanted, atol=1
    )


def test_scans_that_are_too_large_or_damaged():
    for content in (
        tiff(np.zeros((40, 40), np.float64)),
        dicom(np.zeros((40, 40), "u2")),
    ):
        with pytest.raises(BadImage, match="40x40 pixels, over config.data.max_pixels"):
            Decoder(max_pixels=1000)(content)
    for content in (tiff(RAMP.astype(np.float64)), dicom(U16)):
        with pytest.raises(BadImage, match="damaged|compressed|without an image"):
            Decoder()(content[: len(content) - 200])


def test_each_frame_of_a_dicom_file_can_be_an_image(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "mr").mkdir()
    stack = np.stack([U16, U16.T.copy(), U16[::-1].copy()])
    (tmp_path / "ct" / "a.dcm").write_bytes(dicom(stack, frames=3))
    (tmp_path / "ct" / "broken.dcm").write_bytes(b"broken")
    (tmp_path / "mr" / "b.DCM").write_bytes(dicom(U16))
    source = Folder(str(tmp_path), Decoder(), FolderOptions(each_frame=True))
    assert source.ids == (*(f"ct/a.dcm#000{k}" for k in range(3)), "mr/b.DCM#0000")
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 1])
    assert "damaged" in source.defects["ct/broken.dcm"]
    for k, wanted in enumerate([EIGHT, EIGHT.T, EIGHT[::-1], EIGHT]):
        np.testing.assert_array_equal(source[k]["image"], grey(wanted))
    source = Folder(str(tmp_path), Decoder())
    with pytest.raises(BadImage, match="3 frames"):
        source[source.ids.index("ct/a.dcm")]


def test_a_folder_of_volumes_is_refused_with_how_to_slice_them(tmp_path):
    (tmp_path / "ill").mkdir()
    (tmp_path / "ill" / "1.nii.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="save its slices as images.*nibabel"):
        Folder(str(tmp_path), Decoder())
    (tmp_path / "ill" / "1.png").write_bytes(pillow(EIGHT, "png"))
    assert "nibabel" in Folder(str(tmp_path), Decoder()).defects["ill/1.nii.gz"]
