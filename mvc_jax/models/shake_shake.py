"""Shake-Shake regularisation: Gastaldi, arXiv 1705.07485.

"Shake-Shake-Image": each example and block has its own mixture of the two branches, one
on the way forward and another on the way back.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mvc_jax.models.layers import Layers, head, pooled, shake, uniform


class Branch(nn.Module):
    """Twice ReLU, a 3x3 convolution and normalisation."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = layers.conv(nn.relu(x), self.width, 3, self.stride, name="conv1")
        y = nn.relu(layers.norm(y, name="bn1"))
        return layers.norm(layers.conv(y, self.width, 3, name="conv2"), name="bn2")


class Shortcut(nn.Module):
    """Two projections to half the channels, of pixels diagonally next to each other."""

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

    The gradients of the branches are mixed by another draw; a is 1/2 outside training.
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
    """26 2xWd for small images where `blocks` is 4; logits [B, num_classes].

    In training, examples whose `mask` [B] is False stay out of the batch statistics,
    and `rngs={"dropout": key}` is wanted.
    """

    num_classes: int
    width: int
    blocks: int = 4
    dtype: Any = jnp.float32

    stride = 4  # pixels of the image for one of the last features

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
        return head(pooled(nn.relu(x)), self.num_classes)


ShakeShake26x96 = functools.partial(ShakeShake, width=96)
