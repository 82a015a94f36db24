"""How long a finished workdir with many images takes to say that nothing is to do.

    python benchmarks/reopen.py --images=200000

Makes such a workdir in the layout of a true one: every stage is opened and finished by
`mvc_jax/stage.py`, the synthetic images are written by `generation/synthetic.py`, as
Parquet shards, as files in a folder for each class and as lists; only their pixels are
made up. Then it times the command, fresh processes one after another, profiles one, and
tells how much of the writing was hashing: an upper limit of its cost, as a run also has
to draw what it writes; `--run_seconds` is what a true one of so many images took.

A workdir that is there already, made by an earlier call, is used as it is.
"""

import argparse
import contextlib
import hashlib
import importlib
import os
import pathlib
import pstats
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files, stage
from mvc_jax.command import run_config
from mvc_jax.data import shards
from mvc_jax.digests import Digests
from mvc_jax.generation import synthetic

CONFIG = "configs/digits.py"
FIELDS = {
    "data.size": 32,
    "generate.sets": ("mixed",),
    "generate.shard_size": 1000,
    "classify.runs": ("real", "combined"),
}
SIDE = 32
CLASSES = tuple(f"class {i}" for i in range(10))
PER_IMAGE = 4
TARGET = 5.0  # seconds, at 200,000 images
_PROFILED = 12  # functions in the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", help="kept; default: a temporary folder")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--model_mib", type=int, default=64, help="of made-up weights")
    parser.add_argument("--run_seconds", type=float, default=0, help="of a true run")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        workdir = epath.Path(folder)
        if stage.is_complete(workdir, "report"):
            print(f"{workdir} is there already: what writing costs is not measured")
        else:
            with timed_hashing() as hashing:
                began = time.perf_counter()
                make(workdir, arguments.images, arguments.model_mib)
                seconds = time.perf_counter() - began
            print(cost(hashing, seconds, arguments.run_seconds))
        print(f"{describe(workdir)}; load of the machine {os.getloadavg()[0]:.2f}\n")
        taken = [start(workdir) for _ in range(arguments.starts)]
        print("| `nothing to do` | seconds |\n|---|---:|")
        print(f"| the first start | {taken[0]:.2f} |")
        print(f"| median of {len(taken)} | {statistics.median(taken):.2f} |")
        print(f"| slowest | {max(taken):.2f} |")
        print(f"\nwanted at 200,000 images: {TARGET:g} s\n")
        print(profile(workdir))


def config() -> ConfigDict:
    found = run_config.load(CONFIG)
    for name, value in FIELDS.items():
        section, field = name.split(".")
        found[section][field] = value
    return found


