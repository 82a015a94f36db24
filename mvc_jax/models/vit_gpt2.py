"""Captions by a ViT that a GPT-2 looks at, in JAX: transformers' Flax classes.

PyTorch is not needed, which makes this the captioner of a TPU VM. Weights come from
`model.safetensors` with PyTorch's names, or from `flax_model.msgpack`.

Importing this module silences one line of the pinned transformers, by its exact text:
it comes with every Flax model and says that the next major release has none.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax import files
from mvc_jax.checkpoints import captioner_checkpoint, weights
from mvc_jax.errors import UserError, require

_DEPRECATED = (
    "TensorFlow and JAX classes are deprecated and will be removed in Transformers v5. "
    "We recommend migrating to PyTorch classes or pinning your version of Transformers."
)
logging.getLogger("transformers.modeling_flax_utils").addFilter(
    lambda record: record.getMessage() != _DEPRECATED
)

LAYOUT = captioner_checkpoint.Layout(
    model_type="vision-encoder-decoder",
    torch_class="VisionEncoderDecoderModel",
    weights=("model.safetensors", "flax_model.msgpack"),
)
DTYPES = ("auto", "float32", "bfloat16")
# PyTorch's GPT-2 stored its causal masks as tensors, and its output layer beside the
# embedding that it is tied to. The encoder's pooler is no part of a caption.
_UNUSED = r"attention\.(masked_)?bias$|attn\.(masked_)?bias$|lm_head|encoder\.pooler\."

Params = dict[str, Any]


class _Model(transformers.FlaxVisionEncoderDecoderModel):
    """The library's model without random weights: parameters go with each call."""

    def init_weights(self, rng, input_shape, params=None) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        init = super().init_weights
        with jax.numpy_rank_promotion("allow"):  # the library's layers rely on it
            return jax.eval_shape(lambda key: init(key, input_shape), rng)

    def _adapt_logits_for_beam_search(self, logits: Array) -> Array:
        # The scores of beams are sums over tokens, too close together for bfloat16.
        return logits.astype(jnp.float32)


def check_model(model: str) -> None:
    """Refuses, without loading or downloading, what `captions` could not use.

    Raises:
      UserError: a folder holds no ViT with a GPT-2, or not all of it.
    """
    folder = captioner_checkpoint.check(model, LAYOUT)
    if folder is not None:
        _read_config(folder, model)


def captions(
    images: UInt8[np.ndarray, "N S S 3"],
    rows: Sequence[int],
    *,
    model: str,
    batch_size: int,
    dtype: str,
    max_new_tokens: int,
    num_beams: int,
) -> Iterator[tuple[int, str]]:
    """Captions some rows of an array of images, in the order of `rows`.

    The model is loaded when the first caption is asked for.

    Args:
      images: may be a memory map.
      rows: which images, 0 to N - 1.
      model: a checkpoint folder or a hub name.
      batch_size: images at a time; the last batch is filled up.
      dtype: one of `DTYPES`; "auto" is bfloat16 on an accelerator, float32 on a CPU.
      max_new_tokens: the most tokens of a caption.
      num_beams: width of the beam search; 1 is greedy. Nothing is sampled.

    Yields:
      (row, caption as the model wrote it).

    Raises:
      UserError: the model is missing, is another, or cannot write as many tokens.
    """
    if not rows:
        return
    folder = captioner_checkpoint.find(model, LAYOUT)
    config = _read_config(folder, model)
    process = _processor(folder, config, model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(folder), config=config.decoder
    )
    longest = config.decoder.n_positions - 1  # one is the start token's
    require(
        max_new_tokens <= longest,
        "config.caption.max_new_tokens",
        wanted=f"at most {longest}, the positions of {model!r}",
        got=max_new_tokens,
        fix="Lower it.",
    )
    network, params = load(folder, config, _dtype(dtype))
    write = jax.jit(
        lambda params, pixels: _generate(
            network, params, pixels, max_new_tokens=max_new_tokens, num_beams=num_beams
        )
    )
    for start in range(0, len(rows), batch_size):
        batch = list(rows[start : start + batch_size])
        filled = batch + batch[-1:] * (batch_size - len(batch))
        tokens = np.asarray(write(params, process(images[filled])))[: len(batch)]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        yield from zip(batch, texts, strict=True)


