"""What the ablation's conditionings need and the method does not.

An image tower, texts that number the images, edges and a ControlNet (supplement,
section 2). A part beside the stages. Nothing is loaded before it is asked for, and what
is made for an image is made anew with each batch: beside sampling it costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax.checkpoints import diffusers_layout, pipeline_folder
from mvc_jax.data import edges
from mvc_jax.errors import UserError, require
from mvc_jax.models import clip, controlnet, stable_diffusion
from mvc_jax.training import sharding

CLIP_FIELD = "config.generate.clip"
CONTROLNET_FIELD = "config.generate.controlnet"


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a run has for the ablation; plain values of its fields.

    Attributes:
      clip: `generate.clip`.
      controlnet: `generate.controlnet`.
      base: `base.path`; "" where `pretrain` makes it.
      image_encoder_steps: of `pretrain`.
      controlnet_steps: of `pretrain`.
      text_width: D where `pretrain` makes the base.
    """

    clip: str
    controlnet: str
    base: str
    image_encoder_steps: int
    controlnet_steps: int
    text_width: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Needs":
        """Those of a run's settings."""
        pretrain, generate = config["pretrain"], config["generate"]
        return cls(
            clip=generate["clip"],
            controlnet=generate["controlnet"],
            base=config["base"]["path"],
            image_encoder_steps=pretrain["image_encoder"]["steps"],
            controlnet_steps=pretrain["controlnet"]["steps"],
            text_width=pretrain["text"]["width"],
        )

    def check(self, need: str) -> None:
        """Refuses, without a device, what could not be used.

        Args:
          need: `image_tower`, `controlnet` or, of what needs neither, `""`.

        Raises:
          UserError: there is none, or it does not fit the base.
        """
        if need == "image_tower":
            self._check_image_tower()
        elif need == "controlnet":
            self._check_controlnet()

    def _check_image_tower(self) -> None:
        path = self.clip or self.base
        require(
            bool(path or self.image_encoder_steps),
            CLIP_FIELD,
            wanted="an image tower, for image_embedding and embedding_difference",
            got="none, and the base gets none: pretrain.image_encoder.steps is 0",
            fix="Name a CLIP checkpoint, as openai/clip-vit-large-patch14 for Stable "
            "Diffusion 1.x, or set --config.pretrain.image_encoder.steps=500.",
        )
        if not path:
            return
        found = clip.check(path, field=CLIP_FIELD)
        width = self._text_width()
        if found is not None and width is not None:
            _require_width(found, width, path)

    def _check_controlnet(self) -> None:
        require(
            bool(self.controlnet or (self.controlnet_steps and not self.base)),
            CONTROLNET_FIELD,
            wanted="a ControlNet for edges",
            got="none"
            if self.base
            else "none, and the base gets none: pretrain.controlnet.steps is 0",
            fix="Name one, as lllyasviel/sd-controlnet-canny for Stable Diffusion 1.x"
            + (
                "." if self.base else ", or set --config.pretrain.controlnet.steps=500."
            ),
        )
        if self.controlnet:
            controlnet.check(self.controlnet, self._configs(), field=CONTROLNET_FIELD)

    def _configs(self) -> dict[str, dict] | None:
        """The base's, where they lie here already."""
        if not self.base or pipeline_folder.is_hub_name(self.base):
            return None
        return diffusers_layout.load(self.base, ())[0].configs

    def _text_width(self) -> int | None:
        if not self.base:
            return self.text_width
        configs = self._configs()
        return configs and configs["text_encoder"]["hidden_size"]


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Makes it for images of the run, given by their rows in the cache.

    Attributes:
      needs: what there is.
      base: of the run, as arguments of `diffusers_layout.load`.
      own_controlnet: the folder of `pretrain`'s.
      images: uint8 [N, H, W, 3], the training images.
      rows: of `encode`, one for each.
      class_type: of the prompt.
      mesh: the devices.
      batch_size: rows at once, at most.
    """

    needs: Needs
    base: dict[str, Any]
    own_controlnet: epath.Path
    images: np.ndarray
    rows: Sequence[dict]
    class_type: str
    mesh: Mesh
    batch_size: int

    def image_embeddings(self, rows: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B D"]:
        """CLIP's, as wide as a text state."""
        tower, embed = self._tower
        return embed(tower.preprocess(self.images[rows]))

    def number_states(self, rows: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B L D"]:
        """Text states of `number_text`."""
        tokenize, encode = self._text_encoder
        distinct, back = np.unique(rows, return_inverse=True)
        return encode(tokenize([self._number_texts[row] for row in distinct]))[back]

    def edges(self, rows: Int[np.ndarray, " B"]) -> UInt8[np.ndarray, "B H W 3"]:
        """White on black."""
        return edges.canny(self.images[rows])

    def load_controlnet(self) -> tuple[controlnet.ControlNet, dict[str, Any]]:
        """The architecture, and host parameters."""
        self.needs.check("controlnet")
        model, _ = diffusers_layout.load(components=(), **self.base)
        path = self.needs.controlnet or self.own_controlnet
        return controlnet.load(path, model.configs, field=CONTROLNET_FIELD)

    @functools.cached_property
    def _tower(self) -> tuple[clip.Clip, Callable]:
        self.needs.check("image_tower")
        path = self.needs.clip or pipeline_folder.resolve(**self.base)[0]
        tower, params = clip.load(path, field=CLIP_FIELD)
        model, _ = diffusers_layout.load(components=(), **self.base)
        _require_width(tower, model.text_width, path)
        return tower, self._batched(tower.image_embeddings, params)

    @functools.cached_property
    def _text_encoder(self) -> tuple[Callable, Callable]:
        model, params = diffusers_layout.load(components=("text_encoder",), **self.base)
        return model.tokenize, self._batched(model.text_states, params)

    @functools.cached_property
    def _number_texts(self) -> list[str]:
        return number_texts(self.rows, self.class_type)

    def _batched(self, function: Callable, params: Any) -> Callable:
        size = sharding.padded_size(self.batch_size, self.mesh)
        run = sharding.over_batches(function, params, size=size, mesh=self.mesh)
        return lambda batch: next(run([batch]))


def controlled(
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
      model: the base, widened by zeros.
      network: it sees the noisy latents alone.
      pictures: in [0, 1]; K is a multiple of B, the branches of an image beside each
        other as in `guidance`.
      latents: noisy, with source latents.
      timesteps: [K].
      text_states: of the branches.
    """
    pictures = jnp.repeat(pictures, len(latents) // len(pictures), axis=0)
    noisy = latents[..., : model.latent_channels]
    seen = (noisy, timesteps, text_states)
    residuals = network.residuals(params["controlnet"], *seen, pictures)
    return model.denoise(params, latents, timesteps, text_states, residuals)


def number_texts(rows: Sequence[dict], class_type: str) -> list[str]:
    """`"a photo {i}/{n} of {class_type} {label}"` of each image (supplement, 2).

    Args:
      rows: of `encode`, one for each image: `label` and `class_name`.
      class_type: may be empty.

    Returns:
      a text for each: it is number i, from 1, of the n of its class.
    """
    totals: dict[int, int] = {}
    for row in rows:
        totals[row["label"]] = totals.get(row["label"], 0) + 1
    seen: dict[int, int] = {}
    texts = []
    for row in rows:
        i = seen[row["label"]] = seen.get(row["label"], 0) + 1
        text = f"a photo {i}/{totals[row['label']]} of {class_type} {row['class_name']}"
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
