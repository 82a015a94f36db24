"""The pure mixing operations, and recipes as the arrays that they take.

Legend: B batch, L text tokens, D their width, M partners, k positions, d dims.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def coarse_mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    positions: Int[Array, " k"],
    donors: Int[Array, " k"],
) -> Float[Array, "L D"]:
    """`states` with whole tokens taken over: E[p] = F_m[p] (supplement).

    Several partners F_m are ours; the supplement has one.

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      positions: token positions, distinct; those outside [1, L) stand for none, so that
        BOS is never touched.
      donors: m in [0, M), the partner behind each position.

    Returns:
      the mixed states; with no positions, `states` itself.
    """
    length = states.shape[0]
    positions = jnp.where(positions > 0, positions, length)
    taken = partners[donors, jnp.minimum(positions, length - 1)]
    return states.at[positions].set(taken, mode="drop")


def fine_mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    dims: Int[Array, "L d"],
    donors: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """`states` with a few dims of its tokens taken over: E[l, j] = F_m[l, j].

    The supplement replaces fewer than 10 of 768. Whether every token gives up the same
    dims is the caller's choice: row l of `dims` belongs to token l.

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      dims: those taken over at each token, distinct; those outside [0, D) stand for
        none. Row 0, BOS, always stands for none.
      donors: m in [0, M), the partner behind each column of `dims`.

    Returns:
      the mixed states; with no dims, `states` itself.
    """
    length, width = states.shape
    tokens = jnp.arange(length)[:, None]
    dims = jnp.where((tokens > 0) & (dims >= 0), dims, width)
    taken = partners[donors[None], tokens, jnp.minimum(dims, width - 1)]
    return states.at[tokens, dims].set(taken, mode="drop")


def mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    positions: Int[Array, " k"],
    donors: Int[Array, " k"],
    dims: Int[Array, "L d"],
    dim_donors: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """Both operations of a recipe for one image, fine after coarse; vmap it."""
    mixed = coarse_mix(states, partners, positions, donors)
    return fine_mix(mixed, partners, dims, dim_donors)


@dataclasses.dataclass(frozen=True)
class Widths:
    """How much room the arrays of a batch have: the most of any recipe of a run.

    Taken over the whole file, so that every batch has the same shapes.
    """

    positions: int
    dims: int
    partners: int


def widths_of(recipes: Sequence[Mapping]) -> Widths:
    """The widths that `as_arrays` needs for any batch of these recipes."""
    return Widths(
        positions=max((len(r["positions"]) for r in recipes), default=0),
        dims=max((len(r["dim_donors"]) for r in recipes), default=0),
        partners=max((len(r["partners"]) for r in recipes), default=1),
    )


def as_arrays(
    recipes: Sequence[Mapping],
    row_of: Mapping[str, int],
    *,
    length: int,
    width: int,
    widths: Widths,
) -> dict[str, np.ndarray]:
    """Recipes as the padded arrays of a batch; the last four are `mix`'s arguments.

    Args:
      recipes: B rows of `recipes.jsonl`.
      row_of: id of an image -> its row in the cache.
      length: L, tokens of a text state.
      width: D, dims of a text state.
      widths: k, d and M of the arrays.

    Returns:
      `index`, `noise_seed`, `source` int32 [B], the last a row of the cache; `partners`
      int32 [B, M] likewise, filled up with the first; `text_scale`, `image_scale`
      float32 [B]; `positions`, `donors` int32 [B, k], filled up with L and 0; `dims`
      int32 [B, L, d], filled up with D; `dim_donors` int32 [B, d], with 0.
    """
    count = len(recipes)
    arrays = {
        name: np.asarray([recipe[name] for recipe in recipes], dtype)
        for name, dtype in (
            ("index", np.int32),
            ("noise_seed", np.int32),
            ("text_scale", np.float32),
            ("image_scale", np.float32),
        )
    }
    arrays["source"] = np.asarray([row_of[r["source"]] for r in recipes], np.int32)
    partners = np.empty((count, widths.partners), np.int32)
    positions = np.full((count, widths.positions), length, np.int32)
    donors = np.zeros((count, widths.positions), np.int32)
    dims = np.full((count, length, widths.dims), width, np.int32)
    dim_donors = np.zeros((count, widths.dims), np.int32)
    for i, recipe in enumerate(recipes):
        rows = [row_of[id_] for id_ in recipe["partners"]]
        partners[i] = rows[0]
        partners[i, : len(rows)] = rows
        taken = len(recipe["positions"])
        positions[i, :taken] = recipe["positions"]
        donors[i, :taken] = recipe["donors"]
        if recipe["dims"]:  # one row, for every token alike, or one for each
            start, stop = recipe["dim_tokens"]
            columns = len(recipe["dim_donors"])
            dims[i, start:stop, :columns] = recipe["dims"]
            dim_donors[i, :columns] = recipe["dim_donors"]
    arrays |= {"partners": partners, "positions": positions, "donors": donors}
    return arrays | {"dims": dims, "dim_donors": dim_donors}
