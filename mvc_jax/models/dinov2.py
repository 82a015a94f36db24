"""DINOv2: self-supervised features of images (arXiv 2304.07193), in JAX.

`checkpoints/dinov2_checkpoint.py` reads the files.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mvc_jax.models.flax_classes import FlaxDinov2Module, transformers

Params = dict[str, Any]
SIZE = 224  # pixels, at which its features are published
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_A = -0.75  # of the cubic convolution, as in PyTorch


@dataclasses.dataclass(frozen=True)
class Dinov2:
    """The architecture; no weights.

    Attributes:
      config: of transformers' class.
    """

    config: transformers.Dinov2Config

    @functools.cached_property
    def network(self) -> nn.Module:
        return FlaxDinov2Module(self.config)

    @property
    def width(self) -> int:
        """P: dims of a feature."""
        return self.config.hidden_size

    def features(
        self, params: Params, pixels: Float[Array, "B S S 3"]
    ) -> Float[Array, "B P"]:
        """The class token after the last layer norm, of normalised pixels."""
        with jax.numpy_rank_promotion("allow"):  # the library's layers rely on it
            return self.network.apply({"params": params}, pixels).pooler_output

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        side = self.config.image_size
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        key = jax.eval_shape(functools.partial(jax.random.key, 0))  # starts no backend
        with jax.numpy_rank_promotion("allow"):
            return jax.eval_shape(self.network.init, key, pixels)["params"]


def resized(model: Dinov2, params: Params, size: int) -> tuple[Dinov2, Params]:
    """The same network for images of `size` pixels: its position table is resampled.

    As transformers' PyTorch class does it at each call. (Its Flax class resamples by
    another cubic convolution.)
    """
    config = transformers.Dinov2Config.from_dict(model.config.to_dict())
    grids = [side // config.patch_size for side in (config.image_size, size)]
    config.image_size = size
    table = np.asarray(params["embeddings"]["position_embeddings"], np.float32)
    if grids[0] != grids[1]:
        cubic = _cubic(*grids)
        grid = table[:, 1:].reshape(grids[0], grids[0], -1)
        grid = np.einsum("ij,kl,jlc->ikc", cubic, cubic, grid)
        grid = grid.reshape(1, grids[1] ** 2, -1).astype(np.float32)
        table = np.concatenate([table[:, :1], grid], axis=1)
    embeddings = {**params["embeddings"], "position_embeddings": table}
    return Dinov2(config), {**params, "embeddings": embeddings}


def _cubic(before: int, after: int) -> Float[np.ndarray, "{after} {before}"]:
    """The matrix of cubic convolution: Keys, 1981, equation 4; corners not aligned."""
    position = (np.arange(after) + 0.5) * before / after - 0.5
    matrix = np.zeros((after, before))
    for tap in range(-1, 3):
        index = np.floor(position).astype(int) + tap
        x = np.abs(position - index)
        near = ((_A + 2) * x - (_A + 3)) * x**2 + 1
        far = ((x - 5) * x + 8) * x * _A - 4 * _A
        index = np.clip(index, 0, before - 1)
        np.add.at(matrix, (np.arange(after), index), np.where(x <= 1, near, far))
    return matrix
