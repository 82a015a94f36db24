"""CIFAR-10: 50,000 training images of ten classes at 32 pixels.

    python -m mvc_jax.train --config=configs/cifar10.py --workdir=runs/cifar10

TFDS must have prepared it once; where it has not, the message has the command.
`--config=configs/cifar10.py:per_class=50` takes 50 training images of each class.

Supplement: fine-tuning with Adam, learning rate 1e-4, batches of 50; classifiers from
scratch after AutoAugment's recipe (arXiv 1805.09501), of which this has the network's
input size and no more yet. Ours: Stable Diffusion at 256 pixels, since 32 are fewer
than its autoencoder can work with and 512 cost four times as much.
Hardware, wall time and numbers to expect: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("per_class", "preset"))
    config = common.get_config()
    config.data.source = "tfds:cifar10"
    config.data.size = 256
    config.data.per_class = int(given.get("per_class", 0))
    config.data.class_type = "object"

    config.base.path = common.STABLE_DIFFUSION
    config.classify.model = "resnet20"
    config.classify.size = 32
    config.report.title = "Mixing Visual Concepts: CIFAR-10"
    return common.apply_preset(config, given)
