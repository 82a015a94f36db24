"""Tiny random checkpoints of the families that people fine-tune, and inputs for them.

Their structure is that of the public checkpoints, narrower and, where that shows
nothing new, shallower. Every parameter is random, also biases and the scales of norms,
and drawn with NumPy from its name alone: no file holds one.
"""

import functools
import pathlib
import re
import tempfile
import zlib
from typing import Any

import jax
import numpy as np

from mvc_jax.checkpoints import (
    clip_tokenizer,
    scheduler_config,
    weights,
)
from mvc_jax.models.stable_diffusion import Params, StableDiffusion
from mvc_jax.pretraining import tokenizer

FAMILIES = ("sd1", "sd2", "pix2pix", "sdxl")
WORDS = "a photo of the digit one, bold slanted strokes"
PROMPTS = (
    "",
    "a photo of the digit one",
    "Bold, slanted strokes; naïve 7!",
    " ".join([WORDS] * 20),  # more than 77 tokens
)
LATENTS = (8, 16)  # not square: a transposed axis would show

_ATTENDS, _PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UNETS = {
    "sd1": {
        "block_out_channels": [32, 32, 64, 64],
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
    "sd2": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 48,
        "use_linear_projection": True,
    },
    "pix2pix": {
        "in_channels": 8,
        "block_out_channels": [32, 64],
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "down_block_types": [_PLAIN, _ATTENDS, _ATTENDS],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4, 8],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
    },
}
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
# As published: SD 1.5's, SD 2.1's, InstructPix2Pix's, XL 1.0's.
SCHEDULERS = {
    "sd1": _NOISE
    | {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "sd2": _NOISE
    | {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "pix2pix": _NOISE
    | {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "prediction_type": "epsilon",
    },
    "sdxl": _NOISE
    | {
        "_class_name": "EulerDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}


@functools.cache
def checkpoint(family: str) -> tuple[StableDiffusion, Params]:
    """A base as it would be downloaded: (architecture, host parameters)."""
    read = _tokenizer(pad_token="!" if family == "sd2" else "<|endoftext|>")
    unet = _unet(**_UNETS[family])
    configs = {
        "unet": unet,
        "vae": _VAE,
        "text_encoder": _text(family, read, unet["cross_attention_dim"]),
        "scheduler": scheduler_config.ddim_config(SCHEDULERS[family]),
    }
    more = {}
    if family == "sdxl":
        second = _tokenizer(pad_token="!")
        configs["vae"] = _VAE | {"scaling_factor": 0.13025, "force_upcast": True}
        configs["text_encoder"] = _text(family, read, 32)
        configs["text_encoder_2"] = _text(family, second, 48) | {
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_act": "gelu",
            "projection_dim": 40,
        }
        more = {"tokenizer_2": second, "zero_empty": True}
    model = StableDiffusion(configs, read, **more)
    params = {
        name: random(f"{family}.{name}", model.shapes(name))
        for name in model.components
    }
    return model, params


@functools.cache
def fine_tuned(family: str) -> tuple[StableDiffusion, Params]:
    """The base widened, then with a kernel for the source that is not zero any more."""
    base, params = checkpoint(family)
    model, params = base.widened(params)
    if model is base:
        return model, params
    conv_in = params["unet"]["conv_in"]
    kernel = np.array(conv_in["kernel"])
    drawn = _leaf(f"{family}.source", "kernel", kernel.shape)
    kernel[:, :, base.latent_channels :] = drawn[:, :, base.latent_channels :]
    unet = {**params["unet"], "conv_in": {**conv_in, "kernel": kernel}}
    return model, {**params, "unet": unet}


def normal(name: str, *shape: int) -> np.ndarray:
    """Standard normal, fp32, a function of `name`."""
    seed = zlib.crc32(name.encode())
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def images(name: str, batch: int) -> np.ndarray:
    """[B, H, W, 3] in [-1, 1]: noise, coarse and fine, as PNGs would hold it."""
    height, width = (8 * side for side in LATENTS)
    coarse = normal(f"{name}.coarse", batch, *LATENTS, 3).repeat(8, 1).repeat(8, 2)
    fine = normal(f"{name}.fine", batch, height, width, 3)
    pixels = np.clip(127.5 + 60 * coarse + 20 * fine, 0, 255).round()
    return (pixels / 127.5 - 1).astype(np.float32)


_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 16, 32, 32],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": 64,
    "scaling_factor": 0.18215,
}


# Halved, as a residual branch is smaller than what it is added to after training: else
# depth alone makes fp32 rounding, PyTorch's and ours, grow to the size of the bar.
_ENDS_BRANCH = re.compile(r"\.(conv2|to_out\.0|net\.2|fc2|out_proj)\.weight$")


def _unet(block_out_channels: list[int], in_channels: int = 4, **fields) -> dict:
    attending = len(block_out_channels) - 1
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "in_channels": in_channels,
        "out_channels": 4,
        "down_block_types": [_ATTENDS] * attending + [_PLAIN],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attending,
        "block_out_channels": block_out_channels,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        **fields,
    }


def _text(family: str, read: Any, width: int) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(read),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if family == "sd2" else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "bos_token_id": read.bos_token_id,
        "eos_token_id": read.eos_token_id,
        "pad_token_id": read.pad_token_id,
    }


def _tokenizer(pad_token: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.train(
            pathlib.Path(folder), [WORDS] * 5, vocab_size=560, max_length=77
        )
        read = clip_tokenizer.read(folder)[0]
        # Through the disk: reading makes a pad token special, also within a prompt.
        read.pad_token = pad_token
        read.save_pretrained(folder)
        return clip_tokenizer.read(folder)[0]


def random(prefix: str, shapes: Any) -> Any:
    def one(path, leaf):
        keys = tuple(entry.key for entry in path)
        return _leaf(f"{prefix}.{weights.torch_name(keys)}", keys[-1], leaf.shape)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _leaf(name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    drawn = normal(name, *shape)
    if kind == "kernel":
        gain = 0.5 if _ENDS_BRANCH.search(name) else 1.0
        return drawn * np.float32(gain * np.prod(shape[:-1]) ** -0.5)
    if kind == "scale":
        return np.float32(1.0) + np.float32(0.2) * drawn
    return drawn * np.float32(0.2 if kind == "bias" else 1.0)
