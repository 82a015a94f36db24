"""Throughput of reading images: `gather.read_images` against PyTorch's `DataLoader`.

    python benchmarks/read_images.py --folder=/tmp/photos

Writes JPEG files of 512 px in 10 classes, with the file size of photographs, then reads
all of them in three variants, in turn: as a run does, with fingerprints; without these;
and with `DataLoader(num_workers=2, batch_size=64)` over a dataset that opens, rotates,
converts and resizes with Pillow. Each turn is a new process that imports its modules
and reads a few images before its clock starts; the files are in the system's cache.
"""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps

from mvc_jax.data import decode, duplicates, gather, sources

SIDE = 512  # pixels, of the files
SOURCES = 48  # scenes that the files are crops of
CLASSES = 10
WARM_UP = 64  # images read before the clock starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", help="for the images, kept; default: a temporary one"
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        paths = make(pathlib.Path(folder), arguments.images)
        sizes = [len(path.read_bytes()) for path in paths]  # also fills the cache
        print(
            f"{len(paths)} JPEG files of {SIDE} px, {np.mean(sizes) / 1e3:.0f} kB each"
        )
        print(f"load average of the machine before: {os.getloadavg()[0]:.2f}\n")
        turns = {
            "ours": (read_ours, arguments.threads),
            "ours, without checks": (read_unchecked, arguments.threads),
            "torch": (read_torch, arguments.workers),
        }
        rates = {name: [] for name in turns}
        for _ in range(arguments.rounds):
            for name, (read, *options) in turns.items():
                rate = measure(read, folder, arguments.images, arguments.size, *options)
                rates[name].append(rate)
        print(table(rates))
        print(costs(paths[:: max(len(paths) // 200, 1)], arguments.size))


def make(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Writes the images that do not exist yet."""
    paths = [folder / f"class {i % CLASSES}" / f"{i:05}.jpg" for i in range(count)]
    todo = [(i, path) for i, path in enumerate(paths) if not path.exists()]
    for path in {path.parent for path in paths}:
        path.mkdir(parents=True, exist_ok=True)
    if todo:
        scenes = [scene(seed) for seed in range(SOURCES)]

        def write(item: tuple[int, pathlib.Path]) -> None:
            index, path = item
            rng = np.random.default_rng([1, index])
            left, top = rng.integers(0, SIDE // 2, 2).tolist()
            picture = Image.fromarray(scenes[index % SOURCES])
            picture = picture.crop((left, top, left + SIDE, top + SIDE))
            if rng.random() < 0.5:
                picture = ImageOps.mirror(picture)
            gain = rng.uniform(0.8, 1.1)
            picture = picture.point([min(int(gain * i), 255) for i in range(256)] * 3)
            temporary = path.with_suffix(".part")
            picture.save(temporary, "JPEG", quality=90)
            temporary.rename(path)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(write, todo))
    return paths


def scene(seed: int) -> np.ndarray:
    """Smooth shapes with texture at several scales; uint8 [H, W, 3]."""
    rng = np.random.default_rng([0, seed])
    side = SIDE * 3 // 2
    total = np.full((side, side, 3), 128, np.float32)
    strength = rng.uniform(0.5, 1.2)
    for cells, contrast in ((4, 50), (12, 25), (48, 12), (192, 8 * strength)):
        grid = rng.normal(size=(cells, cells, 4)).astype(np.float32)
        planes = [Image.fromarray(grid[..., i]) for i in range(4)]
        planes = [p.resize((side, side), Image.Resampling.BICUBIC) for p in planes]
        light, *colours = (np.asarray(plane) for plane in planes)
        total += contrast * (light[..., None] + 0.4 * np.stack(colours, -1))
    total += rng.normal(scale=3 * strength, size=(side, side, 1))  # sensor noise
    return np.clip(total, 0, 255).astype(np.uint8)


def measure(read: Callable, *arguments) -> tuple[float, float]:
    """Images per second and processor milliseconds per image, in a new process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_timed, args=(send, read, *arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _timed(send, read: Callable, folder: str, count: int, *options) -> None:
    for _ in read(folder, WARM_UP, *options):
        pass
    start, busy = (
        time.perf_counter(),
        sum(os.times()[:4]),
    )  # workers count once they end
    read_count = sum(read(folder, count, *options))
    seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - busy
    assert read_count == count
    send.send((count / seconds, 1e3 * busy / count))


def read_ours(folder: str, count: int, size: int, threads: int) -> Iterator[int]:
    source = sources.open_source(f"folder:{folder}")
    options = gather.ReaderOptions(size, threads=threads)
    for _, image, info in gather.read_images(source, range(count), options):
        assert image is not None, info
        yield 1


def read_unchecked(folder: str, count: int, size: int, threads: int) -> Iterator[int]:
    """The same work as the `DataLoader`'s; needs a process of its own."""
    gather.fingerprint = lambda image: duplicates.Fingerprint(0, image[:0])
    gather._is_grey = lambda image: False
    yield from read_ours(folder, count, size, threads)


class Files:
    """A typical PyTorch dataset of (uint8 [S, S, 3], label)."""

    def __init__(self, folder: str, count: int, size: int):
        paths = itertools.islice(sorted(pathlib.Path(folder).glob("*/*.jpg")), count)
        self.paths, self.size = list(map(str, paths)), size
        names = sorted({os.path.dirname(path) for path in self.paths})
        self.labels = [names.index(os.path.dirname(path)) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        import torch

        with Image.open(self.paths[index]) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGB")
        picture = picture.resize((self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)), self.labels[index]


def read_torch(folder: str, count: int, size: int, workers: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    files = Files(folder, count, size)
    # The default on Linux, but not in a spawned process.
    settings = {"num_workers": workers, "multiprocessing_context": "fork"}
    for images, _ in DataLoader(files, batch_size=64, **settings):
        yield len(images)


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """A Markdown table of the turns, with ours relative to torch's."""
    rounds = range(1, len(found["torch"]) + 1)
    names = [f"images/s, turn {i}" for i in rounds] + ["mean"]
    names += [f"processor, ms per image, turn {i}" for i in rounds] + ["mean"]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    rows = {name: np.asarray(turns).T for name, turns in found.items()}
    rows = {name: np.c_[row, row.mean(1)] for name, row in rows.items()}
    for name, (rate, busy) in rows.items():
        cells = [f"{x:.0f}" for x in rate] + [f"{x:.2f}" for x in busy]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in [name for name in rows if name != "torch"]:
        ratio = (rows[name] / rows["torch"]).ravel()
        lines.append(f"| {name} / torch | {' | '.join(f'{x:.2f}' for x in ratio)} |")
    return "\n".join(lines)


def costs(paths: list[pathlib.Path], size: int) -> str:
    """A Markdown table of the milliseconds per image of each step, on one thread."""
    contents = [path.read_bytes() for path in paths]
    decoder = decode.Decoder()
    box, method = (size, size), Image.Resampling.LANCZOS

    def opened(content: bytes) -> Image.Image:
        picture = Image.open(io.BytesIO(content))
        picture.load()
        return picture

    pictures = list(map(opened, contents[:50]))
    images = [np.asarray(picture) for picture in pictures]
    fitted = [decode.fit(image, size) for image in images]
    steps = {
        "JPEG -> Pillow": (opened, contents),
        "resize in Pillow": (lambda picture: picture.resize(box, method), pictures),
        "ours: JPEG -> array": (decoder, contents),
        "ours: array -> resized array": (lambda image: decode.fit(image, size), images),
        "ours: check for colour": (gather._is_grey, fitted),
        "ours: fingerprint": (duplicates.fingerprint, fitted),
    }
    lines = ["", "| step, one thread | ms per image |", "|---|---:|"]
    for name, (step, inputs) in steps.items():
        best = min(_seconds(step, inputs) for _ in range(5))
        lines.append(f"| {name} | {1e3 * best / len(inputs):.2f} |")
    return "\n".join(lines)


def seconds_of_pillow(paths: list[pathlib.Path], size: int) -> float:
    """The least that an image takes on a thread: Pillow decodes and resizes it."""
    contents = [path.read_bytes() for path in paths]

    def read(content: bytes) -> None:
        with Image.open(io.BytesIO(content)) as picture:
            picture.resize((size, size), Image.Resampling.LANCZOS)

    return min(_seconds(read, contents) for _ in range(5)) / len(contents)


def _seconds(step: Callable, inputs: list) -> float:
    start = time.perf_counter()
    for item in inputs:
        step(item)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
