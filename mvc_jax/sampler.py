"""Recipes in, images and their health out: one compiled sampler for every set.

A part beside the stages: whoever draws synthetic images uses it, and it calls no stage.
What a set tells the UNet of an image is nothing but text states, and source latents or
zeros; `CONDITIONINGS` says how each set makes them, and all are drawn by the same
program. Legend: B batch, h w latent grid, c its channels, L text tokens, D their width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from mvc_jax import files, mix
from mvc_jax.data import splits
from mvc_jax.data.cache import Cache, open_cache
from mvc_jax.diffusion import instruct_pix2pix
from mvc_jax.models import checkpoint_folder, diffusers_layout, stable_diffusion
from mvc_jax.training import rng, sharding

HEALTH = ("fine", "NaN", "black", "constant")  # an image's flag indexes them
_FLAT = 2  # grey levels that count as none


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn; plain values of the fields of the same names.

    Attributes:
      seed: of the run.
      sampler: a solver's name.
      steps: of the solver.
      guidance_interval: shares of the training noise levels within which there is
        guidance.
      guidance_rescale: of the guided prediction.
      noise_scale: of `noised`, in standard deviations of the text states.
      interpolation: share of the partner in `interpolated`, in [0, 1].
      batch_size: images at once; changes none of them.
      dtype: of the UNet's activations.
      attention: how it is computed.
    """

    seed: int
    sampler: str
    steps: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    noise_scale: float = 0.1
    interpolation: float = 0.5
    batch_size: int = 16
    dtype: str = "auto"
    attention: str = "auto"


@dataclasses.dataclass(frozen=True)
class Texts:
    """What text states are made of, for the recipes of a batch.

    Attributes:
      cache: of `encode`.
      settings: of the run.
      widths: of the recipes' arrays, the same for every batch of the run.
    """

    cache: Cache
    settings: Settings
    widths: mix.Widths

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
    key = rng.purpose_key(texts.settings.seed, "embedding noise")
    seeds = np.asarray([r["noise_seed"] for r in recipes], np.int32)
    return _noised(texts.own(recipes), key, seeds, texts.settings.noise_scale)


def interpolated(texts: Texts, recipes: Sequence[dict]) -> Float[np.ndarray, "B L D"]:
    """(1 - a) E + a F, a being `interpolation`."""
    share = np.float32(texts.settings.interpolation)
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
        nothing = {"positions": [], "donors": [], "dims": [], "dim_donors": []}
        partners = recipe["partners"][: self.partners]
        return recipe | nothing | {"mode": name, "partners": partners}


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


@dataclasses.dataclass
class Drawn:
    """Images of some recipes, in their order.

    Attributes:
      images: uint8 [N, H, W, 3].
      health: uint8 [N], indices of `HEALTH`.
    """

    images: np.ndarray
    health: np.ndarray


class Sampler:
    """The cache, the compiled program, and a model on the devices."""

    def __init__(
        self,
        workdir: epath.Path,
        mesh: Mesh,
        settings: Settings,
        widths: mix.Widths,
    ):
        self._workdir, self._mesh, self._settings = workdir, mesh, settings
        self._grey = splits.read_split(workdir / "caption", "train").grey
        self.texts = Texts(open_cache(workdir / "encode"), settings, widths)
        self._base = diffusers_layout.recorded(
            workdir / "encode" / "base.json", workdir / "pretrain" / "model"
        )
        self._size = sharding.padded_size(settings.batch_size, mesh)
        self._key = rng.purpose_key(settings.seed, "noise")
        null = self.texts.cache.null_states
        self._null = jax.device_put(null, sharding.replicated(mesh))
        self._conditioning = self._folder = self._params = self._draw = None

    def model_folder(self, name: str) -> tuple[epath.Path, str]:
        """The folder of the model that draws a set, and the variant of its weights."""
        if CONDITIONINGS[name].finetuned:
            return self._workdir / "finetune" / "model", ""
        return checkpoint_folder.resolve(**self._base)[0], self._base["variant"]

    def model_hash(self, name: str) -> str:
        """Of the weights of the UNet that draws a set."""
        folder, variant = self.model_folder(name)
        weights = checkpoint_folder.weight_files(folder, "unet", variant)
        return files.sha256(*weights)[:16]

    def load(self, name: str) -> None:
        """Makes ready to draw the set `name`; its model goes onto the devices."""
        self._conditioning = CONDITIONINGS[name]
        folder, variant = self.model_folder(name)
        if folder == self._folder:
            return
        self._params = None  # before the next one comes
        model, params = diffusers_layout.load(folder, ("vae", "unet"), variant)
        # The base's UNet, widened by zeros, ignores the source.
        model, params = model.widened(params)
        if self._draw is None:
            self._draw = self._compiled(model)
        shardings = sharding.tree_shardings(params, self._mesh)
        self._params, self._folder = jax.device_put(params, shardings), folder

    def draw(self, recipes: Sequence[dict], redraw: int = 0) -> Drawn:
        """The images of `recipes`, whatever the batches they happen to be drawn in."""
        return next(self.stream([recipes], redraw))

    def stream(
        self, groups: Iterable[Sequence[dict]], redraw: int = 0
    ) -> Iterator[Drawn]:
        """Draws groups of recipes, one after another.

        A batch is sent before the one before it is fetched, over the border of groups
        too. Image k has row k of the batch, modulo its size: on the same devices, with
        the same batch size, it is the same to the bit whatever is drawn beside it.

        Args:
          groups: of recipes, none empty.
          redraw: of these images: how often they were drawn before.

        Yields:
          what was drawn for each group.
        """
        for drawn, places, (pixels, health), last in _one_behind(
            self._sent(groups, redraw)
        ):
            there = places >= 0
            drawn.images[places[there]] = np.asarray(pixels)[there]
            drawn.health[places[there]] = np.asarray(health)[there]
            if last:
                yield drawn

    def _sent(self, groups: Iterable[Sequence[dict]], redraw: int) -> Iterator[tuple]:
        for recipes in groups:
            drawn = None
            batches = aligned([recipe["index"] for recipe in recipes], self._size)
            for number, places in enumerate(batches, start=1):
                batch = self._batch([recipes[max(place, 0)] for place in places])
                batch["redraws"] = np.full(self._size, redraw, np.int32)
                batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
                out = self._draw(self._params, batch, self._null, self._key)
                if drawn is None:
                    shape = (len(recipes), *out[0].shape[1:])
                    health = np.zeros(len(recipes), np.uint8)
                    drawn = Drawn(np.empty(shape, np.uint8), health)
                yield drawn, places, out, number == len(batches)

    def _batch(self, recipes: Sequence[dict]) -> dict[str, Any]:
        """What `sample_images` takes of recipes: these rows alone leave the disk."""
        cache = self.texts.cache
        moments = np.zeros((len(recipes), *cache.moments.shape[1:]), np.float32)
        if self._conditioning.source:
            moments = cache.moments_of(self.texts.rows(r["source"] for r in recipes))
        numbers = {"noise_seed": np.int32}
        numbers |= dict.fromkeys(("text_scale", "image_scale"), np.float32)
        return {
            "moments": moments,
            "states": self._conditioning.states(self.texts, recipes),
            **{
                name: np.asarray([recipe[name] for recipe in recipes], type_)
                for name, type_ in numbers.items()
            },
        }

    def _compiled(self, model: stable_diffusion.StableDiffusion) -> Callable:
        settings = self._settings
        model = model.computing(
            dtype=settings.dtype, attention=settings.attention, section="generate"
        )
        draw = functools.partial(
            sample_images,
            model=model,
            solver=model.solver(settings.sampler, settings.steps),
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
            grey=self._grey,
        )
        return jax.jit(draw)


