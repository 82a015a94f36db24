"""CIFAR-10: 50,000 training images of ten classes at 32 pixels.

    python -m mvc_jax.train --config=configs/cifar10.py --workdir=runs/cifar10

TFDS must prepare the dataset once; the error message has the command.
`--config=configs/cifar10.py:per_class=50` uses 50 training images per class.

Supplement: fine-tuning with Adam, learning rate 1e-4, batches of 50; classifiers from
scratch with AutoAugment's hyperparameters, which are (arXiv 1805.09501, section 4.1):
WRN-28-10, 200 epochs of SGD with Nesterov momentum, batches of 128, learning rate 0.1
with cosine decay, weight decay 5e-4, flips, crops, the policy and Cutout. Epochs count
real images, so every run takes the same number of steps. Ours: weight decay of kernels
only; Stable Diffusion at 256 pixels, since its autoencoder does not work at 32, and 512
cost four times as much.
Every real image, test images included, is resized from 32 pixels to 256 (Lanczos) and
back to the classifier's 32 (area), with a PSNR of 38.5 dB, measured on crops of
scikit-learn's two photographs that were reduced to this size.

`--config.stages=caption --config.caption.captioner=template` on a copy as JPEG in
Parquet files, by `--config.data.source=parquet:...`: 579 s on two busy CPU cores, 125
images/s; 50,000 training and 10,000 test images, no bad images, no duplicates and no
picture with two labels among them. All else: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("per_class", "preset", "pretrain"))
    config = common.get_config()
    config.data.source = "tfds:cifar10"
    config.data.size = 256
    config.data.per_class = common.whole_number(given, "per_class", 0)
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
        "probabilistic:real+autoaugment_cifar10",
        "combined:unmixed+autoaugment_cifar10",
    )
    config.report.title = "Mixing Visual Concepts: CIFAR-10"
    return common.apply_preset(config, given)
