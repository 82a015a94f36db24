"""Images of a run, and the texts about them: real ones, and those of synthetic sets."""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath
from PIL import Image

from mvc_jax import files
from mvc_jax.data import splits
from mvc_jax.mixing import marked_words

SETS = ("unmixed", "mixed", "pretrained")  # first columns; other sets follow
_PROVENANCE = ["index", "label", "source", "partners", "mode", "prompt"]
_RECIPE = {"source", "partners", "mode", "noise_seed", "positions", "donors"}
_RECIPE |= {"dims", "dim_donors", "dim_tokens"}
_MAX_NUMBERS = 12  # positions or dims shown of a recipe


@dataclasses.dataclass(frozen=True)
class RunImages:
    """Images of a run, and the texts about them.

    Attributes:
      generate: folder of the synthetic sets.
      encode: folder of the prompts.
      class_names: K strings indexed by label.
      real: the training images.
      captions: rows of `captions.jsonl` by image id.
      recipes: rows of `recipes.jsonl` by index.
      sets: set -> index -> provenance of a synthetic image, without its pixels.
    """

    generate: epath.Path
    encode: epath.Path
    class_names: list[str]
    real: splits.Split
    captions: dict[str, dict]
    recipes: dict[int, dict]
    sets: dict[str, dict[int, dict]]

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Row of `real` by image id."""
        return {id_: i for i, id_ in enumerate(self.real.ids)}

    def real_cell(self, id_: str, label: int, heading: str, alt: str = "") -> dict:
        """A cell of a training image, with what is known of it."""
        caption = self.captions.get(id_, {}).get("caption")
        return {
            "heading": heading,
            "image": Image.fromarray(self.real.images[self.places[id_]]),
            "alt": f"{self.class_names[label]}, {alt or heading + ' image'}",
            "facts": [("Training image", id_), ("Class", self.class_names[label])],
            "words": [{"of": "Caption", "pieces": [(caption, False)]}]
            if caption
            else [],
        }

    def cell(self, set_name: str, row: dict, heading: str, alt: str = "") -> dict:
        """A cell of a synthetic image; `read_pixels` adds the image."""
        facts = [
            ("Image", f"{row['index']} of the set {set_name}"),
            ("Class", self.class_names[row["label"]]),
            ("Source", row["source"]),
        ]
        if set_name == "mixed":
            facts += [("Mode", row["mode"]), ("Mixed in", self.mixed(row))]
        recipe = self.recipes.get(row["index"], {})
        if "noise_seed" in recipe:
            facts.append(("Noise seed", str(recipe["noise_seed"])))
        if row["prompt"] and set_name != "mixed":
            facts.append(("Prompt", row["prompt"]))
        return {
            "heading": heading,
            "set": set_name,
            "index": row["index"],
            "alt": f"{self.class_names[row['label']]}, {alt or heading + ' image'}",
            "facts": facts,
            "words": [],
        }

    def read_words(self, cells: Iterable[dict]) -> None:
        """Reads what was mixed in the images of `cells` into them, as `words`.

        Prompts in pieces of which some are marked; in a run whose prompts are not
        there, captions. A cell has its `recipe`, or is one of the set `mixed`.
        """
        mixed = [x for x in cells if x.get("set") == "mixed" or "recipe" in x]
        rows = [x.get("recipe") or self.recipes.get(x["index"], {}) for x in mixed]
        ids = {id_ for row in rows for id_ in (row.get("source"), *_partners(row))}
        encode, prompts, shape = self.encode, {}, (0, 0)
        if (encode / "prompts.jsonl").exists():
            prompts = marked_words.read_prompts(encode, ids)
            index = files.read_json(encode / "text_states" / "index.json")
            shape = index["row_shape"]  # nothing else of the states is needed
        for cell, row in zip(mixed, rows, strict=True):
            cell["words"] = self._captions(row)
            if row.keys() >= _RECIPE and prompts.keys() >= {row["source"]}:
                made = marked_words.provenance(
                    row, prompts, length=shape[0], width=shape[1]
                )
                cell["words"] = [
                    {"of": of, "pieces": marked(each["caption"], each["marked"])}
                    for of, each in zip(
                        _roles(row, "prompt"), made["words"], strict=False
                    )
                ]
                if made["mixed"]:
                    cell["facts"].insert(-1, ("In words", " ".join(made["mixed"])))

    def _captions(self, row: dict) -> list[dict]:
        """The captions of source and partners, without marks."""
        ids = [row["source"], *_partners(row)] if row else []
        captions = [self.captions.get(id_, {}).get("caption") for id_ in ids]
        return [
            {"of": of, "pieces": [(caption, False)]}
            for of, caption in zip(_roles(row, "caption"), captions, strict=False)
            if caption
        ]

    def mixed(self, row: dict) -> str:
        """Describes the mixing: `token positions 1, 4 and text dims 7 from a.png`."""
        recipe = self.recipes.get(row["index"], {})
        taken = []
        if recipe.get("positions"):
            taken.append(f"token positions {_numbers(recipe['positions'])}")
        if recipe.get("dims"):
            same = len(recipe["dims"]) == 1
            shown = _numbers(recipe["dims"][0]) if same else "that differ by token"
            start, stop = recipe["dim_tokens"]
            taken.append(f"text dims {shown} (tokens {start} to {stop - 1})")
        return (
            f"{' and '.join(taken) or 'nothing'} from {' and '.join(row['partners'])}"
        )

    def read_pixels(self, cells: Iterable[dict]) -> None:
        """Reads the synthetic images of `cells`, and no others, into them."""
        cells = list(cells)
        for name in self.sets:
            mine = [cell for cell in cells if cell.get("set") == name]
            indices = {cell["index"] for cell in mine}
            rows = _read_set(self.generate / name, ["index", "image"], indices)
            pixels = {row["index"]: row["image"]["bytes"] for row in rows}
            for cell in mine:
                image = Image.open(io.BytesIO(pixels[cell["index"]]))
                cell["image"] = image.convert("RGB")


def _partners(row: dict) -> list[str]:
    return row.get("partners", [])


def _roles(row: dict, what: str) -> list[str]:
    """What the source's and the partners' texts are called."""
    partners = _partners(row)
    numbers = range(1, len(partners) + 1)
    if len(partners) == 1:
        return [f"Source’s {what}", f"Partner’s {what}"]
    return [
        f"Source’s {what}",
        *(f"{what} of partner {n}".capitalize() for n in numbers),
    ]


def cells_in(value: Any) -> Iterator[dict]:
    """All cells in what sections show: dicts with an `image`, or a `set` to read it."""
    if isinstance(value, dict):
        if "image" in value and "heading" in value or "set" in value:
            yield value
        else:
            value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from cells_in(each)


def marked(text: str, ranges: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Cuts a text into pieces: (piece, whether it is in one of the ranges).

    Args:
      text: to cut.
      ranges: [start, stop) of characters, which may touch and overlap.
    """
    flags = [any(start <= i < stop for start, stop in ranges) for i in range(len(text))]
    pieces = itertools.groupby(zip(text, flags, strict=True), key=lambda pair: pair[1])
    return [("".join(x for x, _ in piece), flag) for flag, piece in pieces]


