"""Inputs of the ablation's conditionings that the method itself does not need.

An image tower, texts that number the images, edges, and a ControlNet (supplement,
section 2). Models are loaded when they are first used; what is derived from an image is
computed again for each batch, which is cheap next to sampling.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax.checkpoints import (
    clip_checkpoint,
    controlnet_checkpoint,
    diffusers_layout,
    pipeline_folder,
)
from mvc_jax.data import edges
from mvc_jax.errors import UserError
from mvc_jax.models import clip, controlnet, stable_diffusion
from mvc_jax.training import sharding

CLIP_FIELD = "config.generate.clip"
CONTROLNET_FIELD = "config.generate.controlnet"


@dataclasses.dataclass(frozen=True)
class AblationModels:
    """Which models a run has for the ablation.

    Attributes:
      clip: folder or hub name of a CLIP; "": the base's own image tower.
      controlnet: folder or hub name of a ControlNet; "": the one that `pretrain` makes.
      base: folder or hub name of the base model; "": `pretrain` makes it.
      image_encoder_steps: training steps of the image tower in `pretrain`; 0: none.
      controlnet_steps: training steps of the ControlNet in `pretrain`; 0: none.
      text_width: D, width of the text states, if `pretrain` makes the base.
    """

    clip: str
    controlnet: str
    base: str
    image_encoder_steps: int
    controlnet_steps: int
    text_width: int

    def check(self, need: str) -> None:
        """Checks, without a device, that a model exists and fits the base.

        Args:
          need: a conditioning's `needs`: `"image_tower"`, `"controlnet"` or `""`.

        Raises:
          UserError: there is no such model, or it does not fit.
        """
        if need == "image_tower":
            self._check_image_tower()
        elif need == "controlnet":
            self._check_controlnet()

    def _check_image_tower(self) -> None:
        path = self.clip or self.base
        if not path:
            if self.image_encoder_steps:
                return
            raise UserError(
                CLIP_FIELD,
                wanted="an image tower, for image_embedding and embedding_difference",
                got="none, and pretrain makes none: pretrain.image_encoder.steps is 0",
                fix="Name a CLIP checkpoint, as openai/clip-vit-large-patch14 for "
                "Stable Diffusion 1.x, or set "
                "--config.pretrain.image_encoder.steps=500.",
            )
        if not self.clip and pipeline_folder.is_hub_name(path):
            return  # `encode` checks the base; its tower is known after the download
        tower = clip_checkpoint.check(path, field=CLIP_FIELD)
        width = self._base_text_width()
        if tower is not None and width is not None:
            _require_width(tower, width, path)

    def _check_controlnet(self) -> None:
        if self.controlnet:
            configs = self._base_configs()
            controlnet_checkpoint.check(
                self.controlnet, configs, field=CONTROLNET_FIELD
            )
        elif self.base or not self.controlnet_steps:
            got, fix = "none", "."
            if not self.base:
                got = "none, and pretrain makes none: pretrain.controlnet.steps is 0"
                fix = ", or set --config.pretrain.controlnet.steps=500."
            raise UserError(
                CONTROLNET_FIELD,
                wanted="a ControlNet for edges",
                got=got,
                fix="Name one, as lllyasviel/sd-controlnet-canny for Stable Diffusion "
                f"1.x{fix}",
            )

    def _base_configs(self) -> dict[str, dict] | None:
        """The base's configs; None if it is not on this disk yet."""
        if not self.base or pipeline_folder.is_hub_name(self.base):
            return None
        return diffusers_layout.load(self.base, ())[0].configs

    def _base_text_width(self) -> int | None:
        if not self.base:
            return self.text_width
        configs = self._base_configs()
        return configs and configs["unet"]["cross_attention_dim"]


