"""Wide residual networks: Zagoruyko & Komodakis, arXiv 1605.07146, table 1.

WRN-d-k has d layers and k times the channels of a small ResNet, with pre-activation
blocks. No dropout, as in AutoAugment's protocol.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mvc_jax.models.layers import Layers, global_pool, head


class Block(nn.Module):
    """Normalisation, ReLU and a 3x3 convolution, twice, and a shortcut.

    If the number of channels changes, the shortcut is a projection of the first ReLU's
    output.
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = nn.relu(layers.norm(x, name="bn1"))
        if x.shape[-1] != self.width:
            x = layers.conv(y, self.width, 1, self.stride, name="shortcut")
        y = layers.conv(y, self.width, 3, self.stride, name="conv1")
        y = nn.relu(layers.norm(y, name="bn2"))
        return x + layers.conv(y, self.width, 3, name="conv2")


class WideResNet(nn.Module):
    """WRN-`depth`-`widen` for small images; returns logits [B, K].

    In training, examples whose `mask` [B] is False are left out of the batch
    statistics.

    Attributes:
      num_classes: K.
      depth: 6n + 4 layers.
      widen: width factor, at least 2.
      dtype: of the activations.
    """

    num_classes: int
    depth: int
    widen: int
    dtype: Any = jnp.float32

    stride = 4  # pixels per feature of the last feature map

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        mask: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B K"]:
        layers = Layers(train, mask, self.dtype)
        x = layers.conv(images, 16, 3, name="conv1")
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                width, name = 16 * self.widen * 2**stage, f"layer{stage + 1}_{block}"
                x = Block(width, stride, name=name)(x, layers)
        x = nn.relu(layers.norm(x, name="bn1"))
        return head(global_pool(x), self.num_classes)


WRN16x4 = functools.partial(WideResNet, depth=16, widen=4)
WRN40x2 = functools.partial(WideResNet, depth=40, widen=2)
WRN28x10 = functools.partial(WideResNet, depth=28, widen=10)
