"""Which words a recipe mixes: token positions as ranges of characters, for people.

`encode` writes the offsets of the tokens of every distinct prompt, so that no tokenizer
is needed. Token 0 is BOS; a prompt's tokens, EOS and padding follow.

Legend: L tokens of a text state, D its dims.
"""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.mixing.recipes import MODES

OFFSETS = "offsets.jsonl"
Ranges = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt, and where its tokens are in it.

    Attributes:
      text: the prompt.
      offsets: [start, stop) of the characters of each token from token 1 on, without
        BOS, EOS and padding; None: unknown, in a run of an older version.
    """

    text: str
    offsets: Sequence[tuple[int, int]] | None = None

    def ranges(self, positions: Iterable[int]) -> Ranges:
        """The characters of the tokens at some positions, those of words alone.

        Ranges that touch, overlap, or have nothing but spaces between are one.
        """
        found: Ranges = []
        offsets = self.offsets or ()
        places = {p - 1 for p in positions if 1 <= p <= len(offsets)}
        for start, stop in sorted(offsets[place] for place in places):
            if found and not self.text[found[-1][1] : start].strip():
                start, stop = found[-1][0], max(stop, found[-1][1])
                found.pop()
            found.append((start, stop))
        return found

    def kinds(self, positions: Iterable[int]) -> str:
        """What is at some positions: `3 tokens of words, EOS, 2 tokens of padding`."""
        positions = [*positions]
        if self.offsets is None:
            return _counted(len(positions), "token")
        end = len(self.offsets) + 1
        words, padding = (
            sum(1 <= p < end for p in positions),
            sum(p > end for p in positions),
        )
        parts = [_counted(words, "token") + " of words"] if words else []
        parts += ["EOS"] if end in positions else []
        parts += [_counted(padding, "token") + " of padding"] if padding else []
        return ", ".join(parts)


def read_prompts(
    encode: epath.Path, ids: Collection[str]
) -> dict[str, TokenizedPrompt]:
    """The prompts of some training images, by their ids.

    Args:
      encode: folder of the stage.
      ids: of the images.
    """
    rows = files.read_jsonl(encode / "prompts.jsonl")
    rows = [row for row in rows if row["id"] in ids]
    offsets: dict[int, Ranges] = {}
    if (encode / OFFSETS).exists():
        states = {row["state"] for row in rows}
        with (encode / OFFSETS).open("r") as file:
            for state, line in enumerate(file):
                if state in states:  # parses no other
                    flat = json.loads(line)["offsets"]
                    offsets[state] = [*zip(flat[::2], flat[1::2], strict=True)]
    return {
        row["id"]: TokenizedPrompt(row["prompt"], offsets.get(row["state"]))
        for row in rows
    }


def provenance(
    recipe: Mapping[str, Any],
    prompts: Mapping[str, TokenizedPrompt],
    *,
    length: int,
    width: int,
) -> dict[str, Any]:
    """What an image was made of, for a page.

    Args:
      recipe: of the image (`recipes.py`), or its row of a set.
      prompts: those of its source and its partners, by id.
      length: L.
      width: D.

    Returns:
      `{"source": id, "partners": [ids], "seed": noise seed, "words": [{"caption":
      prompt, "marked": [[start, stop], ...]}, ...], "mixed": [sentences]}`. `words` has
      the source, then the partners; marked are the characters of the tokens that are
      replaced, and of those that come in their place, or whose dims do, unless all
      tokens' do. `mixed` says what cannot be marked; it is empty for a set that does
      not mix.
    """
    ids = [recipe["source"], *recipe["partners"]]
    positions = _positions(recipe, length)
    words = [
        {
            "caption": prompts[id_].text,
            "marked": [[*each] for each in prompts[id_].ranges(mine)],
        }
        for id_, mine in zip(ids, positions, strict=True)
        if id_ in prompts
    ]
    return {
        "source": recipe["source"],
        "partners": [*recipe["partners"]],
        "seed": recipe["noise_seed"],
        "words": words,
        "mixed": _sentences(recipe, prompts, length, width),
    }


def _positions(recipe: Mapping[str, Any], length: int) -> list[set[int]]:
    """The positions to mark in the source's prompt, and in each partner's."""
    positions, donors = recipe["positions"] or (), recipe["donors"] or ()
    partners = range(len(recipe["partners"]))
    found = [
        {p for p, m in zip(positions, donors, strict=True) if m == n} for n in partners
    ]
    dims = _dim_tokens(recipe)
    if len(dims) < length - 1:
        for n in partners:
            found[n] |= {*dims} if n in recipe["dim_donors"] else set()
    return [set().union(*found), *found]


def _dim_tokens(recipe: Mapping[str, Any]) -> range:
    """The tokens whose dims are mixed."""
    return range(*recipe["dim_tokens"]) if recipe["dims"] else range(0)


def _sentences(
    recipe: Mapping[str, Any],
    prompts: Mapping[str, TokenizedPrompt],
    length: int,
    width: int,
) -> list[str]:
    source, partners = recipe["source"], recipe["partners"]
    if recipe["mode"] not in MODES:
        return []
    if {*partners} <= {source}:
        return ["Nothing changes: its class has no other image to mix with."]
    found = []
    positions = recipe["positions"] or ()
    if positions and source in prompts:
        of_donor = itertools.groupby(
            sorted(zip(recipe["donors"], positions, strict=True)), key=lambda x: x[0]
        )
        for donor, pairs in of_donor:
            mine, id_ = [p for _, p in pairs], partners[donor]
            theirs = prompts.get(id_, TokenizedPrompt(""))
            found.append(
                f"Replaced: {prompts[source].kinds(mine)}, by {theirs.kinds(mine)} of "
                f"{id_}."
            )
    if tokens := _dim_tokens(recipe):
        which = "every token but BOS"
        if len(tokens) < length - 1:
            which = f"tokens {tokens.start} to {tokens.stop - 1}"
        other = ", others for each token," if len(recipe["dims"]) > 1 else ""
        donors = dict.fromkeys(partners[m] for m in sorted(recipe["dim_donors"]))
        found.append(
            f"Replaced: {len(recipe['dims'][0])} of {width} dims{other} of {which}, by "
            f"those of {' and '.join(donors)}."
        )
    return found or ["Nothing is mixed."]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
