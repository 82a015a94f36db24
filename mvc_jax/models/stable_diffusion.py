"""Stable Diffusion: diffusers' and transformers' Flax classes behind plain arrays.

The only file that knows those libraries' networks, with `attention.py`, which reaches
into their layers. Everything that crosses its border is channels-last;
`diffusers_layout` reads and writes the folders.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
from diffusers.models.vae_flax import FlaxAutoencoderKL
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, UInt8
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModule

from mvc_jax.models import attention, lora, noise_schedule, remat

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """The architecture: four `config.json` contents and a tokenizer; no weights.

    Parameters are passed to each method, as a tree with the keys `unet`, `vae` and
    `text_encoder`, and `lora` where the UNet has adapters.

    Attributes:
      configs: of the three, and of the `scheduler`: DDIM's, with the fields of the
        noise and the `prediction_type`.
      tokenizer: CLIP's.
      dtype: of the UNet's activations, `float32` or `bfloat16`.
      attention: how the UNet's runs, one of `attention.ASKED`.
      remat: what its backward pass computes again, one of `remat.MODES`.
      batch_sharding: of its activations' first axis; None leaves it to XLA.
    """

    configs: dict[str, dict[str, Any]]
    tokenizer: transformers.CLIPTokenizerFast
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    batch_sharding: NamedSharding | None = None

    @functools.cached_property
    def unet(self) -> nn.Module:
        return build(
            FlaxUNet2DConditionModel,
            self.configs["unet"] | {"dtype": jnp.dtype(self.dtype)},
        )

    @functools.cached_property
    def vae(self) -> nn.Module:
        return build(FlaxAutoencoderKL, self.configs["vae"])

    @functools.cached_property
    def text_encoder(self) -> nn.Module:
        config = transformers.CLIPTextConfig.from_dict(self.configs["text_encoder"])
        return FlaxCLIPTextModule(config)

    @property
    def context_length(self) -> int:
        """L: tokens of a prompt, markers and padding included."""
        return self.configs["text_encoder"]["max_position_embeddings"]

    @property
    def text_width(self) -> int:
        """D: dims of a token's text state."""
        return self.configs["text_encoder"]["hidden_size"]

    @property
    def latent_channels(self) -> int:
        return self.configs["vae"]["latent_channels"]

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Brings posterior samples to about unit variance for the UNet."""
        return self.configs["vae"]["scaling_factor"]

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`: what the UNet predicts."""
        return self.configs["scheduler"]["prediction_type"]

    @property
    def conditioned(self) -> bool:
        """Whether the UNet takes source latents beside the noisy ones."""
        return self.configs["unet"]["in_channels"] == 2 * self.latent_channels

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Token ids with BOS, EOS and padding; longer texts are cut."""
        encoded = self.tokenizer(
            list(texts),
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
            return_tensors="np",
        )
        return encoded["input_ids"].astype(np.int32)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` with BOS and EOS, before any cut."""
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def text_states(
        self, params: Params, ids: Int[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """The text encoder's last hidden states, layer norm applied."""
        return self._encoded(params, ids).last_hidden_state

    def pooled_text(
        self, params: Params, ids: Int[Array, "B L"]
    ) -> Float[Array, "B D"]:
        """The state of the text's EOS token, which has seen all of it."""
        return self._encoded(params, ids).pooler_output

    def _encoded(self, params: Params, ids: Array) -> Any:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return self.text_encoder.apply(
            {"params": params["text_encoder"]}, ids, jnp.ones_like(ids), positions
        )

    def moments(self, params: Params, images: Float[Array, "B H W 3"]) -> Array:
        """Mean and log variance [B, h, w, 2c] of the posterior of images in [-1, 1]."""
        posterior = self.vae.apply(
            {"params": params["vae"]},
            images.transpose(0, 3, 1, 2),
            method=FlaxAutoencoderKL.encode,
        ).latent_dist
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)

    def encode_pixels(self, params: Params, pixels: UInt8[Array, "B H W 3"]) -> Array:
        """`moments` of images as they lie on disk, in [0, 255]."""
        return self.moments(params, pixels / 127.5 - 1.0)

    def decode(self, params: Params, latents: Float[Array, "B h w c"]) -> Array:
        """Images [B, H, W, 3], about [-1, 1], from *scaled* latents."""
        output = self.vae.apply(
            {"params": params["vae"]},
            latents / self.scaling_factor,
            method=FlaxAutoencoderKL.decode,
        )
        return output.sample.transpose(0, 2, 3, 1)

    def denoise(
        self,
        params: Params,
        latents: Float[Array, "B h w C"],
        timesteps: Int[Array, " B"],
        text_states: Float[Array, "B L D"],
        residuals: tuple[Sequence[Array], Array] | None = None,
    ) -> Float[Array, "B h w c"]:
        """The UNet's prediction; C is c, or 2c with source latents concatenated.

        Where `params` have the key `lora`, its adapters are added to the UNet's layers.
        `residuals` are a ControlNet's, added to its skip connections and middle block.
        """
        down, middle = (None, None) if residuals is None else residuals
        with (
            attention.exact(),
            attention.running(self.attention),
            lora.adapted(params.get("lora", {})),
            remat.checkpointing(self.remat),
            _batch_stays(self.batch_sharding),
        ):
            output = self.unet.apply(
                {"params": params["unet"]},
                latents.transpose(0, 3, 1, 2),
                timesteps,
                text_states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            )
        return output.sample.transpose(0, 2, 3, 1)

    def inputs(self, height: int, width: int) -> tuple:
        """What `denoise` takes behind its parameters, for one example, as shapes."""
        channels = self.configs["unet"]["in_channels"]
        text = (1, self.context_length, self.text_width)
        return (
            jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct(text, jnp.float32),
        )

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " T"]:
        """The noise schedule: the product of 1 - beta up to each training timestep."""
        return noise_schedule.alphas_cumprod(self.configs["scheduler"])

    def shapes(self, component: str) -> Any:
        """The parameter tree of a component as `jax.ShapeDtypeStruct`s."""
        if component == "text_encoder":
            ids = jnp.zeros((1, self.context_length), jnp.int32)
            init = functools.partial(self.text_encoder.init, input_ids=ids)
            init = functools.partial(init, attention_mask=ids, position_ids=ids)
            return jax.eval_shape(lambda key: init(key)["params"], jax.random.key(0))
        return jax.eval_shape(getattr(self, component).init_weights, jax.random.key(0))

    def with_compute_options(
        self,
        *,
        dtype: str = "auto",
        field: str = "config.finetune.attention",
        **how: str,
    ) -> "StableDiffusion":
        """This model with its UNet computed as asked.

        Args:
          dtype: of activations; `auto`: bfloat16 on an accelerator, else float32.
          field: that asks for the attention, for errors.
          **how: `attention` and `remat`, see the attributes.

        Raises:
          UserError: the devices have no such attention.
        """
        backend = attention.backend()
        if dtype == "auto":
            dtype = "float32" if backend == "cpu" else "bfloat16"
        asked = how.get("attention", self.attention)
        attention.check(asked, field=field, backend=backend, dtype=dtype)
        return dataclasses.replace(self, dtype=dtype, **how)

    def widened(self, params: Params) -> tuple["StableDiffusion", Params]:
        """A UNet that takes source latents too, equal to this one at the start.

        `conv_in` goes from c to 2c input channels: the new kernel slices are zero,
        kernel and bias of the old are copied (InstructPix2Pix, arXiv 2211.09800,
        section 3.2). A UNet that is conditioned already comes back as it is.
        """
        if self.conditioned:
            return self, params
        conv_in = params["unet"]["conv_in"]
        kernel = np.asarray(conv_in["kernel"])
        kernel = np.concatenate([kernel, np.zeros_like(kernel)], axis=2)
        unet = {**params["unet"], "conv_in": {**conv_in, "kernel": kernel}}
        unet_config = {**self.configs["unet"], "in_channels": kernel.shape[2]}
        configs = {**self.configs, "unet": unet_config}
        return dataclasses.replace(self, configs=configs), {**params, "unet": unet}


