"""A pool of images from elsewhere, on which the small base is trained.

The stage `caption` writes it into its folder `pool/`, as the files of `data/splits.py`
with one split, and its captions beside them. No image of it is also in test.
"""

from collections.abc import Callable

import numpy as np
from etils import epath
from jaxtyping import Int

from mvc_jax import files
from mvc_jax.data import duplicates, splits
from mvc_jax.data.class_folders import class_folders
from mvc_jax.data.example import Source
from mvc_jax.data.gather import Gathered, ReaderOptions, gather, write_rows
from mvc_jax.data.order import generator
from mvc_jax.data.sources import folders_of
from mvc_jax.errors import UserError

FOLDER = "pool"
_NAMED = 3  # shared images, in the message


def seed_of(run: int, own: int) -> int:
    """The seed of pool and base: `pretrain.seed` if it is not -1, or the run's."""
    return run if own < 0 else own


def choose(
    source: Source,
    count: int,
    *,
    seed: int,
    usable: np.ndarray | None = None,
) -> dict[str, Int[np.ndarray, " n"]]:
    """Which images of a source are the pool: none of its own test images.

    Args:
      source: of the images.
      count: how many, in proportion to the classes; 0: all.
      seed: of the draw.
      usable: bool [N]; None: all are.

    Returns:
      split name -> ascending indices into the source; all but `pool` are empty.

    Raises:
      UserError: there are not so many.
    """
    free = np.ones(len(source), bool) if usable is None else usable
    if source.is_test is not None:
        free = free & ~source.is_test
    there = int(free.sum())
    if usable is not None:  # fewer, where some were left out
        count = min(count, there)
    if not there or count > there:
        raise UserError(
            "config.pretrain.pool.images",
            wanted=f"at most the {there} images of config.pretrain.source that are "
            "neither its own test images nor left out",
            got=f"{count or 'all'}",
            fix="Lower it; 0 uses all that there are."
            if there
            else "Name another source.",
        )
    draw = generator(seed, "pretrain/pool")
    order = draw.permutation(len(source))
    order = order[free[order]]
    classes = len(source.class_names)
    quotas = splits.proportional(
        count or there, np.bincount(source.labels[free], minlength=classes)
    )
    labels = source.labels[order]
    chosen = [order[labels == k][:quota] for k, quota in enumerate(quotas)]
    empty = np.zeros(0, np.int64)
    return {
        **dict.fromkeys(splits.SPLITS, empty),
        "pool": np.sort(np.concatenate(chosen)),
    }


def read(
    source: Source,
    folder: epath.Path,
    options: ReaderOptions,
    *,
    name: str,
    count: int,
    seed: int,
    test: splits.Split,
    policy: str,
    on_bad: Callable[[dict[int, str]], None],
    on_image: Callable[[int], None],
) -> None:
    """Reads the pool and writes its files.

    Args:
      source: of the images.
      folder: where they are written.
      options: how they are read.
      name: of the source.
      count: as `choose` takes it.
      seed: the same.
      test: the test images of the run, of the same size.
      policy: for images that are also in test: `refuse` or `remove`.
      on_bad: called with bad images; may raise.
      on_image: as `gather` takes it.

    Raises:
      UserError: images are also in test and the policy is `refuse`.
    """
    references = [duplicates.fingerprint(image) for image in test.images]
    shared: dict[int, dict[str, str]] = {}

    def split(usable: np.ndarray, copied: np.ndarray) -> dict[str, np.ndarray]:
        return choose(source, count, seed=seed, usable=usable & ~copied)

    def find_copies(gathered: Gathered) -> list[int]:
        mine = gathered.splits["pool"].tolist()
        queries = [gathered.info[i].fingerprint for i in mine]
        found = duplicates.find(queries, references)
        new = {
            mine[i]: {"pool": source.ids[mine[i]], "test": test.ids[j]}
            for i, j in found
        }
        shared.update(new)
        if new and policy == "refuse":
            raise _shared_error([*new.values()], len(mine))
        return list(new)

    gathered = gather(
        source,
        folder / "images.npy",
        split,
        options,
        on_bad=on_bad,
        copies=find_copies,
        on_image=on_image,
    )
    files.write_jsonl(folder / "duplicates.jsonl", list(shared.values()))
    write_rows(
        folder,
        source,
        gathered,
        groups=None,
        name=name,
        remarks=source.remarks,
        duplicates="remove",
        class_folders=class_folders(folders_of(source)),
    )


def _shared_error(rows: list[dict[str, str]], count: int) -> UserError:
    named = ", ".join(row["pool"] for row in rows[:_NAMED])
    return UserError(
        "config.pretrain.source",
        wanted="images of which none is also in test, by its fingerprint",
        got=f"{len(rows)} of {count} that are, e.g. {named}",
        fix="Do without them: --config.pretrain.pool.duplicates=remove.",
        details=[f"{row['pool']} is {row['test']} of test" for row in rows],
    )
