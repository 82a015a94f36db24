"""The model card of an exported folder: README.md for the Hugging Face hub."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints.family import SD, XL, Family

FILE = "README.md"
LICENSE_FIELDS = ("license", "license_name", "license_link")
UNKNOWN = {"license": "other", "license_name": "unknown-see-the-base"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """The content of the card, as plain values.

    Attributes:
      base: hub name, or path, of the model that was fine-tuned; a relative path is
        relative to the card.
      revision: the commit of a base from the hub; None for a local folder.
      license: of the base, from `base_license`.
      dataset: its name.
      classes: their names.
      images: number of training images.
      resolution: pixels along one side.
      prompt: one of the prompts, for the examples.
      hyperparameters: of the fine-tuning, by name.
      steps: optimiser steps.
      adapters: the folder of the LoRA file, relative to the card's, if there is one.
      variant: of the base's weights, e.g. `fp16`; `""` for the default one.
      family: of the model.
    """

    base: str
    revision: str | None
    license: Mapping[str, Any]
    dataset: str
    classes: Sequence[str]
    images: int
    resolution: int
    prompt: str
    hyperparameters: Mapping[str, Any]
    steps: int
    adapters: str | None = None
    variant: str = ""
    family: Family = SD


def write(folder: epath.PathLike, facts: Facts) -> list[str]:
    """Writes the card of a model folder.

    Returns:
      the files written, relative to `folder`.
    """
    files.write_text(epath.Path(folder) / FILE, text(facts))
    return [FILE]


def text(facts: Facts) -> str:
    """The card: YAML front matter, then Markdown."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    name = facts.family.name
    about = f"# {name} fine-tuned on {code(facts.dataset)}\n\n{_ABOUT}"
    sections = [about, _base(facts), _data(facts), _training(facts), _USE]
    sections.append(_loading(facts))
    if facts.adapters is not None:
        sections.append(_loading_adapters(facts))
    return f"---\n{front}---\n\n" + "\n".join([*sections, _REFERENCES])


def base_license(folder: epath.PathLike) -> dict[str, Any]:
    """The licence in the card of a model folder, as fields of front matter.

    Without a card, or a licence in it, it is `other` and unknown.
    """
    path = epath.Path(folder) / FILE
    card = path.read_bytes().decode("utf-8-sig", "replace") if path.exists() else ""
    front, _ = split(card)
    if not front.get("license"):
        return dict(UNKNOWN)
    return {name: front[name] for name in LICENSE_FIELDS if name in front}