def read(workdir: epath.Path, class_names: list[str]) -> RunImages:
    """The images of a finished run; of the synthetic ones what is known of them."""
    captions = files.read_jsonl(workdir / "caption" / "captions.jsonl")
    recipes, names = [], []
    if (workdir / "generate").exists():  # else of real images alone
        recipes = files.read_jsonl(workdir / "mix" / "recipes.jsonl")
        folders = (path for path in (workdir / "generate").iterdir() if path.is_dir())
        names = [path.name for path in folders]
    sets = {}
    for name in [*(n for n in SETS if n in names), *sorted({*names} - {*SETS})]:
        rows = _read_set(workdir / "generate" / name, _PROVENANCE)
        sets[name] = {row["index"]: row for row in rows}
    return RunImages(
        generate=workdir / "generate",
        encode=workdir / "encode",
        class_names=class_names,
        real=splits.read_split(workdir / "caption", "train"),
        captions={row["id"]: row for row in captions},
        recipes={row["index"]: row for row in recipes},
        sets={name: rows for name, rows in sets.items() if rows},
    )


def _read_set(
    folder: epath.Path, columns: list[str], indices: Iterable[int] | None = None
) -> list[dict]:
    """Reads rows of a synthetic set in the order of their index; None: all rows."""
    keep = None if indices is None else pc.field("index").isin(sorted(indices))
    rows = []
    for path in files.matching(folder, "data/train-*.parquet"):
        with path.open("rb") as file:
            rows += pq.read_table(file, columns=columns, filters=keep).to_pylist()
    return sorted(rows, key=lambda row: row["index"])


def _numbers(values: list[int]) -> str:
    rest = len(values) - _MAX_NUMBERS
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(str, values[:_MAX_NUMBERS])) + more
