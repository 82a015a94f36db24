"""ControlNet: a copy of a UNet's encoder that looks at a picture of shapes, too.

Zhang et al., arXiv 2302.05543. diffusers' Flax class behind plain arrays, and its
folder. What it says is added to the skip connections of the UNet
(`StableDiffusion.denoise`, `residuals`).

Legend: B batch, h w latent grid, c latent channels, H W pixels, L tokens, D text width.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from diffusers.models.controlnets.controlnet_flax import FlaxControlNetModel
from etils import epath
from jaxtyping import Array, Float

from mvc_jax import files
from mvc_jax.checkpoints import families, hub, pipeline_folder, weights
from mvc_jax.errors import UserError, require
from mvc_jax.models import attention, stable_diffusion

_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_PATTERNS = ("config.json", *_WEIGHTS, "diffusion_pytorch_model-*.safetensors")

Params = dict[str, Any]
Residuals = tuple[tuple[Array, ...], Array]  # of the down blocks, of the middle one


@dataclasses.dataclass(frozen=True)
class ControlNet:
    """The architecture: the content of its config.json; no weights.

    Attributes:
      config: that content.
      dtype: of its activations, `float32` or `bfloat16`.
      attention: how it runs, one of `attention.ASKED`.
    """

    config: dict[str, Any]
    dtype: str = "float32"
    attention: str = "auto"

    @functools.cached_property
    def network(self) -> nn.Module:
        return stable_diffusion.build(
            FlaxControlNetModel, self.config | {"dtype": jnp.dtype(self.dtype)}
        )

    def residuals(
        self,
        params: Params,
        latents: Float[Array, "B h w c"],
        timesteps: Array,
        text_states: Float[Array, "B L D"],
        pictures: Float[Array, "B H W 3"],
    ) -> Residuals:
        """What `StableDiffusion.denoise` adds to the UNet's skip connections.

        Args:
          params: of the ControlNet.
          latents: noisy, without source latents.
          timesteps: [B], integers or floats, as the UNet takes them.
          text_states: as the UNet takes them.
          pictures: in [0, 1], e.g. white edges on black.
        """
        with attention.exact(), attention.running(self.attention):
            output = self.network.apply(
                {"params": params},
                latents.transpose(0, 3, 1, 2),
                timesteps,
                text_states,
                pictures.transpose(0, 3, 1, 2),
            )
        down = tuple(output.down_block_res_samples)
        return down, output.mid_block_res_sample

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s.

        Not by the library's `init_weights`, which takes eight pixels a latent for
        granted.
        """
        config = self.config
        grid = 2 ** (len(config["block_out_channels"]) - 1)
        side = grid * 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)

        def init(key):
            latents = jnp.zeros((1, config["in_channels"], grid, grid))
            pictures = jnp.zeros((1, 3, side, side))
            states = jnp.zeros((1, 1, config["cross_attention_dim"]))
            steps = jnp.zeros((1,), jnp.int32)
            return self.network.init(key, latents, steps, states, pictures)["params"]

        return jax.eval_shape(init, jax.random.key(0))


def of_unet(model: stable_diffusion.StableDiffusion) -> ControlNet:
    """An untrained ControlNet for a base; its embedding of pictures is narrow."""
    unet = model.configs["unet"]
    copied = (
        "down_block_types",
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "use_linear_projection",
        "flip_sin_to_cos",
        "freq_shift",
    )
    levels = len(model.configs["vae"]["block_out_channels"])
    channels = [16 * 2**level for level in range(levels)]
    config = {"_class_name": "ControlNetModel", "conditioning_channels": 3}
    config |= {name: unet[name] for name in copied if name in unet}
    config |= {"in_channels": model.latent_channels}
    config |= {"conditioning_embedding_out_channels": channels}
    return ControlNet(families.completed("controlnet", config))


