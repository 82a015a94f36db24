"""Every classifier by name.

The table is plain data, so that a config can be checked without JAX: a network's module
is imported when the network is made.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from mvc_jax.errors import UserError

# Values that keep a network's own default.
_DEFAULTS = {"width": 0, "stem": "", "stem_stride": 1}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network and the image size that it was published for.

    Attributes:
      module: the file of `models/` that defines it.
      constructor: its name there; called with `num_classes` and other fields it gives a
        Flax module.
      size: image size in pixels.
      downsampling: pixels per feature of the last feature map, without a ResNet's stem.
      stem: of a ResNet, "cifar" or "imagenet".
      options: fields of `config.classify` that the network takes.
    """

    module: str
    constructor: str
    size: int
    downsampling: int
    stem: str = ""
    options: tuple[str, ...] = ()

    def make(self, num_classes: int, **fields: Any) -> Any:
        """Returns the Flax module.

        `module.apply(variables, images, train, mask)` maps float images [B, H, W, 3] to
        fp32 logits [B, K]; training takes `mutable=["batch_stats"]`, and networks with
        dropout `rngs={"dropout": key}`.
        """
        module = importlib.import_module(f"mvc_jax.models.{self.module}")
        return getattr(module, self.constructor)(num_classes=num_classes, **fields)

    def min_size(self, stem: str = "", stem_stride: int = 1) -> int:
        """Smallest image side in pixels, which leaves one feature.

        Args:
          stem: of a ResNet; "" for its own.
          stem_stride: of the CIFAR stem.
        """
        strides = {"": 1, "cifar": stem_stride, "imagenet": 4}
        return self.downsampling * strides[stem or self.stem]


_RESNET_OPTIONS = ("width", "stem", "stem_stride")


def _small_resnet(constructor: str) -> Variant:
    return Variant("resnet", constructor, 32, 4, "cifar", _RESNET_OPTIONS)


def _resnet(constructor: str) -> Variant:
    return Variant("resnet", constructor, 224, 8, "imagenet", _RESNET_OPTIONS)


def _efficientnet(constructor: str, size: int) -> Variant:
    return Variant("efficientnet", constructor, size, 32, options=("width",))


VARIANTS = {
    "resnet8": _small_resnet("ResNet8"),
    "resnet20": _small_resnet("ResNet20"),
    "resnet56": _small_resnet("ResNet56"),
    "resnet18": _resnet("ResNet18"),
    "resnet34": _resnet("ResNet34"),
    "resnet50": _resnet("ResNet50"),
    "wide_resnet50_2": _resnet("WideResNet50"),
    "wrn16_4": Variant("wide_resnet", "WRN16x4", 32, 4),
    "wrn40_2": Variant("wide_resnet", "WRN40x2", 32, 4),
    "wrn28_10": Variant("wide_resnet", "WRN28x10", 32, 4),
    "efficientnet_b0": _efficientnet("B0", 224),
    "efficientnet_b1": _efficientnet("B1", 240),
    "efficientnet_b2": _efficientnet("B2", 260),
    "efficientnet_b3": _efficientnet("B3", 300),
    "efficientnet_lite0": _efficientnet("LITE0", 224),
    "shake_shake26_2x96d": Variant(
        "shake_shake", "ShakeShake26x96", 32, 4, options=("width",)
    ),
    "pyramidnet272": Variant("pyramidnet", "PyramidNet272", 32, 4),
}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks `width`, `stem` and `stem_stride` against a network, without making it.

    Raises:
      UserError: the network has no such field, or its stem has no such stride.
    """
    variant = VARIANTS[name]
    for field, value in options.items():
        if value != _DEFAULTS[field] and field not in variant.options:
            raise _unknown_field(name, field, value)
    _check_stem(
        name, options.get("stem", "") or variant.stem, options.get("stem_stride", 1)
    )


def make(name: str, *, num_classes: int, dtype: str = "auto", **fields: Any) -> Any:
    """Returns the network of a name, a Flax module.

    Args:
      name: a key of `VARIANTS`.
      num_classes: K.
      dtype: of activations, `float32` or `bfloat16`; "auto" is float32 on a CPU and
        bfloat16 on other devices, and starts JAX's backend.
      **fields: of the module; 0 and "" keep the network's own default.

    Raises:
      UserError: the network has no such field, or its stem has no such stride.
    """
    import jax.numpy as jnp

    from mvc_jax import devices

    given = {key: value for key, value in fields.items() if value}
    dtype = devices.activations_dtype(dtype)
    network = VARIANTS[name].make(num_classes, dtype=jnp.dtype(dtype))
    known = {field.name for field in dataclasses.fields(network)}
    for field, value in given.items():
        if field not in known:
            raise _unknown_field(name, field, value)
    network = network.clone(**given)
    _check_stem(name, getattr(network, "stem", ""), getattr(network, "stem_stride", 1))
    return network


def _unknown_field(name: str, field: str, value: Any) -> UserError:
    return UserError(
        f"config.classify.{field}",
        wanted=f"nothing: {name} has no {field}",
        got=f"{value}",
        fix=f"Set --config.classify.{field}={_DEFAULTS.get(field, '')}, or choose a "
        "ResNet.",
    )


def _check_stem(name: str, stem: str, stride: int) -> None:
    if stride != 1 and stem != "cifar":
        raise UserError(
            "config.classify.stem_stride",
            wanted=f"1: {name} has ImageNet's stem, whose stride is fixed",
            got=f"{stride}",
            fix="Set --config.classify.stem_stride=1, or --config.classify.stem=cifar.",
        )
