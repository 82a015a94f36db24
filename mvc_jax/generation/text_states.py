"""The text states of each set: `TEXT_STATES`; of Stable Diffusion XL also `POOLED`.

Computed for a batch of recipes from the cache of `encode`, or by `ablation.py`. Legend:
B batch, L text tokens, D their width, P that of pooled embeddings; E, F the states of
the prompts of an image's source and of its first partner.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mvc_jax.data.cache import Cache
from mvc_jax.diffusion import conditioning
from mvc_jax.generation.ablation import AblationInputs
from mvc_jax.generation.edits import Edits
from mvc_jax.mixing import operations
from mvc_jax.training import rng


@dataclasses.dataclass(frozen=True)
class TextInputs:
    """What text states are computed from.

    Attributes:
      cache: of `encode`.
      widths: of the recipes' arrays, the same for every batch of the run.
      seed: of the run.
      noise_scale: of `noised`, in standard deviations of the text states.
      interpolation: weight of the partner in `interpolated`, in [0, 1].
      ablation: inputs that are not in the cache; None if no set uses them.
      edits: completes recipes of sets that start from their source; None if there are
        none.
    """

    cache: Cache
    widths: operations.Widths
    seed: int = 0
    noise_scale: float = 0.1
    interpolation: float = 0.5
    ablation: AblationInputs | None = None
    edits: Edits | None = None

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """Image id -> its row in the cache."""
        return {row["id"]: i for i, row in enumerate(self.cache.rows)}

    def rows(self, ids: Iterable[str]) -> Int[np.ndarray, " N"]:
        """Rows in the cache of images by id."""
        return np.asarray([self.row_of[id_] for id_ in ids], np.int32)

    def source_rows(self, recipes: Sequence[dict]) -> Int[np.ndarray, " B"]:
        """Rows of the sources."""
        return self.rows(recipe["source"] for recipe in recipes)

    def partner_rows(self, recipes: Sequence[dict]) -> Int[np.ndarray, " B"]:
        """Rows of the first partners."""
        return self.rows(recipe["partners"][0] for recipe in recipes)


def caption(inputs: TextInputs, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
    """E."""
    return inputs.cache.states_of(inputs.source_rows(recipes))


def target(inputs: TextInputs, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
    """The states of the prompts of the targets, images of other classes."""
    rows = inputs.rows(recipe["target"] for recipe in recipes)
    return inputs.cache.states_of(rows)


def mixed(inputs: TextInputs, recipes: Sequence[dict]) -> Float[Array, "B L D"]:
    """E, with tokens and dims replaced by the partners' as the recipes say."""
    length, width = inputs.cache.text_states.shape[1:]
    arrays = operations.as_arrays(
        recipes, inputs.row_of, length=length, width=width, widths=inputs.widths
    )
    partners = inputs.cache.states_of(arrays["partners"].ravel())
    return _mixed(
        inputs.cache.states_of(arrays["source"]),
        partners.reshape(*arrays["partners"].shape, length, width),
        arrays["positions"],
        arrays["donors"],
        arrays["dims"],
        arrays["dim_donors"],
    )


def noised(inputs: TextInputs, recipes: Sequence[dict]) -> Float[Array, "B L D"]:
    """E + noise_scale * std(E) * N(0, 1), except for BOS; redraws have equal noise."""
    key = rng.purpose_key(inputs.seed, "embedding noise")
    seeds = np.asarray([recipe["noise_seed"] for recipe in recipes], np.int32)
    return _noised(caption(inputs, recipes), key, seeds, inputs.noise_scale)


def interpolated(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[np.ndarray, "B L D"]:
    """(1 - a) E + a F with a = `interpolation`."""
    weight = np.float32(inputs.interpolation)
    partner = inputs.cache.states_of(inputs.partner_rows(recipes))
    return (1 - weight) * caption(inputs, recipes) + weight * partner


def image_embedding(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[Array, "B L D"]:
    """The source's CLIP image embedding, as `conditioning.embedding_states`."""
    embeddings = inputs.ablation.image_embeddings(inputs.source_rows(recipes))
    return _embedding_states(embeddings, caption(inputs, recipes))


def embedding_difference(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[Array, "B L D"]:
    """Image embeddings, source minus first partner, as states."""
    embeddings = inputs.ablation.image_embeddings(inputs.source_rows(recipes))
    others = inputs.ablation.image_embeddings(inputs.partner_rows(recipes))
    return _difference_states(embeddings, others, caption(inputs, recipes))


def image_number(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[np.ndarray, "B L D"]:
    """States of `"a photo i/n of {class_type} {label}"`."""
    return inputs.ablation.number_states(inputs.source_rows(recipes))


_mixed = jax.jit(jax.vmap(operations.mix))
_embedding_states = jax.jit(conditioning.embedding_states)
_difference_states = jax.jit(conditioning.difference_states)


@jax.jit
def _noised(states, key, seeds, scale):
    words = states[:, 1:]
    noise = rng.normal_like(rng.example_keys(key, seeds), words.shape[1:])
    std = words.std(axis=(1, 2), keepdims=True)
    return states.at[:, 1:].add(scale * std * noise)


TEXT_STATES: dict[str, Callable[[TextInputs, Sequence[dict]], Any]] = {
    "caption": caption,
    "target": target,
    "mixed": mixed,
    "noised": noised,
    "interpolated": interpolated,
    "image_embedding": image_embedding,
    "embedding_difference": embedding_difference,
    "image_number": image_number,
}


def caption_pooled(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[np.ndarray, "B P"]:
    """The pooled embeddings of the sources' prompts."""
    return inputs.cache.pooled_of(inputs.source_rows(recipes))


def mixed_pooled(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[np.ndarray, "B P"]:
    """As each recipe's `pooled` says; without it the source's."""
    sources = caption_pooled(inputs, recipes)
    rows = []
    for own, recipe in zip(sources, recipes, strict=True):
        partners = inputs.cache.pooled_of(inputs.rows(recipe["partners"]))
        rows.append(operations.mix_pooled(own, partners, recipe.get("pooled")))
    return np.stack(rows)


def interpolated_pooled(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[np.ndarray, "B P"]:
    """As `interpolated`, of pooled embeddings."""
    weight = np.float32(inputs.interpolation)
    partner = inputs.cache.pooled_of(inputs.partner_rows(recipes))
    return (1 - weight) * caption_pooled(inputs, recipes) + weight * partner


def image_number_pooled(
    inputs: TextInputs, recipes: Sequence[dict]
) -> Float[np.ndarray, "B P"]:
    """Pooled embeddings of the texts of `image_number`."""
    return inputs.ablation.number_pooled(inputs.source_rows(recipes))


# Where it is not the source's.
POOLED: dict[str, Callable[[TextInputs, Sequence[dict]], Any]] = {
    "mixed": mixed_pooled,
    "interpolated": interpolated_pooled,
    "image_number": image_number_pooled,
}
