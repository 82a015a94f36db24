"""The filters of `generate`: opened, asked, and what they remove kept for the eye.

`screening/filters.py` judges, `screening/removed.py` lists and shows; here they meet
the config, a CLIP and the folders of the sets.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from mvc_jax import files
from mvc_jax.checkpoints import clip_checkpoint, diffusers_layout, pipeline_folder
from mvc_jax.data import captions
from mvc_jax.data.splits import Split
from mvc_jax.errors import require
from mvc_jax.generation import synthetic
from mvc_jax.generation.ablation import CLIP_FIELD
from mvc_jax.models import clip
from mvc_jax.screening import filters, removed
from mvc_jax.screening.selection import Judge


def check(config: dict[str, Any]) -> None:
    """Checks `generate.filter` of a run's settings, and the files of a CLIP here."""
    fields, named = _fields(config), config["generate"]["clip"]
    base, own = config["base"]["path"], config["pretrain"]["image_encoder"]["steps"] > 0
    if base:
        own = pipeline_folder.is_hub_name(base) or _has_tower(epath.Path(base))
    # Recipes of the user's own have the partners that they have.
    partners = 1 if config["mix"]["file"] else config["mix"]["partners"]
    fields.check(partners=partners, has_clip=bool(named or own))
    if not fields.asks_images or not (named or own):
        return
    by_texts = fields.label == "clip"
    require(
        bool(named or base) or not by_texts,
        f"{filters.FIELD}.label",
        wanted="a CLIP with a text tower, to compare images with texts",
        got="'clip', and only the image tower that pretrain makes",
        fix="Name a whole CLIPModel by config.generate.clip, or set "
        f"--{filters.FIELD}.label=folds.",
    )
    if named or base:
        clip_checkpoint.check(named or base, field=CLIP_FIELD, text=by_texts)


