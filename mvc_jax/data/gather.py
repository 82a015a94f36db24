"""A source -> the images of a run: each decoded once, in parallel, and kept on disk."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mvc_jax import files
from mvc_jax.data.decode import BadImage, fit, strict_pillow
from mvc_jax.data.duplicates import Fingerprint, fingerprint
from mvc_jax.data.example import Example, Source
from mvc_jax.data.splits import SPLITS
from mvc_jax.errors import require_disk_space

_MOST_THREADS = 16  # each holds an image at its own size, 200 MB for some cameras
_AHEAD_BYTES = 64 << 20  # of images that wait for the consumer

Parts = dict[str, np.ndarray]  # split name -> ascending indices into a source


@dataclasses.dataclass(frozen=True)
class Reader:
    """How images are read.

    Attributes:
      size: pixels along a side of what comes out.
      resize: as for `decode.fit`.
      resample: likewise.
      max_pixels: no image of more is decoded.
      threads: that decode; 0: two a core, since some wait for the disk, up to 16.
    """

    size: int
    resize: str = "stretch"
    resample: str = "lanczos"
    max_pixels: int = 89_478_485
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class Read:
    """What is known of an image once it was read, without its pixels.

    Attributes:
      height: at the source.
      width: at the source.
      note: of the decoder.
      grey: without colour.
      fingerprint: to find its copies.
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
      parts: split name -> indices into the source; none of them is bad.
      found: index -> what was read.
      bad: index -> the reason why it cannot be used.
    """

    parts: Parts
    found: dict[int, Read] = dataclasses.field(default_factory=dict)
    bad: dict[int, str] = dataclasses.field(default_factory=dict)


def read_images(
    source: Source, indices: Sequence[int], reader: Reader
) -> Iterator[tuple[int, np.ndarray | None, Read | str]]:
    """Decodes and resizes in parallel, in the order of `indices`.

    grain's threads work ahead of the consumer; Pillow decodes and resizes without the
    interpreter's lock.

    Yields:
      (index, uint8 [S, S, 3], what is known of it), or (index, None, the reason why it
      cannot be used).
    """
    import grain  # takes 3 s, and a finished stage needs none

    def read(index: int) -> tuple[int, np.ndarray | None, Read | str]:
        try:
            return index, *_read(source[index], reader)
        except BadImage as error:
            return index, None, str(error)

    threads = reader.threads or min(2 * (os.cpu_count() or 1), _MOST_THREADS)
    # The longer grain's buffer, the more each element costs.
    ahead = _AHEAD_BYTES // (3 * reader.size**2)
    ahead = int(np.clip(ahead, threads, 8 * threads))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    with strict_pillow(reader.max_pixels), _reused_memory(4 * threads):
        yield from grain.MapDataset.source(indices).map(read).to_iter_dataset(options)


def _read(example: Example, reader: Reader) -> tuple[np.ndarray, Read]:
    image = example["image"]
    fitted = fit(image, reader.size, resize=reader.resize, resample=reader.resample)
    return fitted, Read(
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
    """Inside, Pillow keeps blocks of memory, of at most 16 MB, for its next image.

    To get it from the system anew for each image costs a tenth or more. The setting
    is global to the process.
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
    choose: Callable[[np.ndarray], Parts],
    reader: Reader,
    *,
    on_bad: Callable[[dict[int, str]], None],
    keep: Callable[[Gathered], Parts],
    on_image: Callable[[], None] = lambda: None,
) -> Gathered:
    """Reads the images that `choose` chooses and writes them to `path`.

    A bad image is left out and the choice made again without it, so that a class still
    gets as many training images as were asked for.

    Args:
      source: of the images.
      path: gets a `.npy` file, uint8 [N, S, S, 3], in the order of `SPLITS`.
      choose: usable, bool [N] -> split name -> ascending indices into the source.
      reader: how images are read.
      on_bad: told of the bad images, index -> reason, once all were tried; may raise.
      keep: looks at all that was read and returns the parts to keep of it; may raise.
      on_image: called after each image.

    Raises:
      UserError: the disk has no room for them.
    """
    path = epath.Path(path)
    usable = np.ones(len(source), bool)
    result = Gathered(choose(usable))
    todo = _in_order(result.parts)
    expected = list(range(len(todo)))
    _require_room(path.parent, len(todo), reader.size)
    rows: dict[int, int] = {}  # index -> row of the temporary file
    with files.replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(files.image_array_header(len(todo), reader.size))
            while todo:
                for index, image, found in read_images(source, todo, reader):
                    if image is None:
                        result.bad[index], usable[index] = found, False
                    else:
                        file.write(image.tobytes())
                        result.found[index], rows[index] = found, len(rows)
                    on_image()
                on_bad(result.bad)
                result.parts = choose(usable) if result.bad else result.parts
                todo = [i for i in _in_order(result.parts) if i not in rows]
        result.parts = keep(result)
        final = [rows[i] for i in _in_order(result.parts)]
        if final != expected:
            _rewrite(temporary, final, reader.size)
    return result


def write_rows(
    folder: epath.PathLike, source: Source, gathered: Gathered, **facts: Any
) -> None:
    """Writes what `splits.read_split` reads beside the images.

    Args:
      folder: of the stage.
      source: of the images.
      gathered: what was kept of it.
      **facts: more for `dataset.json`.
    """
    folder = epath.Path(folder)
    rows, ids = [], {}
    for name in SPLITS:
        ids[name] = [source.ids[i] for i in gathered.parts[name]]
        for i in gathered.parts[name].tolist():
            found = gathered.found[i]
            row = {"id": source.ids[i], "split": name, "label": int(source.labels[i])}
            row |= {"height": found.height, "width": found.width, "note": found.note}
            rows.append(row)
    grey = all(gathered.found[i].grey for i in _in_order(gathered.parts))
    dataset = {"class_names": list(source.class_names), "grey": grey, **facts}
    files.write_jsonl(folder / "images.jsonl", rows)
    files.write_json(folder / "splits.json", ids)
    files.write_json(folder / "dataset.json", dataset)


def _in_order(parts: Parts) -> list[int]:
    return [int(i) for name in SPLITS for i in parts[name]]


def _rewrite(path: epath.Path, order: list[int], size: int) -> None:
    """Puts the rows of a `.npy` file into another order, with a header that fits."""
    shape = (-1, size, size, 3)
    if "://" in str(path):
        rows = np.frombuffer(
            path.read_bytes(), np.uint8, offset=len(files.image_array_header(0, size))
        )
    else:
        rows = np.memmap(
            path, np.uint8, mode="r", offset=len(files.image_array_header(0, size))
        )
    rows = rows.reshape(shape)
    with files.replacing(path) as sorted_, sorted_.open("wb") as file:
        file.write(files.image_array_header(len(order), size))
        for row in order:
            file.write(rows[row].tobytes())


def _require_room(folder: epath.Path, count: int, size: int) -> None:
    require_disk_space(
        folder,
        3 * count * size * size,
        what=f"{count} images of {size}x{size} pixels",
        fix="Free some, or lower config.data.size, per_class or fraction.",
    )
