"""Applies the filters to the sets of a run and records what they remove."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mvc_jax import files
from mvc_jax.data.splits import Split
from mvc_jax.errors import UserError
from mvc_jax.screening import filters, removed
from mvc_jax.screening.selection import Screen
from mvc_jax.screening.settings import FIELD, FILTERS, FilterSettings


@dataclasses.dataclass(frozen=True)
class Screener:
    """The filters of a run.

    Attributes:
      filters: fitted on `train`; None: all are off, and nothing is written.
      train: the real training images.
    """

    filters: filters.FittedFilters | None
    train: Split

    @property
    def count_names(self) -> tuple[str, ...]:
        """Keys of the counts that `finish_set` returns."""
        if self.filters is None:
            return ()
        enabled = [name for name in FILTERS if name in self.filters.facts]
        return ("removed", *(f"removed_{name}" for name in enabled))

    def for_set(self, folder: epath.Path) -> Screen | None:
        """Returns a function that screens images of the set in `folder`.

        It maps (images, their provenance) to the rows of `removed.jsonl` of each image,
        none for an image to keep, and saves pictures of removed images. None if all
        filters are off.
        """
        find = self.filters
        if find is None:
            return None

        def screen(images: np.ndarray, rows: Sequence[dict]) -> list[list[dict]]:
            found = find(images, rows)
            for image, row, findings in zip(images, rows, found, strict=True):
                if findings:
                    removed.save_picture(folder, row["index"], image)
            names = self.train.class_names
            return [
                removed.rows(row, findings, names)
                for row, findings in zip(rows, found, strict=True)
            ]

        return screen

    def finish_set(
        self, folder: epath.Path, rows: Sequence[dict[str, Any]], labels: np.ndarray
    ) -> tuple[list[str], dict[str, int]]:
        """Writes what was removed of a complete set, and warns if it is much.

        Args:
          folder: of the set.
          rows: of `removed.jsonl`.
          labels: int [N], of the images kept.

        Returns:
          the files written, relative to `folder`, and counts for the manifest.

        Raises:
          UserError: no image is left.
        """
        if self.filters is None:
            return [], {}
        names = removed.write(folder, rows, self.train)
        counts = removed.count(rows)
        total_removed = counts.pop("images")
        drawn = len(labels) + total_removed
        by_filter = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
        logging.info(
            "generate/%s: filters removed %d of %d images%s",
            folder.name,
            total_removed,
            drawn,
            f" ({by_filter})" if by_filter else "",
        )
        for warning in removed.warnings(rows, drawn, self.filters.facts):
            logging.warning("generate/%s: %s", folder.name, warning)
        if drawn and not len(labels):
            raise UserError(
                f"generate/{folder.name}",
                wanted="an image that the filters keep",
                got=f"none of {drawn} (removed by {by_filter})",
                fix=f"Look at {folder / removed.SHEET}, relax {FIELD}, and delete "
                f"{folder.parent} to draw them again.",
            )
        self._warn_of_empty_classes(folder, rows, labels)
        counts = {f"removed_{name}": count for name, count in counts.items()}
        return names, {"removed": total_removed} | counts

    def _warn_of_empty_classes(
        self, folder: epath.Path, rows: Sequence[dict[str, Any]], labels: np.ndarray
    ) -> None:
        kept = {self.train.class_names[label] for label in np.unique(labels)}
        empty = sorted({row["label"] for row in rows} - kept)
        if empty:
            logging.warning(
                "generate/%s: the filters removed all images of %d classes (%s)",
                folder.name,
                len(empty),
                ", ".join(empty[:10]),
            )

    def write_facts(self, folder: epath.Path) -> list[str]:
        """Writes the thresholds into the stage's folder; returns the file's name."""
        if self.filters is None:
            return []
        files.write_json(folder / removed.FACTS, self.filters.facts)
        return [removed.FACTS]


def open_screener(
    settings: FilterSettings,
    *,
    workdir: epath.Path,
    train: Split,
    recipes: Sequence[dict[str, Any]],
    seed: int,
    clip_path: str,
    class_type: str,
) -> Screener:
    """Fits the filters on the real training images.

    Args:
      settings: checked.
      workdir: of the run, whose base model is used if `clip_path` is empty.
      train: the real training images.
      recipes: of all images to be screened.
      seed: of the folds.
      clip_path: folder or hub name of a CLIP; "": the base model's image encoder.
      class_type: noun between "a photo of" and the class name in CLIP's texts.

    Raises:
      UserError: the data, the recipes or the CLIP do not suffice for `settings`.
    """
    if not settings.enabled:
        return Screener(None, train)
    settings.require_top(len(train.class_names))
    settings.require_folds(
        max(len({*recipe["partners"]} - {recipe["source"]}) for recipe in recipes)
    )
    embed = zero_shot = None
    if settings.use_embeddings:
        from mvc_jax.screening import clip_embedder  # imports JAX

        by_text = settings.label == "clip"
        embedder = clip_embedder.load(workdir, clip_path, text=by_text)
        settings.require_clip(available=embedder is not None)
        if embedder is not None:
            embed = embedder.embed
            if by_text:
                zero_shot = embedder.zero_shot(train.class_names, class_type)
    fitted = filters.FittedFilters(
        settings, train, seed=seed, embed=embed, zero_shot=zero_shot
    )
    label = fitted.facts.get("label")
    if label:
        logging.info(
            "the filter label would remove %d of %d real training images",
            label["real_removed"],
            label["real_images"],
        )
    return Screener(fitted, train)
