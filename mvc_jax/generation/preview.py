"""Pictures to look at before hours of drawing.

A part beside the stages: it draws by the sampler, and writes pictures alone.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data.cache import pairs_of_all_classes
from mvc_jax.data.splits import Split
from mvc_jax.errors import UserError
from mvc_jax.generation.conditionings import CONDITIONINGS
from mvc_jax.generation.sampler import Sampler

CONTACT_SHEET = "contact_sheet.png"
CONDITIONING_FIGURE = "conditionings.png"
LEVEL_FIGURE = "levels.png"
TITLES = {  # in the order of the figure
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
_TOKENS = {"tokens 1": "words", "tokens 2": "+ padding", "tokens 3": "all tokens"}
_COLUMNS = 8
_CONDITIONING_NOTE = (
    "Along a column the noise is the same. Where the name begins with image, the "
    "image's latents condition as well; elsewhere text states alone, or edges."
)
_LEVEL_NOTE = (
    "Along a row image, partner and noise are the same. Dims: how many of every "
    "token's are the partner's. Then whole tokens: the captions' words, as many tokens "
    "of padding as well, all but the first."
)
_TILE = 128
_SHEET_BYTES = 8_000_000
_LONGEST = 32  # characters of a name
_SAME = ("noise_seed", "text_scale", "image_scale")  # along a row


def contact_sheet(
    path: epath.Path,
    sampler: Sampler,
    recipes: Sequence[dict],
    train: Split,
    *,
    limit: int,
) -> None:
    """A row an image: the source, unmixed, and each mode of mixing, at the same noise.

    Args:
      path: of the picture.
      sampler: opened.
      recipes: of the run; of each source the first of each mode.
      train: the real images.
      limit: rows, of classes in turn.
    """
    of_source: dict[str, dict[str, dict]] = {}
    for recipe in recipes:
        of_source.setdefault(recipe["source"], {}).setdefault(recipe["mode"], recipe)
    sources = _sources(of_source, train, limit)
    modes = list(dict.fromkeys(recipe["mode"] for recipe in recipes))
    firsts = [next(iter(of_source[train.ids[i]].values())) for i in sources]
    columns = [("unmixed", "unmixed", firsts)]
    for mode in modes:
        found = [of_source[train.ids[i]].get(mode) for i in sources]
        columns.append(("mixed", mode, found))
    cells = [[_cell("source", train.images[i])] for i in sources]
    for name, heading, found in columns:
        wanted = [
            recipe and recipe | {key: first[key] for key in _SAME}
            for first, recipe in zip(firsts, found, strict=True)
        ]
        for row, image in zip(cells, _drawn(sampler, name, wanted), strict=True):
            row.append(_cell(heading, image))
    names = [train.class_names[train.labels[i]] for i in sources]
    rows = [
        pictures.Row(name=name[:_LONGEST], cells=row)
        for name, row in zip(names, cells, strict=True)
    ]
    _write(path, rows)


def conditionings(
    path: epath.Path,
    sampler: Sampler,
    recipes: Sequence[dict],
    train: Split,
    *,
    names: Sequence[str],
    optional: bool,
) -> list[str]:
    """Figure 4 of the supplement: a row a conditioning, a column an image.

    The first row shows the images themselves. Along a column the noise is the same.

    Args:
      path: of the picture.
      sampler: opened.
      recipes: of the run; of each source the first.
      train: the real images.
      names: of `CONDITIONINGS`.
      optional: leave out what cannot be drawn, and say so below.

    Returns:
      what was left out, a sentence each, with the way to get it.

    Raises:
      UserError: one cannot be drawn, and is not optional.
    """
    of_source: dict[str, dict] = {}
    for recipe in recipes:
        of_source.setdefault(recipe["source"], recipe)
    sources = _sources(of_source, train, _COLUMNS)
    firsts = [of_source[train.ids[i]] for i in sources]
    headings = [train.class_names[train.labels[i]] for i in sources]
    shown: dict[str, list] = {}
    left_out = []
    for name in sorted(names, key=_by_model):
        try:
            shown[name] = _drawn(sampler, name, firsts)
        except UserError as error:
            if not optional:
                raise
            left_out.append(f"Not drawn: {TITLES[name]}. {error}")
    images = {"original": [train.images[i] for i in sources]}
    images |= {TITLES[name]: shown[name] for name in TITLES if name in shown}
    rows = [
        pictures.Row(name=title, cells=list(map(_cell, headings, row)))
        for title, row in images.items()
    ]
    _write(path, rows, panels=1, notes=[_CONDITIONING_NOTE, *left_out])
    return left_out


def level_figure(
    path: epath.Path, sampler: Sampler, recipes: Sequence[dict], train: Split
) -> None:
    """Figure 5 of the supplement: more and more dims, and more and more tokens.

    Args:
      path: of the picture.
      sampler: opened.
      recipes: of `mix/levels.jsonl`.
      train: the real images.
    """
    of_source: dict[str, dict[str, dict]] = {}
    for recipe in recipes:
        of_source.setdefault(recipe["source"], {})[recipe["level"]] = recipe
    places = {id_: i for i, id_ in enumerate(train.ids)}
    rows = []
    for source, found in of_source.items():
        first = next(iter(found.values()))
        label, image = first["label"], train.images[places[source]]
        cells = [_cell("source", image)]
        cells.append(_cell("unmixed", _drawn(sampler, "unmixed", [first])[0]))
        rows.append(pictures.Row(name=label[:_LONGEST], cells=cells))
    for level in sorted({recipe["level"] for recipe in recipes}):  # dims come first
        wanted = [found.get(level) for found in of_source.values()]
        heading = _level(level, next(filter(None, wanted)))
        for row, image in zip(rows, _drawn(sampler, "mixed", wanted), strict=True):
            row["cells"].append(_cell(heading, image))
    _write(path, rows, panels=1, notes=[_LEVEL_NOTE])


def read_levels(workdir: epath.Path) -> list[dict]:
    """Recipes of Figure 5, where `mix.levels` asked for them."""
    path = workdir / "mix" / "levels.jsonl"
    return files.read_jsonl(path) if path.exists() else []


class Opened(Protocol):
    """A run that can be drawn of."""

    sampler: Sampler
    recipes: list[dict]
    train: Split


def figures(
    folder: epath.Path,
    open_run: Callable[[], Opened],
    *,
    names: Sequence[str],
    optional: bool,
    levels: Sequence[dict],
    again: bool,
) -> None:
    """Draws the supplement's figures 4 and 5, where they are asked for.

    Args:
      folder: of the pictures.
      open_run: called if there is something to draw.
      names: of the conditionings of Figure 4; none: it is not drawn.
      optional: see `conditionings`.
      levels: the recipes of Figure 5; none: it is not drawn.
      again: also a picture that is there.
    """
    asked = {CONDITIONING_FIGURE: names, LEVEL_FIGURE: levels}
    paths = {name: folder / name for name in asked if asked[name]}
    paths = {name: path for name, path in paths.items() if again or not path.exists()}
    if not paths:
        return
    run = open_run()
    drawn = (run.sampler, run.recipes, run.train)
    if path := paths.get(CONDITIONING_FIGURE):
        for sentence in conditionings(path, *drawn, names=names, optional=optional):
            logging.warning("generate.conditioning: %s", sentence)
    if path := paths.get(LEVEL_FIGURE):
        level_figure(path, run.sampler, levels, run.train)


def _level(level: str, recipe: dict) -> str:
    if level.startswith("dims"):
        return f"{len(recipe['dims'][0])} dims"
    return _TOKENS.get(level, level)


def _sources(of_source: Collection[str], train: Split, count: int) -> list[int]:
    """Rows of `count` images that have a recipe, of classes in turn."""
    there = np.flatnonzero([id_ in of_source for id_ in train.ids])
    pairs = np.stack([there, there], axis=1)
    return pairs_of_all_classes(pairs, train.labels, count)[:, 0].tolist()


def _by_model(name: str) -> tuple[bool, str]:
    """So that each model is loaded once."""
    return not CONDITIONINGS[name].finetuned, CONDITIONINGS[name].needs


def _drawn(
    sampler: Sampler, name: str, recipes: Sequence[dict | None]
) -> list[np.ndarray | None]:
    """Images of the set `name`, one for each recipe that is there."""
    sampler.load(name)
    wanted = [
        CONDITIONINGS[name].recipe(recipe, name) | {"index": place}
        for place, recipe in enumerate(recipes)
        if recipe is not None
    ]
    images = iter(sampler.draw(wanted).images if wanted else ())
    return [None if recipe is None else next(images) for recipe in recipes]


def _write(path: epath.Path, rows: Sequence[pictures.Row], **options: Any) -> None:
    content = pictures.grid_png(rows, _TILE, max_bytes=_SHEET_BYTES, **options)
    files.write_bytes(path, content)


def _cell(heading: str, image: np.ndarray | None) -> pictures.Cell:
    shown = None if image is None else Image.fromarray(image)
    return pictures.Cell(heading=heading, image=shown)
