"""Runs every documented value of every field through all stages, to the report.

    python benchmarks/every_value.py --folder=runs/every-value

Four runs of all stages on images that it makes (54 of three classes, with the parts
train, val and test), at the smallest sizes and a few steps, so that each value of a
field with choices, each regime, set and augmentation policy is in one of them. It
prints a row for each run: how it ended, and how long it took. Networks of classifiers
have a run each with `--networks`, at 32 pixels and of one step; those after the first
take the stages before from it.

`tests/test_fields.py` checks that no value of `configs/common.py` is missing here.
"""

import argparse
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image

CLASSES = ("bolt", "hex nut", "washer")
SMALL = (
    "data.size=16",
    "data.class_type=part",
    "data.pool=18",
    "data.per_class=6",
    "pretrain.judge.steps=2",
    "pretrain.judge.samples=4",
    "pretrain.vae.steps=2",
    "pretrain.unet.steps=2",
    "pretrain.unet.warmup=1",
    "pretrain.image_encoder.steps=2",
    "pretrain.controlnet.steps=2",
    "finetune.steps=2",
    "mix.tokens=2",
    "mix.dims=2",
    "mix.per_image=2",
    "generate.steps=10",
    "generate.batch_size=12",
    "classify.width=8",
    "classify.stem_stride=2",
    "classify.seeds=1",
    "classify.steps=2",
)
_SETS = (
    "mixed,unmixed,pretrained,caption_only,noised,interpolated,image_embedding,"
    "image_number,embedding_difference,controlnet,real_guidance,gif_sd,"
    "da_fusion,diff_mix"
)
_METRICS = "frechet,kid,cmmd,prdc,vendi,text,shift,classes"
_XL = {  # which has no companions
    "pretrain.family": "sdxl",
    "pretrain.image_encoder.steps": "0",
    "pretrain.controlnet.steps": "0",
}
# The fields of each run; FOLDER is that of the images.
RUNS: dict[str, dict[str, str]] = {
    "a": {
        "data.validation": "join",
        "data.resize": "stretch",
        "data.resample": "lanczos",
        "data.frames": "refuse",
        "data.on_bad_image": "skip",
        "data.duplicates": "keep",
        "caption.captioner": "file",
        "caption.file": "FOLDER/images.jsonl",
        "caption.dtype": "auto",
        "caption.attributes": "strokes",
        "pretrain.pool.captioner": "",
        "pretrain.pool.attributes": "strokes",
        "encode.dtype": "float32",
        "finetune.mode": "full",
        "finetune.schedule": "constant",
        "finetune.dtype": "auto",
        "finetune.attention": "auto",
        "finetune.remat": "none",
        "mix.modes": "coarse,fine",
        "mix.positions": "caption",
        "mix.partner": "class",
        "mix.partner_prompt": "auto",
        "mix.dims_on": "all",
        "pretrain.family": "sd",
        "mix.pooled": "source",
        "generate.sets": _SETS,
        "generate.sampler": "ddim",
        "generate.timestep_spacing": "auto",
        "generate.dtype": "auto",
        "generate.attention": "auto",
        "generate.format": "png",
        "generate.filter.label": "",
        "generate.filter.copies": "",
        "generate.filter.features": "auto",
        "classify.model": "resnet8",
        "classify.stem": "",
        "classify.optimizer": "adam",
        "classify.schedule": "cosine",
        "classify.class_weights": "none",
        "classify.dtype": "auto",
        "classify.runs": "real,combined,two_phase,probabilistic,synthetic_only,"
        "replace_same_source,replace_same_class,replace_any,combined:unmixed",
        "evaluate.features": "pixels",
        "evaluate.metrics": _METRICS,
    },
    "b": {
        "data.validation": "keep",
        "data.resize": "crop",
        "data.resample": "area",
        "data.frames": "each",
        "data.on_bad_image": "skip",
        "data.duplicates": "remove",
        "caption.captioner": "file",
        "caption.file": "FOLDER/images.jsonl",
        "caption.dtype": "float32",
        "pretrain.source": "folder:FOLDER/whole",
        "pretrain.pool.captioner": "file",
        "pretrain.pool.duplicates": "refuse",
        "pretrain.pool.file": "FOLDER/whole.jsonl",
        "pretrain.pool.attributes": "photo",
        "encode.dtype": "float16",
        "finetune.mode": "lora",
        "finetune.schedule": "cosine",
        "finetune.dtype": "float32",
        "finetune.attention": "xla",
        "finetune.remat": "blocks",
        "mix.modes": "both",
        "mix.positions": "first",
        "mix.partner": "any",
        "mix.partner_prompt": "other",
        "mix.dims_on": "words",
        **_XL,
        "mix.pooled": "mixed",
        "generate.sampler": "euler",
        "generate.timestep_spacing": "trailing",
        "generate.dtype": "float32",
        "generate.attention": "xla",
        "generate.format": "jpeg",
        "generate.filter.label": "folds",
        "generate.filter.copies": "any",
        "generate.filter.features": "pixels",
        "classify.model": "resnet8",
        "classify.stem": "cifar",
        "classify.optimizer": "sgd",
        "classify.schedule": "constant",
        "classify.class_weights": "balanced",
        "classify.dtype": "float32",
        "classify.runs": "real+flip,real+flip_crop,real+affine,real+cutout,"
        "combined+randaugment,combined+mixup",
    },
    "c": {
        "data.resize": "pad",
        "data.on_bad_image": "skip",
        "caption.captioner": "attributes",
        "caption.dtype": "bfloat16",
        "caption.attributes": "photo",
        "pretrain.source": "folder:FOLDER/whole",
        "pretrain.pool.captioner": "attributes",
        "pretrain.pool.attributes": "scan",
        "pretrain.pool.duplicates": "remove",
        "finetune.dtype": "bfloat16",
        "finetune.attention": "mapped",
        "finetune.remat": "full",
        "mix.modes": "coarse,both",
        "mix.positions": "span",
        "mix.partner_prompt": "any",
        **_XL,
        "mix.pooled": "partner",
        "generate.sampler": "dpmpp_2m",
        "generate.timestep_spacing": "linspace",
        "generate.dtype": "bfloat16",
        "generate.attention": "mapped",
        "generate.filter.copies": "source",
        "classify.model": "resnet8",
        "classify.stem": "imagenet",
        "classify.stem_stride": "1",
        "classify.schedule": "multistep",
        "classify.dtype": "bfloat16",
        "classify.runs": "real,combined+trivialaugment,combined+autoaugment_cifar10,"
        "combined+autoaugment_svhn,combined+cutmix",
    },
    "d": {
        "data.on_bad_image": "fail",
        "caption.captioner": "template",
        "caption.dtype": "int8",
        "caption.attributes": "scan",
        "pretrain.source": "folder:FOLDER/whole",
        "pretrain.pool.captioner": "template",
        "pretrain.pool.attributes": "",
        "pretrain.pool.duplicates": "remove",
        "mix.modes": "fine",
        "mix.positions": "all",
        "generate.timestep_spacing": "leading",
        "classify.model": "resnet8",
        "classify.runs": "real,combined+autoaugment_imagenet,"
        "combined+fast_autoaugment_cifar10,combined+fast_autoaugment_cifar100",
    },
}
_TRACKERS = "benchmarks/trackers.sh"
_WEIGHTS = "weights of other people, which the tests of their files make"
_DEVICE = "another device, on which benchmarks/accelerator.sh runs it"
# Values that cannot run here, and why.
NOT_HERE: dict[str, dict[str, str]] = {
    "track": dict.fromkeys(("tensorboard", "wandb", "mlflow"), _TRACKERS),
    "caption.captioner": {"blip2": _WEIGHTS, "flax": _WEIGHTS},
    "pretrain.pool.captioner": {"blip2": _WEIGHTS, "flax": _WEIGHTS},
    "finetune.attention": {"cudnn": _DEVICE, "pallas": _DEVICE},
    "generate.attention": {"cudnn": _DEVICE, "pallas": _DEVICE},
    "generate.filter.label": {"clip": _WEIGHTS},
    "generate.filter.features": {"clip": _WEIGHTS},
    "evaluate.features": dict.fromkeys(("clip", "dinov2", "inception"), _WEIGHTS),
}
# Fields whose values are networks, `NOT_HERE` apart: the first by `--networks`, the
# second with the weights of one of them.
NETWORKS = ("classify.model", "evaluate.features")


