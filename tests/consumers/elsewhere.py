"""What programs outside of the lock read, run by `benchmarks/consumers.sh`.

pytest does not collect this file by itself. `CONSUMERS` is a folder of environments:
`now` has today's versions, `before` an earlier major version of `datasets`. Each test
adds rows to the table in the file `CONSUMERS_TABLE`.
"""

import json
import os
import pathlib
import subprocess
import sys

import awkward
import jax.numpy as jnp
import numpy as np
import pytest
import readers
import test_classifier_weights as classifiers
import test_export
import texts
from PIL import Image
from test_classifier_parity import random_variables
from test_export import family, folders  # noqa: F401, fixtures
from test_readers import BY_CARD, EXCHANGE, IN_LOCK, work  # noqa: F401, a fixture

from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.data import decode
from mvc_jax.data.sources import open_source
from mvc_jax.models.classifiers import VARIANTS
from mvc_jax.training.metrics import MetricsLog

HERE = pathlib.Path(__file__).parent
OUTSIDE = ("torchvision", "timm", "DuckDB", "pandas", "metadata.jsonl")
WHAT = {
    "datasets": "`load_dataset(folder)`",
    "imagefolder": '`load_dataset("imagefolder")`',
    "torchvision": "`ImageFolder`, joined by names",
    "timm": "`ImageDataset`, joined by names",
    "Keras": "`image_dataset_from_directory`",
    "TFDS": "`tfds.ImageFolder`",
    "pandas": "`read_parquet`",
    "metadata.jsonl": "`read_json` of `metadata.jsonl`",
    "DuckDB": "`select` from the Parquet files",
}


def python(environment: str) -> str:
    if environment == "lock":
        return sys.executable
    return os.path.join(os.environ["CONSUMERS"], environment, "bin", "python")


def table_row(*cells: str) -> None:
    with open(os.environ["CONSUMERS_TABLE"], "a", encoding="utf-8") as file:
        file.write("| " + " | ".join(cells) + " |\n")


def run(environment: str, script: str, *arguments: str, cwd=None) -> str:
    command = [python(environment), str(HERE / script), *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "document", "programs"),
    [
        ("now", "exchange.md", ("datasets", "imagefolder", *OUTSIDE)),
        ("now", "card", BY_CARD),
        ("before", "exchange.md", ("datasets", "imagefolder")),
        ("before", "card", ("datasets", "imagefolder")),
        ("lock", "exchange.md", IN_LOCK),
        ("lock", "card", ("datasets", "imagefolder")),
    ],
)
def test_images(work, environment, document, programs):  # noqa: F811
    card = work / "runs" / "parts3" / "generate" / "mixed" / "README.md"
    path = EXCHANGE if document == "exchange.md" else card
    lines = run(environment, "readers.py", f"{path}={','.join(programs)}", cwd=work)
    for found in map(json.loads, lines.splitlines()):
        assert "error" not in found, found
        name = found["program"]
        equal, count = awkward.equal(name, found["rows"]), len(awkward.IMAGES)
        package = readers.PROGRAMS[name].package
        said = "classes, numbers" if name != "metadata.jsonl" else "classes"
        table_row(
            package,
            found["version"],
            f"{WHAT[name]}, {document}",
            f"{equal} of {count} images: pixels, {said}",
        )
        assert equal == count == len(found["rows"])


