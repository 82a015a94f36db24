"""ResNets for small images: He et al., arXiv 1512.03385, section 4.2.

A 3x3 stem, three stages of basic blocks at widths w, 2w, 4w, global average pooling.
Depth is 6n + 2.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def _norm(x: Array, *, name: str, train: bool, mask: Array | None) -> Array:
    """Batch normalisation over the examples that `mask` [B] (None: all) lets count."""
    norm = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name
    )
    return norm(x, mask=None if mask is None else mask[:, None, None, None])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool, mask: Array | None
    ) -> Array:
        norm = functools.partial(_norm, train=train, mask=mask)
        conv = functools.partial(nn.Conv, use_bias=False)
        strides = (self.stride, self.stride)
        y = conv(self.width, (3, 3), strides, padding=1, name="conv1")(x)
        y = nn.relu(norm(y, name="norm1"))
        y = conv(self.width, (3, 3), padding=1, name="conv2")(y)
        y = norm(y, name="norm2")
        if x.shape != y.shape:
            x = conv(self.width, (1, 1), strides, name="shortcut")(x)
            x = norm(x, name="shortcut_norm")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """`blocks` basic blocks in each of three stages; logits [B, num_classes].

    `stem_stride` 2 halves the image at once, for images enlarged from fewer pixels.
    In training, examples whose `mask` [B] is False stay out of the batch statistics.
    """

    num_classes: int
    blocks: int
    width: int = 16
    stem_stride: int = 1

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        mask: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B K"]:
        strides = (self.stem_stride, self.stem_stride)
        stem = nn.Conv(
            self.width, (3, 3), strides, padding=1, use_bias=False, name="stem"
        )
        x = nn.relu(_norm(stem(images), name="stem_norm", train=train, mask=mask))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage}_block{block}"
                x = BasicBlock(self.width * 2**stage, stride, name=name)(x, train, mask)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))


ResNet8 = functools.partial(ResNet, blocks=1)
ResNet20 = functools.partial(ResNet, blocks=3)
ResNet56 = functools.partial(ResNet, blocks=9)

VARIANTS = {"resnet8": ResNet8, "resnet20": ResNet20, "resnet56": ResNet56}
