"""What timm, torchvision and transformers call the tensors of a classifier.

Our modules have timm's names, which for ResNets are torchvision's; the others follow
from these. A network is told by its names and shapes: `structure`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mvc_jax.models import efficientnet, resnet

LIBRARIES = ("timm", "torchvision", "transformers")

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def timm_name(path: Sequence[str]) -> str:
    """Of a leaf of our variables.

    `("params", "layer1_0", "conv1", "kernel")` -> `"layer1.0.conv1.weight"`.
    """
    _, *modules, leaf = path
    modules = [re.sub(r"_(\d+)", r".\1", module) for module in modules]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a library names the tensors of a family of networks.

    Attributes:
      library: one of `LIBRARIES`.
      family: "ResNet" or "EfficientNet".
      rename: timm's name without its last part -> the library's; given the number of
        blocks in each stage besides.
      prefix: of every name but the head's, left out where the head is.
    """

    library: str
    family: str
    rename: Callable[[str, Sequence[int]], str]
    prefix: str = ""

    @property
    def head(self) -> str:
        """The module of the last layer."""
        timm = "fc" if self.family == "ResNet" else "classifier"
        return self.rename(timm, ())

    def name(self, timm: str, depths: Sequence[int] = ()) -> str:
        module, _, leaf = timm.rpartition(".")
        return f"{self.rename(module, depths)}.{leaf}"


def _same(module: str, depths: Sequence[int]) -> str:
    return module


def _transformers_resnet(module: str, depths: Sequence[int]) -> str:
    if module == "fc":
        return "classifier.1"
    if module in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{_part(module)}"
    stage, block, *rest = module.split(".")
    place = f"resnet.encoder.stages.{int(stage[-1]) - 1}.layers.{block}"
    if rest[0] == "downsample":
        return f"{place}.shortcut.{('convolution', 'normalization')[int(rest[1])]}"
    return f"{place}.layer.{int(rest[0][-1]) - 1}.{_part(rest[0])}"


def _part(module: str) -> str:
    return "convolution" if module.startswith("conv") else "normalization"


# By timm's names in a block that expands, and in one that does not.
_EXPANDING = ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand")
_EXPANDING += ("conv_pwl", "bn3")
_PLAIN = ("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2")

_TORCHVISION_BLOCK = {
    len(_EXPANDING): ("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"),
    len(_PLAIN): ("0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"),
}
_TORCHVISION_ENDS = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}
_TRANSFORMERS_BLOCK = ("expansion.expand_conv", "expansion.expand_bn")
_TRANSFORMERS_BLOCK += (
    "depthwise_conv.depthwise_conv",
    "depthwise_conv.depthwise_norm",
)
_TRANSFORMERS_BLOCK += ("squeeze_excite.reduce", "squeeze_excite.expand")
_TRANSFORMERS_BLOCK += ("projection.project_conv", "projection.project_bn")
_TRANSFORMERS_ENDS = {
    "conv_stem": "efficientnet.embeddings.convolution",
    "bn1": "efficientnet.embeddings.batchnorm",
    "conv_head": "efficientnet.encoder.top_conv",
    "bn2": "efficientnet.encoder.top_bn",
    "classifier": "classifier",
}


def _torchvision_efficientnet(module: str, depths: Sequence[int]) -> str:
    if module in _TORCHVISION_ENDS:
        return _TORCHVISION_ENDS[module]
    stage, block, parts, inner = _in_block(module)
    part = _TORCHVISION_BLOCK[len(parts)][parts.index(inner)]
    return f"features.{stage + 1}.{block}.block.{part}"


def _transformers_efficientnet(module: str, depths: Sequence[int]) -> str:
    if module in _TRANSFORMERS_ENDS:
        return _TRANSFORMERS_ENDS[module]
    stage, block, parts, inner = _in_block(module)
    part = _TRANSFORMERS_BLOCK[-len(parts) :][parts.index(inner)]
    return f"efficientnet.encoder.blocks.{sum(depths[:stage]) + block}.{part}"


def _in_block(module: str) -> tuple[int, int, tuple[str, ...], str]:
    _, stage, block, inner = module.split(".", 3)
    return int(stage), int(block), _PLAIN if stage == "0" else _EXPANDING, inner


