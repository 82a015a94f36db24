"""How synthetic images differ from real ones as signals: colours and frequencies.

The supplement names the shift of the domain as the open problem. A classifier can tell
the sources apart by it, whatever the images show.
"""

import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int, UInt8

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class ImageStatistics:
    """Channel histograms and the radial power spectrum of square images; mergeable.

    Attributes:
      images: how many.
      histograms: int64 [3, 256], pixels by channel and level.
      spectrum: float64 [R], sums over images of the power at 1, 2, ... R cycles per
        image; R is half the side.
    """

    def __init__(self, size: int):
        """Starts with no image.

        Args:
          size: S, pixels along a side.
        """
        self.size, self.images = size, 0
        self.histograms = np.zeros((3, 256), np.int64)
        self.spectrum = np.zeros(size // 2)

    def add(self, images: Iterable[UInt8[np.ndarray, "S S 3"]]) -> None:
        """Adds some images."""
        for image in images:
            for channel in range(3):
                levels = np.ascontiguousarray(image[..., channel]).reshape(-1)
                self.histograms[channel] += np.bincount(levels, minlength=256)
            self.spectrum += radial_spectrum(image)
            self.images += 1

    def merge(self, other: "ImageStatistics") -> None:
        """Adds the images of another one."""
        self.images += other.images
        self.histograms += other.histograms
        self.spectrum += other.spectrum

    def distribution(self) -> Float[np.ndarray, "3 256"]:
        """The fraction of the pixels of each channel that has each level."""
        return self.histograms / max(self.images * self.size**2, 1)

    def mean_spectrum(self) -> Float[np.ndarray, " R"]:
        """The mean over images."""
        return self.spectrum / max(self.images, 1)


def radial_spectrum(image: UInt8[np.ndarray, "S S 3"]) -> Float[np.ndarray, " R"]:
    """The power of an image's luminance by frequency, the mean over all directions.

    Azimuthal integration: Durall et al., arXiv 2003.01826, equation 3.

    Returns:
      |F|^2 / S^2 at 1, 2, ... S / 2 cycles per image, of pixels in [0, 1].
    """
    size = image.shape[0]
    transform = np.fft.rfft2(image @ (np.asarray(_LUMA) / 255))
    power = (transform.real**2 + transform.imag**2) / size**2
    radius, weight, total = _radii(size)
    sums = np.bincount(radius, weights=(power * weight).reshape(-1))
    return sums[1 : size // 2 + 1] / total


@functools.cache
def _radii(size: int) -> tuple[Int[np.ndarray, " F"], np.ndarray, np.ndarray]:
    """Rounded radius and weight of each frequency of `rfft2`; their sums by radius.

    Frequencies that `rfft2` leaves out, since they are conjugates, count twice.
    """
    rows, columns = np.fft.fftfreq(size, 1 / size), np.fft.rfftfreq(size, 1 / size)
    radius = np.rint(np.hypot(rows[:, None], columns[None])).astype(np.int64)
    weight = np.full(radius.shape, 2.0)
    weight[:, 0] = 1
    if size % 2 == 0:
        weight[:, -1] = 1
    total = np.bincount(radius.reshape(-1), weights=weight.reshape(-1))
    return radius.reshape(-1), weight, total[1 : size // 2 + 1]


def histogram_shift(a: ImageStatistics, b: ImageStatistics) -> float:
    """The first Wasserstein distance of pixel values in [0, 1], a mean over channels.

    In one dimension it is the area between the cumulative distributions.
    """
    cumulative = (a.distribution() - b.distribution()).cumsum(1)
    return float(np.abs(cumulative[:, :-1]).sum(1).mean() / 255)


def spectrum_shift(a: ImageStatistics, b: ImageStatistics) -> float:
    """The root mean squared difference of the mean spectra, in decibels.

    10 dB are a factor of ten in power at every frequency. A millionth of the variance
    of pixels is added to both, so that a frequency without any power counts little.
    """
    floor = 1e-6
    ratio = (a.mean_spectrum() + floor) / (b.mean_spectrum() + floor)
    return float(np.sqrt((np.log10(ratio) ** 2).mean()) * 10) if len(ratio) else 0.0
