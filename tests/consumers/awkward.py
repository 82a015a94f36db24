"""A set whose classes are called what programs may misread, and what it should be."""

import collections
import os
import pathlib
import re

import made_sets
import numpy as np
import readers

ABSENT = "no image"  # the class of which none was kept
CLASSES = tuple(
    sorted(
        [
            *("train", "test", "val", "valid", "validation", "dev", "eval"),
            *("bullet train", "training", "a.b", "M2.5 bolt", "M20 bolt", "3.5 mm"),
            *("30 mm", "cat's", "c+", "(d)", "e, f", "हिन्दी", "ภาษา", "数", "日本語"),
            *(
                "100%",
                "#1",
                "a[b]",
                "x*",
                "q?",
                "01",
                "2",
                "10",
                "nan",
                "no",
                "~t",
                "café",
            ),
            *('say "so"', "a=b", "a&b", "{c}", "a;b", " lead", "-minus", ABSENT),
        ]
    )
)
_EACH = 2  # images of a class
_DRAWN = [label for label, name in enumerate(CLASSES) if name != ABSENT]
_COUNT = _EACH * len(_DRAWN)
IMAGES = np.random.default_rng(0).integers(
    0, 256, (_COUNT, *readers.SHAPE, 3), dtype=np.uint8
)


def write(work: pathlib.Path) -> pathlib.Path:
    """Writes what the documents read: the set, and the images that it was made from.

    Args:
      work: the folder in which the commands of the documents run.

    Returns:
      the folder of the set.
    """
    rows = [
        made_sets.ROWS[0] | {"index": k, "label": _DRAWN[k % len(_DRAWN)]}
        for k in range(_COUNT)
    ]
    folder = work / "runs" / "parts3" / "generate" / "mixed"
    made_sets.write(folder, CLASSES, rows, size=_COUNT // 2 + 1, images=IMAGES)
    (work / "runs" / "digits").symlink_to(work / "runs" / "parts3")
    (some, *_) = sorted(folder.glob("train/*/*.png"))
    for name in CLASSES:
        (work / "parts" / "train" / name).mkdir(parents=True)
        os.link(some, work / "parts" / "train" / name / "0.png")
    return folder


def expected(program: str) -> dict[str, tuple[str, int | None, str]]:
    """File -> class, number and pixels, as `program` should read them."""
    order = list(CLASSES)
    if program == "timm":
        order.sort(key=_natural)
    elif program in ("imagefolder", "Keras", "TFDS"):  # the classes that they meet
        order.remove(ABSENT)
    number_of = dict(zip(order, range(len(order)), strict=True))
    if program == "metadata.jsonl":
        number_of = collections.defaultdict(lambda: None)
    found = {}
    for k, image in enumerate(IMAGES):
        name = CLASSES[_DRAWN[k % len(_DRAWN)]]
        found[f"{k:08d}.png"] = name, number_of[name], readers.digest(image)
    return found


def _natural(name: str) -> list:
    """timm's order: 2 before 10."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdigit() else part for part in parts]


def equal(program: str, rows: list) -> int:
    """How many images were read once, and as expected."""
    times = collections.Counter(row[0] for row in rows)
    wanted = expected(program)
    return sum(
        times[file] == 1 and wanted.get(file) == tuple(rest) for file, *rest in rows
    )
