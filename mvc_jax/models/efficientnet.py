"""EfficientNets: Tan & Le, arXiv 1905.11946; blocks of MobileNetV2 and MnasNet.

There are two variants of the architecture. timm's `efficientnet_b0` and torchvision's
use PyTorch's padding and epsilon 1e-5, the defaults here; timm's `tf_efficientnet_b0`
and transformers' use TensorFlow's padding "same" and epsilon 1e-3. Parameters have
timm's names.

EfficientNet-Lite (tensorflow/tpu, models/official/efficientnet/lite) is for devices
without a fast sigmoid: ReLU6 in place of SiLU, no squeeze-and-excitation, and a stem
and a head that `width` does not scale. Its published weights are timm's
`tf_efficientnet_lite0`, with padding "same".
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mvc_jax.models.layers import Layers, drop, global_pool, head


class Stage(NamedTuple):
    """A row of table 1, before scaling."""

    expand: int
    size: int
    stride: int
    width: int
    depth: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: Hu et al., arXiv 1709.01507."""

    squeezed: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = global_pool(x)[:, None, None]
        y = layers.conv(y, self.squeezed, 1, bias=True, name="conv_reduce")
        y = layers.conv(nn.silu(y), x.shape[-1], 1, bias=True, name="conv_expand")
        return x * nn.sigmoid(y)


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection.

    `drop_path` is the probability that training drops an example's residual; `lite` is
    that of the network.
    """

    stage: Stage
    width: int
    stride: int
    drop_path: float
    lite: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        inputs, expanded = x.shape[-1], self.stage.expand * x.shape[-1]
        names, activation = iter(("bn1", "bn2", "bn3")), _activation(self.lite)
        y = x
        if self.stage.expand > 1:
            y = layers.conv(y, expanded, 1, name="conv_pw")
            y = activation(layers.norm(y, name=next(names)))
        size, stride = self.stage.size, self.stride
        y = layers.conv(y, expanded, size, stride, depthwise=True, name="conv_dw")
        y = activation(layers.norm(y, name=next(names)))
        if not self.lite:
            y = SqueezeExcite(max(1, inputs // 4), name="se")(y, layers)
        project = "conv_pwl" if self.stage.expand > 1 else "conv_pw"
        y = layers.conv(y, self.width, 1, name=project)
        y = layers.norm(y, name=next(names))
        if self.stride > 1 or inputs != self.width:
            return y
        if layers.train and self.drop_path:
            key = self.make_rng("dropout")
            y = drop(y, (len(y), 1, 1, 1), self.drop_path, key)
        return x + y


class EfficientNet(nn.Module):
    """An EfficientNet; returns logits [B, K].

    In training, examples whose `mask` [B] is False are left out of the batch
    statistics, and `rngs={"dropout": key}` is required unless both rates are 0.

    Attributes:
      num_classes: K.
      width, depth: factors of the channels and layers of table 1.
      dropout: rate before the head.
      drop_path: rate of the last block; it grows linearly from 0 at the first.
      padding, epsilon: see the top of this file.
      stages: the rows of table 1.
      lite: see the top of this file.
      dtype: of the activations.
    """

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    drop_path: float = 0.2
    padding: str = "symmetric"
    epsilon: float = 1e-5
    stages: tuple[tuple[int, ...], ...] = STAGES
    lite: bool = False
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels per feature of the last feature map."""
        return 2 * math.prod(row.stride for row in self.rows())

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        mask: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B K"]:
        layers = Layers(train, mask, self.dtype, self.padding, self.epsilon)
        activation, (stem, top) = _activation(self.lite), self.ends()
        x = layers.conv(images, stem, 3, 2, name="conv_stem")
        x = activation(layers.norm(x, name="bn1"))
        number, depths = 0, self.depths()
        for row, (stage, depth) in enumerate(zip(self.rows(), depths, strict=True)):
            for block in range(depth):
                x = MBConv(
                    stage,
                    self.scaled(stage.width),
                    stage.stride if block == 0 else 1,
                    self.drop_path * number / sum(depths),
                    self.lite,
                    name=f"blocks_{row}_{block}",
                )(x, layers)
                number += 1
        x = layers.conv(x, top, 1, name="conv_head")
        x = global_pool(activation(layers.norm(x, name="bn2")))
        if train and self.dropout:
            x = drop(x, x.shape, self.dropout, self.make_rng("dropout"))
        return head(x, self.num_classes, name="classifier")

    def rows(self) -> list[Stage]:
        """`stages` as `Stage`s; plain tuples, as read from JSON, are converted."""
        return [Stage(*row) for row in self.stages]

    def depths(self) -> list[int]:
        """Number of blocks in each stage."""
        return [math.ceil(self.depth * stage.depth) for stage in self.rows()]

    def ends(self) -> tuple[int, int]:
        """Channels of the stem and of the head."""
        return (32, 1280) if self.lite else (self.scaled(32), self.scaled(1280))

    def scaled(self, channels: int) -> int:
        """Channels times `width`, to a multiple of 8; loses at most a tenth."""
        exact = channels * self.width
        rounded = max(8, int(exact + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * exact else rounded + 8


def _activation(lite: bool) -> Callable[[Array], Array]:
    return nn.relu6 if lite else nn.silu


B0 = functools.partial(EfficientNet)
B1 = functools.partial(EfficientNet, depth=1.1)
B2 = functools.partial(EfficientNet, width=1.1, depth=1.2, dropout=0.3)
B3 = functools.partial(EfficientNet, width=1.2, depth=1.4, dropout=0.3)
LITE0 = functools.partial(EfficientNet, lite=True)
