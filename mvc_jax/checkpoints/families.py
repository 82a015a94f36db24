"""Which checkpoints can be computed: Stable Diffusion 1.x, 2.x, InstructPix2Pix.

The pinned Flax classes skip options of `config.json` that their PyTorch twins follow,
without a word. Here every such option is refused by name unless it has the value that
both compute alike; the options that Flax follows too may have any.
"""

import math
from collections.abc import Mapping
from typing import Any

import transformers

from mvc_jax.errors import UserError, require

Config = dict[str, Any]

PIPELINES = (  # the classes of model_index.json that are made of the same four parts
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
)
# Values of the options that Flax does not follow; the first is PyTorch's default.
FIXED: dict[str, dict[str, tuple]] = {
    "unet": {
        "_class_name": (None, "UNet2DConditionModel"),
        "center_input_sample": (False,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0,),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "class_embeddings_concat": (False,),
        "addition_embed_type": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
    },
    "controlnet": {
        "_class_name": (None, "ControlNetModel"),
        "conditioning_channels": (3,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "transformer_layers_per_block": (1,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "resnet_time_scale_shift": ("default",),
        "global_pool_conditions": (False,),
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    },
    "vae": {
        "_class_name": (None, "AutoencoderKL"),
        "in_channels": (3,),
        "out_channels": (3,),
        "act_fn": ("silu", "swish"),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    },
    "text_encoder": {
        "model_type": ("clip_text_model",),
        "use_attention_mask": (None, False),
    },
    "scheduler": {
        "rescale_betas_zero_snr": (False,),
        "prediction_type": ("epsilon", "v_prediction"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    },
}
_BLOCKS = {
    "unet": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "controlnet": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
}
DOWN_BLOCKS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]  # the library's default
# What this program looks up itself, where a file of an early release leaves it out.
DEFAULTS: dict[str, Config] = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 1280,
        "block_out_channels": [320, 640, 1280, 1280],
    },
    "controlnet": {
        "in_channels": 4,
        "cross_attention_dim": 1280,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    },
    "vae": {
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "block_out_channels": [64],
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "max_position_embeddings": 77,
    },
    "scheduler": {},
}
_WHOLE_NUMBERS = {
    "unet": ("sample_size", "layers_per_block", *list(DEFAULTS["unet"])[:3]),
    "controlnet": ("in_channels", "layers_per_block", "cross_attention_dim"),
    "vae": ("sample_size", "layers_per_block", "norm_num_groups", "latent_channels"),
    "text_encoder": (
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        *DEFAULTS["text_encoder"],
    ),
    "scheduler": ("num_train_timesteps",),
}
_PER_BLOCK = {  # one whole number, or one for each block
    "unet": ("attention_head_dim", "transformer_layers_per_block"),
    "controlnet": ("attention_head_dim",),
}
_FIX = "Take a base of Stable Diffusion 1.x or 2.x, or InstructPix2Pix."
_FIX_CONTROLNET = "Take a ControlNet that was trained on such a base."


def completed(component: str, config: Config) -> Config:
    """`config` with the defaults that this program relies on."""
    return DEFAULTS[component] | config


def check_config(component: str, config: Config, path: str) -> None:
    """Refuses options of one component that Flax would ignore, or cannot build.

    Args:
      component: `unet`, `controlnet`, `vae`, `text_encoder` or `scheduler`.
      config: its JSON file, `completed`.
      path: of that file, for errors.

    Raises:
      UserError: with every such option and its value.
    """
    problems = []
    for option, values in FIXED[component].items():
        value = _same(config.get(option, values[0]))
        if not any(
            value == v and isinstance(value, str) == isinstance(v, str) for v in values
        ):
            known = " or ".join(map(repr, values))
            problems.append(f"{option} is {config[option]!r}, not {known}")
    for option in _WHOLE_NUMBERS[component]:
        value = config.get(option, 1)
        if type(value) is not int or value < 1:
            problems.append(f"{option} is {value!r}, not a whole number above 0")
    problems += _block_problems(component, config)
    if component == "vae" and not _is_number(config["scaling_factor"]):
        value = config["scaling_factor"]
        problems.append(f"scaling_factor is {value!r}, not a number above 0")
    problems += _noise_problems(config) if component == "scheduler" else []
    if component == "scheduler" and not {"beta_start", "trained_betas"} & set(config):
        kind = config.get("_class_name", "a scheduler")
        problems.append(f"{kind} has no beta_start: its noise is of another kind")
    if problems:
        raise UserError(
            path,
            wanted="a network that is computed in JAX as it is in PyTorch",
            got="; ".join(problems),
            fix=_FIX_CONTROLNET if component == "controlnet" else _FIX,
        )


