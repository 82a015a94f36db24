"""Recipes in, images and their health out: one compiled program for every set.

A part beside the stages: whoever draws synthetic images uses it, and it calls no stage.
`conditionings.py` says what each set tells the UNet. Legend: B batch, h w latent grid,
c its channels, L text tokens, D their width.
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

from mvc_jax import files
from mvc_jax.checkpoints import diffusers_layout, pipeline_folder
from mvc_jax.diffusion import instruct_pix2pix, samplers
from mvc_jax.generation import ablation
from mvc_jax.generation.conditionings import CONDITIONINGS, Texts
from mvc_jax.models import controlnet, stable_diffusion
from mvc_jax.training import rng, sharding

HEALTH = ("ok", "NaN", "black", "constant")  # an image's flag indexes them
_FLAT = 2  # grey levels that count as none


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn; plain values of the fields of the same names.

    Attributes:
      sampler: one of `samplers.SAMPLERS`.
      steps: of the sampler.
      guidance_interval: shares of the training noise levels within which there is
        guidance.
      guidance_rescale: of the guided prediction.
      grey: the dataset has no colour: channels are averaged.
      batch_size: images at once; changes none of them.
      dtype: of the UNet's activations.
      attention: how it is computed.
    """

    sampler: str
    steps: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    grey: bool = False
    batch_size: int = 16
    dtype: str = "auto"
    attention: str = "auto"


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
        self, workdir: epath.Path, mesh: Mesh, settings: Settings, texts: Texts
    ):
        """Opens it; nothing is loaded yet.

        Args:
          workdir: of a run whose model is fine-tuned.
          mesh: the devices.
          settings: how to draw.
          texts: of the run.
        """
        self._workdir, self._mesh, self._settings = workdir, mesh, settings
        self._texts = texts
        self._base = diffusers_layout.recorded_base(workdir)
        self._size = sharding.padded_size(settings.batch_size, mesh)
        self._key = rng.purpose_key(texts.seed, "noise")
        null = self._texts.cache.null_states
        self._null = jax.device_put(null, sharding.replicated(mesh))
        self._hashes: dict[epath.Path, str] = {}
        self._conditioning = self._loaded = self._params = None
        self._programs: dict[bool, Callable] = {}  # by whether there is a ControlNet

    def base_folder(self) -> epath.Path:
        """The folder of the base model."""
        return pipeline_folder.resolve(**self._base)[0]

    def model_folder(self, name: str) -> tuple[epath.Path, str]:
        """The folder of the model that draws a set, and the variant of its weights."""
        if CONDITIONINGS[name].finetuned:
            return self._workdir / "finetune" / "model", ""
        return self.base_folder(), self._base["variant"]

    def model_hash(self, name: str) -> str:
        """Of the weights of the UNet that draws a set."""
        folder, variant = self.model_folder(name)
        if folder not in self._hashes:
            weights = pipeline_folder.weight_files(folder, "unet", variant)
            self._hashes[folder] = files.sha256(*weights)[:16]
        return self._hashes[folder]

    def load(self, name: str) -> None:
        """Makes ready to draw the set `name`; its model goes onto the devices."""
        self._conditioning = CONDITIONINGS[name]
        folder, variant = self.model_folder(name)
        if (folder, self._controlled) == self._loaded:
            return
        self._params = None  # before the next one comes
        model, params = diffusers_layout.load(folder, ("vae", "unet"), variant)
        # The base's UNet, widened by zeros, ignores the source.
        model, params = model.widened(params)
        network = None
        if self._controlled:
            network, params["controlnet"] = self._texts.ablation.load_controlnet()
        if self._controlled not in self._programs:
            self._programs[self._controlled] = self._compiled(model, network)
        shardings = sharding.tree_shardings(params, self._mesh)
        self._params = jax.device_put(params, shardings)
        self._loaded = folder, self._controlled

    @property
    def _controlled(self) -> bool:
        return self._conditioning.needs == "controlnet"

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
                draw = self._programs[self._controlled]
                out = draw(self._params, batch, self._null, self._key)
                if drawn is None:
                    shape = (len(recipes), *out[0].shape[1:])
                    health = np.zeros(len(recipes), np.uint8)
                    drawn = Drawn(np.empty(shape, np.uint8), health)
                yield drawn, places, out, number == len(batches)

    def _batch(self, recipes: Sequence[dict]) -> dict[str, Any]:
        """What `sample_images` takes of recipes: these rows alone leave the disk."""
        cache = self._texts.cache
        moments = np.zeros((len(recipes), *cache.moments.shape[1:]), np.float32)
        if self._conditioning.source:
            moments = cache.moments_of(self._texts.rows(r["source"] for r in recipes))
        numbers = {"noise_seed": np.int32}
        numbers |= dict.fromkeys(("text_scale", "image_scale"), np.float32)
        edges = {}
        if self._controlled:
            sources = self._texts.rows(r["source"] for r in recipes)
            edges = {"edges": self._texts.ablation.edges(sources)}
        return {
            **edges,
            "moments": moments,
            "states": self._conditioning.states(self._texts, recipes),
            **{
                name: np.asarray([recipe[name] for recipe in recipes], type_)
                for name, type_ in numbers.items()
            },
        }

    def _compiled(
        self,
        model: stable_diffusion.StableDiffusion,
        network: controlnet.ControlNet | None,
    ) -> Callable:
        settings = self._settings
        model = model.with_compute_options(
            dtype=settings.dtype,
            attention=settings.attention,
            field="config.generate.attention",
        )
        if network is not None:
            how = {"dtype": model.dtype, "attention": model.attention}
            network = dataclasses.replace(network, **how)
        draw = functools.partial(
            sample_images,
            model=model,
            network=network,
            sampler=samplers.make(
                settings.sampler,
                settings.steps,
                alphas_cumprod=model.alphas_cumprod,
                prediction_type=model.prediction_type,
            ),
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
            grey=settings.grey,
        )
        return jax.jit(draw)


