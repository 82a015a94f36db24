"""Captions by a ViT-GPT-2 checkpoint: found, checked, read, run by
`models/vit_gpt2.py`.

Weights are read from `model.safetensors`, under PyTorch's names, or from
`flax_model.msgpack`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8

from mvc_jax import devices, files
from mvc_jax.checkpoints import captioner_checkpoint, weights
from mvc_jax.errors import UserError
from mvc_jax.models import tokenizer_release, vit_gpt2
from mvc_jax.models.flax_classes import transformers
from mvc_jax.models.vit_gpt2 import Params, VitGpt2

DTYPES = vit_gpt2.DTYPES
LAYOUT = captioner_checkpoint.Layout(
    model_type="vision-encoder-decoder",
    torch_class="VisionEncoderDecoderModel",
    weights=("model.safetensors", "flax_model.msgpack"),
)
# PyTorch's GPT-2 stored its causal masks as tensors, and its output layer beside the
# embedding that it is tied to. Captions do not use the encoder's pooler.
_UNUSED = r"attention\.(masked_)?bias$|attn\.(masked_)?bias$|lm_head|encoder\.pooler\."


def check_model(model: str) -> None:
    """Checks, without loading or downloading it, what `captions` needs.

    Raises:
      UserError: a folder is not a ViT-GPT-2 checkpoint, or is incomplete.
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
    """Yields (row, caption) of some rows of an array, see `models.vit_gpt2.captions`.

    The checkpoint is loaded when the first caption is requested.

    Args:
      images: may be a memory map.
      rows: indices of images, 0 to N - 1.
      model: a checkpoint folder or a name on the hub, which is downloaded first.
      batch_size: images per batch.
      dtype: one of `DTYPES`; "auto" is bfloat16 on an accelerator, float32 on a CPU.
      max_new_tokens: maximum number of tokens of a caption.
      num_beams: width of the beam search.

    Raises:
      UserError: the checkpoint is missing, is of another architecture, or cannot write
        so many tokens.
    """
    if not rows:
        return
    captioner, params = load(model, dtype)
    yield from vit_gpt2.captions(
        captioner,
        params,
        images,
        rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
    )


def load(model: str, dtype: str) -> tuple[VitGpt2, Params]:
    """Reads a checkpoint: the captioner, and its device parameters in `dtype`.

    Raises:
      UserError: the checkpoint is missing or of another architecture, or tensors are
        missing, unexpected or of another shape.
    """
    folder = captioner_checkpoint.find(model, LAYOUT)
    config = _read_config(folder, model)
    kind = _dtype(dtype)
    network = vit_gpt2.Network(config, dtype=kind)
    if (folder / "generation_config.json").exists():
        network.generation_config = transformers.GenerationConfig.from_pretrained(
            str(folder)
        )
    name, options = tokenizer_release.class_and_options(str(folder))
    tokenizer = getattr(transformers, name).from_pretrained(
        str(folder), config=config.decoder, **options
    )
    preprocess = _read_processor(folder, config.encoder.image_size, model)
    params = _read_params(folder, network.params_shape_tree)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), params)
    return VitGpt2(network, tokenizer, preprocess), params


def _read_params(folder: epath.Path, shapes: Params) -> Params:
    """Host parameters; the encoder's pooler, which no caption depends on, is zero."""
    encoder = dict(shapes["encoder"])
    pooler = encoder.pop("pooler")
    shapes = {**shapes, "encoder": encoder}
    if (folder / LAYOUT.weights[0]).exists():
        params = weights.read(folder / LAYOUT.weights[0], shapes, _UNUSED)
    else:
        params = _read_msgpack(folder / LAYOUT.weights[1], shapes)
    # The library's encoder computes the pooler; XLA removes it, as nothing uses it.
    params["encoder"]["pooler"] = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), pooler
    )
    return params


def _read_processor(
    folder: epath.Path, side: int, model: str
) -> Callable[[np.ndarray], np.ndarray]:
    """The checkpoint's image processor, which NumPy and Pillow run, not torchvision."""
    processor = transformers.AutoImageProcessor.from_pretrained(
        str(folder), use_fast=False
    )

    def preprocess(images: np.ndarray) -> np.ndarray:
        pixels = processor(
            list(images), input_data_format="channels_last", return_tensors="np"
        )["pixel_values"]
        return pixels.astype(np.float32)

    size = preprocess(np.zeros((1, 8, 8, 3), np.uint8)).shape[2:]
    if size != (side, side):
        raise UserError(
            captioner_checkpoint.field(model),
            wanted=f"images of {side} pixels from its preprocessor_config.json",
            got=" x ".join(map(str, size)),
            fix="Use preprocessor_config.json and config.json of the same checkpoint.",
        )
    return preprocess


def _read_config(folder: epath.Path, model: str):
    """transformers' config of the checkpoint, which must be a ViT with a GPT-2."""
    parts = files.read_json(folder / "config.json")
    kinds = [parts.get(part, {}).get("model_type") for part in ("encoder", "decoder")]
    if kinds != ["vit", "gpt2"]:
        raise UserError(
            captioner_checkpoint.field(model),
            wanted="an encoder 'vit' and a decoder 'gpt2' in its config.json",
            got=" and ".join(map(repr, kinds)),
            fix="Use another checkpoint, or another config.caption.captioner.",
        )
    return transformers.VisionEncoderDecoderConfig.from_dict(parts)


def _read_msgpack(path: epath.Path, shapes: Params) -> Params:
    """The parameters that `save_pretrained` of a Flax model wrote, fp32."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        found = flax.traverse_util.flatten_dict(tree)
    except Exception as error:  # of msgpack, NumPy or Flax, depending on the damage
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
    if differ:
        raise UserError(
            str(path),
            wanted="the parameters of the architecture in its config.json",
            got=f"{len(differ)} that are missing or of another shape: "
            + ", ".join(differ),
            fix="Use weights and config.json of the same checkpoint.",
        )
    params = {key: np.asarray(found[key], np.float32) for key in wanted}
    return flax.traverse_util.unflatten_dict(params)


def _dtype(name: str) -> Any:
    """The dtype of a setting."""
    if name not in DTYPES:
        raise UserError(
            "config.caption.dtype",
            wanted=f"one of {', '.join(DTYPES)} for this captioner",
            got=repr(name),
            fix="Use one of these; 'int8' is for blip2.",
        )
    return jnp.dtype(devices.activations_dtype(name))
