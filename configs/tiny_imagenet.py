"""Tiny ImageNet: 100,000 training images of 200 classes at 64 pixels.

    python -m mvc_jax.train --config=configs/tiny_imagenet.py --workdir=runs/tiny

in `data/tiny-imagenet-200`, or where `--config=configs/tiny_imagenet.py:path=...` says.
The folder as its archive unpacks: `train/<wnid>/images`, `val/val_annotations.txt`,
`words.txt`, from which the classes get their names. The labelled validation images are
the test part; the archive's own test images have no labels.

The supplement has no recipe for it; classifiers, runs too, are CIFAR-10's at 64 pixels.
Every real image, test ones too, goes from 64 pixels to 256 by Lanczos and back to the
classifier's 64 by area: a PSNR of 38.7 dB, measured on scikit-learn's two photographs,
cut and made as small.
Hardware, wall time and numbers to expect: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import cifar10, common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("path", "per_class", "preset"))
    config = cifar10.get_config()
    config.data.source = f"folder:{given.get('path', 'data/tiny-imagenet-200')}"
    config.data.per_class = int(given.get("per_class", 0))
    config.data.class_type = ""

    config.classify.size = 64
    config.report.title = "Mixing Visual Concepts: Tiny ImageNet"
    return common.apply_preset(config, given)
