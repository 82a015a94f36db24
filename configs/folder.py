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
Hardware, wall time and expected numbers: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    """The config for `path=FOLDER[,class_type=WORDS][,size=PIXELS][,preset=fast]`.

    Raises:
      UserError: the argument has no path, or another form.
    """
    known = ("path", "class_type", "size", "preset")
    given = common.parse_argument(argument, known=known, needed=("path",))
    config = common.get_config()
    config.data.source = f"folder:{given['path']}"
    config.data.class_type = given.get("class_type", "")
    config.data.size = common.whole_number(given, "size", 512, minimum=1)
    config.caption.captioner = "template"

    config.base.path = common.STABLE_DIFFUSION
    config.classify.model = "resnet20"
    config.classify.size = 128
    config.classify.stem_stride = 2
    config.report.title = "Mixing Visual Concepts: your own images"
    return common.apply_preset(config, given)
