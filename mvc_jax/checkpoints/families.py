"""The supported checkpoints: Stable Diffusion 1.x, 2.x and XL, and InstructPix2Pix.

The pinned Flax classes silently ignore options of `config.json` that the PyTorch
classes implement. Here every such option raises an error unless it has a value for
which both compute the same; options that Flax implements too may have any value.
`family.py` has what differs between Stable Diffusion and XL.
"""

import math
from collections.abc import Mapping
from typing import Any

from mvc_jax.checkpoints import family as family_data
from mvc_jax.checkpoints.family import Family
from mvc_jax.errors import UserError

Config = dict[str, Any]

# Supported values of the options that Flax ignores; the first is PyTorch's default.
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
    "text_encoder_2": {
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
# Defaults of options that this program reads and that early releases did not write.
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
    "text_encoder_2": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "max_position_embeddings": 77,
        "projection_dim": 512,
    },
    "scheduler": {},
}
_WHOLE_NUMBERS = {
    "unet": ("layers_per_block", *list(DEFAULTS["unet"])[:3]),
    "controlnet": ("in_channels", "layers_per_block", "cross_attention_dim"),
    "vae": ("layers_per_block", "norm_num_groups", "latent_channels"),
    "text_encoder": (
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        *DEFAULTS["text_encoder"],
    ),
    "text_encoder_2": (
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        *DEFAULTS["text_encoder_2"],
    ),
    "scheduler": ("num_train_timesteps",),
}
_PER_BLOCK = {  # one whole number, or one for each block
    "unet": ("attention_head_dim", "transformer_layers_per_block"),
    "controlnet": ("attention_head_dim",),
}
FIX = "Use a base of Stable Diffusion 1.x, 2.x or XL, or InstructPix2Pix."
_FIX_CONTROLNET = "Use a ControlNet that was trained on such a base."
_FIX_PARTS = "Use all parts of the same checkpoint."


def check_classes(index: Mapping[str, Any], path: str, family: Family) -> None:
    """Checks the classes of a pipeline's components.

    Args:
      index: content of its `model_index.json`; components may be missing.
      path: of that file, for errors.
      family: of the pipeline.

    Raises:
      UserError: a class is not one of the family's, or of their Flax versions.
    """
    problems = []
    for component, known in family.classes.items():
        named = index.get(component)
        name = named[-1] if _is_list(named) and named else named
        if component in index and str(name).removeprefix("Flax") not in known:
            problems.append(f"{component} is a {name}, not a {known[0]}")
    if problems:
        raise UserError(
            path,
            wanted=f"the components of a {family.name}",
            got="; ".join(problems),
            fix=FIX,
        )


def completed(component: str, config: Config) -> Config:
    """`config` with defaults for missing options that this program reads."""
    return DEFAULTS[component] | config


def check_config(
    component: str, config: Config, path: str, family: Family = family_data.SD
) -> None:
    """Checks one component for options that Flax would ignore, or cannot build.

    Args:
      component: `unet`, `controlnet`, `vae`, `scheduler` or a text encoder.
      config: content of its JSON file, `completed`.
      path: of that file, for errors.
      family: of the pipeline.

    Raises:
      UserError: there are such options; it lists each with its value.
    """
    problems = []
    fixed = FIXED[component] | family.fixed.get(component, {})
    for option, values in fixed.items():
        value = _common_value(config.get(option, values[0]))
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
    problems += _side_problems(component, config)
    if component == "vae" and not _is_number(config["scaling_factor"]):
        value = config["scaling_factor"]
        problems.append(f"scaling_factor is {value!r}, not a number above 0")
    if component == "scheduler":
        problems += _noise_problems(config)
        if family is family_data.XL:
            family_data.check_schedule(config, path)
    if component == "scheduler" and not {"beta_start", "trained_betas"} & set(config):
        kind = config.get("_class_name", "a scheduler")
        problems.append(f"{kind} has no beta_start: its noise is of another kind")
    if problems:
        raise UserError(
            path,
            wanted="a network that JAX computes as PyTorch does",
            got="; ".join(problems),
            fix=_FIX_CONTROLNET if component == "controlnet" else FIX,
        )