@dataclasses.dataclass(frozen=True)
class AblationInputs:
    """Computes the inputs for images of the run, given by their rows in the cache.

    Attributes:
      models: which there are.
      base: the base model, as arguments of `diffusers_layout.load`.
      own_controlnet: folder of the ControlNet that `pretrain` makes.
      images: uint8 [N, H, W, 3], the training images.
      rows: of `encode`, one for each image.
      class_type: of the prompt.
      mesh: the devices.
      batch_size: maximum number of rows that are passed at once.
    """

    models: AblationModels
    base: dict[str, Any]
    own_controlnet: epath.Path
    images: np.ndarray
    rows: Sequence[dict]
    class_type: str
    mesh: Mesh
    batch_size: int

    def image_embeddings(self, rows: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B D"]:
        """CLIP image embeddings, as wide as text states."""
        tower, embed = self._tower
        return embed(tower.preprocess(self.images[rows]))

    def number_states(self, rows: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B L D"]:
        """Text states of the images' `number_texts`."""
        tokenize, encode = self._text_encoder
        distinct, inverse = np.unique(rows, return_inverse=True)
        return encode(tokenize([self._number_texts[row] for row in distinct]))[inverse]

    def number_pooled(self, rows: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B P"]:
        """Pooled embeddings of the images' `number_texts`; of Stable Diffusion XL."""
        tokenize, encode = self._text_pooler
        distinct, inverse = np.unique(rows, return_inverse=True)
        return encode(tokenize([self._number_texts[row] for row in distinct]))[inverse]

    def edges(self, rows: Int[np.ndarray, " B"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Canny edges, white on black."""
        return edges.canny(self.images[rows])

    def load_controlnet(self) -> tuple[controlnet.ControlNet, dict[str, Any]]:
        """The architecture of the ControlNet, and host parameters."""
        self.models.check("controlnet")
        model, _ = diffusers_layout.load(components=(), **self.base)
        path = self.models.controlnet or self.own_controlnet
        return controlnet_checkpoint.load(path, model.configs, field=CONTROLNET_FIELD)

    @functools.cached_property
    def _tower(self) -> tuple[clip.Clip, Callable]:
        self.models.check("image_tower")
        path = self.models.clip or pipeline_folder.resolve(**self.base)[0]
        tower, params = clip_checkpoint.load(path, field=CLIP_FIELD)
        model, _ = diffusers_layout.load(components=(), **self.base)
        _require_width(tower, model.text_width, path)
        return tower, self._batched(tower.image_embeddings, params)

    @functools.cached_property
    def _text_encoder(self) -> tuple[Callable, Callable]:
        model, params = self._load_text_encoders()
        return model.tokenize, self._batched(model.text_states, params)

    @functools.cached_property
    def _text_pooler(self) -> tuple[Callable, Callable]:
        model, params = self._load_text_encoders()
        return model.tokenize, self._batched(model.pooled_text, params)

    def _load_text_encoders(self) -> tuple[stable_diffusion.StableDiffusion, Any]:
        model, _ = diffusers_layout.load(components=(), **self.base)
        return diffusers_layout.load(components=model.text_encoders, **self.base)

    @functools.cached_property
    def _number_texts(self) -> list[str]:
        return number_texts(self.rows, self.class_type)

    def _batched(self, function: Callable, params: Any) -> Callable:
        size = sharding.padded_size(self.batch_size, self.mesh)
        run = sharding.over_batches(function, params, size=size, mesh=self.mesh)
        return lambda batch: next(run([batch]))


def denoise_with_controlnet(
    params: dict,
    model: stable_diffusion.StableDiffusion,
    network: controlnet.ControlNet,
    pictures: Float[Array, "B H W 3"],
    latents: Float[Array, "K h w C"],
    timesteps: Array,
    text_states: Float[Array, "K L D"],
) -> Float[Array, "K h w c"]:
    """`model.denoise` with the ControlNet's residuals, in every branch of guidance.

    Args:
      params: `unet` and `controlnet`.
      model: the base, its `conv_in` widened by zeros.
      network: the ControlNet; it is given the noisy latents only.
      pictures: in [0, 1]; K is a multiple of B, the branches of an image being next to
        each other as in `guidance`.
      latents: noisy latents, then source latents, on the channel axis.
      timesteps: [K].
      text_states: of the branches.
    """
    pictures = jnp.repeat(pictures, len(latents) // len(pictures), axis=0)
    noisy = latents[..., : model.latent_channels]
    residuals = network.residuals(
        params["controlnet"], noisy, timesteps, text_states, pictures
    )
    return model.denoise(params, latents, timesteps, text_states, residuals)


def number_texts(rows: Sequence[dict], class_type: str) -> list[str]:
    """`"a photo {i}/{n} of {class_type} {label}"` for each image (supplement, 2).

    Args:
      rows: of `encode`, one for each image: `label` and `class_name`.
      class_type: may be empty.

    Returns:
      a text for each image: it is number i, from 1, of the n images of its class.
    """
    totals = Counter(row["label"] for row in rows)
    seen: Counter[int] = Counter()
    texts = []
    for row in rows:
        label = row["label"]
        seen[label] += 1
        number = f"{seen[label]}/{totals[label]}"
        text = f"a photo {number} of {class_type} {row['class_name']}"
        texts.append(" ".join(text.split()))
    return texts


def _require_width(tower: clip.Clip, width: int, path: epath.PathLike) -> None:
    if tower.width != width:
        raise UserError(
            f"{CLIP_FIELD} {str(path)!r}",
            wanted=f"embeddings of {width} dims, as wide as the base's text states",
            got=f"{tower.width}, its projection_dim",
            fix="Stable Diffusion 1.x has 768, as openai/clip-vit-large-patch14; 2.x "
            "has 1024, as laion/CLIP-ViT-H-14-laion2B-s32B-b79K.",
        )
