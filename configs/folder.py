"""Your own images: a folder, whatever its layout, to a report.

    python -m mvc_jax.train --config=configs/folder.py:path=/data/parts \
      --workdir=runs/parts --config.stages=caption

looks at the images first: classes, counts, bad files, a contact sheet. The whole run:

    python -m mvc_jax.train --config=configs/folder.py:path=/data/parts \
      --workdir=runs/parts --config.caption.captioner=blip2 \
      --config.data.class_type=part

Captions by template are the same for a whole class, so that mixing them does nothing:
they are for the first look. docs/your-own-images.md goes through it step by step.
Hardware, wall time and numbers to expect: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    """`argument`: `path=FOLDER`, if you like with `,class_type=WORDS`, `,size=PIXELS`
    or `,preset=fast`.

    Raises:
      UserError: it has no path, or something else.
    """
    given = common.parse_argument(
        argument, needed=("path",), known=("path", "class_type", "size", "preset")
    )
    config = common.get_config()
    config.data.source = f"folder:{given['path']}"
    config.data.class_type = given.get("class_type", "")
    config.data.size = int(given.get("size", 512))
    config.caption.captioner = "template"

    config.base.path = common.STABLE_DIFFUSION
    config.classify.model = "resnet20"
    config.classify.size = 128
    config.classify.stem_stride = 2
    config.report.title = "Mixing Visual Concepts: your own images"
    return common.apply_preset(config, given)
