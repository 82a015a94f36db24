"""The classifiers of a finished workdir, and what they say of its test images."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from mvc_jax import files
from mvc_jax.classification import runs
from mvc_jax.data import splits


@dataclasses.dataclass(frozen=True)
class Tested:
    """The test images of a workdir, and which of them its classifiers get right.

    Attributes:
      class_names: K names.
      ids: of the T test images.
      labels: int32 [T].
      images: uint8 [T, H, W, 3].
      correct: by run, whether seed s is right about test image t.
    """

    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: Int[np.ndarray, " T"]
    images: np.ndarray
    correct: dict[str, Bool[np.ndarray, "S T"]]

    def difference_of_images(self, other: "Tested", source: bool) -> str:
        """The first difference of two workdirs' test images, in words; "": none.

        Args:
          other: has the same classes.
          source: whether both read the same source, so that an id is one image.
        """
        if len(self.ids) != len(other.ids):
            return f"{len(self.ids)} images, and {len(other.ids)}"
        for i, pair in enumerate(zip(self.ids, other.ids, strict=True)):
            if pair[0] != pair[1]:
                return f"image {i + 1} is {pair[0]!r}, and {pair[1]!r}"
        if not np.array_equal(self.labels, other.labels):
            return "other labels"
        if not source and not np.array_equal(self.images, other.images):
            return "other pixels under the same names"
        return ""


def read(workdir: epath.PathLike, names: Sequence[str]) -> Tested:
    """Reads the results of some runs that `classify` has finished."""
    workdir = epath.Path(workdir)
    test, correct = splits.read_split(workdir / "caption", "test"), {}
    for name in names:
        path = workdir / "classify" / "results" / f"{runs.parse(name).slug}.json"
        seeds = files.read_json(path)["seeds"]
        predictions = np.asarray([seed["predictions"] for seed in seeds])
        correct[name] = predictions == test.labels
    return Tested(test.class_names, test.ids, test.labels, test.images, correct)
