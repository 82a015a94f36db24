"""Draws images by recipe, with one compiled program for every set.

`conditionings.py` says what the UNet is given for each set. Legend: B batch, h w latent
grid, c its channels, L text tokens, D their width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, UInt8

from mvc_jax import files
from mvc_jax.checkpoints import diffusers_layout, pipeline_folder
from mvc_jax.diffusion import instruct_pix2pix, loss, samplers, timesteps
from mvc_jax.generation import ablation, latent_perturbation
from mvc_jax.generation.conditionings import CONDITIONINGS
from mvc_jax.generation.edits import Edits
from mvc_jax.generation.image_status import Drawn, image_status
from mvc_jax.generation.text_states import (
    POOLED,
    TEXT_STATES,
    TextInputs,
    caption_pooled,
)
from mvc_jax.models import controlnet, stable_diffusion
from mvc_jax.training import rng, sharding

SCALARS = {  # of a recipe, that the compiled program takes
    "noise_seed": np.int32,
    "text_scale": np.float32,
    "image_scale": np.float32,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn: fields of `generate`, and `grey`.

    Attributes:
      sampler: its name.
      steps: of the sampler.
      spacing: of its timesteps, as `timesteps.timesteps_of` takes it.
      guidance_interval: fractions of the training timesteps between which guidance is
        applied.
      guidance_rescale: phi of the guided prediction, in [0, 1].
      grey: whether the colour channels are averaged, for a dataset without colour.
      batch_size: images that are drawn at once; it changes none of them.
      dtype: of the UNet's activations.
      attention: implementation of attention.
    """

    sampler: str
    steps: int
    spacing: str = timesteps.AUTO
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    grey: bool = False
    perturbation: float = 0.8
    batch_size: int = 16
    dtype: str = "auto"
    attention: str = "auto"


