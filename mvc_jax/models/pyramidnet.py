"""PyramidNets: Han et al., arXiv 1610.02915; with ShakeDrop: Yamada et al., 1802.02375.

The width grows with every block. Parameters have the names of the authors' PyTorch
code.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mvc_jax.models.layers import Layers, global_pool, head, shake, uniform


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with normalisation; the shortcut has no weights.

    In training, the residual of each example is multiplied by b + a - b a, where b = 1
    with probability `keep`, and a is uniform in [-1, 1] in the forward pass and in
    [0, 1] in the backward pass (ShakeDrop, equation 6; per example as in AutoAugment's
    code). At evaluation it is multiplied by the expectation, `keep`.
    """

    width: int
    stride: int
    keep: float

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], layers: Layers) -> Array:
        y = layers.norm(x, name="bn1")
        y = layers.conv(y, self.width, 1, name="conv1")
        y = nn.relu(layers.norm(y, name="bn2"))
        y = layers.conv(y, self.width, 3, self.stride, name="conv2")
        y = nn.relu(layers.norm(y, name="bn3"))
        y = layers.norm(layers.conv(y, 4 * self.width, 1, name="conv3"), name="bn4")
        if layers.train:
            draws = uniform(self.make_rng("dropout"), (len(x), 3, 1, 1, 1))
            kept = jnp.floor(draws[:, 0] + self.keep)
            forward = kept + (1 - kept) * (2 * draws[:, 1] - 1)
            y = shake(y, forward, kept + (1 - kept) * draws[:, 2])
        else:
            y = self.keep * y
        if self.stride > 1:
            window = (self.stride, self.stride)
            x = nn.avg_pool(x, window, window, "SAME", count_include_pad=False)
        wider = y.shape[-1] - x.shape[-1]
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wider)))


class PyramidNet(nn.Module):
    """PyramidNet-`depth` for small images; returns logits [B, K].

    In training, examples whose `mask` [B] is False are left out of the batch
    statistics, and `rngs={"dropout": key}` is required.

    Attributes:
      num_classes: K.
      depth: 9n + 2 layers.
      alpha: channels that are added from the first bottleneck to the last (equation 2).
      keep: probability that ShakeDrop leaves the last block unchanged (P_L); it falls
        linearly from 1 at the first block.
      dtype: of the activations.
    """

    num_classes: int
    depth: int
    alpha: int
    keep: float = 0.5
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
        count = (self.depth - 2) // 9
        for number in range(3 * count):
            stage, block = divmod(number, count)
            done = (number + 1) / (3 * count)
            x = Bottleneck(
                round(16 + self.alpha * done),
                stride=2 if stage > 0 and block == 0 else 1,
                keep=1 - (1 - self.keep) * done,
                name=f"layer{stage + 1}_{block}",
            )(x, layers)
        x = nn.relu(layers.norm(x, name="bn_final"))
        return head(global_pool(x), self.num_classes)


PyramidNet272 = functools.partial(PyramidNet, depth=272, alpha=200)
