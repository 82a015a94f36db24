"""The card of a synthetic dataset: README.md for the Hugging Face hub.

Its front matter lists the files of each configuration; without it,
`load_dataset(folder)` would guess from file names.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import model_card
from mvc_jax.checkpoints.model_card import code, table

_SIZES = (  # upper limit of the number of images, the hub's size category
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (float("inf"), "1M<n<10M"),
)
_SOFT = "soft labels"
_FILTERS = "filters"  # key of the settings, if any filter was on


@dataclasses.dataclass(frozen=True)
class Facts:
    """The content of the card, as plain values.

    Attributes:
      set: its name in the run.
      about: a sentence on what distinguishes this set.
      dataset: name of the real dataset.
      classes: their names, in the order of labels.
      folders: what the folder of each class is called, in `train/`.
      counts: synthetic images of each class.
      real: real images of each class in the folder; all 0 if there are none.
      size: of the images, as text.
      settings: of the generation, by name.
      redrawn: reason -> images that were drawn again and kept.
      left_out: reason -> images that are not in the dataset.
      base: hub name, or path, of the base model.
      license: of the base, from `model_card.base_license`.
      pictures: whether the folder `train/` exists.
    """

    set: str
    about: str
    dataset: str
    classes: Sequence[str]
    folders: Sequence[str]
    counts: Sequence[int]
    real: Sequence[int]
    size: str
    settings: Mapping[str, Any]
    redrawn: Mapping[str, int]
    left_out: Mapping[str, int]
    base: str
    license: Mapping[str, Any]
    pictures: bool


def write(folder: epath.PathLike, facts: Facts) -> list[str]:
    """Writes the card of a set's folder.

    Returns:
      the files written, relative to `folder`.
    """
    files.write_text(epath.Path(folder) / model_card.FILE, text(facts))
    return [model_card.FILE]


def text(facts: Facts) -> str:
    """The card: YAML front matter, then Markdown."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    title = f"# {code(facts.dataset)}, enlarged: the set {code(facts.set)}"
    about = f"{title}\n\n{_ABOUT}\n{facts.about}\n"
    drawn = f"## How the images were drawn\n\n{table(facts.settings)}"
    sections = [about, _counts(facts), drawn, _redrawn(facts), _base(facts)]
    sections += [_use(facts), _loading(facts), _REFERENCES]
    return f"---\n{front}---\n\n" + "\n".join(sections)


def without_pictures(card: str) -> str:
    """The card of the same set without its folder `train/`."""
    card = card.replace(_PICTURES, "")
    start = card.find(f"\n\n{_FOLDERS}")
    if start < 0:
        return card
    return card[:start] + card[card.index(f"\n\n{_REFERENCES}", start) :]


def in_words(
    *,
    seed: int,
    per_image: int | None,
    mixing: Mapping[str, Any] | None,
    text_scale: tuple[float, float],
    image_scale: tuple[float, float],
    sampler: str,
    steps: int,
    spacing: str,
    guidance_interval: tuple[float, float],
    guidance_rescale: float,
    filters: str,
    strengths: Sequence[float] = (),
    gamma: float | None = None,
    perturbation: float | None = None,
) -> dict[str, Any]:
    """How the images of a set were drawn, by name, for `Facts.settings`.

    Args:
      seed: of the run.
      per_image: synthetic images for each real one; None: recipes edited by hand.
      mixing: from `mixing_in_words`; None: the set does not mix, or its recipes were
        edited by hand.
      text_scale: minimum and maximum guidance scale of the text.
      image_scale: minimum and maximum guidance scale of the image.
      sampler: its name.
      steps: of the sampler.
      spacing: of its timesteps, as diffusers names it.
      guidance_interval: fractions of the training timesteps with guidance.
      guidance_rescale: of the guided prediction.
      filters: from `filters_in_words`.
      strengths: of the noise that is added to the source; (): images start from noise.
      gamma: of soft labels; None: labels are those of the sources.
      perturbation: the most that a latent number is changed by; None: none is.
    """
    words: dict[str, Any] = {}
    if per_image is None:
        words["recipes"] = "edited by hand"
    else:
        words["images for each real one"] = per_image
    words.update(mixing or {})
    if per_image is not None:
        words["text scale"] = _span(*text_scale)
        words["image scale"] = _span(*image_scale)
    if strengths:
        drawn = ", ".join(f"{strength:g}" for strength in strengths)
        words["strength of the noise on the source"] = drawn
    if gamma is not None:
        words[_SOFT] = f"the other class has the probability strength^{gamma:g}"
    if perturbation is not None:
        words["perturbation of the latents"] = f"at most {perturbation:g}"
    words["sampler"] = f"{sampler}, {steps} steps, {spacing} timesteps"
    words["guidance interval"] = _span(*guidance_interval)
    words["guidance rescale"] = f"{guidance_rescale:g}"
    if filters:
        words[_FILTERS] = filters
    words["seed"] = seed
    return words


