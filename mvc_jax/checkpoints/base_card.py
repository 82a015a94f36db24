"""The model card of the small base: what it was trained on, and how good it is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints.model_card import FILE, code, table

_MOST_CLASSES = 200  # that are named


@dataclasses.dataclass(frozen=True)
class Facts:
    """The content of the card, as plain values.

    Attributes:
      dataset: whose images it has seen.
      classes: their names.
      images: how many of them.
      resolution: pixels along a side.
      captioner: what wrote their captions.
      prompt: one of the prompts.
      steps: network -> optimiser steps.
      measures: of `pretraining.quality.Quality`, with `warnings`.
    """

    dataset: str
    classes: Sequence[str]
    images: int
    resolution: int
    captioner: str
    prompt: str
    steps: Mapping[str, int]
    measures: Mapping[str, Any]


def write(folder: epath.PathLike, facts: Facts) -> list[str]:
    """Writes the card of a base's folder; returns the files, relative to it."""
    files.write_text(epath.Path(folder) / FILE, text(facts))
    return [FILE]


def text(facts: Facts) -> str:
    """The card: YAML front matter, without a licence, then Markdown."""
    front = yaml.safe_dump(
        {
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["stable-diffusion", "text-to-image", "mvc_jax"],
        },
        sort_keys=False,
    )
    side = f"{facts.resolution} x {facts.resolution}"
    data = {
        "dataset": facts.dataset,
        "images": facts.images,
        "resolution": side,
        "classes": len(facts.classes),
        "captions": facts.captioner,
        "a prompt": facts.prompt,
    }
    names = ", ".join(code(name) for name in facts.classes[:_MOST_CLASSES])
    rest = len(facts.classes) - _MOST_CLASSES
    more = f" and {rest} more" if rest > 0 else ""
    steps = {f"steps of {name}": count for name, count in facts.steps.items()}
    sections = [
        f"# A small Stable Diffusion of {code(facts.dataset)}\n\n{_ABOUT}",
        f"## What it has seen\n\n{table(data)}\nClasses: {names}{more}\n",
        f"## Training\n\n{table(steps)}",
        f"## Measures\n\n{table(_measures(facts.measures))}{_NOTE}",
        *[f"> Warning: {each}.\n" for each in facts.measures["warnings"]],
        _LIMITS,
    ]
    return f"---\n{front}---\n\n" + "\n".join(sections)


def _measures(found: Mapping[str, Any]) -> dict[str, str]:
    rows = {"held-out images": str(found["held_out"])}
    if found["psnr"] is not None:
        rows["PSNR of their reconstructions"] = f"{found['psnr']:.1f} dB"
        rows["PSNR where they are not black"] = f"{found['psnr_inside']:.1f} dB"
        rows["sharpness, of the originals'"] = f"{100 * found['sharpness']:.0f} %"
    if found["to_augment"] is not None:
        measured = found["to_augment"]
        psnr = f"{measured['psnr']:.1f} dB, of {measured['images']}"
        rows["PSNR of reconstructed images to augment"] = psnr
    if found["agreement"] is not None:
        judged = f"{100 * found['agreement']:.0f} % of {found['judged']}"
        rows["samples taken for their class"] = judged
    if found["judge_accuracy"] is not None:
        accuracy = f"{100 * found['judge_accuracy']:.0f} %"
        rows["held-out images taken for their class"] = accuracy
    return rows


_ABOUT = """\
Trained from scratch by `mvc_jax` where no base model is given: autoencoder, text
encoder and UNet know the images below and nothing else.
"""

_NOTE = """
Classes are those that a small classifier, trained on the same images, predicts.
"""

_LIMITS = """\
## Limits

- It may reproduce training images. If those are private, do not publish it.
- Its prompts are those of its captions; other words say little to it.
- The terms of the dataset may apply to it.
"""
