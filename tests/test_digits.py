"""scikit-learn's digits as a source, read with and without importing the library."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mvc_jax.data import digits
from mvc_jax.data.example import Source


@pytest.mark.parametrize("find_spec", [None, lambda name: None], ids=["file", "import"])
def test_the_digits_are_those_of_the_library(monkeypatch, find_spec):
    bunch = load_digits()
    if find_spec:
        monkeypatch.setattr(digits.importlib.util, "find_spec", find_spec)
    else:
        monkeypatch.setattr("sklearn.datasets.load_digits", None)
    source = digits.Digits()
    assert isinstance(source, Source)
    assert len(source) == len(source.ids) == len(set(source.ids)) == 1797
    np.testing.assert_array_equal(source.labels, bunch.target)
    for index in range(0, 1797, 100):
        image = np.round(bunch.images[index] * (255 / 16))[:, :, None]
        np.testing.assert_array_equal(source[index]["image"], np.repeat(image, 3, 2))
