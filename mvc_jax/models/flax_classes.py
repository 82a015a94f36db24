"""diffusers' and transformers' Flax classes, imported without PyTorch or TensorFlow.

Both libraries import PyTorch, and transformers imports TensorFlow, wherever they are
installed: 15 seconds for classes that nothing here uses. (`USE_TORCH=0` would not be
enough: diffusers tries `import torch` whatever its settings are.) So neither can be
found while this module is imported, and both libraries remember that.

The rest of the package imports these classes from here only, so that nothing imports
the libraries before. Who needs their PyTorch classes in the same process, as tests that
compare both, sets `USE_TORCH=1` before this module is imported.
"""

import logging
import os

from mvc_jax.imports import hidden

__all__ = [
    "ACT2FN",
    "FlaxAttention",
    "FlaxAutoencoderKL",
    "FlaxCLIPTextModelWithProjectionModule",
    "FlaxCLIPTextModule",
    "FlaxCLIPVisionTransformer",
    "FlaxControlNetModel",
    "FlaxDinov2Module",
    "FlaxGEGLU",
    "FlaxTransformer2DModel",
    "FlaxUNet2DConditionModel",
    "transformers",
]

# The pinned releases log these lines with every Flax class, by these loggers.
_DEPRECATIONS = (
    "Flax classes are deprecated and will be removed in Diffusers v0.40.0. We "
    "recommend migrating to PyTorch classes or pinning your version of Diffusers.",
    "TensorFlow and JAX classes are deprecated and will be removed in Transformers v5. "
    "We recommend migrating to PyTorch classes or pinning your version of "
    "Transformers.",
)
_LOGGERS = (
    "diffusers.models.attention_flax",
    "diffusers.models.controlnets.controlnet_flax",
    "diffusers.models.embeddings_flax",
    "diffusers.models.modeling_flax_utils",
    "diffusers.models.resnet_flax",
    "diffusers.models.unets.unet_2d_blocks_flax",
    "diffusers.models.unets.unet_2d_condition_flax",
    "diffusers.models.vae_flax",
    "transformers.modeling_flax_utils",
)
for _logger in _LOGGERS:  # before the import below, which logs some of them
    logging.getLogger(_logger).addFilter(
        lambda record: record.getMessage() not in _DEPRECATIONS
    )

_TORCH = ("torch", "torchvision")
if os.environ.get("USE_TORCH", "").upper() in ("1", "ON", "YES", "TRUE"):
    _TORCH = ()
# The tokenizers' threads do not survive a fork, of which they would warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with hidden("tensorflow", *_TORCH):
    import transformers
    from diffusers.models.attention_flax import (
        FlaxAttention,
        FlaxGEGLU,
        FlaxTransformer2DModel,
    )
    from diffusers.models.controlnets.controlnet_flax import FlaxControlNetModel
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
    from diffusers.models.vae_flax import FlaxAutoencoderKL
    from transformers.modeling_flax_utils import ACT2FN
    from transformers.models.clip.modeling_flax_clip import (
        FlaxCLIPTextModelWithProjectionModule,
        FlaxCLIPTextModule,
        FlaxCLIPVisionTransformer,
    )
    from transformers.models.dinov2.modeling_flax_dinov2 import FlaxDinov2Module