class ImageSampler:
    """A model on the devices, and the compiled programs that sample from it."""

    def __init__(
        self, workdir: epath.Path, mesh: Mesh, settings: Settings, texts: TextInputs
    ):
        """Prepares; no model is loaded yet.

        Args:
          workdir: of a run whose model is fine-tuned.
          mesh: the devices.
          settings: how to draw.
          texts: what text states are computed from.
        """
        self.settings = settings
        self._workdir, self._mesh, self._texts = workdir, mesh, texts
        self._base = diffusers_layout.recorded_base(workdir)
        self._size = sharding.padded_size(settings.batch_size, mesh)
        self._key = rng.purpose_key(texts.seed, "noise")
        null = texts.cache.null_states
        self._null = jax.device_put(null, sharding.replicated(mesh))
        self._hashes: dict[epath.Path, str] = {}
        self._conditioning = self._loaded = self._params = None
        self._architecture: tuple[Any, ...] = ()  # of the programs: model, ControlNet
        # By whether there is a ControlNet, by strength, and by perturbation.
        self._programs: dict[tuple[Any, ...], Callable] = {}

    def base_folder(self) -> epath.Path:
        """Folder of the base model."""
        return pipeline_folder.resolve(**self._base)[0]

    def model_folder(self, name: str) -> tuple[epath.Path, str]:
        """Folder of the model that draws a set, and the variant of its weights."""
        if CONDITIONINGS[name].finetuned:
            return self._workdir / "finetune" / "model", ""
        return self.base_folder(), self._base["variant"]

    def model_hash(self, name: str) -> str:
        """Hash of the weights of the UNet that draws a set."""
        folder, variant = self.model_folder(name)
        if folder not in self._hashes:
            weights = pipeline_folder.weight_files(folder, "unet", variant)
            self._hashes[folder] = files.sha256(*weights)[:16]
        return self._hashes[folder]

    def load(self, name: str) -> None:
        """Prepares to draw the set `name`: moves its model onto the devices."""
        self._conditioning = CONDITIONINGS[name]
        folder, variant = self.model_folder(name)
        if (folder, self._controlled) == self._loaded:
            return
        self._params = None  # freed before the next model is loaded
        model, params = diffusers_layout.load(folder, ("vae", "unet"), variant)
        # The base's UNet, widened by zeros, ignores the source.
        model, params = model.widened(params)
        network = None
        if self._controlled:
            network, params["controlnet"] = self._texts.ablation.load_controlnet()
        self._architecture = model, network
        if not self._conditioning.edits:
            start = timesteps.start_in_words(
                self.settings.sampler,
                self.settings.steps,
                self.settings.spacing,
                len(model.alphas_cumprod),
            )
            logging.info("%s", start)
        shardings = sharding.tree_shardings(params, self._mesh)
        self._params = jax.device_put(params, shardings)
        self._loaded = folder, self._controlled

    @property
    def edits(self) -> Edits | None:
        """What completes the recipes of sets that start from their source."""
        return self._texts.edits

    @property
    def has_pooled(self) -> bool:
        """Whether the UNet is given pooled embeddings, as that of XL is."""
        return self._texts.cache.pooled is not None

    def _program(self, strength: float | None) -> Callable:
        """The compiled program for images that start like this."""
        perturbs = self._conditioning.perturbed
        perturbation = self.settings.perturbation if perturbs else None
        key = self._controlled, strength, perturbation
        if key not in self._programs:
            self._programs[key] = jit_sample_images(
                *self._architecture,
                self.settings,
                self._mesh,
                strength=strength,
                perturbation=perturbation,
            )
        return self._programs[key]

    @property
    def _controlled(self) -> bool:
        return self._conditioning.needs == "controlnet"

    def draw(self, recipes: Sequence[dict], redraw: int = 0) -> Drawn:
        """Draws the images of `recipes`; see `stream`."""
        return next(self.stream([recipes], redraw))

    def stream(
        self,
        groups: Iterable[Sequence[dict]],
        redraw: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Drawn]:
        """Draws groups of recipes, one after another.

        Each batch is dispatched before the previous one is fetched, also from one group
        to the next. Image k has row k of its batch, modulo the batch size: on the same
        devices and with the same batch size it is bit-identical whatever else is drawn.

        Args:
          groups: of recipes, none empty.
          redraw: number of the redraw, from 1; 0: the images are drawn first.
          advance: is called with the number of images of each batch that was drawn.

        Yields:
          the images of each group.
        """
        for drawn, places, (pixels, status), last in _delayed(
            self._dispatched(groups, redraw)
        ):
            used = places >= 0
            drawn.images[places[used]] = np.asarray(pixels)[used]
            drawn.status[places[used]] = np.asarray(status)[used]
            advance(int(used.sum()))
            if last:
                yield drawn

    def _dispatched(
        self, groups: Iterable[Sequence[dict]], redraw: int
    ) -> Iterator[tuple]:
        for recipes in groups:
            drawn = None
            batches = [*self._batches(recipes)]
            for number, (strength, places) in enumerate(batches, start=1):
                here = places[places >= 0][0]  # in the place of recipes there are not
                batch = self._batch(
                    [recipes[here if place < 0 else place] for place in places]
                )
                batch["redraws"] = np.full(self._size, redraw, np.int32)
                batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
                draw = self._program(strength)
                out = draw(self._params, batch, self._null, self._key)
                if drawn is None:
                    shape = (len(recipes), *out[0].shape[1:])
                    status = np.zeros(len(recipes), np.uint8)
                    drawn = Drawn(np.empty(shape, np.uint8), status)
                yield drawn, places, out, number == len(batches)

    def _batches(
        self, recipes: Sequence[dict]
    ) -> Iterator[tuple[float | None, Int[np.ndarray, " size"]]]:
        """Batches of recipes of one strength each, by their places; -1: no recipe."""
        by_strength: dict[float | None, list[int]] = {}
        for place, recipe in enumerate(recipes):
            by_strength.setdefault(recipe.get("strength"), []).append(place)
        for strength, mine in by_strength.items():
            indices = [recipes[place]["index"] for place in mine]
            for places in batches_by_index(indices, self._size):
                yield strength, np.where(places < 0, -1, np.asarray(mine)[places])

    def _batch(self, recipes: Sequence[dict]) -> dict[str, Any]:
        """The inputs of `sample_images` for these recipes, but for `redraws`."""
        cache, sources = self._texts.cache, self._texts.source_rows(recipes)
        if self._conditioning.source:
            moments = cache.moments_of(sources)
        else:
            moments = np.zeros((len(recipes), *cache.moments.shape[1:]), np.float32)
        text = self._conditioning.text
        states = TEXT_STATES[text](self._texts, recipes)
        pooled = None
        if cache.pooled is not None:
            pooled = POOLED.get(text, caption_pooled)(self._texts, recipes)
        batch = {
            "moments": moments,
            "states": cache.conditions(sources, states, pooled),
        }
        if self._conditioning.edits:
            batch["start"] = cache.moments_of(sources)
        for name, dtype in SCALARS.items():
            batch[name] = np.asarray([recipe[name] for recipe in recipes], dtype)
        if self._controlled:
            batch["edges"] = self._texts.ablation.edges(sources)
        return batch


