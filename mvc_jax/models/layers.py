"""The classifiers' layers: convolution, batch normalisation, pooling, head, dropout.

Activations have the network's `dtype`; batch statistics, pooled features and logits are
always fp32. Randomness is drawn per example: what happens to row i of a batch depends
on the key and on i, not on the batch size.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mvc_jax.models.convolution import convolve

# He et al., arXiv 1502.01852, equation 14; a depthwise kernel has one input channel.
_HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_HE_DEPTHWISE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Settings of one call of a network; its methods add layers to the calling module.

    Args:
      train: whether batch normalisation uses the batch's own statistics and updates the
        running ones, with momentum 0.9. The running variance is the biased one, as in
        Flax; PyTorch's is n / (n - 1) times as large.
      mask: [B], True for the examples that count in the statistics; None for all.
      dtype: of the activations.
      padding: "symmetric" (half the kernel on all sides, as in PyTorch) or "same" (as
        in TensorFlow, where an odd pixel of padding goes to the end).
      epsilon: of batch normalisation.
    """

    train: bool
    mask: Array | None
    dtype: Any
    padding: str = "symmetric"
    epsilon: float = 1e-5

    def conv(
        self,
        x: Float[Array, "B H W C"],
        features: int,
        size: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
        name: str,
    ) -> Float[Array, "B h w {features}"]:
        """A `size` x `size` convolution."""
        padding: Any = {"symmetric": size // 2, "same": "SAME"}[self.padding]
        layer = nn.Conv(
            features,
            (size, size),
            (stride, stride),
            padding=padding,
            feature_group_count=features if depthwise else 1,
            use_bias=bias,
            kernel_init=_HE_DEPTHWISE if depthwise else _HE,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name=name,
        )
        return layer(x)

    def norm(self, x: Float[Array, "B H W C"], *, name: str) -> Array:
        """Batch normalisation over the examples of `mask`."""
        layer = nn.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=name,
        )
        mask = self.mask
        return layer(x, mask=None if mask is None else mask[:, None, None, None])


def global_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
    """Global average pooling: the mean of each channel, in fp32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def head(x: Float[Array, "B C"], classes: int, name: str = "fc") -> Array:
    """The last layer: fp32 logits [B, classes]."""
    return nn.Dense(classes, dtype=jnp.float32, name=name)(x)


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """Draws uniform numbers in [0, 1); row i depends only on (key, i)."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)


def drop(x: Array, shape: tuple[int, ...], rate: float, key: Key[Array, ""]) -> Array:
    """Dropout: zeroes with probability `rate` and rescales the rest by 1 / (1 - rate).

    There is one draw per entry of `shape`, which broadcasts to `x`: `x.shape` is
    dropout, (B, 1, 1, 1) is drop path (stochastic depth, arXiv 1603.09382).
    """
    keep = jnp.floor(uniform(key, shape) + (1 - rate))
    return x * (keep / (1 - rate)).astype(x.dtype)


def shake(x: Array, forward: Array, backward: Array) -> Array:
    """Returns `forward * x`; its gradient is multiplied by `backward` instead."""
    forward, backward = (factor.astype(x.dtype) for factor in (forward, backward))
    return backward * x + jax.lax.stop_gradient((forward - backward) * x)
