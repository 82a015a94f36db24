"""What each set of synthetic images tells the UNet: `CONDITIONINGS`.

A part beside the stages: made of what is cached, of the recipes and of mixing. A set is
nothing but text states, and source latents or zeros; so all are drawn by one program. A
further one is a function and a row of the table. Legend: B batch, L text tokens, D
their width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mvc_jax import mix
from mvc_jax.data.cache import Cache
from mvc_jax.data.recipes import NOTHING
from mvc_jax.training import rng


@dataclasses.dataclass(frozen=True)
class Texts:
    """What text states are made of, for the recipes of a batch.

    Attributes:
      cache: of `encode`.
      widths: of the recipes' arrays, the same for every batch of the run.
      seed: of the run.
      noise_scale: of `noised`, in standard deviations of the text states.
      interpolation: share of the partner in `interpolated`, in [0, 1].
    """

    cache: Cache
    widths: mix.Widths
    seed: int = 0
    noise_scale: float = 0.1
    interpolation: float = 0.5

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """Image id -> its row in the cache."""
        return {row["id"]: i for i, row in enumerate(self.cache.rows)}

    def rows(self, ids: Iterable[str]) -> Int[np.ndarray, " N"]:
        return np.asarray([self.row_of[id_] for id_ in ids], np.int32)

    def own(self, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
        """E: states of the prompts of the sources."""
        return self.cache.states_of(self.rows(r["source"] for r in recipes))

    def partner(self, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
        """F: states of the prompts of the first partners."""
        return self.cache.states_of(self.rows(r["partners"][0] for r in recipes))


def mixed(texts: Texts, recipes: Sequence[dict]) -> Float[Array, "B L D"]:
    """The method: E, with tokens or dims of its partners as the recipes say."""
    length, width = texts.cache.text_states.shape[1:]
    sizes = {"length": length, "width": width, "widths": texts.widths}
    arrays = mix.as_arrays(recipes, texts.row_of, **sizes)
    partners = texts.cache.states_of(arrays["partners"].ravel())
    return _mixed(
        texts.cache.states_of(arrays["source"]),
        partners.reshape(*arrays["partners"].shape, length, width),
        *(arrays["positions"], arrays["donors"]),
        *(arrays["dims"], arrays["dim_donors"]),
    )


def own(texts: Texts, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
    """E itself."""
    return texts.own(recipes)


def noised(texts: Texts, recipes: Sequence[dict]) -> Float[Array, "B L D"]:
    """E + noise_scale * std(E) * N(0, 1), BOS apart; a redraw changes nothing here."""
    key = rng.purpose_key(texts.seed, "embedding noise")
    seeds = np.asarray([r["noise_seed"] for r in recipes], np.int32)
    return _noised(texts.own(recipes), key, seeds, texts.noise_scale)


def interpolated(texts: Texts, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
    """(1 - a) E + a F, a being `interpolation`."""
    share = np.float32(texts.interpolation)
    return (1 - share) * texts.own(recipes) + share * texts.partner(recipes)


_mixed = jax.jit(jax.vmap(mix.mix))


@jax.jit
def _noised(states, key, seeds, scale):
    words = states[:, 1:]
    noise = rng.normal_like(rng.example_keys(key, seeds), words.shape[1:])
    std = words.std(axis=(1, 2), keepdims=True)
    return states.at[:, 1:].add(scale * std * noise)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a set tells the UNet.

    Attributes:
      about: a sentence, for the dataset card.
      states: (texts, recipes of a batch) -> text states [B, L, D].
      source: whether the source's latents count; else there are zeros.
      finetuned: whether the fine-tuned model draws; else the base.
      partners: how many of a recipe's partners it uses; None: the whole recipe.
    """

    about: str
    states: Callable[[Texts, Sequence[dict]], Any]
    source: bool = True
    finetuned: bool = True
    partners: int | None = 0

    def recipe(self, recipe: dict, name: str) -> dict:
        """What of a recipe is true of an image of the set `name`."""
        if self.partners is None:
            return recipe
        partners = recipe["partners"][: self.partners]
        own = {"mode": name, "partners": partners, "dim_tokens": [1, 1]}
        return recipe | NOTHING | own


CONDITIONINGS = {
    "mixed": Conditioning(
        "The method: a real image, and its caption mixed with others of its class.",
        mixed,
        partners=None,
    ),
    "unmixed": Conditioning(
        "A control: a real image with its own caption, not mixed.", own
    ),
    "pretrained": Conditioning(
        "A control: the base model without fine-tuning, by captions alone.",
        own,
        source=False,
        finetuned=False,
    ),
    "caption_only": Conditioning(
        "An ablation: the fine-tuned model by captions alone, without a real image.",
        own,
        source=False,
    ),
    "noised": Conditioning(
        "An ablation: a real image with its own caption, whose text states have noise.",
        noised,
    ),
    "interpolated": Conditioning(
        "An ablation: a real image, and a mean of its caption and another's.",
        interpolated,
        partners=1,
    ),
}
