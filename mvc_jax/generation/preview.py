"""Figures of a few images: a contact sheet, and the figures of the supplement."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from mvc_jax.data.cache import pairs_of_all_classes
from mvc_jax.data.splits import Split
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.generation.conditionings import CONDITIONINGS, model_order
from mvc_jax.generation.figures import REAL, Cell, Figure, Row
from mvc_jax.generation.image_sampler import ImageSampler
from mvc_jax.mixing.recipes import MODES

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
    "real_guidance": "noised image + caption, not fine-tuned",
    "gif_sd": "noised image + caption, latents changed (GIF-SD)",
    "da_fusion": "noised image + caption (DA-Fusion)",
    "diff_mix": "noised image + prompt of another class (Diff-Mix)",
}
_LEVEL_HEADINGS = {
    "tokens 1": "words",
    "tokens 2": "+ padding",
    "tokens 3": "all tokens",
}
_COARSE_FINE_NOTE = (
    "The first image of a row is real; the others are made from it. Coarse mixing "
    "replaces whole tokens of its caption by those of another image of the class, fine "
    "mixing a few dims of every token. No image was picked by hand."
)
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
_OF_MODE = 2  # images of each mode, as in the supplement
_MAX_NAME = 32  # characters
_SHARED = ("noise_seed", "text_scale", "image_scale")  # by all images of a source
_CAPTIONED = (
    "mixed",
    "caption",
    "noised",
    "interpolated",
    "target",
)  # text states of prompts


@dataclasses.dataclass(frozen=True)
class Cells:
    """Makes the cells of figures, with their provenance.

    Attributes:
      train: the real images.
      prompts: of these, by id.
      sampler: of the run; None: nothing is drawn.
      seed: of the run.
    """

    train: Split
    prompts: Mapping[str, str]
    sampler: ImageSampler | None = None
    seed: int = 0

    def real(self, row: int, heading: str) -> Cell:
        """Training image `row`."""
        id_ = self.train.ids[row]
        return Cell(
            heading,
            self.train.images[row],
            REAL,
            self.train.class_names[self.train.labels[row]],
            {"source": id_, "mode": REAL, "prompt": self.prompts.get(id_)},
        )

    def drawn(
        self, name: str, headings: Sequence[str], recipes: Sequence[dict | None]
    ) -> list[Cell]:
        """Draws the images of set `name`; empty cells where there is no recipe."""
        self.sampler.load(name)
        conditioning, settings = CONDITIONINGS[name], self.sampler.settings
        edits = self.sampler.edits
        applied = [r and conditioning.applied(r, name, edits) for r in recipes]
        placed = [
            recipe | {"index": place}
            for place, recipe in enumerate(applied)
            if recipe is not None
        ]
        images = iter(self.sampler.draw(placed).images if placed else ())
        cells = []
        for heading, recipe in zip(headings, applied, strict=True):
            if recipe is None:
                cells.append(Cell(heading))
                continue
            captioned = conditioning.text in _CAPTIONED
            of = recipe.get("target", recipe["source"])
            provenance = {
                **recipe,
                "prompt": self.prompts.get(of) if captioned else None,
                "seed": self.seed,
                "redraws": 0,
                "steps": settings.steps,
                "sampler": settings.sampler,
                "guidance_interval": list(settings.guidance_interval),
                "guidance_rescale": settings.guidance_rescale,
            }
            cells.append(Cell(heading, next(images), name, recipe["label"], provenance))
        return cells


def contact_sheet(cells: Cells, recipes: Sequence[dict], *, limit: int) -> Figure:
    """A row per source: the source, unmixed, and each mode with the same noise.

    Args:
      cells: of the run.
      recipes: of the run; the first of each source and mode is used.
      limit: maximum number of sources; classes take turns.
    """
    by_source: dict[str, dict[str, dict]] = {}
    for recipe in recipes:
        by_source.setdefault(recipe["source"], {}).setdefault(recipe["mode"], recipe)
    train = cells.train
    sources = _sources(by_source, train, limit)
    modes = list(dict.fromkeys(recipe["mode"] for recipe in recipes))
    firsts = [next(iter(by_source[train.ids[i]].values())) for i in sources]
    columns = [("unmixed", "unmixed", firsts)]
    for mode in modes:
        found = [by_source[train.ids[i]].get(mode) for i in sources]
        columns.append(("mixed", mode, found))
    rows = [_class_row(train, i, [cells.real(i, "source")]) for i in sources]
    for name, heading, found in columns:
        same_noise = [
            recipe and recipe | {key: first[key] for key in _SHARED}
            for first, recipe in zip(firsts, found, strict=True)
        ]
        _append(rows, cells.drawn(name, [heading] * len(rows), same_noise))
    return Figure("Contact sheet", rows)


def coarse_fine_figure(cells: Cells, mixed: epath.Path, *, rows: int) -> Figure:
    """Figures 1 to 3 of the supplement: a real image, coarse and fine mixing of it.

    Args:
      cells: of the run.
      mixed: folder of the set, whose images are shown.
      rows: maximum number of sources; classes take turns.

    Raises:
      UserError: the set has no image.
    """
    train = cells.train
    found: dict[str, dict[str, list[int]]] = {}
    for row in synthetic.read_rows(mixed, ("index", "source", "mode")):
        modes = found.setdefault(row["source"], {})
        modes.setdefault(row["mode"], []).append(row["index"])
    if not found:
        raise UserError(
            "config.generate.coarse_fine",
            wanted="images in the set mixed to show",
            got="none: all were left out or removed by filters",
            fix="Set it to 0; mixed/redrawn.jsonl and removed.jsonl say why.",
        )
    modes = [mode for mode in MODES if any(mode in x for x in found.values())]
    # Sources with an image of every mode, where a class has any.
    shown = {
        id_: sum(min(len(x.get(mode, ())), _OF_MODE) for mode in modes)
        for id_, x in found.items()
    }
    best: dict[int, int] = {}
    for id_, label in zip(train.ids, train.labels.tolist(), strict=True):
        best[label] = max(best.get(label, 0), shown.get(id_, 0))
    complete = {
        id_
        for id_, label in zip(train.ids, train.labels.tolist(), strict=True)
        if shown.get(id_, 0) == best[label] > 0
    }
    sources = _sources(complete, train, rows)
    counts = {
        mode: max((len(found[train.ids[i]].get(mode, ())) for i in sources), default=0)
        for mode in modes
    }
    columns = [(m, n) for m in modes for n in range(min(counts[m], _OF_MODE))]
    wanted = {
        (i, mode, n): found[train.ids[i]][mode][n]
        for i in sources
        for mode, n in columns
        if len(found[train.ids[i]].get(mode, ())) > n
    }
    names = ("label", "image", *synthetic.PROVENANCE)
    images = {
        row["index"]: row
        for row in synthetic.read_rows(mixed, names, indices={*wanted.values()})
    }
    made = []
    for i in sources:
        of_row = [cells.real(i, "real")]
        for mode, n in columns:
            row = images.get(wanted.get((i, mode, n), -1))
            if row is None:
                of_row.append(Cell(mode))
                continue
            provenance = {key: row[key] for key in synthetic.PROVENANCE}
            label = train.class_names[row["label"]]
            of_row.append(Cell(mode, row["image"], "mixed", label, provenance))
        made.append(_class_row(train, i, of_row))
    drawn = [cell.provenance for row in made for cell in row.cells[1:] if cell.set]
    notes = [_COARSE_FINE_NOTE, *_alone_in_words("images", drawn)]
    return Figure("Coarse and fine mixing", made, notes)


def conditioning_figure(
    cells: Cells, recipes: Sequence[dict], *, names: Sequence[str], optional: bool
) -> tuple[Figure, list[str]]:
    """Figure 4 of the supplement: a row per conditioning, a column per source.

    The first row shows the sources. All images of a column have the same noise.

    Args:
      cells: of the run.
      recipes: of the run; the first of each source is used.
      names: of the conditionings.
      optional: whether a conditioning that cannot be drawn is left out and mentioned
        below the figure; otherwise it is an error.

    Returns:
      the figure; a sentence for each conditioning that was left out, with the error.

    Raises:
      UserError: a conditioning cannot be drawn, and `optional` is false.
    """
    by_source: dict[str, dict] = {}
    for recipe in recipes:
        by_source.setdefault(recipe["source"], recipe)
    train = cells.train
    sources = _sources(by_source, train, _COLUMNS)
    firsts = [by_source[train.ids[i]] for i in sources]
    headings = [train.class_names[train.labels[i]] for i in sources]
    drawn: dict[str, list[Cell]] = {}
    left_out = []
    for name in sorted(names, key=model_order):
        try:
            drawn[name] = cells.drawn(name, headings, firsts)
        except UserError as error:
            if not optional:
                raise
            left_out.append(f"Not drawn: {TITLES[name]}. {error}")
    rows = [Row("original", [*map(cells.real, sources, headings)])]
    rows += [Row(TITLES[name], drawn[name]) for name in TITLES if name in drawn]
    mixes = any(CONDITIONINGS[name].partners != 0 for name in drawn)
    alone = _alone_in_words("columns", firsts) if mixes else []
    notes = [_CONDITIONING_NOTE, *alone, *left_out]
    title = "The same images and noise under every conditioning"
    return Figure(title, rows, notes), left_out


def level_figure(cells: Cells, recipes: Sequence[dict]) -> Figure:
    """Figure 5 of the supplement: increasing numbers of dims and of tokens.

    Args:
      cells: of the run.
      recipes: of `mix/levels.jsonl`.
    """
    by_source: dict[str, dict[str, dict]] = {}
    for recipe in recipes:
        by_source.setdefault(recipe["source"], {})[recipe["level"]] = recipe
    places = {id_: i for i, id_ in enumerate(cells.train.ids)}
    firsts = [next(iter(found.values())) for found in by_source.values()]
    rows = [
        _class_row(cells.train, i, [cells.real(i, "source")])
        for i in (places[source] for source in by_source)
    ]
    _append(rows, cells.drawn("unmixed", ["unmixed"] * len(rows), firsts))
    for level in sorted({recipe["level"] for recipe in recipes}):  # dims come first
        of_level = [found.get(level) for found in by_source.values()]
        heading = _level_heading(level, next(filter(None, of_level)))
        _append(rows, cells.drawn("mixed", [heading] * len(rows), of_level))
    notes = [_LEVEL_NOTE, *_alone_in_words("rows", firsts)]
    return Figure("Mixing more and more", rows, notes)


def _level_heading(level: str, recipe: dict) -> str:
    if level.startswith("dims"):
        return f"{len(recipe['dims'][0])} dims"
    return _LEVEL_HEADINGS.get(level, level)


def _alone_in_words(what: str, recipes: Sequence[Mapping]) -> list[str]:
    """A sentence if sources are mixed with themselves, also logged; else none."""
    alone = sum({*recipe["partners"]} == {recipe["source"]} for recipe in recipes)
    if not alone:
        return []
    sentence = (
        f"Mixing changes nothing in {alone} of {len(recipes)} {what}: the class has a "
        "single training image, which is mixed with itself."
    )
    logging.warning("%s", sentence)
    return [sentence]


def _class_row(train: Split, source: int, cells: list[Cell]) -> Row:
    label = int(train.labels[source])
    return Row(train.class_names[label][:_MAX_NAME], cells, label)


def _append(rows: Sequence[Row], column: Sequence[Cell]) -> None:
    for row, cell in zip(rows, column, strict=True):
        row.cells.append(cell)


def _sources(by_source: Collection[str], train: Split, count: int) -> list[int]:
    """Rows of up to `count` images that have a recipe, by class.

    Classes take turns, so that all have as many.
    """
    rows = np.flatnonzero([id_ in by_source for id_ in train.ids])
    pairs = np.stack([rows, rows], axis=1)
    chosen = pairs_of_all_classes(pairs, train.labels, count)[:, 0].tolist()
    return sorted(chosen, key=lambda row: (train.labels[row], row))
