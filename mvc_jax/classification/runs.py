"""Runs by name: `<regime>[:<set>][+<policy>][+<mix>]`, e.g. `combined:unmixed+affine`.

`probabilistic:real` adds real images where `probabilistic` adds synthetic ones: what of
its effect comes from larger batches.

`classify` trains them, `evaluate` names them in its tables.
"""

import dataclasses
from collections.abc import Iterable

from mvc_jax import augment
from mvc_jax.classification.regimes import REGIMES
from mvc_jax.errors import UserError

MIXES = ("mixup", "cutmix")
_TITLES = {
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
    "real_guidance": "Real Guidance (rival)",
    "gif_sd": "GIF-SD (rival)",
    "da_fusion": "DA-Fusion (rival)",
    "diff_mix": "Diff-Mix (rival)",
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
    """One row of the results: how classifiers are trained.

    Attributes:
      name: as written in the config.
      regime: how real and synthetic images meet, one of `regimes.REGIMES`.
      set: name of the synthetic set; "" for `real` and `probabilistic:real`.
      policy: augmentation policy of each image, one of `augment.NAMES`.
      mix: augmentation of a whole batch, one of `MIXES`; "" for none.
    """

    name: str
    regime: str
    set: str
    policy: str
    mix: str

    @property
    def slug(self) -> str:
        """Its name as a file name and a TensorBoard tag."""
        return self.name.replace(":", "-").replace("+", "_")

    @property
    def title(self) -> str:
        """Its name in a table, e.g. "Real + synthetic + RandAugment"."""
        title = _TITLES[self.regime]
        if not self.set and self.regime != "real":
            title += ", real images added (control)"
        if self.set not in ("", "mixed"):
            title += f", {_TITLES.get(self.set, self.set.replace('_', ' '))}"
        for name in (self.policy, self.mix):
            if name not in ("none", ""):
                title += f" + {_TITLES.get(name, name)}"
        return title[0].upper() + title[1:]


def unused_fields(run: Run) -> set[str]:
    """Fields of `config.classify` on which the results of a run do not depend."""
    used = {
        "probability": run.regime == "probabilistic"
        or run.regime.startswith("replace"),
        "phase_two": run.regime == "two_phase",
        "phase_two_rate": run.regime == "two_phase",
        "ratio": bool(run.set),
        "alpha": bool(run.mix),
        "randaugment_count": run.policy == "randaugment",
        "randaugment_magnitude": run.policy == "randaugment",
    }
    return {name for name, is_used in used.items() if not is_used}


def drawn_once(runs: Iterable[Run]) -> str:
    """What all results of a workdir's runs share, in words."""
    return "one split and one generator" if any(r.set for r in runs) else "one split"


def parse(name: str) -> Run:
    """Splits a name: `"two_phase:unmixed+affine"`; the set defaults to `mixed`.

    Policy and mix may come in either order.

    Raises:
      UserError: a part is unknown, or there are two policies or two mixes.
    """
    head, *augmentations = name.split("+")
    regime, colon, set_ = head.partition(":")
    policies = [part for part in augmentations if part not in MIXES]
    mixes = [part for part in augmentations if part in MIXES]
    if (
        regime not in REGIMES
        or bool(colon) != bool(set_)
        or (regime == "real" and set_)
        or (set_ == "real" and regime != "probabilistic")
        or any(policy not in augment.NAMES for policy in policies)
        or len(policies) > 1
        or len(mixes) > 1
    ):
        raise UserError(
            "config.classify.runs",
            wanted="<regime>[:<set>][+<policy>][+<mix>] with a regime of "
            f"{', '.join(REGIMES)} (real takes no set, and of the others only "
            "probabilistic takes real images as one), at most one policy of "
            f"{', '.join(augment.NAMES)} and at most one mix of {', '.join(MIXES)}",
            got=repr(name),
            fix="Fix this run's name.",
        )
    set_ = "" if "real" in (regime, set_) else set_ or "mixed"
    policy = policies[0] if policies else "none"
    mix = mixes[0] if mixes else ""
    return Run(name, regime, set_, policy, mix)
