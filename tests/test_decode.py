"""Image files decode to RGB, with a note on conversions; others fail with a reason."""

import io
import itertools
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin
from sklearn.datasets import load_sample_images

from mvc_jax.configs import cifar10, tiny_imagenet
from mvc_jax.data import decode
from mvc_jax.data.decode import BadImage, Decoder, fit, strict_pillow, undo_fit


def encoded(picture, kind="png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rgb():
    x = np.linspace(0, 255, 24)
    return np.stack(np.broadcast_arrays(x, x[:, None], 255 - x), 2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["png", "tiff", "bmp", "webp", "jpeg"])
def test_formats(rgb, kind):
    options = {"lossless": True} if kind == "webp" else {}
    if kind == "jpeg":
        options = {"quality": 100, "subsampling": 0}
    pixels, note = Decoder()(encoded(Image.fromarray(rgb), kind, **options))
    assert pixels.dtype == np.uint8 and note == ""
    np.testing.assert_allclose(pixels, rgb, atol=3 if kind == "jpeg" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_modes_become_rgb(rgb, mode):
    source = Image.fromarray(rgb).convert(mode)
    pixels, note = Decoder()(encoded(source, "tiff"))
    np.testing.assert_array_equal(pixels, np.asarray(source.convert("RGB")))
    assert note == ""


def test_transparency_is_composited_over_white():
    rgba = np.zeros((3, 2, 4), np.uint8)
    rgba[1, :, 3], rgba[2, :, 3] = 255, 128
    pixels, note = Decoder()(encoded(Image.fromarray(rgba)))
    assert pixels[0].min() == 255 and pixels[1].max() == 0
    assert 126 <= pixels[2].min() <= pixels[2].max() <= 128
    assert "white" in note
    opaque = encoded(Image.fromarray(rgba[1:2]))
    assert Decoder()(opaque)[1] == ""
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    pixels, note = Decoder()(encoded(palette, transparency=0))
    assert pixels.min() == 255 and "white" in note


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_windowed(kind):
    grey = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    content = encoded(Image.fromarray(grey), kind)
    pixels, note = Decoder()(content)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 64], [128, 255]])
    assert "windowed" in note
    pixels, _ = Decoder(window=(0, 4000))(content)
    np.testing.assert_array_equal(pixels[..., 1], [[64, 128], [191, 255]])


def test_floats_are_windowed_or_refused():
    values = np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32)
    pixels, _ = Decoder()(encoded(Image.fromarray(values), "tiff"))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 128], [191, 255]])
    values[0, 0] = np.nan
    with pytest.raises(BadImage, match="not finite"):
        Decoder()(encoded(Image.fromarray(values), "tiff"))


def test_a_note_reports_sixteen_bit_colour(rgb):
    import struct
    import zlib

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    rows = b"".join(b"\0" + row.tobytes() for row in rgb.astype(">u2") * 257)
    header = struct.pack(">IIBBBBB", 24, 24, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels, note = Decoder()(content)
    assert "16 bits" in note
    np.testing.assert_allclose(pixels, rgb, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
def test_the_exif_orientation_is_applied(orientation, kind):
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8, :4] = 255  # bright top left
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    pixels, _ = Decoder()(encoded(stored, kind, exif=exif))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 10


def truncated(rgb, kind="png"):
    content = encoded(Image.fromarray(rgb), kind)
    return content[: len(content) * 2 // 3]


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "tiff", "webp"])
def test_truncated_files_are_refused(rgb, kind):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(BadImage, match="damaged|not a PNG"):
        Decoder()(truncated(noise, kind))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "damaged|not a PNG"),
        (b"GIF89a\1\0\1\0\0\0\0;", "not a PNG"),
    ],
)
def test_files_that_are_not_images_are_refused(content, reason):
    with pytest.raises(BadImage, match=reason):
        Decoder()(content)