def start(network: ControlNet, unet: Params, rng: np.random.Generator) -> Params:
    """Host parameters to train from: the UNet's own, and zero convolutions.

    The residuals are zero, so that the UNet says what it said without (arXiv
    2302.05543, section 3.1).
    """
    params = stable_diffusion.random_params(network.shapes(), rng)
    for name, tree in params.items():
        if name in unet:
            params[name] = copy.deepcopy(jax.tree.map(np.asarray, unet[name]))
        elif name != "controlnet_cond_embedding":
            params[name] = jax.tree.map(np.zeros_like, tree)
    embedding = params["controlnet_cond_embedding"]
    embedding["conv_out"] = jax.tree.map(np.zeros_like, embedding["conv_out"])
    return params


def load(
    path: epath.PathLike, base: Mapping[str, dict[str, Any]], *, field: str
) -> tuple[ControlNet, Params]:
    """Reads a ControlNet in the diffusers layout: safetensors only, no PyTorch.

    Args:
      path: its folder, or its name on the Hugging Face hub.
      base: configs of the base that it is to control.
      field: the setting that holds the path, for errors.

    Returns:
      the architecture, and host parameters in the precision in which they are stored.

    Raises:
      UserError: a file is missing or damaged, it is another network or of another base,
        or tensors are missing, unexpected or of another shape.
    """
    folder, file = _find(path, field)
    network = _read_architecture(folder, base)
    try:
        shapes = network.shapes()
    except Exception as error:  # of Flax, JAX or the library, as the numbers have it
        raise UserError(
            str(folder / "config.json"),
            wanted="the options of a ControlNet",
            got=f"some that cannot be built ({type(error).__name__}: {error})",
            fix="Take config.json from the checkpoint, unchanged.",
        ) from error
    weights.check(file)
    return network, weights.read(file, shapes)


def check(
    path: epath.PathLike, base: Mapping[str, dict[str, Any]] | None, *, field: str
) -> None:
    """Refuses, without reading a tensor, what `load` would refuse.

    Of a hub name no more is asked than whether the hub has it; whether the network fits
    is left out where `base` is not known.
    """
    if not hub.is_local(str(path)):
        hub.check_name(str(path), field=f"{field} {str(path)!r}")
        return
    folder, file = _find(path, field)
    weights.check(file)
    _read_architecture(folder, base)


def save(folder: epath.PathLike, network: ControlNet, params: Params) -> list[str]:
    """Writes the folder that diffusers' ControlNetModel reads; its files' names."""
    folder = epath.Path(folder)
    files.write_json(folder / "config.json", network.config)
    weights.write(folder / _WEIGHTS[1], params)
    return ["config.json", _WEIGHTS[1]]


def _find(path: epath.PathLike, field: str) -> tuple[epath.Path, epath.Path]:
    """The folder, and the file of its weights or the index of their shards."""
    name = str(path)
    field = f"{field} {name!r}"
    folder = hub.locate(name, _PATTERNS, field=field)
    there = sorted(x.name for x in folder.glob("*")) if folder.is_dir() else []
    found = next((file for file in _WEIGHTS if file in there), None)
    require(
        "config.json" in there and found is not None,
        field,
        wanted=f"a folder with a ControlNet: config.json and {_WEIGHTS[1]}",
        got=", ".join(there[:8]) or f"nothing at {folder}",
        fix="Name lllyasviel/sd-controlnet-canny for Stable Diffusion 1.x, or the "
        "folder of such a checkpoint. Pickles (.bin, .pth) are never opened.",
    )
    return folder, folder / found


def _read_architecture(
    folder: epath.Path, base: Mapping[str, dict[str, Any]] | None
) -> ControlNet:
    path = folder / "config.json"
    config = families.completed("controlnet", pipeline_folder.read_json(path))
    require(
        config.get("_class_name") == "ControlNetModel",
        str(path),
        wanted="_class_name 'ControlNetModel'",
        got=repr(config.get("_class_name")),
        fix="Name a ControlNet in the diffusers layout.",
    )
    families.check_config("controlnet", config, str(path))
    if base is not None:
        families.check_controlnet(config, base, str(path))
    return ControlNet(config)
