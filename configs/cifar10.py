"""CIFAR-10: 50,000 training images of ten classes at 32 pixels.

    python -m mvc_jax.train --config=configs/cifar10.py --workdir=runs/cifar10

TFDS must have prepared it once; where it has not, the message has the command.
`--config=configs/cifar10.py:per_class=50` takes 50 training images of each class.

Supplement: fine-tuning with Adam, learning rate 1e-4, batches of 50; classifiers from
scratch after AutoAugment's recipe. That is (arXiv 1805.09501, section 4.1): WRN-28-10,
200 epochs of SGD with Nesterov's momentum, batches of 128, learning rate 0.1 by a
cosine, weight decay 5e-4, flips, crops, the policy and Cutout. Epochs are of the real
images: every run takes as many steps. Ours: weight decay of kernels alone; Stable
Diffusion at 256 pixels, since 32 are fewer than its autoencoder can work with and 512
cost four times as much.
Every real image, test ones too, goes from 32 pixels to 256 by Lanczos and back to the
classifier's 32 by area: a PSNR of 38.5 dB, measured on scikit-learn's two photographs,
cut and made as small.
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
    config.classify.model = "wrn28_10"
    config.classify.size = 32
    config.classify.epochs = 200.0
    config.classify.batch_size = 128
    config.classify.optimizer = "sgd"
    config.classify.learning_rate = 0.1
    config.classify.weight_decay = 5e-4
    config.classify.runs = (
        "real+flip_crop",
        "real+autoaugment_cifar10",
        "real+randaugment",
        "real+fast_autoaugment_cifar10",
        "combined+autoaugment_cifar10",
        "two_phase+autoaugment_cifar10",
        "probabilistic+autoaugment_cifar10",
        "combined:unmixed+autoaugment_cifar10",
    )
    config.report.title = "Mixing Visual Concepts: CIFAR-10"
    return common.apply_preset(config, given)
