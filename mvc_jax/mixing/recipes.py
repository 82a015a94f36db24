"""Recipes: what each synthetic image is drawn from, a function of (seed, k).

A row of `recipes.jsonl` holds everything that is specific to one image, and may be
edited by hand (`mixing/recipe_file.py` reads and checks it):

  index        k
  source       id of the real image that the model is given
  partners     ids of the images whose captions are mixed in, at least one; the source
               itself if its class has no other image
  label        class name of the source
  mode         "coarse", "fine" or "both"
  positions    coarse: positions of the tokens replaced, in [1, L), ascending
  donors       coarse: for each position, an index into `partners`
  dims         fine: one list of dims for all tokens, or one list for each token of
               `dim_tokens`, each ascending; [] for none
  dim_donors   fine: for each column of `dims`, an index into `partners`
  dim_tokens   fine: [start, stop) of the token positions; start is at least 1
  noise_seed   k; with the run's seed it determines the noise
  text_scale   guidance scale s_T of the text
  image_scale  guidance scale s_I of the image
  pooled       of Stable Diffusion XL: the pooled embedding that the UNet is given, of
               the "source", "mixed", or of the first "partner"; without it the source's
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mvc_jax.data import order

MODES = ("coarse", "fine", "both")
POSITIONS = ("caption", "first", "span", "all")
PARTNERS = ("class", "any")
PARTNER_PROMPTS = ("other", "any")
EARLIER_PARTNER_PROMPT = "any"  # before it could be chosen
DIMS_ON = ("all", "words")
POOLED = ("source", "mixed", "partner")
NO_MIXING = {"positions": [], "donors": [], "dims": [], "dim_donors": []}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How recipes are drawn.

    Attributes:
      modes: some of `MODES`; rounds over the training images take turns.
      tokens: k, number of positions that coarse mixing replaces, if there are so many.
      tokens_most: if above `tokens`, k is uniform in [tokens, tokens_most].
      positions: which positions: random words of the caption (`caption`), the `first` k
        words, a `span` of k consecutive words, or random ones of `all` tokens.
      class_prompt: whether words of the class prompt may be replaced as well.
      partner: whether partners are of the same `class` or of `any`.
      partners: m, number of partners.
      partner_prompt: whether those of an `other` prompt than the source's are
        preferred, since mixing equal prompts changes nothing, or `any` are drawn alike.
      dims: d, number of dims that fine mixing replaces.
      dims_per_token: whether each token has its own dims.
      dims_on: tokens that fine mixing applies to: `all`, or the caption's `words` (and
        the class prompt's, with `class_prompt`).
      text_scale: minimum and maximum of s_T, uniform between them.
      image_scale: minimum and maximum of s_I, uniform between them.
      pooled: one of `POOLED`; "": the base has no pooled embedding.
    """

    modes: tuple[str, ...] = ("coarse", "fine")
    tokens: int = 4
    tokens_most: int = 0
    positions: str = "caption"
    class_prompt: bool = False
    partner: str = "class"
    partners: int = 1
    partner_prompt: str = "other"
    dims: int = 8
    dims_per_token: bool = False
    dims_on: str = "all"
    text_scale: tuple[float, float] = (7.5, 7.5)
    image_scale: tuple[float, float] = (1.5, 1.5)
    pooled: str = ""


class Classes(dict[int, list[int]]):
    """Label -> ascending indices of its rows.

    Args:
      rows: of `encode`, one for each training image.
    """

    def __init__(self, rows: Sequence[Mapping]):
        super().__init__()
        self._prompts: dict[str, list[int]] = {}
        self._places: dict[tuple[int | None, str], list[int]] = {}
        for i, row in enumerate(rows):
            self.setdefault(row["label"], []).append(i)
            self._prompts.setdefault(row["prompt"], []).append(i)

    def sharing(self, prompt: str, label: int | None) -> list[int]:
        """Ascending places in a class of the rows with this prompt; None: in all."""
        if label is None:
            return self._prompts[prompt]
        key = label, prompt
        if key not in self._places:
            members = self[label]
            mine = self._prompts[prompt]
            places = [(bisect.bisect_left(members, row), row) for row in mine]
            self._places[key] = [p for p, row in places if members[p : p + 1] == [row]]
        return self._places[key]


def classes_of(rows: Sequence[Mapping]) -> Classes:
    """Label -> ascending indices of its rows."""
    return Classes(rows)


