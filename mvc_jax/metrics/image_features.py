"""The features of a set of images on disk, computed once and in one pass over them.

A set is a folder of arrays for every `CHUNK` images: `pixels-00000.npy`, uint8 pixels
at most 32 a side; `features-00000.npy`, float32 features of a network, where there is
one; and, written last, `statistics-00000.npy`. So an interrupted run goes on with the
next chunk, and many processes share chunks out; memory holds a few dozen images, and
the features of a chunk.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from mvc_jax import files, processes
from mvc_jax.data.decode import fit
from mvc_jax.metrics.distances import MAX_SIZE, pixel_points
from mvc_jax.metrics.domain_shift import ImageStatistics
from mvc_jax.metrics.points import Points

CHUNK = 4096  # images
_AT_ONCE = 64  # that are in memory
Images = Callable[[int], Iterator[UInt8[np.ndarray, "S S 3"]]]
Embed = Callable[[Sequence[np.ndarray]], Float[np.ndarray, "b P"]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images that are read one after another.

    Attributes:
      name: of the set.
      labels: class indices [N].
      images: start -> the images from there on, all of one size.
      sources: of synthetic images, rows of the training images that they were made of,
        -1 where it is unknown; None for real images.
      prompts: of the images; (): unknown.
      names: ids of real images, or indices of synthetic ones.
    """

    name: str
    labels: Int[np.ndarray, " N"]
    images: Images
    sources: Int[np.ndarray, " N"] | None = None
    prompts: Sequence[str] = ()
    names: Sequence[str | int] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """What is known of the images of a set.

    Attributes:
      images: the set.
      pixels: for comparing pixels.
      features: in the chosen space, which may be that of pixels.
      statistics: colours and frequencies.
      constant: number of images of a single colour.
    """

    images: ImageSet
    pixels: Points
    features: Points
    statistics: ImageStatistics
    constant: int


def extract(
    sets: Sequence[ImageSet],
    folder: epath.Path,
    *,
    size: int,
    embed: Embed | None,
    advance: Callable[[int], None],
) -> list[ImageFeatures]:
    """Computes what is not in `folder` yet, shared out among the processes.

    Args:
      sets: of images.
      folder: that has a folder for each set.
      size: S, pixels along a side.
      embed: computes features; None: they are the pixels.
      advance: called with the number of images that were just read by this process, and
        in the first one with the number of those that were there.
    """
    chunks = [(x, start) for x in sets for start in range(0, len(x), CHUNK)]

    def find_missing() -> list[int]:
        paths = [_path(folder / x.name, "statistics", start) for x, start in chunks]
        return [i for i, path in enumerate(paths) if not path.exists()]

    missing = processes.on_first("the features that are missing", find_missing)
    counts = [min(CHUNK, len(x) - start) for x, start in chunks]
    if processes.is_first():
        advance(sum(counts) - sum(counts[i] for i in missing))
    mine = processes.share(missing, [counts[i] for i in missing])
    rest: Iterator | None = None
    for i in mine:
        images, start = chunks[i]
        if rest is None or not start or i - 1 not in mine:
            rest = images.images(start)
        some = itertools.islice(rest, counts[i])
        _write_chunk(folder / images.name, start, some, embed, advance)
    processes.barrier("the features", processes.WORK_SECONDS)
    return [_read(x, folder / x.name, size, embed is not None) for x in sets]


def _read(
    images: ImageSet, folder: epath.Path, size: int, embedded: bool
) -> ImageFeatures:
    """The features of a set, all of whose chunks are there."""
    statistics, constant = ImageStatistics(size), 0
    for start in range(0, len(images), CHUNK):
        state = files.read_array(_path(folder, "statistics", start))
        chunk = ImageStatistics(size)
        chunk.images, constant = int(state[0]), constant + int(state[1])
        chunk.histograms = state[2 : 2 + 768].reshape(3, 256).astype(np.int64)
        chunk.spectrum = state[2 + 768 :]
        statistics.merge(chunk)
    pixels = pixel_points(_Chunks(folder, "pixels", len(images)))
    features = pixels
    if embedded:
        features = Points(_Chunks(folder, "features", len(images)))
    return ImageFeatures(images, pixels, features, statistics, constant)


def _write_chunk(
    folder: epath.Path,
    start: int,
    images: Iterator[np.ndarray],
    embed: Embed | None,
    advance: Callable[[int], None],
) -> None:
    statistics: ImageStatistics | None = None
    pixels, features = [], []
    while some := list(itertools.islice(images, _AT_ONCE)):
        size = some[0].shape[0]
        statistics = statistics or ImageStatistics(size)
        statistics.add(some)
        side = min(size, MAX_SIZE)
        pixels += [fit(x, side, resample="area").reshape(-1) for x in some]
        if embed is not None:
            features.append(embed(some))
        advance(len(some))
    small = np.stack(pixels)
    files.write_array(_path(folder, "pixels", start), small)
    if features:
        files.write_array(_path(folder, "features", start), np.concatenate(features))
    constant = int((small.max(1) == small.min(1)).sum())
    head = [statistics.images, constant]
    state = [head, statistics.histograms.reshape(-1), statistics.spectrum]
    files.write_array(_path(folder, "statistics", start), np.concatenate(state))


def _path(folder: epath.Path, kind: str, start: int) -> epath.Path:
    return folder / f"{kind}-{start // CHUNK:05d}.npy"


class _Chunks:
    """The rows of all chunks, mapped; the protocol `Stored` of `points.py`."""

    def __init__(self, folder: epath.Path, kind: str, count: int):
        paths = [_path(folder, kind, start) for start in range(0, count, CHUNK)]
        self._arrays = [files.map_array(path) for path in paths]
        self.shape = (count, self._arrays[0].shape[1])
        self.dtype = self._arrays[0].dtype

    def take(self, indices: np.ndarray) -> np.ndarray:
        rows = np.empty((len(indices), self.shape[1]), self.dtype)
        chunk, offset = np.divmod(indices, CHUNK)
        for number in np.unique(chunk).tolist():
            here = chunk == number
            rows[here] = self._arrays[number][offset[here]]
        return rows
