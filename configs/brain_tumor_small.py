"""Brain Tumor MRI at 64 pixels: a few scans a class, and a base of two cores.

    mvc-jax repeat --seeds=0,1,2 --workdir=runs/mri_25 \
      --config=configs/brain_tumor_small.py:path=data/brain-tumor-mri,per_class=25

A small base is trained once for all splits, on 3,200 other scans of the training part,
then fine-tuned on 25 scans a class (or `per_class=100`), which are of each split; scans
that are also in test are in neither. In these two, the base is one that does not know
scans, and the classifier starts from ImageNet's weights:

    mvc-jax repeat --seeds=0,1,2 --workdir=runs/mri_caltech --config=\
    configs/brain_tumor_small.py:path=data/brain-tumor-mri,base=data/caltech101
    mvc-jax repeat --seeds=0,1,2 --workdir=runs/mri_imagenet --from=runs/mri_25 \
      --config=configs/brain_tumor_small.py:path=data/brain-tumor-mri,weights=\
    efficientnet_lite0

`base` is a folder of images with a folder for each class, `weights` those of
EfficientNet-Lite0. The pool stays reserved where the base is from elsewhere, so that
training and test scans are the same. For time, DA-Fusion and Diff-Mix are left out
there, and GIF-SD everywhere. `pretrain` warns about the base of Caltech-101. Equal
optimiser steps; settings fixed in advance.

With 25 scans a class, three splits (2026-11-30, two cores, 34 minutes for the base and
35 a split): flips and crops 68.2 %, combined 72.2, probabilistic 73.6, with as many
real images added 68.1; with 1,600 steps in place of 400 70.0, 74.3, 73.7 and 68.6.
With the base of Caltech-101 (34 minutes, and 24 a split): flips and crops 69.0,
combined 62.6, without fine-tuning 60.1, probabilistic 65.9. With ImageNet's classifier
(about 40 minutes a split on one core): flips and crops 73.2, combined 74.9,
probabilistic 75.0, with as many real images added 74.0. With 100 scans a class (about
30 minutes a split on one core, five rows): flips and crops 76.7, combined 74.7,
probabilistic 78.4, with as many real images added 78.5; with 1,600 steps both flips and
crops and combined 80.3. `docs/results.md` has all.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common, comparison, presets


def get_config(argument: str = "") -> ConfigDict:
    known = ("path", "per_class", "base", "weights", "preset")
    given = common.parse_argument(argument, known=known)
    config = common.get_config()
    config.data.source = f"folder:{given.get('path', 'data/brain-tumor-mri')}"
    config.data.resize = "pad"
    config.data.pool = 3200
    config.data.per_class = common.whole_number(given, "per_class", 25, minimum=1)
    config.data.duplicates = "remove"
    config.data.class_type = "brain MRI"
    config.caption.attributes = "scan"
    config.pretrain.seed = 0  # one base for all splits
    config.pretrain.context_length = 48  # enough for every prompt
    presets.small64(config)
    if "base" in given:
        config.pretrain.source = f"folder:{given['base']}"
        config.pretrain.pool.attributes = "photo"
        config.pretrain.pool.class_type = "object"
        config.pretrain.pool.duplicates = "remove"

    config.encode.batch_size = 50
    config.pairs.rounds = 4
    config.finetune.steps = 600
    config.finetune.schedule = "cosine"
    comparison.draw_with_few_steps(config)
    sets = comparison.SETS[: 4 if "base" in given else 6]
    rows = "fewest" if "weights" in given else "few"
    comparison.compare(config, "flip_crop", rows=rows, sets=sets)

    config.classify.seeds = 1
    config.classify.steps = 400
    config.classify.model = "resnet20"
    config.classify.size = 32
    if "weights" in given:
        config.classify.model = "efficientnet_lite0"
        config.classify.pretrained = given["weights"]
        config.classify.size = 0
    config.report.title = "Mixing Visual Concepts: a few scans of Brain Tumor MRI"
    return common.apply_preset(config, given)
