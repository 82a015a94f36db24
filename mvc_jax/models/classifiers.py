"""Every classifier by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvc_jax.errors import require
from mvc_jax.models import efficientnet, pyramidnet, resnet, shake_shake, wide_resnet

_NOTHING = {"width": 0, "stem": "", "stem_stride": 1}  # what leaves a field as it is


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network and the image size that it was published for.

    Attributes:
      make: `make(num_classes=K, **fields)` -> a module. Its `stride` is the least image
        size. Called as `module.apply(variables, images, train, mask)` with float images
        [B, H, W, 3] it gives fp32 logits [B, K]; in training with
        `mutable=["batch_stats"]`, and `rngs={"dropout": key}` for those that draw.
      size: pixels.
    """

    make: Callable[..., nn.Module]
    size: int


VARIANTS = {
    "resnet8": Variant(resnet.ResNet8, 32),
    "resnet20": Variant(resnet.ResNet20, 32),
    "resnet56": Variant(resnet.ResNet56, 32),
    "resnet18": Variant(resnet.ResNet18, 224),
    "resnet34": Variant(resnet.ResNet34, 224),
    "resnet50": Variant(resnet.ResNet50, 224),
    "wide_resnet50_2": Variant(resnet.WideResNet50, 224),
    "wrn16_4": Variant(wide_resnet.WRN16x4, 32),
    "wrn40_2": Variant(wide_resnet.WRN40x2, 32),
    "wrn28_10": Variant(wide_resnet.WRN28x10, 32),
    "efficientnet_b0": Variant(efficientnet.B0, 224),
    "efficientnet_b1": Variant(efficientnet.B1, 240),
    "efficientnet_b2": Variant(efficientnet.B2, 260),
    "efficientnet_b3": Variant(efficientnet.B3, 300),
    "shake_shake26_2x96d": Variant(shake_shake.ShakeShake26x96, 32),
    "pyramidnet272": Variant(pyramidnet.PyramidNet272, 32),
}


def make(name: str, *, num_classes: int, dtype: str = "auto", **fields: Any) -> Any:
    """The network of a name.

    Args:
      name: a key of `VARIANTS`.
      num_classes: K.
      dtype: of activations, `float32` or `bfloat16`; "auto": float32 on a CPU alone.
      **fields: of the module; empty ones are left as the network has them.

    Raises:
      UserError: the network has no such field, or its stem no such stride.
    """
    given = {key: value for key, value in fields.items() if value}
    known = {field.name for field in dataclasses.fields(VARIANTS[name].make.func)}
    for field in given:
        flag = f"--config.classify.{field}={_NOTHING.get(field, '')}"
        require(
            field in known,
            f"config.classify.{field}",
            wanted=f"nothing: {name} has no {field}",
            got=given[field],
            fix=f"Set {flag}, or choose a ResNet.",
        )
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    network = VARIANTS[name].make(
        num_classes=num_classes, dtype=jnp.dtype(dtype), **given
    )
    _check_stem(network, name)
    return network


def _check_stem(network: nn.Module, name: str) -> None:
    stride = getattr(network, "stem_stride", 1)
    require(
        stride == 1 or network.stem == "cifar",
        "config.classify.stem_stride",
        wanted=f"1, as {name} has ImageNet's stem, whose stride is its own",
        got=stride,
        fix="Set --config.classify.stem_stride=1, or --config.classify.stem=cifar.",
    )
