"""Tiny ImageNet: 100,000 training images of 200 classes at 64 pixels.

    python -m mvc_jax.train --config=configs/tiny_imagenet.py --workdir=runs/tiny

reads `data/tiny-imagenet-200`; `--config=configs/tiny_imagenet.py:path=DIR` reads DIR.
The folder is the unpacked archive: `train/<wnid>/images`, `val/val_annotations.txt`,
and `words.txt` with the names of the classes. The labelled validation images are the
test split; the archive's own test images have no labels.

The supplement has no settings for it; classifiers and runs are those of CIFAR-10, at 64
pixels. Every real image, test images included, is resized from 64 pixels to 256
(Lanczos) and back to the classifier's 64 (area), with a PSNR of 38.7 dB, measured on
crops of scikit-learn's two photographs that were reduced to this size.
Hardware, wall time and expected numbers: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import cifar10, common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(
        argument, known=("path", "per_class", "preset", "pretrain")
    )
    config = cifar10.get_config()
    config.data.source = f"folder:{given.get('path', 'data/tiny-imagenet-200')}"
    config.data.per_class = common.whole_number(given, "per_class", 0)
    config.data.class_type = ""

    config.classify.size = 64
    config.report.title = "Mixing Visual Concepts: Tiny ImageNet"
    return common.apply_preset(config, given)
