"""Stable Diffusion's architectures, which the benchmarks fill with random weights."""

import pathlib
from collections.abc import Mapping

import numpy as np

TEXT_WIDTH = 768
SD15 = {
    "sample_size": 64,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": TEXT_WIDTH,
}
SMALL = SD15 | {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
    "block_out_channels": [64, 128, 256],
}
BLOCK = SD15 | {  # one block each way, in their true width
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [320],
    "layers_per_block": 1,
}
TINY_TEXT_WIDTH = 64
TINY = BLOCK | {  # its only attention is in the middle
    "cross_attention_dim": TINY_TEXT_WIDTH,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "block_out_channels": [32],
}
SD21_TEXT_WIDTH = 1024
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": SD21_TEXT_WIDTH,
    "use_linear_projection": True,
}
XL_TEXT_WIDTHS = (768, 1280)
SDXL = SD15 | {  # of stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": sum(XL_TEXT_WIDTHS),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + XL_TEXT_WIDTHS[1],
}
UNETS = {"tiny": TINY, "block": BLOCK, "small": SMALL, "sd15": SD15, "sd21": SD21}
UNETS["sdxl"] = SDXL
SD15_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAES = {
    "block": SD15_VAE,
    "tiny": SD15_VAE | {"block_out_channels": [32] * 4, "layers_per_block": 1},
    "small": SD15_VAE | {"block_out_channels": [32, 32, 64, 64]},
    "sd15": SD15_VAE,
    "sd21": SD15_VAE,
    "sdxl": SD15_VAE
    | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
}
SD15_TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SMALL_TEXT = SD15_TEXT | {"vocab_size": 1024, "num_hidden_layers": 1}
TINY_TEXT = SMALL_TEXT | {
    "hidden_size": TINY_TEXT_WIDTH,
    "intermediate_size": 2 * TINY_TEXT_WIDTH,
    "num_attention_heads": 2,
}
TEXTS = {
    "block": SD15_TEXT,
    "tiny": TINY_TEXT,
    "small": SMALL_TEXT,
    "sd15": SD15_TEXT,
    "sd21": SD15_TEXT
    | {
        "hidden_size": SD21_TEXT_WIDTH,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "sdxl": SD15_TEXT,
}
SECOND_TEXTS = {  # of Stable Diffusion XL: OpenCLIP's ViT-bigG/14
    "sdxl": SD15_TEXT
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": XL_TEXT_WIDTHS[1],
        "intermediate_size": 5120,
        "projection_dim": XL_TEXT_WIDTHS[1],
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
    },
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def write(folder: pathlib.Path, size: str, unet: Mapping | None = None) -> None:
    """Writes a checkpoint of random weights, with a tokenizer of a few words.

    Args:
      folder: in the diffusers layout.
      size: a key of `UNETS`.
      unet: fields of the UNet's config to change.
    """
    from mvc_jax.checkpoints import (
        clip_tokenizer,
        diffusers_layout,
        scheduler_config,
    )
    from mvc_jax.models import stable_diffusion
    from mvc_jax.pretraining import tokenizer

    configs = {
        "unet": {**UNETS[size], **(unet or {})},
        "vae": VAES[size],
        "text_encoder": TEXTS[size],
        "scheduler": scheduler_config.ddim_config(SCHEDULE),
    }
    if size in SECOND_TEXTS:
        configs["text_encoder_2"] = SECOND_TEXTS[size]
    pads = {"tokenizer": tokenizer.EOS}
    pads |= {"tokenizer_2": "!"} if size in SECOND_TEXTS else {}
    read = {}
    for name, pad in pads.items():
        tokenizer.train(
            folder / name,
            ["a photo of a part"],
            vocab_size=520,
            max_length=77,
            pad_token=pad,
        )
        read[name] = clip_tokenizer.read(folder / name)[0]
    model = stable_diffusion.StableDiffusion(configs, **read)
    draw = np.random.default_rng(0)
    params = {
        name: stable_diffusion.random_params(model.shapes(name), draw)
        for name in model.components
    }
    diffusers_layout.save(folder, model, params)