def fields() -> set[str]:
    """The fields that some run sets."""
    return {field for run in RUNS.values() for field in run}


def values(field: str) -> set[str]:
    """The values of a field that the runs have."""
    given = [run[field] for run in RUNS.values() if field in run]
    return {part for value in given for part in (value, *value.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--runs", default=",".join(RUNS), help="some of them")
    parser.add_argument("--networks", default="", help="of classifiers, one step each")
    arguments = parser.parse_args()
    draw(arguments.folder / "whole", damaged=False)
    draw(arguments.folder / "images", damaged=True)
    ended = [
        run(arguments.folder, name) for name in filter(None, arguments.runs.split(","))
    ]
    networks = [name for name in arguments.networks.split(",") if name]
    for network in networks:
        first = arguments.folder / f"run-{networks[0]}"
        flags = [] if network == networks[0] else [f"--from={first}"]
        ended.append(run(arguments.folder, network, *flags))
    sys.exit(0 if all(ended) else 1)


def draw(folder: pathlib.Path, *, damaged: bool) -> None:
    """Makes images, of two shapes, two of them equal, and a file of their captions."""
    rng = np.random.default_rng(0)
    captions = []
    for part, count in {"train": 12, "val": 2, "test": 4}.items():
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                shape = ((20, 28, 3), (24, 16, 3))[k % 2]
                pixels = rng.integers(0, 90, shape) + 50 * label
                path = folder / part / name / f"{k}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                words = " ".join(rng.choice(["old", "new", "steel", "brass"], 3))
                id_ = f"{part}/{name}/{k}.png"
                captions.append(f'{{"id": "{id_}", "caption": "a {words} thing"}}\n')
    twin = folder / "train" / CLASSES[0]
    (twin / "1.png").write_bytes((twin / "3.png").read_bytes())
    if damaged:
        (twin / "damaged.png").write_bytes(b"no image")
        id_ = f"train/{CLASSES[0]}/damaged.png"
        captions.append(f'{{"id": "{id_}", "caption": ""}}\n')
    folder.with_suffix(".jsonl").write_text("".join(captions))


def run(folder: pathlib.Path, name: str, *others: str) -> bool:
    """Runs one workdir to its report; prints a row; returns whether it ended well."""
    fields = RUNS.get(name) or RUNS["d"] | {
        "classify.model": name,
        "data.size": "32",
        "classify.width": "0",
        "classify.stem_stride": "1",
        "classify.runs": "real,combined",
        "classify.steps": "1",
    }
    images = "images" if fields["data.on_bad_image"] == "skip" else "whole"
    given = dict(setting.split("=", 1) for setting in SMALL) | fields
    given |= {"data.source": f"folder:{folder / images}"}
    flags = [
        f"--config.{field}={value.replace('FOLDER', str(folder))}"
        for field, value in given.items()
    ]
    command = [sys.executable, "-m", "mvc_jax.train", "--config=configs/digits.py"]
    began = time.monotonic()
    workdir = folder / f"run-{name}"
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *others, *flags],
        capture_output=True,
        text=True,
    )
    made = (workdir / "report" / "report.html").is_file()
    lines = done.stderr.strip().splitlines() or [""]
    ending = (
        "report" if made and not done.returncode else f"{done.returncode}: {lines[-1]}"
    )
    print(f"| {name} | {ending} | {time.monotonic() - began:.0f} |", flush=True)
    return made and not done.returncode


if __name__ == "__main__":
    main()