def command(workdir: epath.Path) -> list[str]:
    """The arguments of the command that finds nothing to do."""
    fields = {
        name: ",".join(value) if isinstance(value, tuple) else value
        for name, value in FIELDS.items()
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["-m", "mvc_jax.train", f"--config={CONFIG}", f"--workdir={workdir}", *flags]


def start(workdir: epath.Path, *options: str) -> float:
    """Seconds of one process; raises if it found something to do."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *options, *command(workdir)], capture_output=True, text=True
    )
    taken = time.perf_counter() - began
    if done.returncode or "nothing to do" not in done.stderr:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return taken


def profile(workdir: epath.Path) -> str:
    """The functions in which one process spent its time, those they call left out."""
    with tempfile.NamedTemporaryFile(suffix=".prof") as file:
        start(workdir, "-m", "cProfile", "-o", file.name)
        stats = pstats.Stats(file.name).stats
    rows = sorted(stats.items(), key=lambda item: -item[1][2])[:_PROFILED]
    total = sum(row[2] for row in stats.values())
    lines = [f"| where the time goes, {total:.2f} s while profiled | calls | seconds |"]
    lines.append("|---|---:|---:|")
    for (path, number, name), (_, calls, own, _, _) in rows:
        place = "" if path == "~" else f" ({pathlib.Path(path).name}:{number})"
        lines.append(f"| `{name}`{place} | {calls:,} | {own:.2f} |")
    return "\n".join(lines)


@contextlib.contextmanager
def timed_hashing() -> Iterator[list[float]]:
    """Adds the seconds and the bytes of every `update` of `hashlib`, in all threads."""
    taken, lock = [0.0, 0], threading.Lock()
    names = ("sha256", "sha1", "md5", "blake2b", "blake2s", "new", "file_digest")
    originals = {name: getattr(hashlib, name) for name in names}

    def add(function, size, *arguments, **options):
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            with lock:
                taken[0] += time.perf_counter() - began
                taken[1] += size

    class Timed:
        def __init__(self, original, *arguments, **options):
            data = arguments[-1] if arguments else b""
            size = 0 if isinstance(data, str) else len(data)
            self._inner = add(original, size, *arguments, **options)

        def update(self, data):
            add(self._inner.update, memoryview(data).nbytes, data)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    def timed(name):
        original = originals[name]
        if name == "file_digest":  # reads the file too
            return lambda *given, **options: add(original, 0, *given, **options)
        return lambda *given, **options: Timed(original, *given, **options)

    try:
        for name in names:
            setattr(hashlib, name, timed(name))
        yield taken
    finally:
        for name, original in originals.items():
            setattr(hashlib, name, original)


def cost(hashing: list[float], seconds: float, run_seconds: float) -> str:
    taken, size = hashing
    text = (
        f"made in {seconds:.1f} s, of which hashing {size / 2**20:,.0f} MiB took "
        f"{taken:.2f} s (of all threads): {100 * taken / seconds:.1f} % of the writing"
    )
    if run_seconds:
        share = 100 * taken / run_seconds
        text += f", {share:.2f} % of a run of {run_seconds:g} s"
    return text


def describe(workdir: epath.Path) -> str:
    count = size = 0
    for folder, _, names in os.walk(workdir):
        count += len(names)
        size += sum(os.path.getsize(os.path.join(folder, name)) for name in names)
    return f"{count:,} files, {size / 2**20:,.0f} MiB"


def make(workdir: epath.Path, images: int, model_mib: int) -> None:
    """Writes a finished workdir with so many synthetic images."""
    made, settings = Made(images), config()
    writers = {
        "caption": made.caption,
        "pretrain": lambda folder: made.model(folder, model_mib),
        "encode": made.encode,
        "pairs": made.pairs,
        "finetune": lambda folder: made.model(folder, model_mib),
        "mix": made.mix,
        "generate": lambda folder: made.generate(folder, opened.digests),
        "classify": made.classify,
        "evaluate": made.evaluate,
        "report": lambda folder: made.texts(
            folder, "report.html", "report.md", "grid.png"
        ),
    }
    for name, write in writers.items():
        began = time.perf_counter()
        spec = importlib.import_module(f"mvc_jax.{name}").stage_spec(settings)
        opened = stage.open_stage(workdir, spec)
        opened.finish(write(opened.folder), images=images)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


class Made:
    """Made-up content; each method writes a stage's files and returns their names."""

    def __init__(self, images: int):
        self._images, self._real = images, max(images // PER_IMAGE, len(CLASSES))
        draw = np.random.default_rng(0)
        self._pixels = draw.integers(0, 256, (64, SIDE, SIDE, 3), np.uint8)
        self._ids = [f"train/{i:06d}.png" for i in range(self._real)]

    def caption(self, folder: epath.Path) -> list[str]:
        pixels = np.resize(self._pixels, (self._real, SIDE, SIDE, 3))
        files.write_array(folder / "images.npy", pixels)
        rows = [
            {"id": id_, "split": "train", "label": i % len(CLASSES), "width": SIDE}
            for i, id_ in enumerate(self._ids)
        ]
        files.write_jsonl(folder / "images.jsonl", rows)
        files.write_json(folder / "splits.json", {"train": self._ids})
        captions = [{"id": id_, "caption": f"a photo {id_}"} for id_ in self._ids]
        files.write_jsonl(folder / "captions.jsonl", captions)
        about = {"class_names": CLASSES, "grey": False, "name": "made up"}
        files.write_json(folder / "dataset.json", about)
        names = ("bad_images.jsonl", "duplicates.jsonl", "contact_sheet.png")
        names = self.texts(folder, *names)
        return [*names, "images.npy", "images.jsonl", "splits.json", "captions.jsonl"]

    def model(self, folder: epath.Path, mib: int) -> list[str]:
        content = np.random.default_rng(1).bytes(mib << 20)
        files.write_bytes(folder / "model" / "unet" / "weights.safetensors", content)
        return ["model/unet/weights.safetensors"]

    def encode(self, folder: epath.Path) -> list[str]:
        written = []
        for name, shape in (("moments", (8, 8, 8)), ("text_states", (16, 64))):
            writer = shards.Writer(
                folder / name, rows=self._real, row_shape=shape, dtype="float32"
            )
            for rows in writer.missing:
                writer.write(rows, np.zeros((len(rows), *shape), np.float32))
            written += writer.names
        rows = [{"id": id_, "prompt": f"a photo {id_}"} for id_ in self._ids]
        files.write_jsonl(folder / "prompts.jsonl", rows)
        return [*written, "prompts.jsonl", *self.texts(folder, "base.json")]

    def pairs(self, folder: epath.Path) -> list[str]:
        files.write_array(folder / "pairs.npy", np.zeros((self._real, 2), np.int32))
        return ["pairs.npy"]

    def mix(self, folder: epath.Path) -> list[str]:
        rows = [self._recipe(k) for k in range(self._images)]
        files.write_jsonl(folder / "recipes.jsonl", rows)
        return ["recipes.jsonl"]

    def generate(self, folder: epath.Path, digests: Digests) -> list[str]:
        written = []
        for name in FIELDS["generate.sets"]:
            store = synthetic.Store(
                folder=folder / name,
                digests=digests,
                class_names=CLASSES,
                model="0123456789abcdef",
                shard_size=FIELDS["generate.shard_size"],
            )
            for part in store.missing(self._images):
                indices = range(part.start, part.stop)
                pixels = [self._pixels[k % len(self._pixels)] for k in indices]
                store.write(part, pixels, [self._provenance(k) for k in indices])
            written += [f"{name}/{file}" for file in store.finish()]
            written += self.texts(folder, f"{name}/README.md")
        return written

    def classify(self, folder: epath.Path) -> list[str]:
        written = []
        for run in FIELDS["classify.runs"]:
            for seed in range(5):
                name = f"models/{run}/seed-{seed}/model.safetensors"
                files.write_bytes(folder / name, bytes(1 << 20))
                written.append(name)
            written += self.texts(folder, f"results/{run}.json")
        return written

    def evaluate(self, folder: epath.Path) -> list[str]:
        row = {"title": "Real only", "accuracy": {"mean": 0.5, "std": 0.0}}
        row["difference"] = None
        metrics = {"runs": [row], "seeds": 5, "steps": 1, "questions": []}
        files.write_json(folder / "metrics.json", metrics)
        return ["metrics.json"]

    def texts(self, folder: epath.Path, *names: str) -> list[str]:
        for name in names:
            files.write_json(folder / name, {"about": "made up"})
        return [*names]

    def _recipe(self, k: int) -> dict:
        source = k % self._real
        return {
            "index": k,
            "source": self._ids[source],
            "partners": [self._ids[(source + len(CLASSES)) % self._real]],
            "label": CLASSES[source % len(CLASSES)],
            "mode": "coarse",
            "positions": [1, 3, 5, 7],
            "donors": [0, 0, 0, 0],
            "dims": [],
            "dim_donors": [],
            "dim_tokens": [1, 1],
            "noise_seed": k,
            "text_scale": 7.5,
            "image_scale": 1.5,
        }

    def _provenance(self, k: int) -> dict:
        recipe = self._recipe(k)
        return {
            **recipe,
            "label": CLASSES.index(recipe["label"]),
            "prompt": f"a photo {recipe['source']}, a photo of {recipe['label']}",
            "seed": 0,
            "redraws": 0,
            "steps": 50,
            "sampler": "ddim",
            "guidance_interval": [0.0, 1.0],
            "guidance_rescale": 0.0,
            "model": "0123456789abcdef",
        }


if __name__ == "__main__":
    main()
