"""Caltech-101: objects of 101 classes and a background class, about 300 by 200 pixels.

    python -m mvc_jax.train --config=configs/caltech101.py --workdir=runs/caltech101

TFDS must prepare the dataset once; the error message has the command. Its split: 30
training images per class, all others are test.

Supplement: Adam with its defaults, learning rate 1e-4, batches of 50. Ours: centre
crops, to keep proportions; ResNet-50 at 224 pixels, 100 epochs, from scratch.

`--config.stages=caption --config.caption.captioner=template` on a copy as a folder,
9,143 images of at most 160 pixels, by `--config.data.source=folder:...`: 258 s on two
busy CPU cores. A folder has no split, so a fifth is test: 7,314 training and 1,829
test images, of which 10 are copies of each other; 3 pictures of `Faces_easy` are also
in `Faces`. In that copy, the images of `BACKGROUND_Google` and of the first classes by
alphabet (accordion to ant) are edge maps, as the contact sheet shows: look at it
before anything is trained. All else: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("per_class", "preset", "pretrain"))
    config = common.get_config()
    config.data.source = "tfds:caltech101"
    config.data.size = 512
    config.data.resize = "crop"
    config.data.per_class = common.whole_number(given, "per_class", 0)

    config.base.path = common.STABLE_DIFFUSION
    config.classify.model = "resnet50"
    config.classify.size = 224
    config.classify.epochs = 100.0
    config.classify.batch_size = 50  # supplement
    config.classify.learning_rate = 1e-4  # supplement
    config.classify.schedule = "constant"
    config.classify.weight_decay = 0.0  # as in Adam's defaults
    config.classify.runs = (
        "real",
        "real+flip_crop",
        "real+autoaugment_imagenet",
        "combined+flip_crop",
        "two_phase+flip_crop",
        "probabilistic+flip_crop",
        "probabilistic:real+flip_crop",
        "combined:unmixed+flip_crop",
    )
    config.report.title = "Mixing Visual Concepts: Caltech-101"
    return common.apply_preset(config, given)
