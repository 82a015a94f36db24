"""Where diffusers' Flax transformer blocks depart from PyTorch's, mended in place.

Nothing in the library is patched: `nn.intercept_methods` swaps two calls while a
module runs under `exact()`.
"""

import contextlib

import flax.linen as nn
import jax.numpy as jnp
from diffusers.models.attention_flax import FlaxGEGLU, FlaxTransformer2DModel


def exact() -> contextlib.AbstractContextManager:
    """Within it, GEGLU's GELU is the exact one and the spatial norm's epsilon 1e-6.

    The library's Flax classes use the tanh approximation and 1e-5, unlike the PyTorch
    classes that trained every public checkpoint.
    """
    return nn.intercept_methods(_mend)


def _mend(next_call, args, kwargs, context):
    module = context.module
    if context.method_name == "__call__":
        if isinstance(module, FlaxGEGLU):
            hidden, gate = jnp.split(module.proj(args[0]), 2, axis=-1)
            return hidden * nn.gelu(gate, approximate=False)
        if isinstance(module, nn.GroupNorm) and isinstance(
            module.parent, FlaxTransformer2DModel
        ):
            object.__setattr__(module, "epsilon", 1e-6)
    return next_call(*args, **kwargs)
