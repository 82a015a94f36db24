"""Shake-Shake regularisation: Gastaldi, arXiv 1705.07485.

"Shake-Shake-Image": each example has its own mixture of the two branches in each block,
one in the forward pass and another in the backward pass.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mvc_jax.models.layers import Layers, global_pool, head, shake, uniform


class Branch(nn.Module):
    """ReLU, a 3x3 convolution and normalisation, twice."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = layers.conv(nn.relu(x), self.width, 3, self.stride, name="conv1")
        y = nn.relu(layers.norm(y, name="bn1"))
        return layers.norm(layers.conv(y, self.width, 3, name="conv2"), name="bn2")


class Shortcut(nn.Module):
    """Two projections to half the channels each, one of them shifted by a pixel."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        x = nn.relu(x)
        shifted = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, :-1, :-1]
        halves = [
            layers.conv(y, self.width // 2, 1, self.stride, name=name)
            for name, y in (("conv1", x), ("conv2", shifted))
        ]
        return layers.norm(jnp.concatenate(halves, axis=-1), name="bn")


class Block(nn.Module):
    """x + a * branch1(x) + (1 - a) * branch2(x), a uniform in [0, 1] (equation 2).

    The backward pass mixes the gradients by another draw; at evaluation a is 1/2.
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        one = Branch(self.width, self.stride, name="branch1")(x, layers)
        two = Branch(self.width, self.stride, name="branch2")(x, layers)
        if x.shape[-1] != self.width:
            x = Shortcut(self.width, self.stride, name="shortcut")(x, layers)
        if not layers.train:
            return x + 0.5 * (one + two)
        draws = uniform(self.make_rng("dropout"), (len(x), 2, 1, 1, 1))
        forward, backward = draws[:, 0], draws[:, 1]
        mixed = shake(one, forward, backward) + shake(two, 1 - forward, 1 - backward)
        return x + mixed


class ShakeShake(nn.Module):
    """Shake-Shake-26 2x`width`d for small images; returns logits [B, K].

    In training, examples whose `mask` [B] is False are left out of the batch
    statistics, and `rngs={"dropout": key}` is required.

    Attributes:
      num_classes: K.
      width: channels of the first stage.
      blocks: in each stage; 4 make 26 layers.
      dtype: of the activations.
    """

    num_classes: int
    width: int
    blocks: int = 4
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
        x = layers.norm(layers.conv(images, 16, 3, name="conv1"), name="bn1")
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                width, name = self.width * 2**stage, f"layer{stage + 1}_{block}"
                x = Block(width, stride, name=name)(x, layers)
        return head(global_pool(nn.relu(x)), self.num_classes)


ShakeShake26x96 = functools.partial(ShakeShake, width=96)
