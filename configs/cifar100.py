"""CIFAR-100: 50,000 training images of a hundred classes at 32 pixels.

    python -m mvc_jax.train --config=configs/cifar100.py --workdir=runs/cifar100

`--config=configs/cifar100.py:per_class=50` uses 50 training images per class.
All else is as for CIFAR-10, hyperparameters and the PSNR of about 38.5 dB after
resizing to 256 pixels and back included.
Hardware, wall time and expected numbers: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import cifar10


def get_config(argument: str = "") -> ConfigDict:
    config = cifar10.get_config(argument)
    config.data.source = "tfds:cifar100"
    config.classify.runs = tuple(  # AutoAugment uses CIFAR-10's policy for both
        run.replace("fast_autoaugment_cifar10", "fast_autoaugment_cifar100")
        for run in config.classify.runs
    )
    config.report.title = "Mixing Visual Concepts: CIFAR-100"
    return config
