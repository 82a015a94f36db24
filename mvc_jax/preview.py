"""Pictures to look at before hours of drawing.

A part beside the stages: it draws by the sampler, and writes pictures alone.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data.cache import pairs_of_all_classes
from mvc_jax.data.splits import Split
from mvc_jax.sampler import Sampler

CONTACT_SHEET = "contact_sheet.png"
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
    there = np.flatnonzero([id_ in of_source for id_ in train.ids])
    pairs = np.stack([there, there], axis=1)
    sources = pairs_of_all_classes(pairs, train.labels, limit)[:, 0].tolist()
    modes = list(dict.fromkeys(recipe["mode"] for recipe in recipes))
    firsts = [next(iter(of_source[train.ids[i]].values())) for i in sources]
    columns = [("unmixed", "unmixed", firsts)]
    for mode in modes:
        found = [of_source[train.ids[i]].get(mode) for i in sources]
        columns.append(("mixed", mode, found))
    cells = [[_cell("source", train.images[i])] for i in sources]
    for name, heading, found in columns:
        sampler.load(name)
        wanted = [
            recipe | {key: first[key] for key in _SAME} | {"index": place}
            for place, (first, recipe) in enumerate(zip(firsts, found, strict=True))
            if recipe is not None
        ]
        images = iter(sampler.draw(wanted).images if wanted else ())
        for row, recipe in zip(cells, found, strict=True):
            row.append(_cell(heading, None if recipe is None else next(images)))
    names = [train.class_names[train.labels[i]] for i in sources]
    rows = [
        pictures.Row(name=name[:_LONGEST], cells=row)
        for name, row in zip(names, cells, strict=True)
    ]
    files.write_bytes(path, pictures.grid_png(rows, _TILE, most_bytes=_SHEET_BYTES))


def _cell(heading: str, image: np.ndarray | None) -> pictures.Cell:
    shown = None if image is None else Image.fromarray(image)
    return pictures.Cell(heading=heading, image=shown)
