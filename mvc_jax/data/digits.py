"""scikit-learn's bundled handwritten digits: real images that need no download.

1,797 grey images of 8x8 pixels, ten classes; the test part of Alpaydin and Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998).
"""

import numpy as np
from sklearn.datasets import load_digits

from mvc_jax.data.example import Example

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Digits:
    """The digits as a `Source`: ids `digits/0000` to `digits/1796`."""

    class_names = tuple(NAMES)
    is_test = None
    defects: dict[str, str] = {}
    remarks = ()

    def __init__(self):
        bunch = load_digits()
        self._images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        self.labels = bunch.target.astype(np.int32)
        self.ids = tuple(f"digits/{i:04d}" for i in range(len(self.labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image = np.repeat(self._images[index][:, :, None], 3, axis=2)
        return Example(image=image, label=int(self.labels[index]), id=self.ids[index])
