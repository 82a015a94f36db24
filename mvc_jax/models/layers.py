"""What the classifiers are made of: convolutions, batch normalisation, randomness.

Activations have the network's `dtype`; batch statistics, the pooled features, the head
and its logits are always fp32. Randomness is drawn example by example: what happens to
row i of a batch depends on the key and on i, never on how many rows there are.
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
    """How one call of a network computes; makes layers of the module that it is in.

    Args:
      train: whether batch normalisation takes the batch's own statistics, which then
        move the running ones by a tenth. The running variance is Flax's, over n values;
        PyTorch's is n / (n - 1) times that.
      mask: [B], the examples that count in these statistics; None: all.
      dtype: of the activations.
      padding: "symmetric" (half the kernel on all sides, as PyTorch pads) or "same"
        (TensorFlow's: what a stride needs, the odd pixel behind).
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
        """Batch normalisation over the examples that count."""
        layer = nn.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=name,
        )
        mask = self.mask
        return layer(x, mask=None if mask is None else mask[:, None, None, None])


def pooled(x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
    """The mean of each channel over the image, fp32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def head(x: Float[Array, "B C"], classes: int, name: str = "fc") -> Array:
    """The last layer: fp32 logits [B, classes]."""
    return nn.Dense(classes, dtype=jnp.float32, name=name)(x)


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """Draws in [0, 1); row i is a function of (key, i) alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)


def drop(x: Array, shape: tuple[int, ...], rate: float, key: Key[Array, ""]) -> Array:
    """Zeroes with probability `rate`, and keeps the expectation.

    One draw for each entry of `shape`, which broadcasts over `x`: `x.shape` is dropout,
    (B, 1, 1, 1) drop path (stochastic depth, arXiv 1603.09382).
    """
    keep = jnp.floor(uniform(key, shape) + (1 - rate))
    return x * (keep / (1 - rate)).astype(x.dtype)


def shake(x: Array, forward: Array, backward: Array) -> Array:
    """`forward * x`, whose gradient is `backward` times that of the output."""
    forward, backward = (factor.astype(x.dtype) for factor in (forward, backward))
    return backward * x + jax.lax.stop_gradient((forward - backward) * x)
