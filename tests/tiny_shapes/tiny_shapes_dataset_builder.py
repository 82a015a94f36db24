"""A TFDS dataset that needs no download: white discs and squares on a dark ground."""

import numpy as np
import tensorflow_datasets as tfds

SIZE = 12  # pixels along one side


def draw(index: int) -> np.ndarray:
    """uint8 [12, 12, 3]: a disc if `index` is even, else a square, of several sizes."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    distance = np.hypot(x, y) if index % 2 == 0 else np.maximum(abs(x), abs(y))
    inside = distance < 2 + index % 4
    return np.repeat(np.where(inside, 255, index)[..., None], 3, axis=2).astype(
        np.uint8
    )


class Builder(tfds.core.GeneratorBasedBuilder):
    """Eight images for training, four for test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
            "label": tfds.features.ClassLabel(names=["disc", "square"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples(0, 8),
            "test": self._generate_examples(8, 12),
        }

    def _generate_examples(self, start: int, stop: int):
        for index in range(start, stop):
            yield index, {"image": draw(index), "label": index % 2}
