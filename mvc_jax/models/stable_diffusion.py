"""Stable Diffusion: diffusers' and transformers' Flax classes behind plain arrays.

Images and latents are channels-last here, whatever the library's layout is;
`checkpoints/diffusers_layout.py` reads and writes the folders.
"""

import dataclasses
import functools
import inspect
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax import devices, work
from mvc_jax.models import (
    attention,
    convolution,
    lora,
    noise_schedule,
    prompt_tokens,
    remat,
    sharded_layers,
)
from mvc_jax.models.flax_classes import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxUNet2DConditionModel,
    transformers,
)

Params = dict[str, Any]
# What the UNet is given beside latents and timesteps: text states [B, L, D]; of
# Stable Diffusion XL `states` [B, L, D], `pooled` [B, P] and `time_ids` [B, 6].
Conditions = Float[Array, "B L D"] | dict[str, Array]
TIME_IDS = 6  # height and width before resizing, top and left of the crop, size
_SHAPES: dict[str, Any] = {}  # by config: to trace them takes seconds
_TRACED = 64  # latents or pixels a side, a power of two, to trace shapes with


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """The architecture: `config.json` contents and tokenizers; no weights.

    Parameters are passed to each method, as a tree with the keys `components`, and
    `lora` where the UNet has adapters.

    Stable Diffusion XL (arXiv 2307.01952) has a second text encoder, with a tokenizer
    that pads otherwise. Its text states are the penultimate hidden states of both, side
    by side; the UNet is also given the second one's pooled embedding and six numbers
    about the image's size (section 2.2).

    Attributes:
      configs: by component: `unet`, `vae`, `text_encoder` and `scheduler`, of XL also
        `text_encoder_2`; `scheduler` is DDIM's, with the noise and the
        `prediction_type` of the model.
      tokenizer: CLIP's; None: no text will be read.
      tokenizer_files: the files that it was read from, by name; {} for a new one.
      dtype: of the UNet's activations, `float32` or `bfloat16`.
      attention: implementation in the UNet, one of `attention.CHOICES`.
      remat: what the UNet's backward pass recomputes, one of `remat.MODES`.
      mesh: the devices that the UNet is compiled for; None: one default device.
      batch_sharding: of the first axis of the UNet's activations; None lets XLA choose.
      weight_shardings: of the UNet's parameters; None: whole on each device.
      tokenizer_2: of the second text encoder; None: there is none.
      tokenizer_2_files: as `tokenizer_files`.
      zero_empty: whether states and pooled embedding of the empty prompt are zeros, as
        in XL's pipelines, instead of what the encoders make of it.
    """

    configs: dict[str, dict[str, Any]]
    tokenizer: transformers.CLIPTokenizerFast | None
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(
        default_factory=dict, repr=False
    )
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    mesh: Mesh | None = None
    batch_sharding: NamedSharding | None = None
    weight_shardings: Any = None
    tokenizer_2: transformers.CLIPTokenizerFast | None = None
    tokenizer_2_files: Mapping[str, bytes] = dataclasses.field(
        default_factory=dict, repr=False
    )
    zero_empty: bool = False

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

    @functools.cached_property
    def text_encoder_2(self) -> nn.Module:
        config = transformers.CLIPTextConfig.from_dict(self.configs["text_encoder_2"])
        return FlaxCLIPTextModelWithProjectionModule(config)

    @property
    def components(self) -> tuple[str, ...]:
        """Those that have parameters, in the order of their files."""
        known = ("unet", "vae", *self.text_encoders)
        return tuple(name for name in known if name in self.configs)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders; Stable Diffusion XL has two."""
        known = ("text_encoder", "text_encoder_2")
        return tuple(name for name in known if name in self.configs)

    @property
    def context_length(self) -> int:
        """L: tokens of a prompt, including BOS, EOS and padding."""
        return self.configs["text_encoder"]["max_position_embeddings"]

    @property
    def text_width(self) -> int:
        """D: dims of a token's text state, over all text encoders."""
        return sum(self.configs[name]["hidden_size"] for name in self.text_encoders)

    @property
    def pooled_width(self) -> int:
        """P: dims of the pooled embedding that the UNet is given; 0: it is not."""
        return self.configs.get("text_encoder_2", {}).get("projection_dim", 0)

    @property
    def latent_channels(self) -> int:
        return self.configs["vae"]["latent_channels"]

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Factor that scales posterior samples to about unit variance."""
        return self.configs["vae"]["scaling_factor"]

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`: what the UNet predicts."""
        return self.configs["scheduler"]["prediction_type"]

    @property
    def conditioned(self) -> bool:
        """Whether the UNet takes source latents beside the noisy ones."""
        return self.configs["unet"]["in_channels"] == 2 * self.latent_channels

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "B *E L"]:
        """Token ids with BOS, EOS and padding; longer texts are truncated.

        [B, L]; of Stable Diffusion XL [B, 2, L], those of each text encoder.
        """
        length = self.context_length
        ids = prompt_tokens.padded(self.tokenizer, texts, length)
        if self.tokenizer_2 is None:
            return ids
        second = prompt_tokens.padded(self.tokenizer_2, texts, length)
        return np.stack([ids, second], axis=1)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text` with BOS and EOS, without truncation."""
        ((ids, _),) = prompt_tokens.encoded(self.tokenizer, [text])
        return len(ids)

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """[start, stop) of the characters of each token of `tokenize`.

        Without BOS, EOS and padding. Tokens of one character's bytes have its range;
        accents that were composed with a letter are in that of its token.
        """
        if not texts:
            return []
        encoded = prompt_tokens.encoded(self.tokenizer, texts, self.context_length)
        found = []
        for text, (_, pairs) in zip(texts, encoded, strict=True):
            offsets = [(start, stop) for start, stop in pairs[1:-1]]
            starts = [*(start for start, _ in offsets[1:]), len(text)]
            for n, (start, stop) in enumerate(offsets):
                while stop < starts[n] and unicodedata.combining(text[stop]):
                    stop += 1
                offsets[n] = start, stop
            found.append(offsets)
        return found

    def text_states(
        self, params: Params, ids: Int[Array, "B *E L"]
    ) -> Float[Array, "B L D"]:
        """The text encoder's last hidden states, layer norm applied.

        Of Stable Diffusion XL the penultimate states of both, without it.
        """
        if "text_encoder_2" not in self.configs:
            return self._encoded(params, "text_encoder", ids).last_hidden_state
        states = [
            self._encoded(params, name, ids[:, i], hidden=True).hidden_states[-2]
            for i, name in enumerate(self.text_encoders)
        ]
        return self._without_empty(jnp.concatenate(states, axis=-1), ids)

    def pooled_text(
        self, params: Params, ids: Int[Array, "B *E L"]
    ) -> Float[Array, "B P"]:
        """The state of the EOS token, which attends to the whole text.

        Of Stable Diffusion XL the second encoder's, projected.
        """
        if "text_encoder_2" not in self.configs:
            return self._encoded(params, "text_encoder", ids).pooler_output
        pooled = self._encoded(params, "text_encoder_2", ids[:, 1]).text_embeds
        return self._without_empty(pooled, ids)

    def conditions(
        self,
        params: Params,
        ids: Int[Array, "B *E L"],
        time_ids: Float[Array, "B 6"] | Int[Array, "B 6"] | None = None,
    ) -> Conditions:
        """What `denoise` is given for texts, and of XL for the sizes of images."""
        states = self.text_states(params, ids)
        if not self.pooled_width:
            return states
        conditions = {"states": states, "pooled": self.pooled_text(params, ids)}
        if time_ids is not None:
            conditions["time_ids"] = time_ids.astype(jnp.float32)
        return conditions

    def _encoded(
        self, params: Params, name: str, ids: Array, hidden: bool = False
    ) -> Any:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return getattr(self, name).apply(
            {"params": params[name]},
            ids,
            jnp.ones_like(ids),
            positions,
            output_hidden_states=hidden,
        )

    def _without_empty(self, encoded: Array, ids: Int[Array, "B E L"]) -> Array:
        """`encoded` [B, ...] with zeros for the empty prompt, where `zero_empty`."""
        if not self.zero_empty:
            return encoded
        empty = (ids == self.tokenize([""])).all(axis=(1, 2))
        return jnp.where(jnp.expand_dims(empty, range(1, encoded.ndim)), 0.0, encoded)

    def moments(self, params: Params, images: Float[Array, "B H W 3"]) -> Array:
        """Mean and log variance [B, h, w, 2c] of the posterior of images in [-1, 1]."""
        posterior = self.vae.apply(
            {"params": params["vae"]},
            images.transpose(0, 3, 1, 2),
            method=FlaxAutoencoderKL.encode,
        ).latent_dist
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)

    def encode_pixels(self, params: Params, pixels: UInt8[Array, "B H W 3"]) -> Array:
        """`moments` of images in [0, 255], the range in which they are stored.

        Of large images a few at a time, as in `decode_in_parts`.
        """
        return self._in_parts(
            lambda part: self.moments(params, part / 127.5 - 1.0),
            pixels,
            math.prod(pixels.shape[1:3]),
        )

    def decode(self, params: Params, latents: Float[Array, "B h w c"]) -> Array:
        """Images [B, H, W, 3], about [-1, 1], of *scaled* latents."""
        output = self.vae.apply(
            {"params": params["vae"]},
            latents / self.scaling_factor,
            method=FlaxAutoencoderKL.decode,
        )
        return output.sample.transpose(0, 2, 3, 1)

    def decode_in_parts(
        self, params: Params, latents: Float[Array, "B h w c"]
    ) -> Array:
        """`decode`, of large images a few at a time.

        The activations of the last layers are the largest of all while images are
        drawn: 0.6 GiB for each of 512 pixels a side.
        """
        return self._in_parts(
            lambda part: self.decode(params, part),
            latents,
            math.prod(latents.shape[1:3]) * self.downsampling**2,
        )

    def _in_parts(
        self, function: Callable[[Array], Array], rows: Array, pixels: int
    ) -> Array:
        """`function` of rows, each an image of so many pixels.

        On TPUs twice as many at once: layers of four images of 512 pixels access four
        times the bytes for each image that layers of eight do (docs/scaling.md).
        """
        tpu = devices.platform(self.mesh) == "tpu"
        return _map_parts(
            function,
            rows,
            size=work.AUTOENCODER_PIXELS * (2 if tpu else 1) // pixels,
            devices=1 if self.mesh is None else self.mesh.size,
        )

    def denoise(
        self,
        params: Params,
        latents: Float[Array, "B h w C"],
        timesteps: Int[Array, " B"] | Float[Array, " B"],
        conditions: Conditions,
        residuals: tuple[Sequence[Array], Array] | None = None,
    ) -> Float[Array, "B h w c"]:
        """The UNet's prediction; C is c, or 2c with source latents concatenated.

        Adapters in `params["lora"]`, if any, are added to the UNet's layers.
        `residuals` are a ControlNet's, added to the UNet's skip connections and middle
        block.
        """
        down, middle = (None, None) if residuals is None else residuals
        states, added = _added(conditions)
        with (
            attention.match_pytorch(),
            attention.implemented_by(self.attention, self.mesh),
            lora.adapted(params.get("lora", {})),
            remat.checkpointing(self.remat),
            convolution.small_images_convolved(self.mesh),
            sharded_layers.mapped(
                self.batch_sharding,
                self.weight_shardings,
                functools.partial(remat.recomputes, self.remat),
            ),
        ):
            output = self.unet.apply(
                {"params": params["unet"]},
                latents.transpose(0, 3, 1, 2),
                timesteps,
                states,
                added_cond_kwargs=added,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            )
        return output.sample.transpose(0, 2, 3, 1)

    def inputs(self, height: int, width: int) -> tuple:
        """Shapes of the arguments of `denoise` after `params`, for one example."""
        channels = self.configs["unet"]["in_channels"]
        return (
            jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            self.condition_shapes(1),
        )

    def condition_shapes(self, batch: int) -> Any:
        """`Conditions` of so many examples, as `jax.ShapeDtypeStruct`s."""
        shapes = {"states": (batch, self.context_length, self.text_width)}
        if self.pooled_width:
            shapes |= {"pooled": (batch, self.pooled_width)}
            shapes |= {"time_ids": (batch, TIME_IDS)}
        of = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
        return of if self.pooled_width else of["states"]

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " T"]:
        """The noise schedule: the product of 1 - beta up to each training timestep."""
        return noise_schedule.alphas_cumprod(self.configs["scheduler"])

    def shapes(self, component: str) -> Any:
        """The parameter tree of a component as `jax.ShapeDtypeStruct`s."""
        key = f"{component} {self.configs[component]}"
        if key not in _SHAPES:
            _SHAPES[key] = self._trace_shapes(component)
        return jax.tree.map(lambda leaf: leaf, _SHAPES[key])  # a copy

    def _trace_shapes(self, component: str) -> Any:
        if component in self.text_encoders:
            ids = np.zeros((1, self.context_length), np.int32)
            init = functools.partial(getattr(self, component).init, input_ids=ids)
            init = functools.partial(init, attention_mask=ids, position_ids=ids)
            return jax.eval_shape(lambda key: init(key)["params"], abstract_key())
        return jax.eval_shape(getattr(self, component).init_weights, abstract_key())

    def count_parameters(self, component: str) -> int:
        """Number of parameters of a component; starts no backend."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes(component)))

    def with_compute_options(
        self,
        *,
        dtype: str = "auto",
        mesh: Mesh | None = None,
        field: str = "config.finetune.attention",
        **options: str,
    ) -> "StableDiffusion":
        """A copy of this model whose UNet is computed with these options.

        Args:
          dtype: of activations; `auto` is bfloat16 on an accelerator, else float32.
          mesh: the devices; None: one default device.
          field: config field that holds the attention, for errors.
          **options: `attention` and `remat`, see the attributes.

        Raises:
          UserError: the devices do not support this attention.
        """
        dtype = devices.activations_dtype(dtype, mesh)
        choice = options.get("attention", self.attention)
        backend = devices.backend(mesh)
        attention.check(choice, field=field, backend=backend, dtype=dtype)
        return dataclasses.replace(self, dtype=dtype, mesh=mesh, **options)

    def widened(self, params: Params) -> tuple["StableDiffusion", Params]:
        """Adds source latents to the UNet's input; at first its output is unchanged.

        `conv_in` goes from c to 2c input channels: the new kernel slices are zero, the
        old kernel and bias are copied (InstructPix2Pix, arXiv 2211.09800, section 3.2).
        A UNet that is conditioned already is returned unchanged.
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


def _added(conditions: Conditions) -> tuple[Array, dict[str, Array] | None]:
    """Text states, and what XL's UNet adds to the embedding of the timestep."""
    if not isinstance(conditions, Mapping):
        return conditions, None
    pooled, time_ids = conditions["pooled"], conditions["time_ids"]
    return conditions["states"], {"text_embeds": pooled, "time_ids": time_ids}


def _map_parts(
    function: Callable[[Array], Array], rows: Array, *, size: int, devices: int
) -> Array:
    """Maps `function` over parts of `rows` [B, ...], one part after another.

    A part has up to `size` rows, and at least one, of each device: none is exchanged.
    If that is all of them, nothing is mapped.
    """
    devices = math.gcd(len(rows), devices)
    own = len(rows) // devices
    size = max(n for n in range(1, own + 1) if own % n == 0 and n <= max(size, 1))
    if size == own:
        return function(rows)

    def part(own_rows):
        done = function(own_rows.reshape(-1, *rows.shape[1:]))
        return done.reshape(devices, size, *done.shape[1:])

    parts = rows.reshape(devices, -1, size, *rows.shape[1:]).swapaxes(0, 1)
    done = jax.lax.map(part, parts).swapaxes(0, 1)
    return done.reshape(len(rows), *done.shape[3:])


def to_pixels(
    images: Float[Array, "B H W 3"], *, grey: bool = False
) -> UInt8[Array, "B H W 3"]:
    """Converts decoded images, about [-1, 1], to pixels.

    `grey` averages the channels, for a dataset without colour.
    """
    if grey:
        images = jnp.broadcast_to(images.mean(-1, keepdims=True), images.shape)
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)


def random_params(shapes: Any, rng: np.random.Generator) -> Any:
    """Draws host parameters for a tree of shapes, by the standard initialisers.

    LeCun normal kernels, zero biases, unit scales, normal embeddings (0.02). They are
    drawn on the host, in the order of the tree's paths, because compiling an `init` of
    hundreds of small draws would take longer than the first epochs of a small model.
    """

    def one(path, leaf):
        kind = path[-1].key
        if kind in ("bias", "scale"):
            return np.full(leaf.shape, float(kind == "scale"), np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        std = fan_in**-0.5 if kind == "kernel" else 0.02
        return rng.normal(0.0, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def abstract_key() -> jax.ShapeDtypeStruct:
    """A random key for `jax.eval_shape`: a concrete one would start the backend."""
    return jax.eval_shape(functools.partial(jax.random.key, 0))


def build(class_: type, config: dict[str, Any]) -> Any:
    """Constructs a library class from the fields of `config` that it accepts.

    No weight depends on `sample_size`, of which the Flax classes know integers only:
    they trace a square of that side, which their UNet must be able to halve.
    """
    config = config | {"sample_size": _TRACED}
    known = inspect.signature(class_).parameters
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key in known
    }
    return class_(**fields)
