"""A summary of the dataset for its owner: a table, a contact sheet and warnings."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data import splits

_MAX_CLASSES = 20  # on the sheet and in the table; the first of them are shown
_COLUMNS = 8  # images per class on the sheet
_EXAMPLES = 3  # captions per class
_MAX_LINES = 20  # of bad images, of duplicates, and of two labels
_TILE = 96
_SHEET_BYTES = 2_000_000


def write_contact_sheet(folder: epath.Path) -> None:
    """Writes `contact_sheet.png`: the first training images of each class, resized.

    Args:
      folder: of the stage `caption`, with all files of `splits.FILES`.
    """
    train = splits.read_split(folder, "train")
    names = train.class_names[:_MAX_CLASSES]
    members = [np.flatnonzero(train.labels == label) for label in range(len(names))]
    columns = min(max(map(len, members)), _COLUMNS)
    rows: list[pictures.Row] = []
    for label, (name, mine) in enumerate(zip(names, members, strict=True)):
        images = [Image.fromarray(train.images[i]) for i in mine[:columns]]
        images += [None] * (columns - len(images))
        cells = [pictures.Cell(heading="", image=image) for image in images]
        name = f"{_short(name)} ({len(mine)})"
        rows.append(pictures.Row(name=name, number=label, cells=cells))
    content = pictures.grid_png(rows, _TILE, max_bytes=_SHEET_BYTES)
    files.write_bytes(folder / "contact_sheet.png", content)


def table(folder: epath.Path, counts: dict[str, int]) -> str:
    """Lists classes, counts, image sizes, example captions and bad images.

    Args:
      folder: of the stage `caption`, which is complete.
      counts: from its manifest.

    Returns:
      lines for a terminal.
    """
    dataset = files.read_json(folder / "dataset.json")
    rows = files.read_jsonl(folder / "images.jsonl")
    captions = files.read_jsonl(folder / "captions.jsonl")
    names = dataset["class_names"]
    sizes = ", ".join(
        f"{counts[part]} {part}"
        for part in (*splits.SPLITS, splits.VALIDATION)
        if counts.get(part)
    )
    lines = [f"\n{dataset['name']}: {len(names)} classes, {sizes} images"]
    lines += _classes(names, rows, {row["id"]: row["caption"] for row in captions})
    notes = Counter(row["note"] for row in rows if row["note"])
    lines += [f"{count} images: {note}" for note, count in sorted(notes.items())]
    lines += dataset["remarks"]
    lines += _bad(folder)
    lines += _duplicates(folder, dataset["duplicates"])
    lines += _conflicts(folder / "label_conflicts.jsonl")
    captioner = captions[0]["captioner"] if captions else "nobody"
    lines.append(
        f"{len(captions)} captions by {captioner}: {counts['cleaned']} cleaned, "
        f"{counts['empty']} empty (the class prompt alone)"
    )
    lines.append(f"contact sheet: {folder / 'contact_sheet.png'}")
    return "\n".join(lines)


def warn_of_classes(names: Sequence[str], labels: np.ndarray) -> None:
    """Warns if there is one class only, or classes of one training image.

    Args:
      names: of the classes.
      labels: of the training images.
    """
    if len(names) == 1:
        logging.warning(
            "one class only, %r; if its folder contains the classes, or train and "
            "test, pass that folder",
            names[0],
        )
    counts = np.bincount(labels, minlength=len(names))
    single = [name for name, n in zip(names, counts, strict=True) if n == 1]
    if single:
        logging.warning(
            "one training image, which can only be paired with itself, in: %s",
            ", ".join(single),
        )


def warn_of_same_captions(texts: Sequence[str], train: splits.Split) -> None:
    """Warns of classes whose captions are all the same, which mixing cannot change.

    Args:
      texts: captions of the training images.
      train: the training images.
    """
    texts_of: dict[int, list[str]] = {}
    for text, label in zip(texts, train.labels.tolist(), strict=True):
        texts_of.setdefault(label, []).append(text)
    same = [group for group in texts_of.values() if len(group) > 1 == len(set(group))]
    if same:
        logging.warning(
            "all captions are the same within %d of %d classes, where mixing them has "
            "no effect; --config.caption.captioner=blip2 describes each image",
            len(same),
            len(train.class_names),
        )


def _classes(names: list[str], rows: list[dict], captions: dict) -> list[str]:
    width = max(len(_short(name)) for name in names[:_MAX_CLASSES])
    every = (*splits.SPLITS, splits.VALIDATION)
    parts = [part for part in every if any(r["split"] == part for r in rows)]
    heading = "".join(f"{part:>{_column(part)}}" for part in parts)
    lines = [f"{'class':{width}}{heading}  original size"]
    for label, name in enumerate(names[:_MAX_CLASSES]):
        mine = [row for row in rows if row["label"] == label]
        counts = Counter(row["split"] for row in mine)
        line = "".join(f"{counts[part]:>{_column(part)}}" for part in parts)
        lines.append(f"{_short(name):{width}}{line}  {_size_range(mine)}")
        texts = [captions[row["id"]] for row in mine if row["id"] in captions]
        lines += [f"    {_short(text, 72) or '(empty)'}" for text in texts[:_EXAMPLES]]
    if len(names) > _MAX_CLASSES:
        lines.append(f"... and {len(names) - _MAX_CLASSES} more classes")
    return lines


def _column(part: str) -> int:
    """Characters of a column of numbers."""
    return max(len(part) + 1, 8)


def _size_range(rows: list[dict]) -> str:
    """`"640x480"`, or `"64x48 to 640x480"` from the smallest area to the largest."""
    sizes = sorted(
        {(row["width"] * row["height"], row["width"], row["height"]) for row in rows}
    )
    ends = [f"{width}x{height}" for _, width, height in (sizes[0], sizes[-1])]
    return " to ".join(dict.fromkeys(ends))


def _bad(folder: epath.Path) -> list[str]:
    bad = files.read_jsonl(folder / "bad_images.jsonl")
    lines = [f"{len(bad)} bad images" + (", left out:" if bad else "")]
    lines += [f"    {row['image']}: {row['reason']}" for row in bad[:_MAX_LINES]]
    return lines + _more(len(bad), folder / "bad_images.jsonl")


def _duplicates(folder: epath.Path, policy: str) -> list[str]:
    rows = files.read_jsonl(folder / "duplicates.jsonl")
    done = "removed" if policy == "remove" else "kept"
    train = [row for row in rows if "pool" not in row]
    of_pool = len(rows) - len(train)
    lines = [
        f"{len(train)} training images are also in test"
        + (f", and {of_pool} of the pool" if of_pool else "")
        + (f", {done} (config.data.duplicates={policy}):" if rows else "")
    ]
    lines += [
        f"    {row.get('train') or row['pool']} = {row['test']}"
        for row in rows[:_MAX_LINES]
    ]
    return lines + _more(len(rows), folder / "duplicates.jsonl")


def _conflicts(path: epath.Path) -> list[str]:
    rows = files.read_jsonl(path) if path.exists() else []  # older workdirs have none
    if not rows:
        return []
    lines = [f"{len(rows)} training images show a picture that has another label, too:"]
    lines += [
        f"    {row['image']} ({_short(row['label'])}) = {row['same_as']} "
        f"({_short(row['with_label'])})"
        for row in rows[:_MAX_LINES]
    ]
    return lines + _more(len(rows), path)


def _more(count: int, path: epath.Path) -> list[str]:
    rest = count - _MAX_LINES
    return [f"    ... and {rest} more in {path}"] if rest > 0 else []


def _short(text: str, length: int = 32) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