def make_recipe(
    k: int,
    rows: Sequence[Mapping],
    classes: Classes,
    drawing: Drawing,
    *,
    seed: int,
    length: int,
    width: int,
) -> dict:
    """The recipe of synthetic image `k`, a function of (seed, k).

    Every training image is the source once per round. Partners, positions, dims and
    scales are drawn independently: another `tokens` does not change the partners.

    Args:
      k: index of the synthetic image.
      rows: of `encode`, one for each training image.
      classes: from `classes_of`.
      drawing: how recipes are drawn.
      seed: of the run.
      length: L, tokens of a text state.
      width: D, dims of a text state.

    Returns:
      a row with the fields listed at the top of this file.
    """
    round_, i = divmod(k, len(rows))
    source, mode = rows[i], drawing.modes[round_ % len(drawing.modes)]
    rng = order.generator(seed, "mix/partner", k)
    partners = [rows[j] for j in _draw_partners(rng, rows, classes, i, drawing)]
    recipe = {
        "index": k,
        "source": source["id"],
        "partners": [row["id"] for row in partners],
        "label": source["class_name"],
        "mode": mode,
        **NO_MIXING,
        "dim_tokens": [1, 1],
        "noise_seed": k,
    }
    words = _common_words([source, *partners], drawing.class_prompt, length)
    if mode in ("coarse", "both"):
        rng = order.generator(seed, "mix/positions", k)
        allowed = words
        if drawing.positions == "all":
            allowed = _all_tokens([source, *partners], drawing.class_prompt, length)
        recipe["positions"] = _draw_positions(rng, allowed, drawing)
        recipe["donors"] = _draw_donors(rng, len(partners), len(recipe["positions"]))
    if mode in ("fine", "both"):
        rng = order.generator(seed, "mix/dims", k)
        tokens = words if drawing.dims_on == "words" else range(1, length)
        if tokens and drawing.dims:
            recipe["dims"] = [
                _draw_ascending(rng, range(width), drawing.dims)
                for _ in range(len(tokens) if drawing.dims_per_token else 1)
            ]
            recipe["dim_donors"] = _draw_donors(rng, len(partners), drawing.dims)
            recipe["dim_tokens"] = [tokens[0], tokens[-1] + 1]
    rng = order.generator(seed, "mix/scales", k)
    for name in ("text_scale", "image_scale"):
        low, high = getattr(drawing, name)
        drawn = round(rng.uniform(low, high), 4)  # rows are read by people as well
        recipe[name] = drawn if low < high else low
    return recipe | _pooled(drawing)


def _pooled(drawing: Drawing) -> dict[str, str]:
    return {"pooled": drawing.pooled} if drawing.pooled else {}


def _draw_partners(
    rng: np.random.Generator,
    rows: Sequence[Mapping],
    classes: Classes,
    source: int,
    drawing: Drawing,
) -> list[int]:
    """Up to `drawing.partners` images but the source; it if it is the only one.

    With `partner_prompt` `other`, those of its own prompt only where others are few.
    """
    label = rows[source]["label"] if drawing.partner == "class" else None
    among = range(len(rows)) if label is None else classes[label]
    if len(among) == 1:
        return [source]
    place = bisect.bisect_left(among, source)
    same = [place]
    if drawing.partner_prompt == "other":
        same = classes.sharing(rows[source]["prompt"], label)
    drawn = _draw_without(rng, len(among), same, drawing.partners)
    if len(drawn) < drawing.partners and len(same) > 1:
        own = bisect.bisect_left(same, place)
        left = drawing.partners - len(drawn)
        drawn += [same[k] for k in _draw_without(rng, len(same), [own], left)]
    return [among[k] for k in drawn]


def _draw_without(
    rng: np.random.Generator, count: int, excluded: Sequence[int], number: int
) -> list[int]:
    """Up to `number` of [0, count) without those excluded, which are ascending."""
    others = count - len(excluded)
    if not others:
        return []
    chosen = rng.choice(others, size=min(number, others), replace=False)
    # How many others are before each of those excluded.
    before = range(len(excluded))
    return [
        j + bisect.bisect_right(before, j, key=lambda k: excluded[k] - k)
        for j in chosen.tolist()
    ]


def _common_words(rows: Sequence[Mapping], class_prompt: bool, length: int) -> range:
    """Positions that are words of the caption, or any words, in all these prompts."""
    if class_prompt:  # up to the EOS of the shortest prompt
        return range(1, min(*(row["tokens"] - 1 for row in rows), length))
    starts = [row["caption_start"] for row in rows]
    stops = [row["caption_start"] + row["caption_tokens"] for row in rows]
    return range(max(starts), min(*stops, length))


