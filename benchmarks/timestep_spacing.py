"""How often a synthetic digit shows its label, by sampler, spacing and steps.

    python -m mvc_jax.train --config=configs/digits.py --workdir=runs/digits \\
      --config.stages=caption,pretrain,encode,pairs,finetune,mix
    python benchmarks/timestep_spacing.py --workdir=runs/digits

Draws the first images of the set `mixed`, with the same recipes and noise for every
row, and asks a support vector machine that was trained on the test digits, which
neither base nor generator has seen. Steps that are refused are drawn here as well.
"""

import argparse

import numpy as np
from etils import epath
from sklearn.svm import SVC

from mvc_jax import generate
from mvc_jax.command import run_config
from mvc_jax.data import splits
from mvc_jax.diffusion import samplers, timesteps
from mvc_jax.errors import UserError

ROWS = (  # sampler, spacings, steps
    ("ddim", ("leading", "trailing"), (1, 2, 5, 12, 50)),
    ("ddim", ("linspace",), (12, 50)),
    ("euler", ("leading", "trailing", "linspace"), (5, 12)),
    ("dpmpp_2m", ("leading", "trailing", "linspace"), (5, 12, 20)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=epath.Path, default="runs/digits")
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    workdir = arguments.workdir
    judge = train_judge(workdir)
    train = splits.read_split(workdir / "caption", "train")
    right = judge.score(flat(train.images), train.labels)
    print(f"the judge is right on {right:.3f} of the {len(train.labels)} real images\n")
    print("| sampler | spacing | steps | starts at | label agreement | refused |")
    print("|---|---|---:|---:|---:|---|")
    samplers.require_noise = lambda *arguments: None  # those that are refused, too
    for sampler, spacings, counts in ROWS:
        for steps in counts:
            for spacing in spacings:
                agreed = agreement(
                    judge, workdir, arguments.images, sampler, steps, spacing
                )
                start = timesteps.timesteps_of(sampler, steps, spacing)[0]
                refused = "yes" if is_refused(sampler, steps, spacing) else ""
                cells = (
                    sampler,
                    spacing,
                    steps,
                    f"{start:g}",
                    f"{agreed:.3f}",
                    refused,
                )
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def train_judge(workdir: epath.Path) -> SVC:
    test = splits.read_split(workdir / "caption", "test")
    return SVC(C=10.0).fit(flat(test.images), test.labels)


def is_refused(sampler: str, steps: int, spacing: str) -> bool:
    try:
        timesteps.require_noise(sampler, steps, spacing)
    except UserError:
        return True
    return False


def agreement(
    judge: SVC,
    workdir: epath.Path,
    images: int,
    sampler: str,
    steps: int,
    spacing: str,
) -> float:
    """The fraction of the first images that show their label."""
    config = run_config.load(str(workdir / "config.json"))
    config.generate.sampler = sampler
    config.generate.steps = steps
    config.generate.timestep_spacing = spacing
    train = generate.read_train(workdir)
    recipes = generate.read_recipes(workdir)[:images]
    drawing = generate.open_sampler(config, workdir, recipes, train)
    drawing.load("mixed")
    drawn = drawing.draw(recipes)
    names = list(train.class_names)
    labels = [names.index(recipe["label"]) for recipe in recipes]
    return float((judge.predict(flat(drawn.images)) == labels).mean())


if __name__ == "__main__":
    main()
