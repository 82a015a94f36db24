"""Brain Tumor MRI: about 7,000 scans of three kinds of tumor and of none.

    python -m mvc_jax.train --config=configs/brain_tumor.py:path=data/brain-tumor-mri \
      --workdir=runs/brain_tumor

The folder as the dataset is handed out: `Training/<class>/*` and `Testing/<class>/*`.
It holds many scans more than once, also across the two: the run lists them, and takes
them out of train.

Supplement: fine-tuning with Adam, learning rate 1e-4, batches of 50; ResNet-50 and
WRN-50-2 with Adam, 1e-3, batches of 50; EfficientNet-B0 with SGD, 0.02 and steps. Of
these, only the optimiser is here yet: the network is a small ResNet.
Hardware, wall time and numbers to expect: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("path", "per_class", "preset"))
    config = common.get_config()
    config.data.source = f"folder:{given.get('path', 'data/brain-tumor-mri')}"
    config.data.size = 512
    config.data.resize = "pad"  # scans are not all square; the ground is black
    config.data.per_class = int(given.get("per_class", 0))
    config.data.duplicates = "remove"
    config.data.class_type = "brain MRI"

    config.base.path = common.STABLE_DIFFUSION
    config.classify.model = "resnet20"
    config.classify.size = 128
    config.classify.stem_stride = 2
    config.classify.learning_rate = 1e-3  # supplement
    config.classify.batch_size = 50  # supplement
    config.report.title = "Mixing Visual Concepts: Brain Tumor MRI"
    return common.apply_preset(config, given)
