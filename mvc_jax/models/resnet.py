"""ResNets: He et al., arXiv 1512.03385; wide: Zagoruyko & Komodakis, arXiv 1605.07146.

The stride of a bottleneck is in its 3x3 convolution ("v1.5"), as in torchvision, timm
and transformers. Parameters have torchvision's names.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mvc_jax.models.convolution import max_pool
from mvc_jax.models.layers import Layers, global_pool, head


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = layers.conv(x, self.width, 3, self.stride, name="conv1")
        y = nn.relu(layers.norm(y, name="bn1"))
        y = layers.conv(y, self.width, 3, name="conv2")
        y = layers.norm(y, name="bn2")
        return nn.relu(y + _shortcut(x, self.width, self.stride, layers))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    The first two have `inner` * `width` channels, the last 4 * `width`.
    """

    width: int
    stride: int
    inner: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = layers.conv(x, self.inner * self.width, 1, name="conv1")
        y = nn.relu(layers.norm(y, name="bn1"))
        y = layers.conv(y, self.inner * self.width, 3, self.stride, name="conv2")
        y = nn.relu(layers.norm(y, name="bn2"))
        y = layers.conv(y, 4 * self.width, 1, name="conv3")
        y = layers.norm(y, name="bn3")
        return nn.relu(y + _shortcut(x, 4 * self.width, self.stride, layers))


def _shortcut(x: Array, features: int, stride: int, layers: Layers) -> Array:
    if stride == 1 and x.shape[-1] == features:
        return x
    x = layers.conv(x, features, 1, stride, name="downsample_0")
    return layers.norm(x, name="downsample_1")


class ResNet(nn.Module):
    """A residual network; returns logits [B, K].

    In training, examples whose `mask` [B] is False are left out of the batch
    statistics.

    Attributes:
      num_classes: K.
      depths: blocks in each stage; each stage has twice the width of the one before.
      width: channels of the first stage.
      inner: inner width of the bottlenecks, as a multiple of the stage's width; 0 for
        basic blocks.
      stem: "imagenet" (7x7 convolution and 3x3 max pooling, each with stride 2) or
        "cifar" (3x3 convolution, section 4.2).
      stem_stride: of the CIFAR stem; 2 is for images enlarged from fewer pixels.
      dtype: of the activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    width: int = 64
    inner: int = 0
    stem: str = "imagenet"
    stem_stride: int = 1
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels per feature of the last feature map."""
        stem = {"imagenet": 4, "cifar": self.stem_stride}[self.stem]
        return stem * 2 ** (len(self.depths) - 1)

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        mask: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B K"]:
        layers = Layers(train, mask, self.dtype)
        size, stride = {"imagenet": (7, 2), "cifar": (3, self.stem_stride)}[self.stem]
        x = layers.conv(images, self.width, size, stride, name="conv1")
        x = nn.relu(layers.norm(x, name="bn1"))
        if self.stem == "imagenet":
            x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                name, width = f"layer{stage + 1}_{block}", self.width * 2**stage
                if self.inner:
                    x = Bottleneck(width, stride, self.inner, name=name)(x, layers)
                else:
                    x = BasicBlock(width, stride, name=name)(x, layers)
        return head(global_pool(x), self.num_classes)


# Section 4.2: 6n + 2 layers.
_Small = functools.partial(ResNet, width=16, stem="cifar")
ResNet8 = functools.partial(_Small, depths=(1, 1, 1))
ResNet20 = functools.partial(_Small, depths=(3, 3, 3))
ResNet56 = functools.partial(_Small, depths=(9, 9, 9))
ResNet18 = functools.partial(ResNet, depths=(2, 2, 2, 2))
ResNet34 = functools.partial(ResNet, depths=(3, 4, 6, 3))
ResNet50 = functools.partial(ResNet, depths=(3, 4, 6, 3), inner=1)
WideResNet50 = functools.partial(ResNet, depths=(3, 4, 6, 3), inner=2)
