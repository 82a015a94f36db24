"""scikit-learn's bundled handwritten digits: real images that need no download.

1,797 grey images of 8x8 pixels in ten classes; the test set of Alpaydin and Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998).
"""

import importlib.util
import pathlib

import numpy as np
from jaxtyping import Float, Int

from mvc_jax.data.example import Example

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Digits:
    """The digits as a `Source`, with the ids `digits/0000` to `digits/1796`."""

    class_names = tuple(NAMES)
    is_test = None
    defects: dict[str, str] = {}
    remarks = ()

    def __init__(self):
        images, labels = _load()
        self._images = np.round(images * (255 / 16)).astype(np.uint8)
        self.labels = labels.astype(np.int32)
        self.ids = tuple(f"digits/{i:04d}" for i in range(len(self.labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image = np.repeat(self._images[index][:, :, None], 3, axis=2)
        return Example(image=image, label=int(self.labels[index]), id=self.ids[index])


def _load() -> tuple[Float[np.ndarray, "N 8 8"], Int[np.ndarray, " N"]]:
    """Images in [0, 16] and labels, as `sklearn.datasets.load_digits` returns them."""
    # Importing scikit-learn takes 3 s; finding its folder imports nothing.
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        table = pathlib.Path(spec.origin).parent / "datasets/data/digits.csv.gz"
        if table.exists():
            rows = np.loadtxt(table, delimiter=",")
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int)
    from sklearn.datasets import load_digits  # a release that stores it elsewhere

    bunch = load_digits()
    return bunch.images, bunch.target
