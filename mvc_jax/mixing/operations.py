"""The mixing operations, and recipes as the arrays that they take.

Legend: B batch, L text tokens, D their width, M partners, k positions, d dims.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mvc_jax.errors import UserError


def coarse_mix(
    states: Float[ArrayLike, "L D"],
    partners: Float[ArrayLike, "M L D"],
    positions: Int[ArrayLike, " k"] | Sequence[int],
    donors: Int[ArrayLike, " k"] | Sequence[int] | None = None,
) -> Float[Array, "L D"]:
    """Replaces whole tokens of `states`: E[p] = F_m[p] (supplement).

    Several partners F_m are ours; the supplement has one.

    >>> states = jnp.zeros((4, 3))
    >>> partners = jnp.stack([jnp.full((4, 3), 1.0), jnp.full((4, 3), 2.0)])
    >>> coarse_mix(states, partners, positions=[1, 3], donors=[0, 1])
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
      donors: m in [0, M), the partner for each position; None: the first.

    Returns:
      the mixed states, in the dtype of `states`; without positions, `states` itself.

    Raises:
      UserError: shapes do not match; without `jit`, a donor is outside [0, M).
    """
    states, partners = _texts(states, partners)
    positions = _whole("positions", positions, 1)
    donors = _donors(donors, positions, len(partners))
    length = states.shape[0]
    positions = jnp.where(positions > 0, positions, length)
    replacements = partners[donors, jnp.minimum(positions, length - 1)]
    return states.at[positions].set(replacements, mode="drop")


def fine_mix(
    states: Float[ArrayLike, "L D"],
    partners: Float[ArrayLike, "M L D"],
    dims: Int[ArrayLike, "L d"] | Int[ArrayLike, " d"] | Sequence[int],
    donors: Int[ArrayLike, " d"] | Sequence[int] | None = None,
) -> Float[Array, "L D"]:
    """Replaces a few dims of the tokens of `states`: E[l, j] = F_m[l, j].

    The supplement replaces fewer than 10 of 768. Whether all tokens have the same dims
    is the caller's choice.

    >>> states, partners = jnp.zeros((3, 4)), jnp.ones((1, 3, 4))
    >>> fine_mix(states, partners, dims=[0, 2])
    Array([[0., 0., 0., 0.],
           [1., 0., 1., 0.],
           [1., 0., 1., 0.]], dtype=float32)
    >>> own = jnp.array([[0], [1], [3]])  # those of each token
    >>> jax.jit(fine_mix)(states, partners, own)
    Array([[0., 0., 0., 0.],
           [0., 1., 0., 0.],
           [0., 0., 0., 1.]], dtype=float32)

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      dims: dims j, distinct: [d] for all tokens, or [L, d], of which row l applies to
        token l; dims outside [0, D), and those of token 0, BOS, are ignored.
      donors: m in [0, M), the partner for each column of `dims`; None: the first.

    Returns:
      the mixed states, in the dtype of `states`; without dims, `states` itself.

    Raises:
      UserError: shapes do not match; without `jit`, a donor is outside [0, M).
    """
    states, partners = _texts(states, partners)
    length, width = states.shape
    dims = _whole("dims", dims, 1, 2)
    if dims.ndim == 2 and len(dims) != length:
        raise UserError(
            "dims",
            wanted=f"shape [d], or [L, d] with the L={length} tokens of states",
            got=f"{[*dims.shape]}",
            fix="Pass a row for each token, BOS included, or one list for all.",
        )
    dims = jnp.broadcast_to(dims, (length, dims.shape[-1]))
    donors = _donors(donors, dims[0], len(partners))
    tokens = jnp.arange(length)[:, None]
    dims = jnp.where((tokens > 0) & (dims >= 0), dims, width)
    replacements = partners[donors[None], tokens, jnp.minimum(dims, width - 1)]
    return states.at[tokens, dims].set(replacements, mode="drop")


def _texts(states: ArrayLike, partners: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one dtype.

    Raises:
      UserError: their shapes do not match.
    """
    states, partners = jnp.asarray(states), jnp.asarray(partners)
    if states.ndim != 2:
        raise UserError(
            "states",
            wanted="shape [L, D], the text states of one prompt",
            got=f"{[*states.shape]}",
            fix="For a batch use jax.vmap of this function.",
        )
    if partners.ndim != 3 or partners.shape[1:] != states.shape:
        length, width = states.shape
        raise UserError(
            "partners",
            wanted=f"shape [M, {length}, {width}], as states has [{length}, {width}]",
            got=f"{[*partners.shape]}",
            fix="Pass partners[None] if it is one partner; texts of another text "
            "encoder cannot be mixed.",
        )
    return states, partners.astype(states.dtype)


def _whole(name: str, values: Any, *ranks: int) -> jax.Array:
    """Whole numbers as an array; an empty list too.

    Raises:
      UserError: they are others, or of another rank.
    """
    array = jnp.asarray(values)
    array = array if array.size else array.astype(jnp.int32)
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(
            name,
            wanted=f"whole numbers, {' or '.join(map(str, ranks))}-dimensional",
            got=f"{array.dtype} {[*array.shape]}",
            fix="Pass e.g. [1, 3].",
        )
    return array


def _donors(donors: Any, replaced: jax.Array, partners: int) -> jax.Array:
    """A partner for each of what is replaced.

    Raises:
      UserError: their numbers differ; or one is no partner, where that can be seen.
    """
    if donors is None:
        return jnp.zeros(replaced.shape, jnp.int32)
    found = _whole("donors", donors, 1)
    known = not isinstance(found, jax.core.Tracer)
    inside = not known or not found.size or 0 <= found.min() <= found.max() < partners
    if found.shape != replaced.shape or not inside:
        raise UserError(
            "donors",
            wanted=f"{replaced.size} partners, from 0 to {partners - 1}",
            got=f"{found.tolist()}" if known else f"{found.size}",
            fix="Pass one for each of what is replaced, or leave it out: then all are "
            "of the first partner.",
        )
    return found


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
