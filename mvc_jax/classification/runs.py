"""Runs by name: `<regime>[:<set>][+<policy>][+<mix>]`, e.g. `combined:unmixed+affine`.

A part beside the stages: `classify` trains them, `evaluate` puts them into words.
"""

import dataclasses

from mvc_jax import augment
from mvc_jax.classification.regimes import REGIMES
from mvc_jax.errors import require

MIXES = ("mixup", "cutmix")
_WORDS = {
    "real": "real only",
    "combined": "real + synthetic",
    "two_phase": "two-phase",
    "probabilistic": "probabilistic",
    "synthetic_only": "synthetic only",
    "replace_same_source": "replaced by the same source's",
    "replace_same_class": "replaced by the same class's",
    "replace_any": "replaced by any",
    "unmixed": "captions unmixed (control)",
    "pretrained": "base not fine-tuned (control)",
    "flip": "flips",
    "flip_crop": "flips and crops",
    "affine": "affine augmentation",
    "cutout": "flips, crops and Cutout",
    "autoaugment_cifar10": "AutoAugment (CIFAR-10)",
    "autoaugment_imagenet": "AutoAugment (ImageNet)",
    "autoaugment_svhn": "AutoAugment (SVHN)",
    "fast_autoaugment_cifar10": "Fast AutoAugment (CIFAR-10)",
    "fast_autoaugment_cifar100": "Fast AutoAugment (CIFAR-100)",
    "randaugment": "RandAugment",
    "trivialaugment": "TrivialAugment",
    "mixup": "MixUp",
    "cutmix": "CutMix",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the table: how real and synthetic images meet, and what bends them.

    Attributes:
      name: as it was written.
      regime: of `regimes.REGIMES`.
      set: of synthetic images; "" for `real`.
      policy: of each image, of `augment.names()`.
      mix: of a batch, of `MIXES`; "" for none.
    """

    name: str
    regime: str
    set: str
    policy: str
    mix: str

    @property
    def slug(self) -> str:
        """Its name as a file's name and a TensorBoard tag."""
        return self.name.replace(":", "-").replace("+", "_")

    @property
    def title(self) -> str:
        """What a reader would call it: "Real + synthetic + RandAugment"."""
        words = _WORDS[self.regime]
        if self.set not in ("", "mixed"):
            words += f", {_WORDS.get(self.set, self.set.replace('_', ' '))}"
        for name in (self.policy, self.mix):
            if name not in ("none", ""):
                words += f" + {_WORDS.get(name, name)}"
        return words[0].upper() + words[1:]


def parse(name: str) -> Run:
    """`"two_phase:unmixed+affine"` -> its parts; the set defaults to `mixed`.

    What stands behind a `+` may come in any order.

    Raises:
      UserError: a part is unknown, or there are two of a kind.
    """
    head, *bends = name.split("+")
    regime, colon, set_ = head.partition(":")
    policies = [bend for bend in bends if bend not in MIXES]
    mixes = [bend for bend in bends if bend in MIXES]
    good = regime in REGIMES and bool(colon) == bool(set_)
    good = good and not (regime == "real" and set_)
    good = good and all(policy in augment.names() for policy in policies)
    require(
        good and len(policies) <= 1 and len(mixes) <= 1,
        "config.classify.runs",
        wanted="<regime>[:<set>][+<policy>][+<mix>] with a regime of "
        f"{', '.join(REGIMES)} (real takes no set), at most one policy of "
        f"{', '.join(augment.names())} and at most one mix of {', '.join(MIXES)}",
        got=repr(name),
        fix="Mend this run's name.",
    )
    set_ = "" if regime == "real" else set_ or "mixed"
    return Run(name, regime, set_, *(policies or ["none"]), *(mixes or [""]))
