"""What limits the results, in sentences beside the numbers: copies, few seeds, data."""

from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.data import captions
from mvc_jax.metrics import distances

_BY_PIXELS = (
    "Distances by pixels are root mean squared differences of images in [0, 1], at no "
    f"more than {distances.MAX_SIZE} pixels a side. A copy is nearer to a training "
    "image than any two different training images are to each other; a leak is nearer "
    "to a test image than any different training image is."
)


def describe(workdir: epath.Path, seeds: int, once: str) -> dict[str, Any]:
    """The caveats of a workdir's results.

    Args:
      workdir: with finished stages before `evaluate`.
      seeds: classifiers of each run.
      once: what all results share (`runs.drawn_once`).

    Returns:
      `caveats`: sentences by what they limit: "accuracy", "copies" and "data"; `notes`:
      all of them.
    """
    found = {
        "accuracy": [
            *_of_test_images(workdir / "caption"),
            _of_one_split(seeds, once),
        ],
        "copies": [_BY_PIXELS],
        "data": _cut_captions(workdir / "encode") + _of_data(workdir / "caption"),
    }
    notes = [*found["data"], *found["accuracy"], *found["copies"]]
    return {"caveats": found, "notes": notes}


def _cut_captions(encode: epath.Path) -> list[str]:
    """Returns how many captions did not fit into their prompts, as sentences."""
    if not (encode / "prompts.jsonl").exists():  # no generator, no prompts
        return []
    cut = captions.cut_by_class(files.read_jsonl(encode / "prompts.jsonl"))
    return [f"{captions.counted(cut, kept)}." for kept in cut if cut[kept]]


def _of_test_images(caption: epath.Path) -> list[str]:
    """Returns what was trained on images that are in test too, as sentences."""
    if files.read_json(caption / "dataset.json")["duplicates"] != "keep":
        return []
    rows = files.read_jsonl(caption / "duplicates.jsonl")
    copies = sum("pool" not in row for row in rows)
    notes = []
    if copies:
        notes.append(
            f"{copies} training images are in test as well: every accuracy is too high "
            "(config.data.duplicates=remove takes them out of train)."
        )
    if pool := len(rows) - copies:
        notes.append(
            f"{pool} images of the base model's pool are in test as well: it has seen "
            "them (config.data.duplicates=remove takes them out of the pool)."
        )
    return notes


def _of_data(caption: epath.Path) -> list[str]:
    """Returns which images were left out, as sentences."""
    notes = []
    if files.read_json(caption / "dataset.json")["duplicates"] != "keep":
        rows = files.read_jsonl(caption / "duplicates.jsonl")
        if copies := sum("pool" not in row for row in rows):
            notes.append(
                f"{copies} images that are also in test were removed from train."
            )
    if bad := len(files.read_jsonl(caption / "bad_images.jsonl")):
        notes.append(f"{bad} images could not be used and were left out.")
    return notes


def _of_one_split(seeds: int, once: str) -> str:
    """Returns what the spread of an accuracy does not know, as a sentence."""
    spread = (
        f"A standard deviation is over {seeds} classifier seeds, an interval over "
        "seeds and test images; both are of"
    )
    if seeds == 1:
        spread = "With one classifier seed there is no spread; the result is of"
    return (
        f"{spread} {once}. Another split changes every row: `mvc-jax repeat` makes "
        "several, and intervals over them."
    )
