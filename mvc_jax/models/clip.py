"""CLIP: embeddings of images and texts in one space (arXiv 2103.00020), in JAX.

`checkpoints/clip_checkpoint.py` reads and writes the files.

Legend: B batch, K classes, S pixels along a side of the tower's input, L tokens, P dims
of an embedding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax.models.flax_classes import (
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPVisionTransformer,
    transformers,
)

Params = dict[str, Any]


class _ImageTower(nn.Module):
    """CLIPVisionModelWithProjection, for which transformers has no Flax class."""

    config: transformers.CLIPVisionConfig

    def setup(self):
        self.vision_model = FlaxCLIPVisionTransformer(self.config)
        self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False)

    def __call__(self, pixels):
        return self.visual_projection(self.vision_model(pixels).pooler_output)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The architecture with its preprocessing and tokenizer; no weights.

    Parameters are passed to each method: `vision_model` and `visual_projection`, and
    with a text tower `text_model`, `text_projection` and `logit_scale`.

    Attributes:
      vision: config of the image tower.
      processor: resizes, crops and normalises images.
      text: config of the text tower; None without one.
      tokenizer: of the text tower.
    """

    vision: transformers.CLIPVisionConfig
    processor: transformers.CLIPImageProcessor
    text: transformers.CLIPTextConfig | None = None
    tokenizer: transformers.CLIPTokenizerFast | None = None

    @functools.cached_property
    def image_tower(self) -> nn.Module:
        return _ImageTower(self.vision)

    @functools.cached_property
    def text_tower(self) -> nn.Module:
        return FlaxCLIPTextModelWithProjectionModule(self.text)

    @property
    def width(self) -> int:
        """P: dims of an embedding."""
        return self.vision.projection_dim

    def preprocess(
        self, images: UInt8[np.ndarray, "B H W 3"]
    ) -> Float[np.ndarray, "B S S 3"]:
        """The image tower's input for images; on the host, by Pillow."""
        pixels = self.processor(
            list(images), input_data_format="channels_last", return_tensors="np"
        )["pixel_values"]
        return pixels.transpose(0, 2, 3, 1).astype(np.float32)

    def image_embeddings(
        self, params: Params, pixels: Float[Array, "B S S 3"]
    ) -> Float[Array, "B P"]:
        """Projected embeddings, not normalised, of `preprocess`ed images."""
        params = {name: params[name] for name in ("vision_model", "visual_projection")}
        return self.image_tower.apply({"params": params}, pixels)

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Token ids with BOS, EOS and padding; longer texts are truncated."""
        return self.tokenizer(
            list(texts),
            max_length=self.text.max_position_embeddings,
            padding="max_length",
            truncation=True,
            return_tensors="np",
        )["input_ids"].astype(np.int32)

    def text_embeddings(
        self, params: Params, ids: Int[Array, "B L"]
    ) -> Float[Array, "B P"]:
        """Projected embeddings, not normalised, of the texts' EOS tokens."""
        params = {name: params[name] for name in ("text_model", "text_projection")}
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        output = self.text_tower.apply(
            {"params": params}, ids, jnp.ones_like(ids), positions
        )
        return output.text_embeds

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""

        def init(key):
            side = self.vision.image_size
            pixels = jnp.zeros((1, side, side, 3))
            params = dict(self.image_tower.init(key, pixels)["params"])
            if self.text is not None:
                ids = jnp.zeros((1, self.text.max_position_embeddings), jnp.int32)
                params |= self.text_tower.init(key, ids, ids, ids)["params"]
                params["logit_scale"] = jnp.zeros(())
            return params

        key = jax.eval_shape(functools.partial(jax.random.key, 0))  # starts no backend
        return jax.eval_shape(init, key)


def normalize(embeddings: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Scales embeddings to length 1: dot products become CLIP's cosine similarities.

    A zero embedding (padding) stays zero and has a finite gradient.
    """
    square = (embeddings**2).sum(axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def zero_shot(
    images: Float[Array, "B P"], texts: Float[Array, "K P"], logit_scale: Array
) -> Float[Array, "B K"]:
    """The probability of each text for each image (arXiv 2103.00020, figure 3).

    Args:
      images: embeddings of images.
      texts: embeddings of one text per class.
      logit_scale: logarithm of the scale, from the checkpoint.
    """
    logits = jnp.exp(logit_scale) * normalize(images) @ normalize(texts).T
    return jax.nn.softmax(logits)


def small_tower(
    *, side: int, patch: int, width: int, layers: int, heads: int, embedding: int
) -> Clip:
    """An image tower of any size, without weights.

    Args:
      side: S, pixels.
      patch: pixels along a side of a patch.
      width: dims of the transformer's states.
      layers: of the transformer.
      heads: of its attention.
      embedding: P.
    """
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=embedding,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
    )
    return Clip(config, image_processor(side))


def image_processor(side: int) -> transformers.CLIPImageProcessor:
    """CLIP's: resizes the shorter side to `side` pixels, centre crops, normalises."""
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
