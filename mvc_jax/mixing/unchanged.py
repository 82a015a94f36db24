"""Recipes that change nothing: their mixed states equal the source's.

So do those of a source and partners with one prompt, those that mix nothing, and coarse
ones of words that begin both prompts: a token's state depends on the tokens before it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float

State = Callable[[int], Float[np.ndarray, "L D"]]
_MAX_CLASSES = 5  # that are named


def unchanged(
    recipes: Sequence[Mapping], rows: Sequence[Mapping], state: State
) -> list[bool]:
    """Whether each recipe's mixed states equal the source's.

    Args:
      recipes: rows of `recipes.jsonl`.
      rows: of `encode`, one for each training image.
      state: number of a prompt -> its text states.
    """
    number = {row["id"]: row["state"] for row in rows}
    return [_is_unchanged(recipe, number, state) for recipe in recipes]


def _is_unchanged(recipe: Mapping, number: Mapping[str, int], state: State) -> bool:
    source = number[recipe["source"]]
    partners = [number[id_] for id_ in recipe["partners"]]
    pooled = {"mixed": partners, "partner": partners[:1]}.get(recipe.get("pooled"), [])
    if any(partner != source for partner in pooled):
        return False
    for m in {*recipe["donors"], *recipe["dim_donors"]}:
        if partners[m] == source:
            continue
        ours, theirs = state(source), state(partners[m])
        pairs = zip(recipe["positions"], recipe["donors"], strict=True)
        mine = [position for position, donor in pairs if donor == m]
        if not np.array_equal(ours[mine], theirs[mine]):
            return False
        columns = np.flatnonzero(np.equal(recipe["dim_donors"], m))
        if columns.size:
            start, stop = recipe["dim_tokens"]
            tokens = np.arange(start, stop)[:, None]
            dims = np.asarray(recipe["dims"])[:, columns]
            if not np.array_equal(ours[tokens, dims], theirs[tokens, dims]):
                return False
    return True


def warn(recipes: Sequence[Mapping], are_unchanged: Sequence[bool]) -> None:
    """Warns of them, if there are any, with their numbers by class."""
    total = sum(are_unchanged)
    if not total:
        return
    pairs = zip(recipes, are_unchanged, strict=True)
    counts = Counter(recipe["label"] for recipe, is_ in pairs if is_)
    named = [f"{name} {n}" for name, n in counts.most_common(_MAX_CLASSES)]
    rest = len(counts) - len(named)
    logging.warning(
        "%d of %d recipes change nothing, so that their images are those of the set "
        "`unmixed`, in: %s%s",
        total,
        len(recipes),
        ", ".join(named),
        f" and {rest} more classes" if rest else "",
    )
