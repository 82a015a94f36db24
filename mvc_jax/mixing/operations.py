"""The mixing operations, and recipes as the arrays that they take.

Legend: B batch, L text tokens, D their width, M partners, k positions, d dims.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax  # noqa: F401 (of the examples)
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def coarse_mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    positions: Int[Array, " k"],
    donors: Int[Array, " k"],
) -> Float[Array, "L D"]:
    """Replaces whole tokens of `states`: E[p] = F_m[p] (supplement).

    Several partners F_m are ours; the supplement has one.

    >>> states = jnp.zeros((4, 3))
    >>> partners = jnp.stack([jnp.full((4, 3), 1.0), jnp.full((4, 3), 2.0)])
    >>> coarse_mix(states, partners, jnp.array([1, 3]), jnp.array([0, 1]))
    Array([[0., 0., 0.],
           [1., 1., 1.],
           [0., 0., 0.],
           [2., 2., 2.]], dtype=float32)
    >>> many = jax.vmap(coarse_mix, in_axes=(0, 0, None, None))
    >>> batch = states[None], partners[None]
    >>> jax.jit(many)(*batch, jnp.array([1]), jnp.array([0])).shape
    (1, 4, 3)

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      positions: token positions p, distinct; positions outside [1, L) are ignored, so
        that BOS is never replaced.
      donors: m in [0, M), the partner for each position.

    Returns:
      the mixed states; without positions, `states` itself.
    """
    length = states.shape[0]
    positions = jnp.where(positions > 0, positions, length)
    replacements = partners[donors, jnp.minimum(positions, length - 1)]
    return states.at[positions].set(replacements, mode="drop")


def fine_mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    dims: Int[Array, "L d"],
    donors: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """Replaces a few dims of the tokens of `states`: E[l, j] = F_m[l, j].

    The supplement replaces fewer than 10 of 768. Row l of `dims` applies to token l:
    whether all tokens have the same dims is the caller's choice.

    >>> states, partners = jnp.zeros((3, 4)), jnp.ones((1, 3, 4))
    >>> dims = jnp.broadcast_to(jnp.array([0, 2]), (3, 2))
    >>> fine_mix(states, partners, dims, jnp.array([0, 0]))
    Array([[0., 0., 0., 0.],
           [1., 0., 1., 0.],
           [1., 0., 1., 0.]], dtype=float32)

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      dims: dims j of each token, distinct; dims outside [0, D), and row 0, BOS, are
        ignored.
      donors: m in [0, M), the partner for each column of `dims`.

    Returns:
      the mixed states; without dims, `states` itself.
    """
    length, width = states.shape
    tokens = jnp.arange(length)[:, None]
    dims = jnp.where((tokens > 0) & (dims >= 0), dims, width)
    replacements = partners[donors[None], tokens, jnp.minimum(dims, width - 1)]
    return states.at[tokens, dims].set(replacements, mode="drop")


def mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    positions: Int[Array, " k"],
    donors: Int[Array, " k"],
    dims: Int[Array, "L d"],
    dim_donors: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """Applies the recipe of one image: `coarse_mix`, then `fine_mix`."""
    mixed = coarse_mix(states, partners, positions, donors)
    return fine_mix(mixed, partners, dims, dim_donors)


def mix_pooled(
    pooled: Float[np.ndarray, " P"],
    partners: Float[np.ndarray, "M P"],
    choice: str | None,
) -> Float[np.ndarray, " P"]:
    """The pooled embedding of a mixed prompt; of Stable Diffusion XL, and ours.

    Its dims are not those of a text state, so that the dims of `fine_mix` do not apply.

    >>> ones, partners = np.ones(2), np.array([[3.0, 5.0], [9.0, 9.0]])
    >>> [mix_pooled(ones, partners, x).tolist() for x in (None, "mixed", "partner")]
    [[1.0, 1.0], [3.5, 4.0], [3.0, 5.0]]

    Args:
      pooled: of the source's prompt.
      partners: of the partners' prompts.
      choice: `source`, or None: unchanged; `mixed`: halfway to the mean of the
        partners'; `partner`: the first partner's.
    """
    if choice == "partner":
        return partners[0]
    if choice == "mixed":
        return (pooled + partners.mean(axis=0)) / 2
    return pooled


@dataclasses.dataclass(frozen=True)
class Widths:
    """Widths of the arrays of a batch: the maximum numbers in any recipe of a run.

    As they cover all recipes, every batch has the same shapes.
    """

    positions: int
    dims: int
    partners: int


def widths_of(recipes: Sequence[Mapping]) -> Widths:
    """The widths with which `as_arrays` can hold any of these recipes."""
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
    """Recipes as the padded arrays of a batch.

    Args:
      recipes: B rows of `recipes.jsonl`.
      row_of: image id -> its row in the cache.
      length: L, tokens of a text state.
      width: D, dims of a text state.
      widths: k, d and M of the arrays.

    Returns:
      `source` int32 [B] and `partners` int32 [B, M], rows of the cache, the latter
      padded with the first partner; and arguments of `mix`: `positions`, `donors` int32
      [B, k], padded with L and 0; `dims` int32 [B, L, d], padded with D; `dim_donors`
      int32 [B, d], padded with 0.
    """
    count = len(recipes)
    source = np.asarray([row_of[r["source"]] for r in recipes], np.int32)
    partners = np.empty((count, widths.partners), np.int32)
    positions = np.full((count, widths.positions), length, np.int32)
    donors = np.zeros((count, widths.positions), np.int32)
    dims = np.full((count, length, widths.dims), width, np.int32)
    dim_donors = np.zeros((count, widths.dims), np.int32)
    for i, recipe in enumerate(recipes):
        rows = [row_of[id_] for id_ in recipe["partners"]]
        partners[i] = rows[0]
        partners[i, : len(rows)] = rows
        replaced = len(recipe["positions"])
        positions[i, :replaced] = recipe["positions"]
        donors[i, :replaced] = recipe["donors"]
        if recipe["dims"]:  # one row for all tokens, or one for each
            start, stop = recipe["dim_tokens"]
            columns = len(recipe["dim_donors"])
            dims[i, start:stop, :columns] = recipe["dims"]
            dim_donors[i, :columns] = recipe["dim_donors"]
    return {
        "source": source,
        "partners": partners,
        "positions": positions,
        "donors": donors,
        "dims": dims,
        "dim_donors": dim_donors,
    }
