"""The shape in an image, as ControlNets are trained on it: Canny's edges."""

import numpy as np
from jaxtyping import UInt8
from skimage import feature


def canny(images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """White edges on black (Canny 1986), by scikit-image.

    Its defaults: a Gaussian of one pixel, hysteresis between a tenth and a fifth of the
    range. Grey is the mean of the channels.
    """
    grey = images.mean(axis=-1) / 255.0
    edges = [
        feature.canny(image, low_threshold=0.1, high_threshold=0.2) for image in grey
    ]
    white = np.asarray(edges, np.uint8).reshape(images.shape[:3]) * np.uint8(255)
    return np.repeat(white[..., None], 3, axis=-1)
