"""Recipes: what each synthetic image is made of, drawn from (seed, k) alone.

A row of `recipes.jsonl` holds everything that is particular to one image, and may be
edited by hand (`mixing/recipe_file.py` reads it back):

  index        k
  source       id of the real image that conditions
  partners     ids of the images whose captions are mixed in, at least one; the source
               itself where its class has no other
  label        class name of the source
  mode         "coarse", "fine" or "both"
  positions    coarse: the token positions taken over, in [1, L), ascending
  donors       coarse: for each position, the index into `partners`
  dims         fine: one list of dims, for every token alike, or one list for each token
               of `dim_tokens`, each ascending; [] for none
  dim_donors   fine: for each column of `dims`, the index into `partners`
  dim_tokens   fine: [start, stop) of the token positions; start is at least 1
  noise_seed   k: what of the run's noise the image gets
  text_scale   s_T of this image
  image_scale  s_I of this image
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mvc_jax.data import order

MODES = ("coarse", "fine", "both")
POSITIONS = ("caption", "first", "span", "all")
PARTNERS = ("class", "any")
DIMS_ON = ("all", "words")
NOTHING = {"positions": [], "donors": [], "dims": [], "dim_donors": []}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How recipes are drawn.

    Attributes:
      modes: some of `MODES`; they take turns by round.
      tokens: k, how many positions coarse mixing takes over, as far as there are.
      tokens_most: above `tokens`: k is uniform in [tokens, tokens_most].
      positions: which: of the caption's words at random (`caption`), their `first` k, k
        of them in a row (`span`); or of `all` tokens at random.
      class_prompt: whether the words of the class prompt may be taken over as well.
      partner: an image of the same `class`, or of `any`.
      partners: m, how many.
      dims: d, how many dims fine mixing takes over.
      dims_per_token: whether every token gets dims of its own.
      dims_on: `all` tokens, or the caption's `words` (and the class prompt's, with
        `class_prompt`).
      text_scale: s_T, least and most; uniform between them.
      image_scale: s_I, likewise.
    """

    modes: tuple[str, ...] = ("coarse", "fine")
    tokens: int = 4
    tokens_most: int = 0
    positions: str = "caption"
    class_prompt: bool = False
    partner: str = "class"
    partners: int = 1
    dims: int = 8
    dims_per_token: bool = False
    dims_on: str = "all"
    text_scale: tuple[float, float] = (7.5, 7.5)
    image_scale: tuple[float, float] = (1.5, 1.5)


def classes_of(rows: Sequence[Mapping]) -> dict[int, list[int]]:
    """label -> ascending indices of its rows."""
    classes: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        classes.setdefault(row["label"], []).append(i)
    return classes


def make_recipe(
    k: int,
    rows: Sequence[Mapping],
    classes: Mapping[int, Sequence[int]],
    drawing: Drawing,
    *,
    seed: int,
    length: int,
    width: int,
) -> dict:
    """The recipe of synthetic image `k`, a function of (seed, k).

    Every training image is the source once a round. Partner, positions, dims and scales
    are drawn apart: other `tokens` leave the partners what they were.

    Args:
      k: index of the synthetic image.
      rows: of `encode`, one a training image.
      classes: of `classes_of`.
      drawing: how.
      seed: of the run.
      length: L, tokens of a text state.
      width: D, dims of a text state.

    Returns:
      a row with the fields at the top of this file.
    """
    round_, i = divmod(k, len(rows))
    source, mode = rows[i], drawing.modes[round_ % len(drawing.modes)]
    rng = order.generator(seed, "mix/partner", k)
    among = classes[source["label"]] if drawing.partner == "class" else range(len(rows))
    partners = [rows[j] for j in _others(rng, among, i, drawing.partners)]
    recipe = {"index": k, "source": source["id"]}
    recipe |= {"partners": [row["id"] for row in partners]}
    recipe |= {"label": source["class_name"], "mode": mode, **NOTHING}
    recipe |= {"dim_tokens": [1, 1], "noise_seed": k}
    words = _words([source, *partners], drawing.class_prompt, length)
    if mode in ("coarse", "both"):
        rng = order.generator(seed, "mix/positions", k)
        allowed = words
        if drawing.positions == "all":
            allowed = _all_tokens([source, *partners], drawing.class_prompt, length)
        recipe["positions"] = _positions(rng, allowed, drawing)
        recipe["donors"] = _donors(rng, len(partners), len(recipe["positions"]))
    if mode in ("fine", "both"):
        rng = order.generator(seed, "mix/dims", k)
        tokens = words if drawing.dims_on == "words" else range(1, length)
        if tokens and drawing.dims:
            recipe["dims"] = [
                _ascending(rng, range(width), drawing.dims)
                for _ in range(len(tokens) if drawing.dims_per_token else 1)
            ]
            recipe["dim_donors"] = _donors(rng, len(partners), drawing.dims)
            recipe["dim_tokens"] = [tokens[0], tokens[-1] + 1]
    rng = order.generator(seed, "mix/scales", k)
    for name in ("text_scale", "image_scale"):
        least, most = getattr(drawing, name)
        drawn = round(rng.uniform(least, most), 4)  # a row is for human eyes, too
        recipe[name] = drawn if least < most else least
    return recipe