def _all_tokens(rows: Sequence[Mapping], class_prompt: bool, length: int) -> list[int]:
    """All positions but BOS and, unless `class_prompt`, words of any class prompt."""
    excluded: set[int] = set()
    for row in rows if not class_prompt else ():
        start, stop = row["caption_start"], row["caption_start"] + row["caption_tokens"]
        excluded |= {*range(1, row["tokens"] - 1)} - {*range(start, stop)}
    return [position for position in range(1, length) if position not in excluded]


def _draw_positions(
    rng: np.random.Generator, allowed: Sequence[int], drawing: Drawing
) -> list[int]:
    high = max(drawing.tokens, drawing.tokens_most)
    count = min(int(rng.integers(drawing.tokens, high + 1)), len(allowed))
    if drawing.positions == "first":
        return list(allowed[:count])
    if drawing.positions == "span":
        start = int(rng.integers(len(allowed) - count + 1))
        return list(allowed[start : start + count])
    return _draw_ascending(rng, allowed, count)


def _draw_ascending(
    rng: np.random.Generator, among: Sequence[int], count: int
) -> list[int]:
    chosen = rng.choice(len(among), size=count, replace=False) if count else ()
    return sorted(among[int(j)] for j in chosen)


def _draw_donors(rng: np.random.Generator, partners: int, count: int) -> list[int]:
    return rng.integers(partners, size=count).tolist()


def make_levels(
    rows: Sequence[Mapping],
    classes: Classes,
    drawing: Drawing,
    *,
    seed: int,
    length: int,
    width: int,
    max_sources: int = 8,
) -> list[dict]:
    """Recipes with increasing amounts of mixing, for the supplement's Figure 5.

    One source of each of the first classes, with the same partners and noise at three
    levels of tokens: the words of the captions; as many tokens of padding as well; all
    but BOS. And at three levels of dims, each including the previous one: d, a quarter
    and half of the width.

    Args:
      rows: of `encode`, one for each training image.
      classes: from `classes_of`.
      drawing: how recipes are drawn.
      seed: of the run.
      length: L, tokens of a text state.
      width: D, dims of a text state.
      max_sources: maximum number of sources.

    Returns:
      six rows for each source, as of `make_recipe`, with `level`: `"tokens 1"` to 3,
      then `"dims 1"` to 3; `noise_seed` is the source's index, as in the first round.
    """
    levels: list[dict] = []
    for label in sorted(classes)[:max_sources]:
        i, partners, words = _first_with_words(
            rows, classes, label, drawing, seed, length
        )
        rng = order.generator(seed, "mix/levels", i)
        donors = _draw_donors(rng, len(partners), length)
        dim_donors = _draw_donors(rng, len(partners), width)
        shuffled = rng.permutation(width).tolist()
        end = max(row["tokens"] for row in (rows[i], *partners))
        padding = range(min(end, length), length)[: len(words)]
        unmixed = {
            "source": rows[i]["id"],
            "partners": [row["id"] for row in partners],
            "label": rows[i]["class_name"],
            "mode": "coarse",
            **NO_MIXING,
            "dim_tokens": [1, 1],
            "noise_seed": i,
            "text_scale": drawing.text_scale[0],
            "image_scale": drawing.image_scale[0],
            **_pooled(drawing),
        }
        token_levels = ([*words], [*words, *padding], [*range(1, length)])
        for level, positions in enumerate(token_levels, start=1):
            coarse = {
                "positions": positions,
                "donors": [donors[p] for p in positions],
                "level": f"tokens {level}",
            }
            levels.append(unmixed | coarse)
        dim_levels = (drawing.dims, width // 4, width // 2)
        for level, count in enumerate(dim_levels, start=1):
            dims = sorted(shuffled[:count])
            fine = {
                "mode": "fine",
                "dims": [dims],
                "dim_tokens": [1, length],
                "dim_donors": [dim_donors[j] for j in dims],
                "level": f"dims {level}",
            }
            levels.append(unmixed | fine)
    return [{"index": index, **row} for index, row in enumerate(levels)]


def _first_with_words(
    rows: Sequence[Mapping],
    classes: Classes,
    label: int,
    drawing: Drawing,
    seed: int,
    length: int,
) -> tuple[int, list[Mapping], range]:
    """The first image of a class with words to mix, its partners, and the positions.

    If none has any, the first image.
    """
    found = []
    for i in classes[label]:
        rng = order.generator(seed, "mix/levels/partner", i)
        partners = [rows[j] for j in _draw_partners(rng, rows, classes, i, drawing)]
        words = _common_words([rows[i], *partners], drawing.class_prompt, length)
        found.append((i, partners, words))
        if words:
            return found[-1]
    return found[0]