def mixing_in_words(
    *,
    modes: Sequence[str],
    tokens: tuple[int, int],
    positions: str,
    dims: int,
    dims_on: str,
    partners: int,
    partner: str,
    prefers_other_prompts: bool,
) -> dict[str, str]:
    """How recipes were drawn, by name: fields of `recipes.Drawing`.

    `tokens` are the minimum and the maximum number; `prefers_other_prompts` is whether
    `partner_prompt` is `other`.
    """
    return {
        "modes, in turn": ", ".join(modes),
        "coarse mixing": f"{_span(*tokens)} tokens; which: {positions}",
        "fine mixing": f"{dims} dims; of tokens: {dims_on}",
        "partners": f"{partners}; of class: {partner}; of another prompt: "
        + ("preferred" if prefers_other_prompts else "as drawn"),
    }


def filters_in_words(
    *,
    label: str,
    label_folds: int,
    label_threshold: float,
    label_top: int,
    copies: str,
    copies_quantile: float,
    outliers: bool,
    outliers_quantile: float,
) -> str:
    """The filters that are on, with their thresholds: fields of `FilterSettings`."""
    words = []
    if label:
        by = "CLIP" if label == "clip" else f"{label_folds} folds"
        likeliest = f" or among the {label_top} likeliest" if label_top else ""
        words.append(f"label, by {by}: {label_threshold:g} or more{likeliest}")
    if copies:
        of = {"any": "any real image", "source": "the source"}[copies]
        words.append(f"copies, of {of}: quantile {copies_quantile:g}")
    if outliers:
        words.append(f"outliers: quantile {outliers_quantile:g}")
    return "; ".join(words)


def _span(low: float | int, high: float | int) -> str:
    return f"{low:g} to {high:g}" if high > low else f"{low:g}"


def _front_matter(facts: Facts) -> dict[str, Any]:
    paths = {"synthetic": ["data/train-*.parquet"], "real": ["data/real-*.parquet"]}
    total = sum(facts.counts) + sum(facts.real)
    parts = {"default": paths["synthetic"]}
    if any(facts.real):
        parts = {"default": [*paths["synthetic"], *paths["real"]], **paths}
    return {
        **facts.license,
        "pretty_name": f"{facts.dataset}, {facts.set}",
        "task_categories": ["image-classification"],
        "size_categories": [next(name for limit, name in _SIZES if total < limit)],
        "tags": ["synthetic", "data-augmentation", "mvc_jax"],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": path}]}
            for name, path in parts.items()
        ],
    }


_ABOUT = """\
Synthetic images, generated by a Stable Diffusion that was fine-tuned on the real ones,
to train classifiers on both. Made with `mvc_jax` (Mixing Visual Concepts).
"""

_PICTURES = """\
files = {"train": "train/**"}
pictures = load_dataset("imagefolder", data_files=files)["train"]
pictures = pictures.class_encode_column("label")
"""

_FOLDERS = "`train/<class>/` holds the same images"

_USE = """\
## Intended use and limits

- They are intended as additional training images for a classifier of these classes;
  test on real images only.
- {label}. The images
  were not inspected one by one: some may show another class, or nothing.
- Synthetic images may resemble training images, whole or in part. If those are
  private, do not publish this dataset.
- They are not evidence, and not for diagnosis, identification or decisions about
  people.
- They inherit the errors and biases of the base model and of the real images.
- The licence of the base model, and the terms of the real dataset, may apply.
"""

_REFERENCES = """\
## References

- Mixing Visual Concepts, WACV 2025: [arXiv 2412.15358](https://arxiv.org/abs/2412.15358)
- InstructPix2Pix: [arXiv 2211.09800](https://arxiv.org/abs/2211.09800)
"""


_LABEL = "Each label is that of the real image that conditioned the synthetic one"
_SOFT_LABEL = (
    "Each image is of two classes: `soft_label` has the probability of every class, "
    "and `label` is the likelier one"
)


def _use(facts: Facts) -> str:
    soft = _SOFT in facts.settings
    return _USE.replace("{label}", _SOFT_LABEL if soft else _LABEL)


