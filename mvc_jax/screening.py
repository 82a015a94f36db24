"""The filters of `generate`: opened, asked, and what they remove kept for the eye.

A part beside the stages. `data/filters.py` judges, `data/removed.py` lists and shows;
here they meet the config and the folders of the sets.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from mvc_jax import files
from mvc_jax.ablation import CLIP_FIELD
from mvc_jax.data import filters, removed
from mvc_jax.data.captions import readable
from mvc_jax.data.splits import Split
from mvc_jax.errors import require
from mvc_jax.models import clip
from mvc_jax.training import sharding

_BATCH = 16  # images that CLIP looks at together


def check(config: dict[str, Any]) -> None:
    """Checks the section `generate.filter` of a run's settings."""
    fields, path = _fields(config), config["generate"]["clip"]
    own = _has_own_tower(config) and fields.label != "clip"  # which has no text tower
    fields.check(partners=config["mix"]["partners"], has_clip=bool(path) or own)
    if fields.asks_images and path:
        clip.check(path, field=CLIP_FIELD, text=fields.label == "clip")


@dataclasses.dataclass(frozen=True)
class Screen:
    """The filters of a run.

    Attributes:
      judge: that looks.
      train: the real training images.
    """

    judge: filters.Judge
    train: Split

    def write_facts(self, folder: epath.Path) -> list[str]:
        """Writes where the thresholds lie into the stage's folder; the file's name."""
        files.write_json(folder / removed.FACTS, self.judge.facts)
        label = self.judge.facts.get("label")
        if label:
            logging.info(
                "the filter label would remove %d of %d real training images",
                label["real_removed"],
                label["real_images"],
            )
        return [removed.FACTS]

    def of_set(
        self, folder: epath.Path
    ) -> Callable[[np.ndarray, Sequence[dict]], list[list[dict]]]:
        """The function that judges images of the set in `folder`.

        It takes images and their provenance, keeps pictures of those to be removed, and
        gives for each image its rows of `removed.jsonl`, none for one that may stay.
        """

        def judge(images: np.ndarray, rows: Sequence[dict]) -> list[list[dict]]:
            found = self.judge(images, rows)
            for image, row, findings in zip(images, rows, found, strict=True):
                if findings:
                    removed.keep_picture(folder, row["index"], image)
            names = self.train.class_names
            return [
                removed.rows(row, findings, names)
                for row, findings in zip(rows, found, strict=True)
            ]

        return judge

    def finish(
        self, folder: epath.Path, found: Sequence[dict], labels: np.ndarray
    ) -> list[str]:
        """Writes what was removed of a set, and says so where it is much.

        Args:
          folder: of the set.
          found: rows of `removed.jsonl`.
          labels: of the images that are left.

        Returns:
          the files written, relative to `folder`.

        Raises:
          UserError: no image is left.
        """
        names = removed.write(folder, found, self.train)
        counts = removed.count(found)
        drawn = len(labels) + counts.pop("images")
        said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        logging.info(
            "%s: filters removed %d of %d images%s",
            *(folder.name, drawn - len(labels), drawn, f" ({said})" if said else ""),
        )
        for complaint in removed.complaints(found, drawn, self.judge.facts):
            logging.warning("%s: %s", folder.name, complaint)
        require(
            len(labels) > 0 or drawn == 0,
            f"generate/{folder.name}",
            wanted="an image that the filters leave",
            got=f"none of {drawn} (removed by {said})",
            fix=f"Look at {folder / removed.SHEET}, loosen {filters.FIELD}, and delete "
            f"{folder.parent} to draw them again.",
        )
        kept = {self.train.class_names[label] for label in labels.tolist()}
        lost = sorted({row["label"] for row in found} - kept)
        if lost:
            logging.warning(
                "%s: the filters left nothing of class %s",
                *(folder.name, ", ".join(lost[:10])),
            )
        return names


def open_screen(
    config: dict[str, Any], train: Split, base: epath.Path, mesh: Mesh
) -> Screen | None:
    """The filters that the config asks for; None: it asks for none.

    Args:
      config: the settings of the run.
      train: the real training images.
      base: the folder of the base model, which may have an image tower.
      mesh: the devices.
    """
    fields = _fields(config)
    if not fields.any:
        return None
    path = config["generate"]["clip"] or (base if _has_own_tower(config) else None)
    asked = {}
    if fields.asks_images and path:
        class_type = config["data"]["class_type"]
        asked = _clip_of(fields, path, train.class_names, class_type, mesh)
    return Screen(filters.Judge(fields, train, seed=config["seed"], **asked), train)


def _has_own_tower(config: dict[str, Any]) -> bool:
    """Whether `pretrain` made the base an image tower."""
    made = config["pretrain"]["image_encoder"]["steps"] > 0
    return made and not config["base"]["path"]


def _clip_of(
    fields: filters.Filters,
    path: epath.PathLike,
    class_names: Sequence[str],
    class_type: str,
    mesh: Mesh,
) -> dict[str, Callable]:
    """What a `Judge` asks of a CLIP: `embed`, and `zero_shot` where it is to name."""
    names = fields.label == "clip"
    model, params = clip.load(path, field=CLIP_FIELD, text=names)
    size = sharding.padded_size(_BATCH, mesh)
    run = sharding.over_batches(model.image_embeddings, params, size=size, mesh=mesh)

    def embed(images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), size)
        batches = (model.preprocess(images[i : i + size]) for i in starts)
        return np.concatenate([*run(batches)])

    if not names:
        return {"embed": embed}
    words = (f"{class_type} {readable(name)}".strip() for name in class_names)
    ids = model.tokenize([f"a photo of {word}" for word in words])
    texts = jax.jit(model.text_embeddings)(params, ids)
    scale = params["logit_scale"]
    ask = jax.jit(lambda images: clip.zero_shot(images, texts, scale))
    return {"embed": embed, "zero_shot": lambda images: np.asarray(ask(images))}


def _fields(config: dict[str, Any]) -> filters.Filters:
    return filters.Filters(**config["generate"]["filter"])
