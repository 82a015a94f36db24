"""The architecture of the small base, as diffusers' and transformers' configs."""

from collections.abc import Sequence
from typing import Any

from mvc_jax.models.flax_classes import transformers
from mvc_jax.models.stable_diffusion import StableDiffusion

# Stable Diffusion 1.x's noise schedule.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}

SECOND_PAD = "!"  # token 0, with which XL's second tokenizer pads
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def stable_diffusion(
    tokenizer: transformers.CLIPTokenizerFast,
    tokenizer_2: transformers.CLIPTokenizerFast | None = None,
    **fields: Any,
) -> StableDiffusion:
    """A small Stable Diffusion.

    Args:
      tokenizer: trained on the captions.
      tokenizer_2: of the family `sdxl`, the same with `SECOND_PAD`.
      **fields: of `configs`.
    """
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    made = configs(vocab_size=len(tokenizer), special_ids=ids, **fields)
    return StableDiffusion(
        made, tokenizer, tokenizer_2=tokenizer_2, zero_empty=tokenizer_2 is not None
    )


def configs(
    *,
    vocab_size: int,
    special_ids: tuple[int, int, int] = (0, 1, 1),
    size: int,
    context_length: int,
    vae_channels: Sequence[int],
    vae_groups: int,
    unet_channels: Sequence[int],
    unet_layers: int,
    unet_heads: int,
    unet_attention_levels: int = 0,
    text_width: int,
    text_layers: int,
    text_heads: int,
    family: str = "sd",
) -> dict[str, dict[str, Any]]:
    """The configs of every component.

    Args:
      vocab_size: tokens of the tokenizer.
      special_ids: of BOS, EOS and padding.
      size: of the images, in pixels along a side.
      context_length: L, tokens of a prompt, including BOS and EOS.
      vae_channels: of each level of the autoencoder.
      vae_groups: of its group norms.
      unet_channels: of each level of the UNet.
      unet_layers: residual blocks per level.
      unet_heads: attention heads of every layer.
      unet_attention_levels: how many of the coarsest levels have attention; 0: all.
      text_width: of the text encoder's states.
      text_layers: of the text encoder.
      text_heads: of its attention.
      family: `sd`, or `sdxl`: with a second text encoder of the same size, whose
        padding is another token.
    """
    levels = len(unet_channels)
    plain = levels - unet_attention_levels if unet_attention_levels else 0
    down = ["DownBlock2D"] * plain + ["CrossAttnDownBlock2D"] * (levels - plain)
    up = ["CrossAttnUpBlock2D"] * (levels - plain) + ["UpBlock2D"] * plain
    unet = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size // 2 ** (len(vae_channels) - 1),
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": list(unet_channels),
        "layers_per_block": unet_layers,
        "attention_head_dim": unet_heads,  # diffusers' name for the number of heads
        "cross_attention_dim": text_width,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae_channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae_channels),
        "block_out_channels": list(vae_channels),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": vae_groups,
        "sample_size": size,
        "scaling_factor": 1.0,  # measured after training
    }
    text_encoder = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "projection_dim": text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_heads,
        "max_position_embeddings": context_length,
        "hidden_act": "quick_gelu",
        **dict(zip(_SPECIAL, special_ids, strict=True)),
    }
    made = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "scheduler": SCHEDULER,
    }
    return _with_second_encoder(made) if family == "sdxl" else made


def _with_second_encoder(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The configs of a Stable Diffusion XL, for those of a Stable Diffusion.

    An encoder's last layer does not reach the states that the UNet is given, so that
    both have one more.
    """
    unet, text = made["unet"], made["text_encoder"]
    width = text["hidden_size"]
    each = 2 * (width // 4)  # even: half of the dims are sines
    unet |= {
        "cross_attention_dim": 2 * width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": 6 * each + width,
    }
    text = text | {"num_hidden_layers": text["num_hidden_layers"] + 1}
    second = text | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    return {**made, "unet": unet, "text_encoder": text, "text_encoder_2": second}