def _counts(facts: Facts) -> str:
    real = any(facts.real)
    headings = ["label", "class", "synthetic", *["real"] * real]
    lines = [_cells(headings), _cells(["---"] * len(headings))]
    rows = zip(facts.classes, facts.counts, facts.real, strict=True)
    rows = [(k, _in_cell(name), *numbers) for k, (name, *numbers) in enumerate(rows)]
    total = ("", "all", sum(facts.counts), sum(facts.real))
    lines += [_cells(row[: len(headings)]) for row in [*rows, total]]
    return f"## Images\n\nSize: {facts.size}.\n\n" + "\n".join(lines) + "\n"


def _cells(values: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def _in_cell(name: str) -> str:
    return code(name).replace("|", r"\|")


def _redrawn(facts: Facts) -> str:
    def with_reasons(counts: Mapping[str, int]) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        return f"{sum(counts.values())}" + (f" ({reasons})" if reasons else "")

    lists = "`redrawn.jsonl` lists them."
    if _FILTERS in facts.settings:
        lists = (
            "`redrawn.jsonl` lists them, and `removed.jsonl` the images that filters "
            "removed, with the reasons."
        )
    return (
        "## Images drawn again, and left out\n\n"
        f"Drawn again with other noise: {with_reasons(facts.redrawn)}. "
        f"Left out: {with_reasons(facts.left_out)}. {lists}\n"
    )


def _base(facts: Facts) -> str:
    rows = {"base": facts.base, "licence": model_card.license_name(facts.license)}
    return f"## Base model\n\n{table(rows)}"


_NUMBERS = """\
import json
from torchvision.datasets import ImageFolder

pictures = ImageFolder("train")
with open("train/metadata.jsonl", encoding="utf-8") as file:
    rows = [json.loads(row) for row in file]
name_of = {os.path.dirname(row["file_name"]): row["label"] for row in rows}
labels = [names.index(name_of[folder]) for folder in pictures.classes]
pictures.target_transform = labels.__getitem__
"""


def _loading(facts: Facts) -> str:
    lines = [
        "import os",
        "from datasets import load_dataset",
        "",
        "folder = os.getcwd()",
        'dataset = load_dataset(folder)["train"]',
        'names = dataset.features["label"].names',
    ]
    if any(facts.real):
        lines[-2] += "  # real and synthetic"
        lines.append('synthetic = load_dataset(folder, "synthetic")["train"]')
    refused = [x for x in facts.folders if re.search(r"::|\\|\$", x)]
    if facts.pictures and not refused:
        lines += _PICTURES.splitlines()
    body = "\n".join(lines)
    columns = (
        "`label` is the class, by its number in the table above, `source` the real "
        "image that conditioned the synthetic one; the other columns are how to "
        "generate it again."
    )
    sections = [
        "## Load it\n\nRun this in the folder, or write its path, or the dataset's "
        "name on the hub, in place of `os.getcwd()`.\n\n"
        f"```python\n{body}\n```\n\n{columns}"
    ]
    if facts.pictures:
        sections += _about_folders(facts, refused)
    return "\n\n".join(sections) + "\n"


def _about_folders(facts: Facts, refused: Sequence[str]) -> list[str]:
    """Paragraphs on the folder `train/`.

    Args:
      facts: the content of the card.
      refused: folders because of which Hugging Face's `imagefolder` reads none.
    """
    found = [
        f"{_FOLDERS} as files, for torchvision's `ImageFolder`, "
        "Keras, TFDS and timm. They number the folders that there are, "
        "in sorted order (timm: 2 before 10), and Hugging Face's `imagefolder` the "
        "labels in it: join classes by their names, not by numbers. So that "
        "torchvision's numbers are those of `dataset`:",
        f"```python\n{_NUMBERS}```",
    ]
    counts = zip(facts.classes, facts.counts, facts.real, strict=True)
    absent = [name for name, *numbers in counts if not any(numbers)]
    if absent:
        found.append(
            f"No image was kept of {_listed(absent)}: there is no folder, and the "
            "numbers of later folders are lower than in a dataset that has one."
        )
    if refused:
        found.append(
            f"Hugging Face's `imagefolder` cannot read the folders {_listed(refused)}, "
            "because of `::`, a backslash or `$`: use `dataset`."
        )
    if hidden := [x for x in facts.folders if x.startswith((".", "__"))]:
        found.append(
            f"Some readers leave out the folders {_listed(hidden)}: Keras and "
            "`mvc_jax` those that begin with a dot, `datasets` 2 also those with `__`. "
            "`dataset` has them all."
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(code, names))
