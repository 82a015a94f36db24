"""Decodes the images of a run from its source, once and in parallel, into one file."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mvc_jax import files
from mvc_jax.data.decode import BadImage, fit, strict_pillow
from mvc_jax.data.duplicates import Fingerprint, fingerprint
from mvc_jax.data.example import Example, Source
from mvc_jax.data.splits import SPLITS, VALIDATION
from mvc_jax.errors import require_disk_space

_MAX_THREADS = 16  # each holds a full-size image, 200 MB for some cameras
_PREFETCH_BYTES = 64 << 20  # of resized images that wait for the consumer

SplitIndices = dict[str, np.ndarray]  # split name -> ascending indices into a source


@dataclasses.dataclass(frozen=True)
class ReaderOptions:
    """How images are read.

    Attributes:
      size: S, pixels along one side after resizing.
      resize: as for `decode.fit`.
      resample: as for `decode.fit`.
      max_pixels: larger images are not decoded.
      threads: for decoding; 0: two per core, since some wait for the disk, at most 16;
        16 where they wait for a server.
    """

    size: int
    resize: str = "stretch"
    resample: str = "lanczos"
    max_pixels: int = 89_478_485
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """What reading an image reveals, besides its pixels.

    Attributes:
      height: before resizing.
      width: before resizing.
      note: from the decoder.
      grey: whether it has no colour.
      fingerprint: for finding its duplicates.
    """

    height: int
    width: int
    note: str
    grey: bool
    fingerprint: Fingerprint


@dataclasses.dataclass
class Gathered:
    """The images of a run.

    Attributes:
      splits: split name -> indices into the source, without bad images.
      info: index -> what reading it revealed.
      bad: index -> the reason why it cannot be used.
    """

    splits: SplitIndices
    info: dict[int, ImageInfo] = dataclasses.field(default_factory=dict)
    bad: dict[int, str] = dataclasses.field(default_factory=dict)


def read_images(
    source: Source, indices: Sequence[int], options: ReaderOptions
) -> Iterator[tuple[int, np.ndarray | None, ImageInfo | str]]:
    """Decodes and resizes images in parallel, in the order of `indices`.

    grain's threads prefetch for the consumer; Pillow releases the interpreter's lock
    while it decodes and resizes.

    Yields:
      (index, uint8 [S, S, 3], its info), or (index, None, the reason why it cannot be
      used).
    """
    import grain  # takes 3 s, and a complete stage does not need it

    def read(index: int) -> tuple[int, np.ndarray | None, ImageInfo | str]:
        try:
            return index, *_read(source[index], options)
        except BadImage as error:
            return index, None, str(error)

    threads = options.threads or min(2 * (os.cpu_count() or 1), _MAX_THREADS)
    if getattr(source, "is_remote", False) and not options.threads:
        threads = _MAX_THREADS
    # The longer grain's buffer, the more each element costs.
    prefetch = _PREFETCH_BYTES // (3 * options.size**2)
    prefetch = int(np.clip(prefetch, threads, 8 * threads))
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    with strict_pillow(options.max_pixels), _reused_memory(4 * threads):
        yield from grain.MapDataset.source(indices).map(read).to_iter_dataset(reading)


def _read(example: Example, options: ReaderOptions) -> tuple[np.ndarray, ImageInfo]:
    image = example["image"]
    fitted = fit(image, options.size, resize=options.resize, resample=options.resample)
    return fitted, ImageInfo(
        height=image.shape[0],
        width=image.shape[1],
        note=example.get("note", ""),
        grey=_is_grey(fitted),
        fingerprint=fingerprint(fitted),
    )


def _is_grey(image: np.ndarray) -> bool:
    red, green, blue = np.moveaxis(image, -1, 0)
    return np.array_equal(red, green) and np.array_equal(red, blue)


@contextlib.contextmanager
def _reused_memory(blocks: int) -> Iterator[None]:
    """Makes Pillow reuse freed blocks of memory, each of at most 16 MB.

    Allocating them for each image costs a tenth of the time or more. The setting is
    global to the process.
    """
    before = Image.core.get_blocks_max()
    Image.core.set_blocks_max(max(before, blocks))
    try:
        yield
    finally:
        Image.core.set_blocks_max(before)


def gather(
    source: Source,
    path: epath.PathLike,
    split: Callable[[np.ndarray, np.ndarray], SplitIndices],
    options: ReaderOptions,
    *,
    on_bad: Callable[[dict[int, str]], None],
    copies: Callable[[Gathered], Iterable[int]],
    on_image: Callable[[int], None] = lambda total: None,
) -> Gathered:
    """Reads the images that `split` selects and writes them to `path`.

    Bad images and copies are left out and `split` is called again without them, so that
    a class still gets the requested number of training images.

    Args:
      source: of the images.
      path: of the `.npy` file to write, uint8 [N, S, S, 3], in the order of `SPLITS`,
        then `VALIDATION`.
      split: usable and copies, bool [N] -> split name -> ascending indices into the
        source.
      options: how images are read.
      on_bad: called with the bad images, index -> reason, after each pass; may raise.
      copies: returns which images must not be in pool or train, after each pass.
      on_image: called after each image with how many there are to read; they become
        more where others take the places of some.

    Raises:
      UserError: there is too little free disk space.
    """
    path = epath.Path(path)
    usable, copied = np.ones(len(source), bool), np.zeros(len(source), bool)
    result = Gathered(split(usable, copied))
    todo = _in_order(result.splits)
    expected = list(range(len(todo)))
    require_disk_space(
        path.parent,
        3 * len(todo) * options.size**2,
        what=f"{len(todo)} images of {options.size}x{options.size} pixels",
        fix="Free some, or lower config.data.size, per_class or fraction.",
    )
    rows: dict[int, int] = {}  # index -> row of the temporary file
    with files.replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(files.image_array_header(len(todo), options.size))
            total = 0
            while todo:
                total += len(todo)
                for index, image, info in read_images(source, todo, options):
                    if image is None:
                        result.bad[index], usable[index] = info, False
                    else:
                        file.write(image.tobytes())
                        result.info[index], rows[index] = info, len(rows)
                    on_image(total)
                on_bad(result.bad)
                result.splits = split(usable, copied) if result.bad else result.splits
                todo = [i for i in _in_order(result.splits) if i not in rows]
                if not todo and (found := list(copies(result))):
                    copied[found] = True
                    result.splits = split(usable, copied)
                    todo = [i for i in _in_order(result.splits) if i not in rows]
        final = [rows[i] for i in _in_order(result.splits)]
        if final != expected:
            _rewrite(temporary, final, options.size)
    return result


def write_rows(
    folder: epath.PathLike,
    source: Source,
    gathered: Gathered,
    *,
    groups: Sequence[str] | None = None,
    **facts: Any,
) -> None:
    """Writes the files that `splits.read_split` reads besides the images.

    Args:
      folder: of the stage.
      source: of the images.
      gathered: the images that were kept.
      groups: of every image of the source; None: they have none.
      **facts: further entries of `dataset.json`.
    """
    folder = epath.Path(folder)
    rows, ids = [], {}
    for name in _names(gathered.splits):
        ids[name] = [source.ids[i] for i in gathered.splits[name]]
        for i in gathered.splits[name].tolist():
            info = gathered.info[i]
            row = {
                "id": source.ids[i],
                "split": name,
                "label": int(source.labels[i]),
                "height": info.height,
                "width": info.width,
                "note": info.note,
            }
            rows.append(row if groups is None else row | {"group": groups[i]})
    grey = all(gathered.info[i].grey for i in _in_order(gathered.splits))
    dataset = {"class_names": list(source.class_names), "grey": grey, **facts}
    files.write_jsonl(folder / "images.jsonl", rows)
    files.write_json(folder / "splits.json", ids)
    files.write_json(folder / "dataset.json", dataset)


def _names(splits: SplitIndices) -> list[str]:
    return [name for name in (*SPLITS, VALIDATION) if name in splits]


def _in_order(splits: SplitIndices) -> list[int]:
    return [int(i) for name in _names(splits) for i in splits[name]]


def _rewrite(path: epath.Path, order: list[int], size: int) -> None:
    """Selects and reorders the rows of a `.npy` file, whose header is not final."""
    header = len(files.image_array_header(0, size))
    rows = np.memmap(files.local(path), np.uint8, mode="r", offset=header)
    rows = rows.reshape(-1, size, size, 3)
    with files.replacing(path) as sorted_, sorted_.open("wb") as file:
        file.write(files.image_array_header(len(order), size))
        for row in order:
            file.write(rows[row].tobytes())