@given(st.binary(max_size=400), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"BM"]))
@settings(deadline=None, max_examples=100)
def test_bytes_decode_or_raise_bad_image(content, head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels, _ = Decoder()(head + content)
        except BadImage:
            return
    assert pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.parametrize("compressed", [True, False])
def test_a_png_with_much_text_is_read(rgb, compressed):
    """More than Pillow allows in one chunk, or in all."""
    text = PngImagePlugin.PngInfo()
    for k in range(1 if compressed else 3):
        text.add_text(
            f"key {k}", "x" * 1_600_000 * (1 if compressed else 20), compressed
        )
    content = encoded(Image.fromarray(rgb), pnginfo=text)
    np.testing.assert_array_equal(Decoder()(content)[0], rgb)
    with pytest.raises(BadImage, match="damaged: (?!no)"):
        Decoder()(content[: len(content) * 2 // 3 if compressed else -900])


def test_a_pointer_of_git_lfs_is_named():
    content = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    with pytest.raises(BadImage, match="git lfs pull"):
        Decoder()(content)


def test_bombs_are_never_decoded(monkeypatch):
    bomb = encoded(Image.new("1", (3000, 2000)))
    assert len(bomb) < 5000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: 1 / 0)
    for limit in (1_000_000, 3_500_000):  # over twice the limit, and less than twice
        with strict_pillow(limit), pytest.raises(BadImage, match="max_pixels"):
            Decoder(max_pixels=limit)(bomb)
    with pytest.raises(BadImage, match="3000x2000 pixels"):
        Decoder(max_pixels=1_000_000)(bomb)


def test_a_limit_above_pillow_s_own_is_respected(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = encoded(Image.new("L", (20, 20)))
    with strict_pillow(400):
        assert Decoder(max_pixels=400)(content)[0].shape == (20, 20, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (4, 4, 3, 1), (0, 4, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(BadImage, match="shape"):
        Decoder().from_array(np.zeros(shape, np.uint8))


def test_decoded_arrays_become_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    for array in (grey, grey[..., 0]):
        np.testing.assert_array_equal(
            Decoder().from_array(array)[0], np.repeat(grey, 3, 2)
        )


@pytest.mark.parametrize("resize", decode.RESIZING)
@pytest.mark.parametrize("resample", decode.RESAMPLING)
def test_resizing_to_the_same_size_changes_nothing(resize, resample):
    image = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    fitted = fit(image, 7, resize=resize, resample=resample)
    np.testing.assert_array_equal(fitted, image)


def test_resizing_keeps_channels_positions_and_mean():
    """A red left half stays red and on the left at any size; the mean is kept."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8, 0] = 200
    for size in (4, 8, 40):
        small = fit(image, size)
        assert small.shape == (size, size, 3)
        assert small[:, 0, 0].min() > 150
        assert small[:, -1].max() < 50
        assert small[..., 1:].max() == 0
        assert abs(small[..., 0].mean() - 100) < 2


def test_crop_pad_and_stretch():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert fit(wide, 8, resize="crop", resample="area").min() == 255
    padded = fit(wide, 24, resize="pad", resample="area")
    assert padded[:8].max() == padded[16:].max() == 0
    np.testing.assert_array_equal(padded[8:16], wide)
    for shape in ((8, 600), (600, 8), (1, 4000)):  # something of each stays
        grey = np.full((*shape, 3), 200, np.uint8)
        for resize in ("pad", "crop", "stretch"):
            assert (fit(grey, 32, resize=resize) == 200).sum() >= 3 * 32
        padded = fit(grey, 32, resize="pad")
        assert undo_fit(padded, shape[1], shape[0], resize="pad").min() == 200
    stretched = fit(wide, 24, resize="stretch", resample="area")
    assert (stretched[:, 8:16] == 255).all() and stretched[:, :7].max() == 0


def test_downscaling_is_antialiased():
    """Stripes of one pixel become grey, not black or white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for resample in decode.RESAMPLING:
        small = fit(stripes, 8, resample=resample)
        assert 120 <= small.min() <= small.max() <= 135


@pytest.mark.parametrize("resize", decode.RESIZING)
@pytest.mark.parametrize("sides", [(40, 30), (30, 40), (12, 8), (8, 8), (50, 1)])
def test_undo_fit_restores_the_aspect_ratio(resize, sides):
    """Its size is the original's, or the square's if that is smaller."""
    width, height = sides
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    source = np.stack(np.broadcast_arrays(x, y[:, None], 128), 2).astype(np.uint8)
    back = undo_fit(fit(source, 16, resize=resize), width, height, resize=resize)
    kept = (min(sides),) * 2 if resize == "crop" else sides
    scale = min(1.0, 16 / max(kept))
    expected = tuple(max(round(side * scale), 1) for side in kept)
    assert back.shape == (*expected[::-1], 3)
    if resize != "crop" and min(sides) >= 8:
        smaller = np.asarray(
            Image.fromarray(source).resize(expected, Image.Resampling.BOX)
        )
        inner = np.s_[1:-1, 1:-1]  # at the border Lanczos rings, next to black padding
        assert np.abs(back[inner].astype(int) - smaller[inner]).max() < 16


@pytest.mark.parametrize(("config", "small"), [(cifar10, 32), (tiny_imagenet, 64)])
def test_the_lab_notes_state_the_psnr_of_resizing_to_256_pixels_and_back(config, small):
    errors = []
    for photograph in load_sample_images().images:
        for side in (2 * small, 4 * small, 8 * small):
            corners = (range(0, n - side + 1, side) for n in photograph.shape[:2])
            for y, x in itertools.product(*corners):
                cut = photograph[y : y + side, x : x + side]
                image = decode.fit(cut, small, resample="area")
                back = decode.fit(decode.fit(image, 256), small, resample="area")
                errors.append(np.square(image.astype(float) - back).mean())
    found = 10 * np.log10(255**2 / np.mean(errors))
    (stated,) = re.findall(r"([\d.]+) dB", config.__doc__)
    assert found == pytest.approx(float(stated), abs=0.05)
