"""Brain Tumor MRI: about 7,000 scans of three kinds of tumor and of healthy brains.

    python -m mvc_jax.train --config=configs/brain_tumor.py:path=data/brain-tumor-mri \
      --workdir=runs/brain_tumor

The folder has the layout of the published dataset: `Training/<class>/*` and
`Testing/<class>/*`. Many scans occur more than once, also across the two: the run lists
these duplicates and removes them from train.

`path=...,model=wrn50_2` or `model=efficientnet_b0` selects another classifier than
`resnet50`. `--config.classify.pretrained=timm/resnet50.tv_in1k`, or another checkpoint
of the network, starts it from ImageNet's weights.

Supplement: fine-tuning with Adam, learning rate 1e-4, batches of 50; ResNet-50 and
WRN-50-2 with Adam, 1e-3, batches of 50; EfficientNet-B0 with SGD, 0.02 and a multi-step
schedule, gamma 0.1. Ours: 224 pixels, 50 epochs, milestones at a half and three
quarters, flips and crops; from scratch, since the supplement does not mention weights.

`--config.stages=caption --config.caption.captioner=template` on a copy at 224 pixels
(5,708 training and 1,311 test scans): 266 s on two busy CPU cores, of which the images
take most. 686 training scans are also in test and are removed, 5,022 remain (glioma
1,321, meningioma 1,230, no tumor 1,021, pituitary 1,450); no bad images, no picture
with two labels. All else: not yet measured.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common

MODELS = {
    "resnet50": "resnet50",
    "wrn50_2": "wide_resnet50_2",
    "efficientnet_b0": "efficientnet_b0",
}


def get_config(argument: str = "") -> ConfigDict:
    known = ("path", "model", "per_class", "preset", "pretrain")
    given = common.parse_argument(argument, known=known)
    config = common.get_config()
    config.data.source = f"folder:{given.get('path', 'data/brain-tumor-mri')}"
    config.data.size = 512
    config.data.resize = "pad"  # scans are not all square; their background is black
    config.data.per_class = common.whole_number(given, "per_class", 0)
    config.data.duplicates = "remove"
    config.data.class_type = "brain MRI"

    config.caption.attributes = "scan"  # where the captioner is `attributes`
    config.base.path = common.STABLE_DIFFUSION
    model = common.choice(given, "model", tuple(MODELS), "resnet50")
    config.classify.model = MODELS[model]
    config.classify.size = 224
    config.classify.epochs = 50.0
    config.classify.batch_size = 50  # supplement
    config.classify.learning_rate = 1e-3  # supplement
    config.classify.schedule = "constant"
    config.classify.weight_decay = 0.0  # as in Adam's defaults
    if model == "efficientnet_b0":
        config.classify.optimizer = "sgd"  # supplement
        config.classify.learning_rate = 0.02
        config.classify.schedule = "multistep"
        config.classify.gamma = 0.1
    config.classify.runs = (
        "real",
        "real+flip_crop",
        "combined+flip_crop",
        "two_phase+flip_crop",
        "probabilistic+flip_crop",
        "probabilistic:real+flip_crop",
        "combined:unmixed+flip_crop",
    )
    config.report.title = "Mixing Visual Concepts: Brain Tumor MRI"
    return common.apply_preset(config, given)