@dataclasses.dataclass(frozen=True)
class Screen:
    """The filters of a run; without a judge, nothing is looked at, or written.

    Attributes:
      judge: that looks; None: all filters are off.
      train: the real training images.
    """

    judge: filters.Judge | None
    train: Split

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of what `finish` counts."""
        if self.judge is None:
            return ()
        asked = [name for name in filters.NAMES if name in self.judge.facts]
        return ("removed", *(f"removed_{name}" for name in asked))

    def of_set(self, folder: epath.Path) -> Judge | None:
        """Who judges images of the set in `folder`.

        Of images and their provenance it gives, for each, its rows of `removed.jsonl`,
        none for one that may stay. Pictures of the others are kept.
        """
        look = self.judge
        if look is None:
            return None

        def judge(images: np.ndarray, rows: Sequence[dict]) -> list[list[dict]]:
            found = look(images, rows)
            for image, row, findings in zip(images, rows, found, strict=True):
                if findings:
                    removed.keep_picture(folder, row["index"], image)
            names = self.train.class_names
            return [
                removed.rows(row, findings, names)
                for row, findings in zip(rows, found, strict=True)
            ]

        return judge

    def finish(self, store: synthetic.Store) -> tuple[list[str], dict[str, int]]:
        """Writes what was removed of a set, and says so where it is much.

        Args:
          store: of the set, whose shards are all there.

        Returns:
          the files written, relative to its folder, and counts for the manifest.

        Raises:
          UserError: no image is left.
        """
        if self.judge is None:
            return [], {}
        folder, found = store.folder, store.recorded("removed")
        labels = store.labels()
        names = removed.write(folder, found, self.train)
        counts = removed.count(found)
        gone = counts.pop("images")
        drawn = len(labels) + gone
        said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        logging.info(
            "generate/%s: filters removed %d of %d images%s",
            folder.name,
            gone,
            drawn,
            f" ({said})" if said else "",
        )
        for complaint in removed.complaints(found, drawn, self.judge.facts):
            logging.warning("generate/%s: %s", folder.name, complaint)
        require(
            len(labels) > 0 or drawn == 0,
            f"generate/{folder.name}",
            wanted="an image that the filters leave",
            got=f"none of {drawn} (removed by {said})",
            fix=f"Look at {folder / removed.SHEET}, loosen {filters.FIELD}, and delete "
            f"{folder.parent} to draw them again.",
        )
        kept = {self.train.class_names[label] for label in np.unique(labels)}
        lost = sorted({row["label"] for row in found} - kept)
        if lost:
            logging.warning(
                "generate/%s: the filters left nothing of %d classes (%s)",
                folder.name,
                len(lost),
                ", ".join(lost[:10]),
            )
        counts = {f"removed_{name}": count for name, count in counts.items()}
        return names, {"removed": gone} | counts

    def write_facts(self, folder: epath.Path) -> list[str]:
        """Writes where the thresholds lie into the stage's folder; the file's name."""
        if self.judge is None:
            return []
        files.write_json(folder / removed.FACTS, self.judge.facts)
        return [removed.FACTS]


def open_screen(
    config: dict[str, Any], workdir: epath.Path, train: Split, recipes: Sequence[dict]
) -> Screen:
    """The filters that the config asks for.

    Args:
      config: the settings of the run, checked.
      workdir: of the run.
      train: the real training images.
      recipes: of all images that will be judged.

    Raises:
      UserError: the data, the recipes or the CLIP cannot bear what is asked.
    """
    fields = _fields(config)
    if not fields.any:
        return Screen(None, train)
    tower = _load_clip(config, workdir) if fields.asks_images else None
    partners = max(len({*r["partners"]} - {r["source"]}) for r in recipes)
    fields.check(partners=partners, has_clip=bool(tower) or not fields.asks_images)
    zero_shot = None
    if tower is not None and fields.label == "clip":
        zero_shot = tower.zero_shot(train.class_names, config["data"]["class_type"])
    judge = filters.Judge(
        fields,
        train,
        seed=config["seed"],
        embed=tower and tower.embed,
        zero_shot=zero_shot,
    )
    label = judge.facts.get("label")
    if label:
        logging.info(
            "the filter label would remove %d of %d real training images",
            label["real_removed"],
            label["real_images"],
        )
    return Screen(judge, train)


@dataclasses.dataclass(frozen=True)
class _Tower:
    """A CLIP on one device, whatever the others do."""

    model: clip.Clip
    params: clip.Params

    @functools.cached_property
    def run(self) -> Callable:
        return jax.jit(self.model.image_embeddings)

    def embed(self, images: Iterable[np.ndarray]) -> Float[np.ndarray, "N P"]:
        """Embeddings of images [H, W, 3], one at a time.

        How a product of matrices is rounded depends on the rows beside a row. Beside
        the UNet's many steps this costs little.
        """
        pixels = (self.model.preprocess(np.asarray(image)[None]) for image in images)
        return np.concatenate([np.asarray(self.run(self.params, p)) for p in pixels])

    def zero_shot(self, names: Sequence[str], class_type: str) -> filters.ZeroShot:
        """Embeddings -> probabilities of `"a photo of {class_type} {name}"`."""
        words = (f"{class_type} {captions.readable(name)}".strip() for name in names)
        texts = [f"a photo of {word}" for word in words]
        encode, ask = jax.jit(self.model.text_embeddings), jax.jit(clip.zero_shot)
        states = encode(self.params, self.model.tokenize(texts))
        scale = self.params["logit_scale"]
        return lambda images: np.asarray(ask(np.float32(images), states, scale))


def _load_clip(config: dict[str, Any], workdir: epath.Path) -> _Tower | None:
    """The CLIP that `generate.clip` names, or the base's own; None: there is none."""
    path = config["generate"]["clip"]
    if not path:
        path, _ = pipeline_folder.resolve(**diffusers_layout.recorded_base(workdir))
        if not _has_tower(path):
            return None
    by_texts = config["generate"]["filter"]["label"] == "clip"
    model, params = clip_checkpoint.load(path, field=CLIP_FIELD, text=by_texts)
    return _Tower(model, jax.device_put(params))


def _has_tower(base: epath.Path) -> bool:
    return (base.expanduser() / clip_checkpoint.IMAGE_ENCODER / "config.json").exists()


def _fields(config: dict[str, Any]) -> filters.Filters:
    return filters.Filters(**config["generate"]["filter"])