def test_images_that_datasets_writes(work, tmp_path):  # noqa: F811
    """Its Parquet of our set, by its own writer, as our source."""
    script = (
        "import sys, datasets\n"
        "found = datasets.load_dataset(sys.argv[1])['train']\n"
        "found.to_parquet(sys.argv[2]); print(datasets.__version__)"
    )
    folder = work / "runs" / "parts3" / "generate" / "mixed"
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [python("now"), "-c", script, folder, tmp_path / "x.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    source = open_source(f"parquet:{tmp_path}/x.parquet")
    expected = awkward.expected("datasets")
    found = [source[k] for k in range(len(source))]
    keys = [(x["label"], readers.digest(x["image"])) for x in found]
    equal = sum((n, d) in keys for _, n, d in expected.values())
    assert source.class_names == awkward.CLASSES and equal == len(found)
    table_row(
        "datasets",
        done.stdout.split()[-1],
        "`to_parquet`, read here by `data.source=parquet:`",
        f"{equal} of {len(expected)} images: pixels, numbers; all class names",
    )


@pytest.mark.parametrize("sizes", [(64, 64), (96, 64)], ids=str)
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_a_classifier_in_timm(tmp_path, resize, sizes):
    """The card's lines; a ResNet-18 with random weights, a smooth image of 90 x 130."""
    data_size, size = sizes
    model = VARIANTS["resnet18"].make(3)
    variables = random_variables(model)
    classifiers.export(
        tmp_path, model, "resnet18", variables, size=size, resize=resize,
        data_size=data_size,
    )  # fmt: skip
    small = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    image = Image.fromarray(small).resize((130, 90), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    pixels = decode.fit(np.asarray(image), data_size, resize=resize)
    pixels = decode.fit(pixels, size, resample="area")
    mean, std = map(np.float32, (classifiers.MEAN, classifiers.STD))
    wanted = (pixels / np.float32(255) - mean) / std
    ours = np.asarray(model.apply(variables, jnp.asarray(wanted[None])))
    run("now", "models.py", "classifier", tmp_path, tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    assert tuple(found["names"]) == classifiers.CLASSES
    exact = np.abs(found["exact_input"][0] - wanted.transpose(2, 0, 1)).max()
    logits = np.abs(found["exact_logits"] - ours).max() / np.abs(ours).max()
    theirs = found["input"][0].transpose(1, 2, 0) * std + mean
    off = np.abs(theirs * 255 - pixels)
    in_timm = np.abs(found["logits"] - ours).max() / np.abs(ours).max()
    table_row(
        "timm",
        str(found["version"]).split()[-1],
        f"a classifier, `data.resize={resize}`, {data_size} to {size} pixels",
        f"its transform: pixels off by {off.mean():.2f} of 255 on average, logits by "
        f"{in_timm:.1e}; the card's exact lines: by {exact:.0f} and {logits:.0e}",
    )
    assert exact == 0 and logits < 1e-5
    np.testing.assert_allclose(found["probabilities"].sum(), 1, rtol=1e-5)
    if resize == "stretch" and data_size == size:
        assert off.max() < 1e-3


def test_a_pipeline_in_pytorch(family, folders):  # noqa: F811
    noise, source = test_export.start()
    options = {
        "prompt": test_export.PROMPT,
        "num_inference_steps": test_export.STEPS,
        "guidance_scale": test_export.TEXT_SCALE,
        "image_guidance_scale": test_export.IMAGE_SCALE,
    }
    np.savez(
        folders / "start.npz", noise=noise, source=source, options=json.dumps(options)
    )
    run("now", "models.py", "pipeline", folders, folders / "x.npz")
    found = np.load(folders / "x.npz")
    model, params = diffusers_layout.load(folders / "merged")
    ours = test_export.draw(model, params)
    same = (found["ids"] == model.tokenize(list(texts.TEXTS))).all(1).sum()
    name = "v-prediction" if model.prediction_type != "epsilon" else "epsilon"
    for what in ("merged", "adapters"):
        off = np.abs(found[what] - ours).max()
        table_row(
            "PyTorch",
            str(found["version"]),
            f"a pipeline ({name}), {what}, 5 steps of DDIM",
            f"the image, to {off:.0e}",
        )
        assert off < 1e-4
    table_row(
        "PyTorch",
        str(found["version"]),
        "its tokenizer",
        f"ids of {same} of {len(texts.TEXTS)} texts (emoji, CJK, special tokens)",
    )
    assert same == len(texts.TEXTS)


def test_curves_in_tensorboard(tmp_path):
    """A run that resumed from step 60, having written 80."""
    folder = tmp_path / "tensorboard" / "toy"
    for first, steps in ((0, (20, 40, 60, 80)), (60, (80, 100))):
        log = MetricsLog(tmp_path, "toy", from_step=first)
        for step in steps:
            log.write(step, loss=float(step + first))
        log.close()
        (newest, *_) = sorted(folder.iterdir(), key=lambda x: x.stat().st_mtime)[::-1]
        newest.rename(folder / f"events.out.tfevents.{first:03d}")  # else one second's
    run("now", "models.py", "scalars", folder, tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    wanted = [(20, 20), (40, 40), (60, 60), (80, 140), (100, 160)]
    assert found["shown"].tolist() == [list(map(float, x)) for x in wanted]
    table_row(
        "TensorBoard",
        str(found["version"]).split()[-1],
        "the curve of a run that resumed from step 60",
        "all 5 points",
    )
