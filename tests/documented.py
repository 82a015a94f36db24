"""The commands of the documents: where they are, and how they are shortened to run."""

import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
]

# Fewer steps, images and seeds of the digits; the stages and shapes are the demo's.
SHORT = (
    "pretrain.judge.steps=10",
    "pretrain.judge.samples=20",
    "pretrain.vae.steps=30",
    "pretrain.unet.steps=30",
    "pretrain.unet.warmup=30",
    "pretrain.checkpoint_every=10",
    "finetune.steps=20",
    "finetune.checkpoint_every=5",
    "mix.per_image=2",
    "generate.steps=4",
    "generate.shard_size=40",
    "generate.batch_size=20",
    "classify.seeds=2",
    "classify.steps=10",
)

# Part of a command -> the flags that shorten it further, with the reason; None: it
# cannot run here. The first that matches is used.
SHORTENED = (
    ("://", None),  # servers
    ("path=data/", None),  # images that the tests do not have
    # Another seed is another program for every stage: minutes of compilation.
    ("--config.seed=1", ["--config.stages=caption"]),
    ("mvc-jax repeat", ["--config.stages=caption"]),
    # A sweep is run in test_pipeline.
    ("mvc-jax sweep", ["--dry_run"]),
    # Its companions are trained in test_companions and drawn in test_ablation.
    ("digits.py:ablation", ["--config.stages=caption"]),
    # 4 GB of Stable Diffusion from the hub.
    ("stable-diffusion-v1-5", ["--config.stages=caption"]),
    # 15 GB of BLIP-2 from the hub, and Stable Diffusion.
    ("captioner=blip2", None),
    # Minutes of training on images that the tests do not have.
    (",pool=", None),
    ("pretrain=small64", None),
    ("configs/folder.py", []),
    # Two regimes with a set each.
    (
        "runs/fine",
        ["--config.classify.runs=real,combined", "--config.classify.ratio=1"],
    ),
    ("runs/digits", []),
)

_OF_SEVERAL = ("--seeds", "--vary")  # flags of commands that make several runs


def commands() -> Iterator[list[str]]:
    """The words of every shell command of the documents."""
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words


def train_flags(words: list[str]) -> list[str] | None:
    """The flags of a single run in a command; None if it runs none."""
    runs = "mvc_jax.train" in words or "mvc-jax" in words or "launch/demo.sh" in words
    if not runs or {"compare", "push"} & {*words}:
        return None
    return [x for x in words if x.startswith("--") and not x.startswith(_OF_SEVERAL)]


def train_arguments(words: list[str]) -> list[str] | None:
    """The arguments of a command that can run here, shortened; else None."""
    flags = train_flags(words)
    if flags is None or "launch/demo.sh" in words:  # which installs packages
        return None
    line = " ".join(words)
    more = next(more for part, more in SHORTENED if part in line)
    if more is None:
        return None
    short = [f"--config.{x}" for x in SHORT] if "configs/digits.py" in line else []
    several = [
        x for x in words if x in ("repeat", "sweep") or x.startswith(_OF_SEVERAL)
    ]
    return [*several, *flags, *short, *more]