def check_fit(
    configs: Mapping[str, Config],
    *,
    tokenizers: Mapping[str, tuple[int, int]],
    folder: str,
) -> None:
    """Checks that the components of a pipeline fit together.

    Args:
      configs: by component, `completed` and checked.
      tokenizers: folder of a tokenizer -> its tokens, and its `model_max_length`.
      folder: of the pipeline, for errors.

    Raises:
      UserError: two numbers that should be equal differ; it reports the first two.
    """
    unet = configs["unet"]
    encoders = {
        name: config
        for name, config in configs.items()
        if name.startswith("text_encoder")
    }
    width = sum(config["hidden_size"] for config in encoders.values())
    channels = configs["vae"]["latent_channels"]
    if unet["out_channels"] != channels:
        raise UserError(
            f"{folder}/unet",
            wanted=f"{channels} output channels, the autoencoder's latent_channels",
            got=f"{unet['out_channels']}",
            fix=_FIX_PARTS,
        )
    if unet["in_channels"] not in (channels, 2 * channels):
        raise UserError(
            f"{folder}/unet",
            wanted=f"{channels} input channels (text to image), or {2 * channels} "
            "(InstructPix2Pix)",
            got=f"{unet['in_channels']}, as an inpainting, depth or upscaling UNet has",
            fix=FIX,
        )
    if width != unet["cross_attention_dim"]:
        raise UserError(
            f"{folder}/text_encoder",
            wanted=f"a text width of {unet['cross_attention_dim']}, the UNet's "
            "cross_attention_dim",
            got=f"{width}" + (", of both" if len(encoders) > 1 else ""),
            fix=_FIX_PARTS,
        )
    for name, (vocab_size, max_length) in tokenizers.items():
        text = configs[name.replace("tokenizer", "text_encoder")]
        if vocab_size > text["vocab_size"]:
            raise UserError(
                f"{folder}/{name}",
                wanted=f"at most {text['vocab_size']} tokens, the text encoder's "
                "vocab_size",
                got=f"{vocab_size}",
                fix=_FIX_PARTS,
            )
        wanted = text["max_position_embeddings"]
        if max_length != wanted:
            raise UserError(
                f"{folder}/{name}",
                wanted=f"a model_max_length of {wanted}, the text encoder's "
                "max_position_embeddings",
                got=f"{max_length}",
                fix=_FIX_PARTS,
            )
    if "text_encoder_2" in configs:
        family_data.check_fit(configs, folder)


def check_controlnet(config: Config, configs: Mapping[str, Config], path: str) -> None:
    """Checks that a ControlNet's residuals have the shapes of the UNet's activations.

    Args:
      config: content of its JSON file, `completed` and checked.
      configs: of the base.
      path: of that file, for errors.

    Raises:
      UserError: it is for another base; all options that differ are listed.
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
        f"{name} is {_as_list(found[name])}, not {_as_list(value)}"
        for name, value in wanted.items()
        if _as_list(found[name]) != _as_list(value)
    ]
    levels = len(configs["vae"]["block_out_channels"])
    embedding = config["conditioning_embedding_out_channels"]
    if not _is_list(embedding) or len(embedding) != levels:
        problems.append(
            f"conditioning_embedding_out_channels is {embedding!r}, not {levels} "
            "numbers, one for each level of the autoencoder"
        )
    if problems:
        raise UserError(
            path,
            wanted="a ControlNet for this base",
            got="; ".join(problems),
            fix=_FIX_CONTROLNET,
        )


def _as_list(value: Any) -> Any:
    return list(value) if _is_list(value) else value


def size_factor(configs: Mapping[str, Config]) -> int:
    """The number of pixels of which the side of an image must be a multiple.

    Autoencoder and UNet halve the side between their levels. Flax's UNet doubles it on
    the way up, where it must equal that of the skip connections, so no side may be odd;
    PyTorch's UNet passes the size on instead.
    """
    levels = [len(configs[part]["block_out_channels"]) - 1 for part in ("vae", "unet")]
    return 2 ** sum(levels)


def check_size(configs: Mapping[str, Config], size: int) -> None:
    """Checks that the networks can halve the side of the images.

    Raises:
      UserError: they cannot; it suggests the nearest sides that work.
    """
    factor = size_factor(configs)
    below = max(size // factor, 1) * factor
    if size % factor:
        raise UserError(
            "config.data.size",
            wanted=f"a multiple of {factor}, for the base's autoencoder and UNet halve "
            "it",
            got=f"{size}",
            fix=f"Set it to {below} or {below + factor}.",
        )


def _block_problems(component: str, config: Config) -> list[str]:
    problems = []
    widths = config.get("block_out_channels", [])
    for option, known in _BLOCKS.get(component, {}).items():
        blocks = config.get(option)
        if blocks is None:
            continue
        unknown = (
            [x for x in blocks if x not in known] if _is_list(blocks) else [blocks]
        )
        if unknown:
            names = ", ".join(map(str, unknown))
            problems.append(f"{option} has {names}, not only {' or '.join(known)}")
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


def _side_problems(component: str, config: Config) -> list[str]:
    """A side, or height and width, that PyTorch's classes take as their default."""
    if component not in ("unet", "vae") or "sample_size" not in config:
        return []
    value = config["sample_size"]
    if value is None and component == "unet":
        return []
    sides = value if _is_list(value) and len(value) == 2 else [value]
    if all(type(side) is int and side > 0 for side in sides):
        return []
    return [f"sample_size is {value!r}, not a whole number above 0, or two"]


def _noise_problems(config: Config) -> list[str]:
    betas, count = config.get("trained_betas"), config.get("num_train_timesteps")
    if betas is None:
        return [
            f"{option} is {config[option]!r}, not a number between 0 and 1"
            for option in ("beta_start", "beta_end")
            if option in config and not _is_number(config[option], below=1.0)
        ]
    if (
        _is_list(betas)
        and len(betas) == count
        and all(_is_number(beta, below=1.0) for beta in betas)
    ):
        return []
    found = f"{len(betas)} values" if _is_list(betas) else repr(betas)
    return [f"trained_betas has {found}, not {count} numbers between 0 and 1"]


def _is_number(value: Any, below: float = math.inf) -> bool:
    return type(value) in (int, float) and 0 < value < below


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _common_value(value: Any) -> Any:
    """The value that a list repeats for each block; other values unchanged."""
    if _is_list(value) and value and all(x == value[0] for x in value):
        return value[0]
    return value