def _batch_stays(
    sharding: NamedSharding | None,
) -> contextlib.AbstractContextManager:
    """Within it, every layer's output is split over the devices by its batch.

    Where weights are sharded, too, XLA may rather gather the activations of all
    examples on each device and leave the weights where they are; so it gathers the
    weights, a layer at a time (FSDP, arXiv 2304.11277).
    """

    def intercept(next_call, args, kwargs, context):
        output = next_call(*args, **kwargs)
        layer = isinstance(context.module, nn.Dense | nn.Conv | nn.GroupNorm)
        if sharding is None or not layer or context.method_name != "__call__":
            return output
        return jax.lax.with_sharding_constraint(output, sharding)

    return nn.intercept_methods(intercept)


def to_pixels(
    images: Float[Array, "B H W 3"], *, grey: bool = False
) -> UInt8[Array, "B H W 3"]:
    """Decoded images, about [-1, 1], as what is stored and shown.

    `grey` averages the channels, for a dataset without colour.
    """
    if grey:
        images = jnp.broadcast_to(images.mean(-1, keepdims=True), images.shape)
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)


def random_params(shapes: Any, rng: np.random.Generator) -> Any:
    """Host parameters for a tree of shapes, by the field's usual initialisers.

    LeCun normal kernels, zero biases, unit scales, normal embeddings (0.02). Drawn on
    the host in the order of the tree's paths: compiling an `init` of hundreds of small
    draws takes longer than training a small model for a while.
    """

    def one(path, leaf):
        kind = path[-1].key
        if kind in ("bias", "scale"):
            return np.full(leaf.shape, float(kind == "scale"), np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        std = fan_in**-0.5 if kind == "kernel" else 0.02
        return rng.normal(0.0, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def build(class_: type, config: dict[str, Any]) -> Any:
    """Constructs a library class from the fields of `config` that it knows."""
    known = inspect.signature(class_).parameters
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key in known
    }
    return class_(**fields)
