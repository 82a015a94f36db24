"""Images -> captions, and the split that says who may see which image.

Reads: the source. Writes: `splits.json`, `captions.jsonl`. Test images are never
captioned.
"""

from collections.abc import Callable

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from mvc_jax.data import captions, manifest, splits
from mvc_jax.data.sources import open_source
from mvc_jax.errors import require

VERSION = "1"  # of the captioners in this file; raise it when their words change


def check(config: ConfigDict) -> None:
    """Checks the sections `data` and `caption`, opening the source but no image."""
    require(
        config.caption.captioner in CAPTIONERS,
        "config.caption.captioner",
        wanted=f"one of {', '.join(CAPTIONERS)}",
        got=repr(config.caption.captioner),
        fix="Name one of these.",
    )
    for field, least in (("size", 1), ("pool", 0), ("per_class", 1)):
        require(
            config.data[field] >= least,
            f"config.data.{field}",
            wanted=f"at least {least}",
            got=config.data[field],
            fix="Raise it.",
        )
    _split(config)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Splits the source by id and captions the base pool and the training images."""
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings["caption"] = config.caption.to_dict() | {"version": VERSION}
    stage = manifest.open_stage(workdir, "caption", settings)
    if stage.complete:
        return
    source, parts = _split(config)
    splits.write_splits(stage.folder / "splits.json", source, parts)
    _warn_of_lone_images(source, parts["train"])

    seen = np.concatenate([parts["pool"], parts["train"]])
    images = [source[i]["image"] for i in seen]
    texts = CAPTIONERS[config.caption.captioner](images)
    captions.write_captions(
        stage.folder / "captions.jsonl",
        {source.ids[i]: text for i, text in zip(seen, texts, strict=True)},
        captioner=config.caption.captioner,
        version=VERSION,
    )
    counts = {name: len(indices) for name, indices in parts.items()}
    sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
    logging.info("%d captions; images: %s", len(seen), sizes)
    stage.finish(["splits.json", "captions.jsonl"], **counts)


def _split(config: ConfigDict):
    source = open_source(config.data.source)
    parts = splits.make_splits(
        source,
        pool=config.data.pool,
        per_class=config.data.per_class,
        seed=config.seed,
    )
    return source, parts


def _warn_of_lone_images(source, train: np.ndarray) -> None:
    counts = np.bincount(source.labels[train], minlength=len(source.class_names))
    lone = [name for name, n in zip(source.class_names, counts, strict=True) if n == 1]
    if lone:
        logging.warning(
            "one training image, which can only pair with itself, in: %s",
            ", ".join(lone),
        )


def attributes(images: list[UInt8[np.ndarray, "H W 3"]]) -> list[str]:
    """Captions that measure each image: `"bold slanted strokes, large, left"`.

    Thickness is the mean ink, slant the shear of the ink's second moments, size its
    spread, position its horizontal centre. Each is cut at the terciles of all images,
    so that the words mean "among these".
    """
    words = (
        ("thin", "medium", "bold"),
        ("backward", "upright", "slanted"),
        ("small", "regular", "large"),
        ("left", "centred", "right"),
    )
    measures = np.stack([_measure(image) for image in images])
    terciles = np.quantile(measures, [1 / 3, 2 / 3], axis=0)
    levels = (measures[:, None] >= terciles).sum(axis=1)  # [N, 4] in 0..2
    template = "{} {} strokes, {}, {}"
    return [
        template.format(*(w[level] for w, level in zip(words, row, strict=True)))
        for row in levels
    ]


def _measure(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "4"]:
    """Thickness, slant, size and position of the ink (bright on dark) of one image."""
    ink = image.mean(axis=2) / 255.0 + 1e-6
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] / np.array(ink.shape)[:, None, None]
    share = ink / ink.sum()
    centre_y, centre_x = (share * y).sum(), (share * x).sum()
    y, x = y - centre_y, x - centre_x
    slant = -(share * x * y).sum() / (share * y * y).sum()
    size = np.sqrt((share * (x * x + y * y)).sum())
    return np.array([ink.mean(), slant, size, centre_x])


CAPTIONERS: dict[str, Callable] = {"attributes": attributes}
