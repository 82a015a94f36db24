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

from mvc_jax.data.cache import Cache
from mvc_jax.diffusion import conditioning
from mvc_jax.errors import require
from mvc_jax.generation.ablation import Ablation
from mvc_jax.mixing import operations
from mvc_jax.mixing.recipes import NOTHING
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
      ablation: what sets beyond the cache are made of; None where there are none.
    """

    cache: Cache
    widths: operations.Widths
    seed: int = 0
    noise_scale: float = 0.1
    interpolation: float = 0.5
    ablation: Ablation | None = None

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
    arrays = operations.as_arrays(recipes, texts.row_of, **sizes)
    partners = texts.cache.states_of(arrays["partners"].ravel())
    return _mixed(
        texts.cache.states_of(arrays["source"]),
        partners.reshape(*arrays["partners"].shape, length, width),
        arrays["positions"],
        arrays["donors"],
        arrays["dims"],
        arrays["dim_donors"],
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


def image_embedding(texts: Texts, recipes: Sequence[dict]) -> Float[Array, "B L D"]:
    """E(I1), the source's CLIP embedding, as `conditioning.embedding_states`."""
    sources = texts.rows(r["source"] for r in recipes)
    embeddings = texts.ablation.image_embeddings(sources)
    return _embedding_states(embeddings, texts.own(recipes))


def embedding_difference(
    texts: Texts, recipes: Sequence[dict]
) -> Float[Array, "B L D"]:
    """E(I1) - E(I2), I2 being the first partner's image."""
    sources = texts.rows(r["source"] for r in recipes)
    partners = texts.rows(r["partners"][0] for r in recipes)
    embeddings = [texts.ablation.image_embeddings(rows) for rows in (sources, partners)]
    return _difference_states(*embeddings, texts.own(recipes))


def image_number(texts: Texts, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
    """States of `"a photo i/n of {class_type} {label}"`."""
    return texts.ablation.number_states(texts.rows(r["source"] for r in recipes))


_mixed = jax.jit(jax.vmap(operations.mix))
_embedding_states = jax.jit(conditioning.embedding_states)
_difference_states = jax.jit(conditioning.difference_states)


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
      needs: of `ablation.Needs.check`, what there must be; `controlnet` also draws.
    """

    about: str
    states: Callable[[Texts, Sequence[dict]], Any]
    source: bool = True
    finetuned: bool = True
    partners: int | None = 0
    needs: str = ""

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
    "image_embedding": Conditioning(
        "An ablation: the fine-tuned model by the CLIP embedding of a real image, in "
        "the place of a caption.",
        image_embedding,
        source=False,
        needs="image_tower",
    ),
    "image_number": Conditioning(
        "An ablation: the fine-tuned model by the class and the number of an image.",
        image_number,
        source=False,
    ),
    "embedding_difference": Conditioning(
        "An ablation: a real image, and the difference between its CLIP embedding and "
        "another's in the place of a caption.",
        embedding_difference,
        partners=1,
        needs="image_tower",
    ),
    "controlnet": Conditioning(
        "An ablation: the base model without fine-tuning, by captions and the edges of "
        "a real image (ControlNet).",
        own,
        source=False,
        finetuned=False,
        needs="controlnet",
    ),
}


def named(value: str) -> tuple[str, ...]:
    """The names in `generate.conditioning`: `all`, or some with commas between.

    Raises:
      UserError: a name is unknown, or there twice.
    """
    names = tuple(name.strip() for name in value.split(",")) if value else ()
    if names == ("all",):
        return tuple(CONDITIONINGS)
    require(
        len(names) == len(set(names) & set(CONDITIONINGS)),
        "config.generate.conditioning",
        wanted=f"all, or some of {', '.join(CONDITIONINGS)}, each once",
        got=repr(value),
        fix="Write them with commas between.",
    )
    return names
