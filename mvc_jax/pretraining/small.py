"""The configs of a small Stable Diffusion, as diffusers and transformers write them."""

from collections.abc import Sequence
from typing import Any

import transformers

from mvc_jax.models.stable_diffusion import StableDiffusion


def stable_diffusion(
    tokenizer: transformers.CLIPTokenizerFast,
    scheduler: dict[str, Any],
    *,
    size: int,
    length: int,
    vae: dict[str, Any],
    unet: dict[str, Any],
    text: dict[str, Any],
) -> StableDiffusion:
    """The architecture of a base whose every level attends to the text.

    Args:
      tokenizer: learnt from the captions.
      scheduler: config of the noise.
      size: of the images, in pixels along a side.
      length: L, tokens of a prompt, markers included.
      vae: `channels` of its levels and `groups` of its norms.
      unet: `channels` of its levels, residual `layers` of each and attention `heads`.
      text: `width`, `layers` and `heads` of the text encoder.
    """
    configs = {
        "unet": _unet(size=size, levels=vae["channels"], width=text["width"], **unet),
        "vae": _vae(size=size, **vae),
        "text_encoder": _text(tokenizer, length, **text),
        "scheduler": dict(scheduler),
    }
    return StableDiffusion(configs, tokenizer)


def _unet(
    *,
    size: int,
    levels: Sequence[int],
    width: int,
    channels: Sequence[int],
    heads: int,
    layers: int,
) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size // 2 ** (len(levels) - 1),
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * len(channels),
        "up_block_types": ["CrossAttnUpBlock2D"] * len(channels),
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "cross_attention_dim": width,
    }


def _vae(*, size: int, channels: Sequence[int], groups: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": list(channels),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": groups,
        "sample_size": size,
        "scaling_factor": 1.0,  # measured after training
    }


def _text(
    tokenizer: transformers.CLIPTokenizerFast,
    length: int,
    *,
    width: int,
    layers: int,
    heads: int,
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
