"""Networks and their weights: plain fields in, arrays out.

Importing this package silences one line of the pinned diffusers, by its exact text: it
comes with every Flax module and says that the next release has none.
"""

import logging
import os

_DEPRECATED = (
    "Flax classes are deprecated and will be removed in Diffusers v0.40.0. We "
    "recommend migrating to PyTorch classes or pinning your version of Diffusers."
)
_SPEAKERS = (
    "models.attention_flax",
    "models.controlnets.controlnet_flax",
    "models.embeddings_flax",
    "models.modeling_flax_utils",
    "models.resnet_flax",
    "models.unets.unet_2d_blocks_flax",
    "models.unets.unet_2d_condition_flax",
    "models.vae_flax",
    "schedulers.scheduling_ddim_flax",
    "schedulers.scheduling_euler_discrete_flax",
)

for _speaker in _SPEAKERS:
    logging.getLogger(f"diffusers.{_speaker}").addFilter(
        lambda record: record.getMessage() != _DEPRECATED
    )
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it forks, and warns of it
