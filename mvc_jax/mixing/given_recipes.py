"""Recipes that a program gives with the texts at hand: most fields may be left out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mvc_jax.errors import UserError
from mvc_jax.mixing import recipe_file

Recipe = Mapping[str, Any]


def for_each(recipe: Any, count: int) -> list:
    """A recipe for each of `count` images, of one for all or of as many."""
    if recipe is None or isinstance(recipe, Mapping):
        return [recipe or {}] * count
    return [*recipe]


def completed(recipe: Recipe, length: int) -> dict[str, Any]:
    """A recipe with every field that says what is mixed.

    Args:
      recipe: with fields of `mixing/recipes.py`; `dims` may be one list of numbers.
      length: L, tokens of a text state.
    """
    given = {name: _as_lists(value) for name, value in recipe.items()}
    positions, dims = given.get("positions", []), given.get("dims", [])
    if dims and not isinstance(dims[0], list):
        dims = [dims]  # the same for all tokens
    columns = len(dims[0]) if dims else 0
    return {
        "positions": positions,
        "donors": given.get("donors", [0] * len(positions)),
        "dims": dims,
        "dim_donors": given.get("dim_donors", [0] * columns),
        "dim_tokens": given.get("dim_tokens", [1, length]),
    }


def require_valid(
    recipe: Any,
    partners: Sequence[int] | None,
    *,
    count: int,
    length: int,
    width: int,
) -> None:
    """Checks recipes before anything is made of them.

    Args:
      recipe: one for all images, or one for each.
      partners: how many each image has; None: there are none.
      count: of the images.
      length: L, tokens of a text state.
      width: D, dims of a text state.

    Raises:
      UserError: a field is unknown or wrong, or mixes partners that are not there.
    """
    for i, own in enumerate(for_each(recipe, count)):
        name = "recipe" if isinstance(recipe, Mapping) else f"recipe[{i}]"
        if not isinstance(own, Mapping):
            raise UserError(
                name,
                wanted="a mapping with fields of a recipe",
                got=repr(own),
                fix="Pass e.g. {'positions': [2, 3], 'dims': [10, 200]}.",
            )
        full = completed(own, length)
        if partners is None and (full["positions"] or full["dims"]):
            raise UserError(
                name,
                wanted="partners, of which it mixes the texts",
                got="none",
                fix="Pass partners=, a text for each image.",
            )
        theirs = 1 if partners is None else partners[i]
        if found := recipe_file.problems({**own, **full}, theirs, length, width):
            raise UserError(
                name,
                wanted="valid fields",
                got="; ".join(found),
                fix="The fields are those of a row of recipes.jsonl.",
            )


def _as_lists(value: Any) -> Any:
    """An array as lists, a tuple as a list; else itself."""
    if isinstance(value, tuple | list):
        return [_as_lists(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
