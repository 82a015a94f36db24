"""Figures of a few images: a contact sheet, and figures 4 and 5 of the supplement."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data.cache import pairs_of_all_classes
from mvc_jax.data.splits import Split
from mvc_jax.errors import UserError
from mvc_jax.generation.conditionings import CONDITIONINGS, model_order
from mvc_jax.generation.image_sampler import ImageSampler

TITLES = {  # in the order of the rows
    "image_embedding": "embedding of the image",
    "caption_only": "caption",
    "image_number": "number of the image",
    "pretrained": "caption, not fine-tuned",
    "controlnet": "caption + edges (ControlNet)",
    "embedding_difference": "image + embedding difference",
    "unmixed": "image + caption",
    "noised": "image + noised caption",
    "interpolated": "image + mean of two captions",
    "mixed": "image + mixed caption",
}
_LEVEL_HEADINGS = {
    "tokens 1": "words",
    "tokens 2": "+ padding",
    "tokens 3": "all tokens",
}
_CONDITIONING_NOTE = (
    "All images of a column have the same noise. Where the name begins with image, the "
    "image's latents are given to the model as well; elsewhere only text states or "
    "edges are."
)
_LEVEL_NOTE = (
    "All images of a row have the same source, partner and noise. Dims: how many of "
    "every token's dims are the partner's. Then whole tokens: the captions' words, as "
    "many tokens of padding as well, all tokens but the first."
)
_COLUMNS = 8
_TILE = 128  # pixels
_MAX_BYTES = 8_000_000
_MAX_NAME = 32  # characters
_SHARED = ("noise_seed", "text_scale", "image_scale")  # by all images of a source


def contact_sheet(
    path: epath.Path,
    sampler: ImageSampler,
    recipes: Sequence[dict],
    train: Split,
    *,
    limit: int,
) -> None:
    """Draws a row per source: the source, unmixed, and each mode with the same noise.

    Args:
      path: of the figure.
      sampler: of the run.
      recipes: of the run; the first of each source and mode is used.
      train: the real images.
      limit: maximum number of sources; classes take turns.
    """
    by_source: dict[str, dict[str, dict]] = {}
    for recipe in recipes:
        by_source.setdefault(recipe["source"], {}).setdefault(recipe["mode"], recipe)
    sources = _sources(by_source, train, limit)
    modes = list(dict.fromkeys(recipe["mode"] for recipe in recipes))
    firsts = [next(iter(by_source[train.ids[i]].values())) for i in sources]
    columns = [("unmixed", "unmixed", firsts)]
    for mode in modes:
        found = [by_source[train.ids[i]].get(mode) for i in sources]
        columns.append(("mixed", mode, found))
    cells = [[_cell("source", train.images[i])] for i in sources]
    for name, heading, found in columns:
        same_noise = [
            recipe and recipe | {key: first[key] for key in _SHARED}
            for first, recipe in zip(firsts, found, strict=True)
        ]
        for row, image in zip(cells, _draw(sampler, name, same_noise), strict=True):
            row.append(_cell(heading, image))
    labels = [int(train.labels[i]) for i in sources]
    rows = [
        pictures.Row(name=train.class_names[k][:_MAX_NAME], number=k, cells=row)
        for k, row in zip(labels, cells, strict=True)
    ]
    _write(path, rows)


def conditioning_figure(
    path: epath.Path,
    sampler: ImageSampler,
    recipes: Sequence[dict],
    train: Split,
    *,
    names: Sequence[str],
    optional: bool,
) -> list[str]:
    """Draws Figure 4 of the supplement: a row per conditioning, a column per source.

    The first row shows the sources. All images of a column have the same noise.

    Args:
      path: of the figure.
      sampler: of the run.
      recipes: of the run; the first of each source is used.
      train: the real images.
      names: of the conditionings.
      optional: whether a conditioning that cannot be drawn is left out and mentioned
        below the figure; otherwise it is an error.

    Returns:
      a sentence for each conditioning that was left out, with the error.

    Raises:
      UserError: a conditioning cannot be drawn, and `optional` is false.
    """
    by_source: dict[str, dict] = {}
    for recipe in recipes:
        by_source.setdefault(recipe["source"], recipe)
    sources = _sources(by_source, train, _COLUMNS)
    firsts = [by_source[train.ids[i]] for i in sources]
    headings = [train.class_names[train.labels[i]] for i in sources]
    drawn: dict[str, list] = {}
    left_out = []
    for name in sorted(names, key=model_order):
        try:
            drawn[name] = _draw(sampler, name, firsts)
        except UserError as error:
            if not optional:
                raise
            left_out.append(f"Not drawn: {TITLES[name]}. {error}")
    images = {"original": [train.images[i] for i in sources]}
    images |= {TITLES[name]: drawn[name] for name in TITLES if name in drawn}
    rows = [
        pictures.Row(name=title, cells=list(map(_cell, headings, row)))
        for title, row in images.items()
    ]
    _write(path, rows, panels=1, notes=[_CONDITIONING_NOTE, *left_out])
    return left_out


def level_figure(
    path: epath.Path, sampler: ImageSampler, recipes: Sequence[dict], train: Split
) -> None:
    """Draws Figure 5 of the supplement: increasing numbers of dims and of tokens.

    Args:
      path: of the figure.
      sampler: of the run.
      recipes: of `mix/levels.jsonl`.
      train: the real images.
    """
    by_source: dict[str, dict[str, dict]] = {}
    for recipe in recipes:
        by_source.setdefault(recipe["source"], {})[recipe["level"]] = recipe
    places = {id_: i for i, id_ in enumerate(train.ids)}
    rows = []
    for source, found in by_source.items():
        first = next(iter(found.values()))
        label, image = first["label"], train.images[places[source]]
        cells = [_cell("source", image)]
        cells.append(_cell("unmixed", _draw(sampler, "unmixed", [first])[0]))
        number = train.class_names.index(label)
        rows.append(pictures.Row(name=label[:_MAX_NAME], number=number, cells=cells))
    for level in sorted({recipe["level"] for recipe in recipes}):  # dims come first
        of_level = [found.get(level) for found in by_source.values()]
        heading = _level_heading(level, next(filter(None, of_level)))
        for row, image in zip(rows, _draw(sampler, "mixed", of_level), strict=True):
            row["cells"].append(_cell(heading, image))
    _write(path, rows, panels=1, notes=[_LEVEL_NOTE])


def _level_heading(level: str, recipe: dict) -> str:
    if level.startswith("dims"):
        return f"{len(recipe['dims'][0])} dims"
    return _LEVEL_HEADINGS.get(level, level)


def _sources(by_source: Collection[str], train: Split, count: int) -> list[int]:
    """Rows of up to `count` images that have a recipe; classes take turns."""
    rows = np.flatnonzero([id_ in by_source for id_ in train.ids])
    pairs = np.stack([rows, rows], axis=1)
    return pairs_of_all_classes(pairs, train.labels, count)[:, 0].tolist()


def _draw(
    sampler: ImageSampler, name: str, recipes: Sequence[dict | None]
) -> list[np.ndarray | None]:
    """Draws the images of set `name`; None where there is no recipe."""
    sampler.load(name)
    applied = [
        CONDITIONINGS[name].applied(recipe, name) | {"index": place}
        for place, recipe in enumerate(recipes)
        if recipe is not None
    ]
    images = iter(sampler.draw(applied).images if applied else ())
    return [None if recipe is None else next(images) for recipe in recipes]


def _write(path: epath.Path, rows: Sequence[pictures.Row], **options: Any) -> None:
    content = pictures.grid_png(rows, _TILE, max_bytes=_MAX_BYTES, **options)
    files.write_bytes(path, content)


def _cell(heading: str, image: np.ndarray | None) -> pictures.Cell:
    shown = None if image is None else Image.fromarray(image)
    return pictures.Cell(heading=heading, image=shown)