def _others(
    rng: np.random.Generator, among: Sequence[int], source: int, count: int
) -> list[int]:
    """`count` others than the source, as far as there are; itself if there is none."""
    others = len(among) - 1
    if not others:
        return [source]
    chosen = rng.choice(others, size=min(count, others), replace=False)
    here = bisect.bisect_left(among, source)
    return [among[j + (j >= here)] for j in chosen.tolist()]


def _words(rows: Sequence[Mapping], class_prompt: bool, length: int) -> range:
    """Positions that are words in all these prompts: the captions', or all words."""
    if class_prompt:  # up to EOS of the shortest
        return range(1, min(*(row["tokens"] - 1 for row in rows), length))
    starts = [row["caption_start"] for row in rows]
    stops = [row["caption_start"] + row["caption_tokens"] for row in rows]
    return range(max(starts), min(*stops, length))


def _all_tokens(rows: Sequence[Mapping], class_prompt: bool, length: int) -> list[int]:
    """Positions but BOS; without those that any of the prompts has a class word at."""
    taken: set[int] = set()
    for row in rows if not class_prompt else ():
        start, stop = row["caption_start"], row["caption_start"] + row["caption_tokens"]
        taken |= {*range(1, row["tokens"] - 1)} - {*range(start, stop)}
    return [position for position in range(1, length) if position not in taken]


def _positions(
    rng: np.random.Generator, allowed: Sequence[int], drawing: Drawing
) -> list[int]:
    most = max(drawing.tokens, drawing.tokens_most)
    count = min(int(rng.integers(drawing.tokens, most + 1)), len(allowed))
    if drawing.positions == "first":
        return list(allowed[:count])
    if drawing.positions == "span":
        start = int(rng.integers(len(allowed) - count + 1))
        return list(allowed[start : start + count])
    return _ascending(rng, allowed, count)


def _ascending(rng: np.random.Generator, among: Sequence[int], count: int) -> list[int]:
    chosen = rng.choice(len(among), size=count, replace=False) if count else ()
    return sorted(among[int(j)] for j in chosen)


def _donors(rng: np.random.Generator, partners: int, count: int) -> list[int]:
    return rng.integers(partners, size=count).tolist()


def make_levels(
    rows: Sequence[Mapping],
    classes: Mapping[int, Sequence[int]],
    drawing: Drawing,
    *,
    seed: int,
    length: int,
    width: int,
    most_sources: int = 8,
) -> list[dict]:
    """Recipes that mix more and more, as the supplement's Figure 5 shows them.

    A source each of the first classes, its partners and its noise stay the same. Three
    levels of tokens: the words of the captions; as many tokens of padding as well; all
    but BOS. Three of dims, each with those before: d, a quarter and half of the width.

    Returns:
      six rows for each source, as of `make_recipe`, with `level`: `"tokens 1"` to 3,
      then `"dims 1"` to 3; `noise_seed` is the source's index, as in the first round.
    """
    levels: list[dict] = []
    for label in sorted(classes)[:most_sources]:
        i, partners, words = _first_with_words(
            rows, classes[label], drawing, seed, length
        )
        rng = order.generator(seed, "mix/levels", i)
        donors = _donors(rng, len(partners), length)
        dim_donors = _donors(rng, len(partners), width)
        shuffled = rng.permutation(width).tolist()
        ends = max(row["tokens"] for row in (rows[i], *partners))
        padding = range(min(ends, length), length)[: len(words)]
        row = {"source": rows[i]["id"], "partners": [row["id"] for row in partners]}
        row |= {"label": rows[i]["class_name"], "mode": "coarse", **NOTHING}
        row |= {"dim_tokens": [1, 1], "noise_seed": i}
        row |= {"text_scale": drawing.text_scale[0]}
        row |= {"image_scale": drawing.image_scale[0]}
        places = ([*words], [*words, *padding], [*range(1, length)])
        for level, taken in enumerate(places, start=1):
            coarse = {"positions": taken, "donors": [donors[p] for p in taken]}
            levels.append(row | coarse | {"level": f"tokens {level}"})
        counts = (drawing.dims, width // 4, width // 2)
        for level, count in enumerate(counts, start=1):
            dims = sorted(shuffled[:count])
            fine = {"mode": "fine", "dims": [dims], "dim_tokens": [1, length]}
            fine |= {"dim_donors": [dim_donors[j] for j in dims]}
            levels.append(row | fine | {"level": f"dims {level}"})
    return [{"index": index, **row} for index, row in enumerate(levels)]


def _first_with_words(
    rows: Sequence[Mapping],
    members: Sequence[int],
    drawing: Drawing,
    seed: int,
    length: int,
) -> tuple[int, list[Mapping], range]:
    """The first of these images that has words to mix; else the first of them."""
    found = []
    for i in members:
        among = members if drawing.partner == "class" else range(len(rows))
        rng = order.generator(seed, "mix/levels/partner", i)
        partners = [rows[j] for j in _others(rng, among, i, drawing.partners)]
        words = _words([rows[i], *partners], drawing.class_prompt, length)
        found.append((i, partners, words))
        if words:
            return found[-1]
    return found[0]
