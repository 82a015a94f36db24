"""Measured attributes of photographs and scans, in words, for captions.

Legend: H W pixels, 3 channels; brightness is ITU-R BT.601's, in [0, 1].
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, UInt8

_LUMA = np.asarray([0.299, 0.587, 0.114])
_GREY = 0.15  # saturation below which a pixel has no colour
_DARK, _LIGHT = 0.2, 0.8  # values at which a pixel without colour is black or white
_SECOND = 0.15  # of the pixels: a second colour that is named
_HUES = (  # name, up to this hue in degrees
    ("red", 15),
    ("orange", 45),
    ("yellow", 70),
    ("green", 165),
    ("cyan", 195),
    ("blue", 260),
    ("purple", 300),
    ("pink", 340),
    ("red", 360),
)
COLOURS = ("black", "grey", "white", *dict(_HUES), "brown")
_BLACK = 0.06  # brightness below which a pixel of a scan is background
_BRIGHTEST = 85  # percentile of a scan's other pixels: what is above is its region
_ROUNDING = 1e-6  # of filtered brightness
_COHERENT = 0.25  # of the structure tensor: below it no direction is named


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What was measured of an image.

    Attributes:
      colours: one or two names of `COLOURS`, the most frequent first.
      brightness: mean.
      contrast: standard deviation of the brightness.
      texture: mean gradient of the brightness, divided by the contrast.
      orientation: `horizontal`, `vertical`, `diagonal`, or "" for none.
      area: fraction of the image that the main region has.
      position: of the centre of the main region, as in `upper left`.
    """

    colours: tuple[str, ...]
    brightness: float
    contrast: float
    texture: float
    orientation: str
    area: float
    position: str


def measure(image: UInt8[np.ndarray, "H W 3"], *, scan: bool) -> Attributes:
    """Measures an image; the main region of a scan is its brightest large part."""
    pixels = image / 255.0
    grey = pixels @ _LUMA
    contrast = float(grey.std())
    down, across = np.gradient(grey)
    region = _bright_region(grey) if scan else _foreground(pixels)
    return Attributes(
        colours=() if scan else colours(image),
        brightness=float(grey.mean()),
        contrast=contrast,
        texture=float(np.hypot(down, across).mean() / (contrast + 1e-3)),
        orientation=orientation(down, across),
        area=float(region.mean()),
        position=position(region),
    )


def colours(image: UInt8[np.ndarray, "H W 3"]) -> tuple[str, ...]:
    """The names of the most frequent colours, one or two.

    By hue, saturation and value: the basic terms of Berlin & Kay (1969), and cyan.
    """
    pixels = image.reshape(-1, 3) / 255.0
    value, low = pixels.max(1), pixels.min(1)
    chroma = value - low
    saturation = np.divide(chroma, value, out=np.zeros_like(value), where=value > 0)
    hue = _hue(pixels, value, chroma)
    names = np.searchsorted([end for _, end in _HUES], hue, side="right")
    index = np.asarray([COLOURS.index(name) for name, _ in _HUES] + [0])[names]
    warm = np.isin(index, [COLOURS.index(x) for x in ("red", "orange", "yellow")])
    index = np.where(warm & (value < 0.6), COLOURS.index("brown"), index)
    plain = (saturation < _GREY) | (value < _DARK)
    shade = np.digitize(value, (_DARK, _LIGHT))  # black, grey, white
    counts = np.bincount(np.where(plain, shade, index), minlength=len(COLOURS))
    first, second = np.argsort(-counts, kind="stable")[:2]
    if counts[second] < _SECOND * len(pixels):
        return (COLOURS[first],)
    return COLOURS[first], COLOURS[second]


def _hue(
    pixels: Float[np.ndarray, "N 3"],
    value: Float[np.ndarray, " N"],
    chroma: Float[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """Hue in [0, 360) degrees; 0 without chroma."""
    red, green, blue = pixels.T
    safe = np.where(chroma > 0, chroma, 1.0)
    sixth = np.select(
        [value == red, value == green],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return np.where(chroma > 0, 60.0 * sixth, 0.0) % 360


def orientation(
    down: Float[np.ndarray, "H W"], across: Float[np.ndarray, "H W"]
) -> str:
    """The dominant direction of lines, by the structure tensor of the gradients.

    Its orientation and coherence are those of Bigun & Granlund (1987).
    """
    xx, yy, xy = (across**2).sum(), (down**2).sum(), (across * down).sum()
    energy = xx + yy
    if energy == 0 or np.hypot(xx - yy, 2 * xy) / energy < _COHERENT:
        return ""
    gradient = 0.5 * np.degrees(np.arctan2(2 * xy, xx - yy))  # in (-90, 90]
    line = (gradient + 90) % 180  # lines are across the gradient
    if line < 22.5 or line >= 157.5:
        return "horizontal"
    return "vertical" if 67.5 <= line < 112.5 else "diagonal"


def position(region: Bool[np.ndarray, "H W"]) -> str:
    """Where the centre of a region is: in a third of the image, down and across."""
    if not region.any():
        return "centre"
    rows, columns = np.nonzero(region)
    height, width = region.shape
    y = int(3 * (rows.mean() + 0.5) / height)
    x = int(3 * (columns.mean() + 0.5) / width)
    words = [("upper", "", "lower")[y], ("left", "", "right")[x]]
    return " ".join(word for word in words if word) or "centre"


def _foreground(pixels: Float[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """The largest connected part that differs from the median colour of the border."""
    from scipy import ndimage

    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.abs(pixels - np.median(border, axis=0)).mean(-1)
    width = max(min(distance.shape) // 16, 1)
    smooth = ndimage.uniform_filter(distance, width)
    return _largest(smooth > otsu(smooth) + _ROUNDING)


def _bright_region(grey: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The largest connected part of the brightest pixels that are not background."""
    from scipy import ndimage

    smooth = ndimage.uniform_filter(grey, max(min(grey.shape) // 16, 1))
    inside = smooth[smooth > _BLACK]
    if not inside.size:
        return np.zeros(grey.shape, bool)
    return _largest(smooth > np.percentile(inside, _BRIGHTEST) + _ROUNDING)


def _largest(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The largest of the connected parts of a mask."""
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    return parts == 1 + int(sizes.argmax())


def otsu(values: Float[np.ndarray, "H W"]) -> float:
    """The threshold that separates two groups of values best (Otsu, 1979)."""
    counts, edges = np.histogram(values, bins=64)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(float)
    above = counts.sum() - below
    total = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = total / below - (total[-1] - total) / above
    between = np.nan_to_num(below * above * gap**2)
    return float(edges[1:][between.argmax()])