def sample_images(
    params: dict,
    batch: dict[str, Array],
    null_states: Float[Array, "L D"],
    key: Key[Array, ""],
    *,
    model: stable_diffusion.StableDiffusion,
    solver: Any,
    guidance_interval: tuple[float, float],
    guidance_rescale: float,
    grey: bool,
) -> tuple[UInt8[Array, "B H W 3"], UInt8[Array, " B"]]:
    """Samples, decodes and examines one batch.

    Args:
      params: `unet` (conditioned) and `vae`.
      batch: `moments` [B, h, w, 2c] of the sources, or zeros; `states` [B, L, D];
        `noise_seed` and `redraws` int32 [B]; `text_scale`, s_T, and `image_scale`,
        s_I, [B].
      null_states: of the empty prompt.
      key: root of the noise.
      model: the architecture.
      solver: as `instruct_pix2pix.draw` takes it.
      guidance_interval: as there.
      guidance_rescale: as there.
      grey: average the colour channels, for a dataset without colour.

    Returns:
      pixels in [0, 255], and an index of `HEALTH` for each image.
    """
    keys = image_keys(key, batch["noise_seed"], batch["redraws"])
    shape = (*batch["moments"].shape[1:3], model.latent_channels)
    latents = instruct_pix2pix.draw(
        functools.partial(model.denoise, params),
        rng.normal_like(keys, shape),
        batch["moments"],
        batch["states"],
        null_states,
        solver=solver,
        text_scale=batch["text_scale"],
        image_scale=batch["image_scale"],
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
    )
    images = model.decode(params, latents)
    pixels = stable_diffusion.to_pixels(images, grey=grey)
    return pixels, examine(latents, images, pixels)


def image_keys(
    key: Key[Array, ""], noise_seeds: Int[Array, " B"], redraws: Int[Array, " B"]
) -> Key[Array, " B"]:
    """The keys of the noise of images: of their seed, and of redraw r >= 1 of it."""
    keys = rng.example_keys(key, noise_seeds)
    again = jax.vmap(jax.random.fold_in)(keys, redraws)
    return jnp.where(redraws > 0, again, keys)


def examine(
    latents: Float[Array, "B h w c"],
    images: Float[Array, "B H W 3"],
    pixels: UInt8[Array, "B H W 3"],
) -> UInt8[Array, " B"]:
    """Whether images can be used: an index of `HEALTH` for each.

    Args:
      latents: that were sampled.
      images: decoded from them.
      pixels: made of these; as good as black, or of one colour, is none.
    """
    finite = jnp.isfinite(latents).all((1, 2, 3)) & jnp.isfinite(images).all((1, 2, 3))
    most, least = pixels.max((1, 2)), pixels.min((1, 2))  # by channel
    black = (most <= _FLAT).all(-1)
    constant = (most - least <= _FLAT).all(-1)
    flag = jnp.where(black, 2, jnp.where(constant, 3, 0))
    return jnp.where(finite, flag, 1).astype(jnp.uint8)


def aligned(
    indices: Sequence[int], size: int
) -> list[Int[np.ndarray, " size"]]:
    """Cuts images into batches in which image k has row k % size.

    Args:
      indices: k of each image.
      size: rows of a batch.

    Returns:
      for each batch, the place in `indices` of the image in each row; -1: none.
    """
    batches: list[np.ndarray] = []
    used = [0] * size
    for place, index in enumerate(indices):
        row = index % size
        if used[row] == len(batches):
            batches.append(np.full(size, -1, np.int64))
        batches[used[row]][row] = place
        used[row] += 1
    return batches


def _one_behind(items: Iterable[Any]) -> Iterator[Any]:
    """Yields each item when the one after it has been made."""
    behind = []
    for item in items:
        yield from behind
        behind = [item]
    yield from behind