def jit_sample_images(
    model: stable_diffusion.StableDiffusion,
    network: controlnet.ControlNet | None,
    settings: Settings,
    mesh: Mesh,
    strength: float | None = None,
    perturbation: float | None = None,
) -> Callable:
    """Jits `sample_images` for a model, settings, devices and a kind of start.

    `strength` and `perturbation` are as there.

    Raises:
      UserError: the devices do not support this attention.
    """
    model = model.with_compute_options(
        dtype=settings.dtype,
        mesh=mesh,
        attention=settings.attention,
        field="config.generate.attention",
    )
    if network is not None:
        network = dataclasses.replace(
            network, dtype=model.dtype, attention=model.attention, mesh=mesh
        )
    draw = functools.partial(
        sample_images,
        model=model,
        network=network,
        sampler=samplers.make(
            settings.sampler,
            settings.steps,
            alphas_cumprod=model.alphas_cumprod,
            prediction_type=model.prediction_type,
            spacing=settings.spacing,
        ),
        guidance_interval=settings.guidance_interval,
        guidance_rescale=settings.guidance_rescale,
        grey=settings.grey,
        strength=strength,
        perturbation=perturbation,
    )
    return jax.jit(draw)


def sample_images(
    params: dict,
    batch: dict[str, Array],
    null_states: Any,
    key: Key[Array, ""],
    *,
    model: stable_diffusion.StableDiffusion,
    network: controlnet.ControlNet | None,
    sampler: samplers.Sampler,
    guidance_interval: tuple[float, float],
    guidance_rescale: float,
    grey: bool,
    strength: float | None = None,
    perturbation: float | None = None,
) -> tuple[UInt8[Array, "B H W 3"], UInt8[Array, " B"]]:
    """Samples and decodes one batch, and computes each image's status.

    Args:
      params: `unet` (conditioned) and `vae`; with a network, `controlnet`.
      batch: `moments` [B, h, w, 2c] of the sources, or zeros; `states` [B, L, D], of XL
        all `guidance.Conditions`; `noise_seed` and `redraws` int32 [B]; `text_scale`,
        s_T, and `image_scale`, s_I, [B]; with a network, uint8 `edges` [B, H, W, 3];
        with a strength, `start`, moments to start from.
      null_states: of the empty prompt, as `instruct_pix2pix.draw` takes them.
      key: root of the noise.
      model: the architecture.
      network: a ControlNet that is given the edges; None: there is none.
      sampler: of `samplers.make`.
      guidance_interval: see `instruct_pix2pix.draw`.
      guidance_rescale: see `instruct_pix2pix.draw`.
      grey: whether the colour channels are averaged.
      strength: of the noise that is added to the mode of `start`; None: images start
        from noise.
      perturbation: `limit` of `latent_perturbation.perturbed`, by which the sampled
        latents are changed; None: they are not.

    Returns:
      pixels in [0, 255], and the status of each image.
    """
    keys = image_keys(key, batch["noise_seed"], batch["redraws"])
    shape = (*batch["moments"].shape[1:3], model.latent_channels)
    denoise = functools.partial(model.denoise, params)
    if network is not None:
        pictures = batch["edges"] / 255.0
        denoise = functools.partial(
            ablation.denoise_with_controlnet, params, model, network, pictures
        )
    start = None
    if strength is not None:
        start = loss.posterior_mode(batch["start"]) * model.scaling_factor
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
        start=start,
        strength=1.0 if strength is None else strength,
    )
    if perturbation is not None:
        latents = latent_perturbation.perturbed(keys, latents, perturbation)
    images = model.decode_in_parts(params, latents)
    pixels = stable_diffusion.to_pixels(images, grey=grey)
    return pixels, image_status(latents, images, pixels)


def image_keys(
    key: Key[Array, ""], noise_seeds: Int[Array, " B"], redraws: Int[Array, " B"]
) -> Key[Array, " B"]:
    """The keys of the images' noise: by noise seed, folded with the redraw from 1."""
    keys = rng.example_keys(key, noise_seeds)
    again = jax.vmap(jax.random.fold_in)(keys, redraws)
    return jnp.where(redraws > 0, again, keys)


def batches_by_index(
    indices: Sequence[int], size: int
) -> list[Int[np.ndarray, " size"]]:
    """Divides images into batches in which image k has row k % size.

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


def _delayed(items: Iterable[Any]) -> Iterator[Any]:
    """Yields each item after the next one was computed."""
    previous = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous
