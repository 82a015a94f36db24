"""CIFAR-10 at its 32 pixels: a few images a class, and a base of its own.

    mvc-jax repeat --seeds=0,1,2 --workdir=runs/cifar10_25 \
      --config=configs/cifar10_small.py:path=data/cifar10,per_class=25

`path` is a folder of Parquet files, `train-*` and `test-*`, as `datasets` writes them.
A small base is trained once for all splits, on 40,000 images, then fine-tuned on 25 of
the others a class (or `per_class=100`). The steps are those of the preset `small32`; on
a GPU, three million examples are `--config.pretrain.unet.steps=23000
--config.pretrain.unet.batch_size=128`.

With 25 images a class, three splits (2026-11-30, one core, 63 minutes for the base and
47 a split): flips and crops 33.2 %, combined 36.0, probabilistic 37.8, with as many
real images added 33.5; with 1,600 steps in place of 400 35.2, 38.1, 37.7 and 35.3. With
100 images (about 43 minutes a split on one core, five rows): 44.2, 39.8, 45.5 and 45.9;
with 1,600 steps flips and crops 49.8, combined 48.5. `docs/results.md` has all.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common, comparison, presets


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("path", "per_class", "preset"))
    config = common.get_config()
    config.data.source = f"parquet:{given.get('path', 'data/cifar10')}"
    config.data.pool = 40_000
    config.data.per_class = common.whole_number(given, "per_class", 25, minimum=1)
    config.data.duplicates = "remove"
    config.data.class_type = "object"
    config.caption.attributes = "photo"
    config.pretrain.seed = 0  # one base for all splits
    config.pretrain.context_length = 48  # enough for every prompt
    presets.small32(config)

    config.encode.batch_size = 50
    config.encode.flip = True
    config.pairs.rounds = 4
    config.finetune.steps = 600
    config.finetune.schedule = "cosine"
    comparison.draw_with_few_steps(config)
    sets = ("mixed", "unmixed", "real_guidance")
    comparison.compare(config, "flip_crop", rows="fewest", sets=sets)

    config.classify.model = "resnet20"
    config.classify.seeds = 1
    config.classify.steps = 400
    config.report.title = "Mixing Visual Concepts: a few images of CIFAR-10"
    return common.apply_preset(config, given)
