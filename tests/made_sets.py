"""Sets of synthetic images as `generate` writes them, without drawing them."""

import pathlib

import numpy as np
from etils import epath

from mvc_jax.checkpoints import dataset_card
from mvc_jax.data import class_folders as naming
from mvc_jax.digests import Digests
from mvc_jax.generation import synthetic

NAMES = ("brain tumor", "naïve class", "healthy")
ROWS = [
    {
        "index": k,
        "label": k % 3,
        "source": f"s/{k}",
        "partners": ["s/9", "s/8"],
        "mode": "both",
        "positions": [1, 5][: k % 3],
        "donors": [0, 1][: k % 3],
        "dims": [[2, 7], [0, 9]][: k % 3],
        "dim_donors": [0, 1][: 2 * (k % 3)],
        "dim_tokens": [1, 1 + k % 3],
        "prompt": "a cat",
        "seed": 1 << 40,
        "noise_seed": k,
        "redraws": k % 2,
        "text_scale": 7.5,
        "image_scale": 1.5,
        "steps": 3,
        "sampler": "ddim",
        "guidance_interval": [0.0, 0.5],
        "guidance_rescale": 0.5,
        "model": "0badf00d",
    }
    for k in range(7)
]
NOTHING = dict.fromkeys(synthetic.PROVENANCE)
REAL = [
    NOTHING | {"index": i, "label": i, "source": f"s/{i}", "mode": "real"}
    for i in range(3)
]
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 6, 3), dtype=np.uint8)


PARTS = (
    "dev",
    "test",
    "valid",
    "bullet train",
    "a.b",
    "cat's",
    "c+",
    "(d)",
    "हिन्दी",
    "数",
)


def store(folder, names=NAMES, size=4, **form):
    path = epath.Path(folder)
    digests = Digests(path, f"{path.parent}-digests/{path.name}")
    return synthetic.Store(path, digests, names, "0badf00d", size, **form)


def write(folder, names=NAMES, rows=ROWS, size=4, real=False, images=IMAGES, **form):
    """A set as `generate` writes it, shard by shard."""
    made = store(folder, names, size, **form)
    for part in made.missing(len(rows)):
        mine = slice(part.start, part.stop)
        made.write(part, list(images[mine]), rows[mine])
    if real:
        made.write_real(list(IMAGES[:3]), REAL, 0)
    made.finish()
    dataset_card.write(made.folder, card(names, rows, real=real, **form))
    return pathlib.Path(folder)


def card(
    names=NAMES, rows=ROWS, *, real=False, pictures=True, format="png", class_folders=()
):
    labels = [row["label"] for row in rows]
    return dataset_card.Facts(
        set="mixed",
        about="The method.",
        dataset="beans `and` peas",
        classes=names,
        folders=class_folders or naming.class_folders(names),
        counts=np.bincount(labels, minlength=len(names)).tolist(),
        real=[int(real)] * len(names),
        size=f"8 x 6 pixels, {format}",
        settings={"sampler": "ddim, 3 steps"},
        redrawn={"NaN": 2},
        left_out={"black": 1, "copies": 3},
        base="some/base",
        license={"license": "other", "license_name": "unknown-see-the-base"},
        pictures=pictures,
    )