def load(folder: epath.Path, config, dtype: jnp.dtype) -> tuple[_Model, Params]:
    """The architecture, which computes in `dtype`, and device parameters of it.

    Raises:
      UserError: tensors are missing, unexpected or of another shape.
    """
    model = _Model(config, dtype=dtype)
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            str(folder)
        )
    encoder = dict(model.params_shape_tree["encoder"])
    pooler = encoder.pop("pooler")
    shapes = {**model.params_shape_tree, "encoder": encoder}
    if (folder / LAYOUT.weights[0]).exists():
        params = weights.read(folder / LAYOUT.weights[0], shapes, _UNUSED)
    else:
        params = _read_msgpack(folder / LAYOUT.weights[1], shapes)
    # The library's encoder computes it; XLA sees that nobody looks, and drops it.
    params["encoder"]["pooler"] = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), pooler
    )
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def _generate(
    model: _Model,
    params: Params,
    pixels: Float[Array, "B 3 H W"],
    *,
    max_new_tokens: int,
    num_beams: int,
) -> Int[Array, "B L"]:
    """Token ids: the start token, at most `max_new_tokens`, and padding."""
    settings, decoder = model.generation_config, model.config.decoder
    end = settings.eos_token_id
    end = decoder.eos_token_id if end is None else end
    end = end[0] if isinstance(end, list) else end
    start = settings.decoder_start_token_id
    padding = settings.pad_token_id
    with jax.numpy_rank_promotion("allow"):
        return model.generate(
            pixels,
            params=params,
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end if padding is None else padding,
            decoder_start_token_id=decoder.bos_token_id if start is None else start,
        ).sequences


def _processor(
    folder: epath.Path, config, model: str
) -> Callable[[UInt8[np.ndarray, "B S S 3"]], Float[np.ndarray, "B 3 H W"]]:
    """The checkpoint's own image processor; NumPy and Pillow, not torchvision's."""
    processor = transformers.AutoImageProcessor.from_pretrained(
        str(folder), use_fast=False
    )
    side = config.encoder.image_size

    def process(images):
        pixels = processor(
            list(images), input_data_format="channels_last", return_tensors="np"
        )["pixel_values"]
        require(
            pixels.shape[2:] == (side, side),
            captioner_checkpoint.field(model),
            wanted=f"images of {side} pixels from its preprocessor_config.json",
            got=" x ".join(map(str, pixels.shape[2:])),
            fix="Take preprocessor_config.json and config.json from one checkpoint.",
        )
        return pixels.astype(np.float32)

    return process


def _read_config(folder: epath.Path, model: str):
    """transformers' config of the model, which must be a ViT and a GPT-2."""
    parts = files.read_json(folder / "config.json")
    kinds = [parts.get(part, {}).get("model_type") for part in ("encoder", "decoder")]
    require(
        kinds == ["vit", "gpt2"],
        captioner_checkpoint.field(model),
        wanted="an encoder 'vit' and a decoder 'gpt2' in its config.json",
        got=" and ".join(map(repr, kinds)),
        fix="Name another checkpoint, or another config.caption.captioner.",
    )
    return transformers.VisionEncoderDecoderConfig.from_dict(parts)


def _read_msgpack(path: epath.Path, shapes: Params) -> Params:
    """The parameters that `save_pretrained` of a Flax model wrote, fp32."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        found = flax.traverse_util.flatten_dict(tree)
    except Exception as error:  # of msgpack, NumPy or Flax, as the damage will have it
        raise UserError(
            str(path),
            wanted="the parameters of a Flax model",
            got=f"a damaged file ({error})",
            fix="Download it again.",
        ) from error
    wanted = flax.traverse_util.flatten_dict(shapes)
    differ = [
        "/".join(key)
        for key, leaf in wanted.items()
        if key not in found or np.shape(found[key]) != leaf.shape
    ]
    require(
        not differ,
        str(path),
        wanted="the parameters of the architecture in its config.json",
        got=f"{len(differ)} that are missing or of another shape: {', '.join(differ)}",
        fix="Take weights and config.json from the same checkpoint.",
    )
    params = {key: np.asarray(found[key], np.float32) for key in wanted}
    return flax.traverse_util.unflatten_dict(params)


def _dtype(name: str) -> jnp.dtype:
    """The dtype of a setting."""
    require(
        name in DTYPES,
        "config.caption.dtype",
        wanted=f"one of {', '.join(DTYPES)} for this captioner",
        got=repr(name),
        fix="Name one of these; 'int8' is for blip2.",
    )
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