def sample_images(
    params: dict,
    batch: dict[str, Array],
    null_states: Float[Array, "L D"],
    key: Key[Array, ""],
    *,
    model: stable_diffusion.StableDiffusion,
    network: controlnet.ControlNet | None,
    sampler: samplers.Sampler,
    guidance_interval: tuple[float, float],
    guidance_rescale: float,
    grey: bool,
) -> tuple[UInt8[Array, "B H W 3"], UInt8[Array, " B"]]:
    """Samples, decodes and examines one batch.

    Args:
      params: `unet` (conditioned) and `vae`; with a network, `controlnet`.
      batch: `moments` [B, h, w, 2c] of the sources, or zeros; `states` [B, L, D];
        `noise_seed` and `redraws` int32 [B]; `text_scale`, s_T, and `image_scale`,
        s_I, [B]; with a network, uint8 `edges` [B, H, W, 3].
      null_states: of the empty prompt.
      key: root of the noise.
      model: the architecture.
      network: a ControlNet that looks at the edges, if any.
      sampler: of `samplers.make`.
      guidance_interval: as there.
      guidance_rescale: as there.
      grey: average the colour channels, for a dataset without colour.

    Returns:
      pixels in [0, 255], and an index of `HEALTH` for each image.
    """
    keys = image_keys(key, batch["noise_seed"], batch["redraws"])
    shape = (*batch["moments"].shape[1:3], model.latent_channels)
    denoise = functools.partial(model.denoise, params)
    if network is not None:
        pictures = batch["edges"] / 255.0
        denoise = functools.partial(
            ablation.controlled, params, model, network, pictures
        )
    latents = instruct_pix2pix.draw(
        denoise,
        rng.normal_like(keys, shape),
        batch["moments"],
        batch["states"],
        null_states,
        sampler=sampler,
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


def aligned(indices: Sequence[int], size: int) -> list[Int[np.ndarray, " size"]]:
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


def draw_again(
    draw: Callable[[Sequence[dict], int], Drawn],
    recipes: Sequence[dict],
    drawn: Drawn,
    most: int,
) -> list[dict]:
    """Draws images that cannot be used anew, in place.

    Args:
      draw: (recipes, how often they were drawn before) -> images.
      recipes: of all images.
      drawn: all images, drawn once.
      most: how often at most.

    Returns:
      a row for each that was bad at first: `{"index", "reason", "redraws", "kept"}`.
    """
    reasons = [HEALTH[flag] for flag in drawn.health]
    redraws = np.zeros(len(recipes), int)
    for attempt in range(1, most + 1):
        bad = np.flatnonzero(drawn.health)
        if not len(bad):
            break
        again = draw([recipes[place] for place in bad], attempt)
        drawn.images[bad], drawn.health[bad] = again.images, again.health
        redraws[bad] = attempt
    return [
        {
            "index": recipes[place]["index"],
            "reason": reason,
            "redraws": int(redraws[place]),
            "kept": not drawn.health[place],
        }
        for place, reason in enumerate(reasons)
        if reason != HEALTH[0]
    ]
