"""CIFAR-100: 50,000 training images of a hundred classes at 32 pixels.

    python -m mvc_jax.train --config=configs/cifar100.py --workdir=runs/cifar100

`--config=configs/cifar100.py:per_class=50` takes 50 training images of each class.
Everything else, recipes too, is CIFAR-10's, and so is what the way to 256 pixels
and back costs, a PSNR of about 38.5 dB.
Hardware, wall time and numbers to expect: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import cifar10


def get_config(argument: str = "") -> ConfigDict:
    config = cifar10.get_config(argument)
    config.data.source = "tfds:cifar100"
    config.classify.runs = tuple(  # AutoAugment's policy is CIFAR-10's for both
        run.replace("fast_autoaugment_cifar10", "fast_autoaugment_cifar100")
        for run in config.classify.runs
    )
    config.report.title = "Mixing Visual Concepts: CIFAR-100"
    return config
