"""Writes drawn images into the folder of a set, with their provenance."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from mvc_jax import processes
from mvc_jax.data import decode
from mvc_jax.data.splits import Split
from mvc_jax.errors import require_disk_space
from mvc_jax.generation.image_sampler import Settings
from mvc_jax.generation.image_status import Drawn
from mvc_jax.generation.synthetic import Part, Store, raw_bytes, real_row

# (images, whether each is usable, their provenance) -> indices of the images to keep,
# and rows of `removed.jsonl` for usable images that are not kept.
Select = Callable[
    [np.ndarray, np.ndarray, Sequence[dict]], tuple[list[int], list[dict]]
]


@dataclasses.dataclass(frozen=True)
class SetWriter:
    """Writes the images of a set.

    Attributes:
      store: the folder of the set.
      train: the real images.
      prompts: image id -> its row of `encode`.
      source_sizes: image id -> (width, height) in its source, in pixels.
      size: pixels along a side of stored images; 0: as drawn; -1: as the source image,
        at most as drawn.
      resize: how source images were made square, see `decode.fit`.
      seed: of the run.
      settings: with which the images are drawn.
    """

    store: Store
    train: Split
    prompts: Mapping[str, dict]
    source_sizes: Mapping[str, tuple[int, int]]
    size: int
    resize: str
    seed: int
    settings: Settings

    def write(
        self,
        part: Part,
        recipes: Sequence[dict],
        drawn: Drawn,
        notes: Sequence[dict],
        select: Select,
    ) -> None:
        """Selects the images of a part, resizes and writes them.

        Args:
          part: one of `store.missing`.
          recipes: of its images.
          drawn: its images.
          notes: of `image_status.redraw_unusable`.
          select: which images are kept.
        """
        rows = self._provenance(recipes, notes)
        kept, removed = select(drawn.images, drawn.status == 0, rows)
        rows = [rows[i] for i in kept]
        images = [
            self._resized(drawn.images[i], row["source"])
            for i, row in zip(kept, rows, strict=True)
        ]
        self.store.write(part, images, rows, notes, removed)

    def write_real(self) -> None:
        """Writes this process's share of the training images, in the same form."""
        ids, size = self.train.ids, self.store.shard_size
        for shard, start in processes.share([*enumerate(range(0, len(ids), size))]):
            part = range(start, min(start + size, len(ids)))
            rows = [real_row(i, self.prompts[ids[i]]) for i in part]
            images = [self._resized(self.train.images[i], ids[i]) for i in part]
            self.store.write_real(images, rows, shard)

    def _provenance(self, recipes: Sequence[dict], notes: Sequence[dict]) -> list[dict]:
        redraws = {note["index"]: note["redraws"] for note in notes}
        return [
            {
                **recipe,
                "label": _label(recipe, self.prompts[recipe["source"]]["label"]),
                "prompt": self.prompts[recipe.get("target", recipe["source"])][
                    "prompt"
                ],
                "seed": self.seed,
                "redraws": redraws.get(recipe["index"], 0),
                "steps": self.settings.steps,
                "sampler": self.settings.sampler,
                "guidance_interval": list(self.settings.guidance_interval),
                "guidance_rescale": self.settings.guidance_rescale,
                "model": self.store.model,
            }
            for recipe in recipes
        ]

    def _resized(
        self, image: UInt8[np.ndarray, "S S 3"], source: str
    ) -> UInt8[np.ndarray, "H W 3"]:
        if self.size < 0:
            width, height = self.source_sizes[source]
            return decode.undo_fit(image, width, height, resize=self.resize)
        if self.size == 0:
            return image
        resample = "area" if self.size <= image.shape[0] else "lanczos"
        return decode.fit(image, self.size, resample=resample)


def _label(recipe: Mapping, own: int) -> int:
    """The class of an image: the likelier one, where its label is soft."""
    soft = recipe.get("soft_label")
    return own if soft is None else int(np.argmax(soft))


def require_space_for_sets(stores: Sequence[Store], images: int, *, side: int) -> None:
    """Checks the free disk space for images of some sets, uncompressed.

    Args:
      stores: the sets, all on one disk.
      images: that are missing in all of them, real ones as well.
      side: pixels along a side.

    Raises:
      UserError: the disk is too full.
    """
    forms = 2 if stores[0].pictures else 1
    require_disk_space(
        stores[0].folder.parent.parent,
        raw_bytes(images, side, pictures=stores[0].pictures),
        what=f"{images} images of {side} x {side} pixels in {forms} form(s)",
        fix="Free some or name a --workdir on another disk; "
        "--config.generate.folder=False needs half.",
    )