def split(card: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, {} without one that can be read, and its text."""
    match = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), card[
        match.end() if match else 0 :
    ]


def _front_matter(facts: Facts) -> dict[str, Any]:
    front = dict(facts.license)
    if facts.revision is not None:  # the hub accepts only names of its own models
        front["base_model"] = facts.base
    tags = ["stable-diffusion", "instruct-pix2pix", "image-to-image", "mvc_jax"]
    return {
        **front,
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": [*tags, "data-augmentation", *["lora"] * (facts.adapters is not None)],
        "classes": list(facts.classes),
    }


_ABOUT = """\
A conditional model like InstructPix2Pix: given an image of a class and a text, it
generates another image of that class. The UNet takes the latents of the given image on
additional input channels. Fine-tuned on the classes below by `mvc_jax`, to enlarge the
dataset by Mixing Visual Concepts.
"""

_USE = """\
## Intended use and limits

- It is intended for the augmentation of the dataset on which it was trained.
- It may reproduce training images, whole or in part. If those are private, do not
  publish this model or its images.
- Its images are not evidence, and not for diagnosis, identification or decisions about
  people. Whether synthetic images help a classifier must be measured on real ones.
- It inherits the errors and biases of the base and of the dataset.
- The licence of the base applies to it, and the terms of the dataset may apply too.
"""

_REFERENCES = """\
## References

- Mixing Visual Concepts, WACV 2025: [arXiv 2412.15358](https://arxiv.org/abs/2412.15358)
- InstructPix2Pix: [arXiv 2211.09800](https://arxiv.org/abs/2211.09800)
"""

_LOAD = """\
import torch
from diffusers import {pipeline}
from PIL import Image

pipe = {pipeline}.from_pretrained({arguments})
"""

_WIDEN = """\
narrow, channels = pipe.unet.conv_in, pipe.vae.config.latent_channels
if narrow.in_channels == channels:  # the new input channels start at zero
    wide = torch.nn.Conv2d(2 * channels, narrow.out_channels, 3, padding=1)
    wide = wide.to(narrow.weight)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, :channels] = narrow.weight
        wide.bias.copy_(narrow.bias)
    pipe.unet.conv_in = wide
    pipe.unet.register_to_config(in_channels=2 * channels)
pipe.load_lora_weights({adapters})
"""

_DRAW = """\
drawn = pipe(
    {prompt},
    image=Image.open("source.png").convert("RGB").resize(({size}, {size})),
{sizes}    num_inference_steps=50,
    guidance_scale=7.5,
    image_guidance_scale=1.5,
    generator=torch.manual_seed(0),
).images[0]
drawn.save("drawn.png")
"""
# XL is given how large the training images were before they were resized to this.
_SIZES = """\
    height={size},
    width={size},
    original_size=Image.open("source.png").size[::-1],
"""


def _base(facts: Facts) -> str:
    rows = {"base": facts.base}
    if facts.revision is not None:
        rows["revision"] = facts.revision
    if facts.variant:
        rows["variant"] = facts.variant
    rows["licence"] = license_name(facts.license)
    return "## Base\n\n" + table(rows)


def _data(facts: Facts) -> str:
    rows = {
        "dataset": facts.dataset,
        "images": facts.images,
        "resolution": f"{facts.resolution} x {facts.resolution}",
        "classes": len(facts.classes),
    }
    names = ", ".join(code(name) for name in facts.classes)
    return f"## Data\n\n{table(rows)}\nClasses: {names}\n"


def _training(facts: Facts) -> str:
    return (
        f"## Hyper-parameters\n\n{table(facts.hyperparameters)}\n"
        f"## Training result\n\n{table({'steps': facts.steps})}"
    )


def _loading(facts: Facts) -> str:
    load = _LOAD.format(arguments='"."', pipeline=facts.family.edits)
    return (
        "## Load it in diffusers\n\n"
        "Run it in this folder, or replace the dot by the model's name on the hub.\n\n"
        f"```python\n{load}{_draw(facts)}```\n"
    )


def _loading_adapters(facts: Facts) -> str:
    arguments = repr(facts.base)
    if facts.revision is not None:
        arguments += f", revision={facts.revision!r}"
    if facts.variant:
        arguments += f", variant={facts.variant!r}"
    load = _LOAD.format(arguments=arguments, pipeline=facts.family.edits)
    widen = _WIDEN.format(adapters=repr(facts.adapters))
    return (
        "## Load the adapters onto the base\n\n"
        "The same model, as low-rank adapters "
        "([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)) of the widened base.\n"
        "This needs the package `peft`.\n\n"
        f"```python\n{load}\n{widen}{_draw(facts)}```\n"
    )


def _draw(facts: Facts) -> str:
    size = facts.resolution
    sizes = _SIZES.format(size=size) if facts.family is XL else ""
    return _DRAW.format(prompt=repr(facts.prompt), size=size, sizes=sizes)


def license_name(license_: Mapping[str, Any]) -> str:
    """The name of a licence from `base_license`."""
    if license_ == UNKNOWN:
        return "unknown, see the base"
    return license_.get("license_name", license_["license"])


def table(rows: Mapping[str, Any]) -> str:
    """A Markdown table of two columns."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        value = code(str(value)).replace("|", r"\|")
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines) + "\n"


def code(value: str) -> str:
    """A Markdown code span of any string, on one line."""
    value = " ".join(value.split()) or "(blank)"
    fence = "`" * (1 + max(map(len, re.findall("`+", value)), default=0))
    space = " " if value[0] == "`" or value[-1] == "`" else ""
    return f"{fence}{space}{value}{space}{fence}"
