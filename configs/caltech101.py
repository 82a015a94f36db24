"""Caltech-101: objects in 101 classes and a background class, about 300 by 200 pixels.

    python -m mvc_jax.train --config=configs/caltech101.py --workdir=runs/caltech101

TFDS must have prepared it once; where it has not, the message has the command. Its
split: 30 training images of each class, all others are test.

Supplement: Adam, learning rate 1e-4, batches of 50. Ours: centre crops, so that nothing
is squeezed.
Hardware, wall time and numbers to expect: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("per_class", "preset"))
    config = common.get_config()
    config.data.source = "tfds:caltech101"
    config.data.size = 512
    config.data.resize = "crop"
    config.data.per_class = int(given.get("per_class", 0))

    config.base.path = common.STABLE_DIFFUSION
    config.classify.model = "resnet20"
    config.classify.size = 128
    config.classify.stem_stride = 2
    config.classify.learning_rate = 1e-4  # supplement
    config.report.title = "Mixing Visual Concepts: Caltech-101"
    return common.apply_preset(config, given)