NAMINGS = (
    Naming("timm", "ResNet", _same),
    Naming("transformers", "ResNet", _transformers_resnet, "resnet."),
    Naming("timm", "EfficientNet", _same),
    Naming("torchvision", "EfficientNet", _torchvision_efficientnet),
    Naming("transformers", "EfficientNet", _transformers_efficientnet, "efficientnet."),
)


def family_of(model: Any) -> str:
    """ "ResNet", "EfficientNet", or "" for those that no library has."""
    if isinstance(model, efficientnet.EfficientNet):
        return "EfficientNet"
    return "ResNet" if isinstance(model, resnet.ResNet) else ""


def naming(library: str, family: str) -> Naming | None:
    """How a library names a family; None where it does not have it."""
    library = "timm" if (library, family) == ("torchvision", "ResNet") else library
    return next(
        (n for n in NAMINGS if (n.library, n.family) == (library, family)), None
    )


def recognise(names: Mapping[str, Any]) -> Naming | None:
    """Whose names these are, by those of the stem and of the first block."""
    first = {"ResNet": "conv1 layer1.0.conv1", "EfficientNet": "conv_stem"}
    first["EfficientNet"] += " blocks.0.0.conv_dw"
    for candidate in NAMINGS:
        wanted = [f"{part}.weight" for part in first[candidate.family].split()]
        wanted = [candidate.name(part) for part in wanted]
        bare = [part.removeprefix(candidate.prefix) for part in wanted]
        if all(x in names for x in wanted) or all(x in names for x in bare):
            return candidate
    return None


def structure(model: Any) -> dict[str, Any]:
    """What tells one network of a family from another, of one of our modules."""
    if family_of(model) == "ResNet":
        return {"depths": model.depths, "width": model.width, "inner": model.inner}
    depths = model.depths()
    return {"blocks": sum(depths), "stem": model.scaled(32), "top": model.scaled(1280)}


def structure_of(shapes: Mapping[str, Sequence[int]], found: Naming) -> dict[str, Any]:
    """The same of a file, from the shapes of its tensors by name."""

    def shape(timm: str) -> Sequence[int]:
        name = found.name(timm)
        return shapes.get(name) or shapes.get(name.removeprefix(found.prefix), ())

    if found.family == "ResNet":
        depths = []
        for stage in range(1, 9):
            blocks = 0
            while shape(f"layer{stage}.{blocks}.conv1.weight"):
                blocks += 1
            depths += [blocks] if blocks else []
        width = shape("conv1.weight")[0]
        inner, grouped = 0, False
        if shape("layer1.0.conv3.weight"):
            middle = shape("layer1.0.conv2.weight")
            inner, grouped = middle[0] // width, middle[0] != middle[1]
        found_here = {"depths": tuple(depths), "width": width, "inner": inner}
        return found_here | ({"groups": middle[0] // middle[1]} if grouped else {})
    pattern = {
        "timm": r"^blocks\.(\d+\.\d+)\.",
        "torchvision": r"^features\.(\d+\.\d+)\.block\.",
        "transformers": r"encoder\.blocks\.(\d+)\.",
    }[found.library]
    matches = [re.search(pattern, name) for name in shapes]
    stem, top = shape("conv_stem.weight"), shape("conv_head.weight")
    return {
        "blocks": len({match[1] for match in matches if match}),
        "stem": stem[0] if stem else 0,
        "top": top[0] if top else 0,
    }


def in_words(family: str, parts: Mapping[str, Any]) -> str:
    """A sentence part for a structure."""
    if family == "EfficientNet":
        return (
            f"an EfficientNet of {parts['blocks']} blocks, {parts['stem']} channels in "
            f"its stem and {parts['top']} at its end"
        )
    kind = "bottlenecks" if parts["inner"] else "basic blocks"
    counts = ", ".join(map(str, parts["depths"]))
    words = f"a ResNet of {counts} {kind}, {parts['width']} channels wide"
    if parts["inner"] > 1:
        words += f" and {parts['inner']} times that inside"
    return words + (f", {parts['groups']} groups" if "groups" in parts else "")
