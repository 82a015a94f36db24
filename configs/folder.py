"""Your own images: from a folder, in any of the supported layouts, to a report.

    python -m mvc_jax.train --config=configs/folder.py:path=/data/parts \
      --workdir=runs/parts --config.stages=caption

summarises the images: classes, counts, bad files, a contact sheet. The whole run:

    python -m mvc_jax.train --config=configs/folder.py:path=/data/parts \
      --workdir=runs/parts --config.caption.captioner=blip2 \
      --config.data.class_type=part

Captions by template, the default here, are the same for all images of a class, so
mixing them has no effect: they are for the summary. docs/your-own-images.md explains
all steps.

    python -m mvc_jax.train --config=configs/folder.py:path=/data/parts,pool=2000 \
      --workdir=runs/parts

uses no Stable Diffusion: 2,000 of the training images train a small base, and are used
for nothing else. docs/without-stable-diffusion.md says when that is worth it.
Hardware, wall time and expected numbers: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The config for `path=FOLDER[,NAME=VALUE...]`.

    The names are `class_type`, `size` in pixels, `pool`, the number of images for a
    base of one's own, and `preset`.

    Raises:
      UserError: the argument has no path, or another form.
    """
    known = ("path", "class_type", "size", "pool", "preset", "pretrain")
    given = common.parse_argument(argument, known=known, needed=("path",))
    pool = common.whole_number(given, "pool", 0)
    config = common.get_config()
    config.data.source = f"folder:{given['path']}"
    config.data.class_type = given.get("class_type", "")
    side = 32 if pool else 512
    config.data.size = common.whole_number(given, "size", side, minimum=1)
    config.caption.captioner = "template"
    config.classify.model = "resnet20"
    if pool:
        _train_small_base(config, pool)
    else:
        config.base.path = common.STABLE_DIFFUSION
        config.classify.size = 128
        config.classify.stem_stride = 2
    config.report.title = "Mixing Visual Concepts: your own images"
    return common.apply_preset(config, given)


def _train_small_base(config: ConfigDict, pool: int) -> None:
    """The digits' settings for a base that is trained on `pool` images.

    Not theirs: longer prompts and more words, for captions of photographs.
    """
    config.data.pool = pool
    config.pretrain.context_length = 77
    config.pretrain.vocab_size = 4096
    config.finetune.steps = 300
    config.finetune.learning_rate = 2e-4
    config.finetune.schedule = "cosine"
    config.generate.steps = 12
    config.generate.text_scale = 2.0