def check_fit(
    configs: Mapping[str, Config],
    tokenizer: transformers.CLIPTokenizerFast,
    folder: str,
) -> None:
    """Refuses components that do not belong together.

    Raises:
      UserError: with the first two numbers that ought to agree.
    """
    unet, text = configs["unet"], configs["text_encoder"]
    channels = configs["vae"]["latent_channels"]
    require(
        unet["out_channels"] == channels,
        f"{folder}/unet",
        wanted=f"{channels} output channels, the autoencoder's latent_channels",
        got=unet["out_channels"],
        fix="Take all parts from the same checkpoint.",
    )
    require(
        unet["in_channels"] in (channels, 2 * channels),
        f"{folder}/unet",
        wanted=f"{channels} input channels (text to image), or {2 * channels} "
        "(InstructPix2Pix)",
        got=f"{unet['in_channels']}, as an inpainting, depth or upscaling UNet has",
        fix=_FIX,
    )
    require(
        text["hidden_size"] == unet["cross_attention_dim"],
        f"{folder}/text_encoder",
        wanted=f"a text width of {unet['cross_attention_dim']}, the UNet's "
        "cross_attention_dim",
        got=text["hidden_size"],
        fix="Take all parts from the same checkpoint.",
    )
    require(
        len(tokenizer) <= text["vocab_size"],
        f"{folder}/tokenizer",
        wanted=f"at most {text['vocab_size']} tokens, the text encoder's vocab_size",
        got=len(tokenizer),
        fix="Take tokenizer and text encoder from the same checkpoint.",
    )
    length, wanted = tokenizer.model_max_length, text["max_position_embeddings"]
    require(
        length == wanted or length > 1e9,  # where its config names none
        f"{folder}/tokenizer",
        wanted=f"a model_max_length of {wanted}, the text encoder's "
        "max_position_embeddings",
        got=length,
        fix="Take tokenizer and text encoder from the same checkpoint.",
    )


def check_controlnet(config: Config, configs: Mapping[str, Config], path: str) -> None:
    """Refuses a ControlNet of another base: its residuals would not fit the UNet's.

    Args:
      config: its JSON file, `completed` and checked.
      configs: of the base.
      path: of that file, for errors.

    Raises:
      UserError: with all that differs.
    """
    unet = configs["unet"]
    wanted = {
        "in_channels": configs["vae"]["latent_channels"],
        "cross_attention_dim": unet["cross_attention_dim"],
        "block_out_channels": unet["block_out_channels"],
        "layers_per_block": unet.get("layers_per_block", 2),
        "down_block_types": unet.get("down_block_types", DOWN_BLOCKS),
    }
    found = {"down_block_types": DOWN_BLOCKS} | config
    problems = [
        f"{name} is {_listed(found[name])}, not {_listed(value)}"
        for name, value in wanted.items()
        if _listed(found[name]) != _listed(value)
    ]
    levels = len(configs["vae"]["block_out_channels"])
    embedding = config["conditioning_embedding_out_channels"]
    if not _is_list(embedding) or len(embedding) != levels:
        problems.append(
            f"conditioning_embedding_out_channels is {embedding!r}, not {levels} "
            "numbers, one for each level of the autoencoder"
        )
    require(
        not problems,
        path,
        wanted="a ControlNet for this base",
        got="; ".join(problems),
        fix=_FIX_CONTROLNET,
    )


def _listed(value: Any) -> Any:
    return list(value) if _is_list(value) else value


def size_factor(configs: Mapping[str, Config]) -> int:
    """What the side of an image must be a multiple of, in pixels.

    The autoencoder halves it between its levels and the UNet between its own. Flax's
    UNet doubles on the way up, where its skip connections must fit: an odd side is
    lost, which PyTorch's mends by asking for a size.
    """
    levels = [len(configs[part]["block_out_channels"]) - 1 for part in ("vae", "unet")]
    return 2 ** sum(levels)


def check_size(configs: Mapping[str, Config], size: int) -> None:
    """Refuses images of a side that the networks cannot halve.

    Raises:
      UserError: with the next sides that they can.
    """
    factor = size_factor(configs)
    below = max(size // factor, 1) * factor
    require(
        size % factor == 0,
        "config.data.size",
        wanted=f"a multiple of {factor}, by which the base's autoencoder and UNet "
        "halve it",
        got=size,
        fix=f"Take {below} or {below + factor}.",
    )


def _block_problems(component: str, config: Config) -> list[str]:
    problems = []
    widths = config.get("block_out_channels", [])
    for option, known in _BLOCKS.get(component, {}).items():
        blocks = config.get(option)
        if blocks is None:
            continue
        strange = (
            [x for x in blocks if x not in known] if _is_list(blocks) else [blocks]
        )
        if strange:
            names = ", ".join(map(str, strange))
            problems.append(f"{option} has {names}, not {' or '.join(known)} alone")
        elif not _is_list(widths) or len(blocks) != len(widths):
            problems.append(
                f"{option} has {len(blocks)} blocks, block_out_channels is {widths!r}"
            )
    blocks = config.get("down_block_types") or DOWN_BLOCKS
    for option in _PER_BLOCK.get(component, ()):
        value = config.get(option, 1)
        values = value if _is_list(value) else [value] * len(blocks)
        whole = all(type(x) is int and x > 0 for x in values)
        if not whole or len(values) != len(blocks):
            problems.append(
                f"{option} is {value!r}, not a whole number above 0 or one for each "
                f"of {len(blocks)} blocks"
            )
    return problems


def _noise_problems(config: Config) -> list[str]:
    betas, count = config.get("trained_betas"), config.get("num_train_timesteps")
    if betas is None:
        return [
            f"{option} is {config[option]!r}, not a number between 0 and 1"
            for option in ("beta_start", "beta_end")
            if option in config and not _is_number(config[option], below=1.0)
        ]
    good = _is_list(betas) and len(betas) == count
    if good and all(_is_number(beta, below=1.0) for beta in betas):
        return []
    found = f"{len(betas)} values" if _is_list(betas) else repr(betas)
    return [f"trained_betas has {found}, not {count} numbers between 0 and 1"]


def _is_number(value: Any, below: float = math.inf) -> bool:
    return type(value) in (int, float) and 0 < value < below


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _same(value: Any) -> Any:
    """The value that a list repeats for each block; any other as it is."""
    if _is_list(value) and value and all(x == value[0] for x in value):
        return value[0]
    return value
