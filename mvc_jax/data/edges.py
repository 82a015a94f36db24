"""Edge images, the input of ControlNets trained on Canny edges."""

import numpy as np
from jaxtyping import UInt8


def canny(images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Detects edges with scikit-image's Canny detector (Canny 1986).

    Uses the detector's default Gaussian of one pixel, and hysteresis thresholds at 0.1
    and 0.2 of the intensity range, on the mean of the channels.

    Args:
      images: in [0, 255].

    Returns:
      edges in white (255) on black (0).
    """
    from skimage import feature  # slow to import

    grey = images.mean(axis=-1) / 255.0
    edges = [
        feature.canny(image, low_threshold=0.1, high_threshold=0.2) for image in grey
    ]
    white = np.asarray(edges, np.uint8).reshape(images.shape[:3]) * np.uint8(255)
    return np.repeat(white[..., None], 3, axis=-1)
