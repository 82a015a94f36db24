"""ControlNet: a copy of a UNet's encoder with an image as a further input.

Zhang et al., arXiv 2302.05543. diffusers' Flax class behind plain arrays. Its output is
added to the skip connections of the UNet (`StableDiffusion.denoise`, `residuals`);
`checkpoints/controlnet_checkpoint.py` reads and writes its folder.

Legend: B batch, h w latent grid, c latent channels, H W pixels, L tokens, D text width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mvc_jax.models import attention, convolution, stable_diffusion
from mvc_jax.models.flax_classes import FlaxControlNetModel

Params = dict[str, Any]
Residuals = tuple[tuple[Array, ...], Array]  # of the down blocks, of the middle block


@dataclasses.dataclass(frozen=True)
class ControlNet:
    """The architecture: the content of its config.json; no weights.

    Attributes:
      config: content of config.json.
      dtype: of the activations, `float32` or `bfloat16`.
      attention: implementation, one of `attention.CHOICES`.
      mesh: the devices that it is compiled for; None: one default device.
    """

    config: dict[str, Any]
    dtype: str = "float32"
    attention: str = "auto"
    mesh: Mesh | None = None

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
        """The arrays that `StableDiffusion.denoise` adds to the UNet's skip
        connections.

        Args:
          params: of the ControlNet.
          latents: noisy latents, without source latents.
          timesteps: [B], integers or floats, as for the UNet.
          text_states: as for the UNet.
          pictures: in [0, 1], e.g. white edges on black.
        """
        with (
            attention.match_pytorch(),
            attention.implemented_by(self.attention, self.mesh),
            convolution.small_images_convolved(self.mesh),
        ):
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

        The library's `init_weights` assumes eight pixels per latent, so it is not used.
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

        return jax.eval_shape(init, stable_diffusion.abstract_key())
