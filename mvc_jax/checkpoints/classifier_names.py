"""Names of a classifier's tensors in timm, torchvision and transformers.

Our modules have timm's names, which for ResNets are torchvision's too; the other
libraries' names are derived from them. `structure` identifies a network by its shapes.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """timm's name of one of our variables.

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
      rename: maps timm's name without its last part, and the number of blocks in each
        stage, to the library's name.
      prefix: of every name but the head's; files without a head leave it out.
    """

    library: str
    family: str
    rename: Callable[[str, Sequence[int]], str]
    prefix: str = ""

    @property
    def head(self) -> str:
        """Name of the last layer."""
        timm = "fc" if self.family == "ResNet" else "classifier"
        return self.rename(timm, ())

    def name(self, timm: str, depths: Sequence[int] = ()) -> str:
        """Maps timm's name of a tensor to the library's."""
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
    prefix = f"resnet.encoder.stages.{int(stage[-1]) - 1}.layers.{block}"
    if rest[0] == "downsample":
        return f"{prefix}.shortcut.{('convolution', 'normalization')[int(rest[1])]}"
    return f"{prefix}.layer.{int(rest[0][-1]) - 1}.{_part(rest[0])}"


def _part(module: str) -> str:
    return "convolution" if module.startswith("conv") else "normalization"


# timm's names in an EfficientNet block with expansion, and in one without.
_EXPANDING = (
    "conv_pw",
    "bn1",
    "conv_dw",
    "bn2",
    "se.conv_reduce",
    "se.conv_expand",
    "conv_pwl",
    "bn3",
)
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
_TRANSFORMERS_BLOCK = (
    "expansion.expand_conv",
    "expansion.expand_bn",
    "depthwise_conv.depthwise_conv",
    "depthwise_conv.depthwise_norm",
    "squeeze_excite.reduce",
    "squeeze_excite.expand",
    "projection.project_conv",
    "projection.project_bn",
)
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
    """The family of a network: "ResNet", "EfficientNet", or "" for other networks."""
    if isinstance(model, efficientnet.EfficientNet):
        return "EfficientNet"
    return "ResNet" if isinstance(model, resnet.ResNet) else ""


def naming(library: str, family: str) -> Naming | None:
    """How a library names a family's tensors; None if it does not have the family."""
    library = "timm" if (library, family) == ("torchvision", "ResNet") else library
    return next(
        (n for n in NAMINGS if (n.library, n.family) == (library, family)), None
    )


def recognise(names: Mapping[str, Any]) -> Naming | None:
    """Recognises a naming by the tensors of the stem and of the first block."""
    for candidate in NAMINGS:
        if any(names.keys() >= {*first} for first in _first(candidate)):
            return candidate
    return None


def prefixes(names: Mapping[str, Any]) -> set[str]:
    """What stands before the names of a network, as `module.` or `model._orig_mod.`.

    More than one where there are several networks.
    """
    found = set()
    for candidate in NAMINGS:
        whole, bare = _first(candidate)
        # The library's own prefix of a network is not one of these.
        for (stem, block), own in ((whole, ""), (bare, candidate.prefix)):
            ends = [name for name in names if name.endswith(f".{stem}")]
            starts = [name.removesuffix(stem) for name in ends]
            found |= {x.removesuffix(own) for x in starts if x + block in names}
    return found


def _first(naming: Naming) -> Iterator[list[str]]:
    """Names of a stem's and a first block's tensors, with and without a prefix."""
    first = {
        "ResNet": ("conv1.weight", "layer1.0.conv1.weight"),
        "EfficientNet": ("conv_stem.weight", "blocks.0.0.conv_dw.weight"),
    }[naming.family]
    wanted = [naming.name(timm) for timm in first]
    yield wanted
    yield [name.removeprefix(naming.prefix) for name in wanted]


def structure(model: Any) -> dict[str, Any]:
    """The numbers that distinguish one network of a family from another."""
    if family_of(model) == "ResNet":
        return {"depths": model.depths, "width": model.width, "inner": model.inner}
    stem, top = model.ends()
    blocks = sum(model.depths())
    return {"blocks": blocks, "stem": stem, "top": top, "lite": model.lite}


def structure_of(shapes: Mapping[str, Sequence[int]], found: Naming) -> dict[str, Any]:
    """The `structure` of the network in a file, from its tensors' shapes by name."""

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
        structure = {"depths": tuple(depths), "width": width, "inner": inner}
        if grouped:
            structure["groups"] = middle[0] // middle[1]
        return structure
    pattern = {
        "timm": r"^blocks\.(\d+\.\d+)\.",
        "torchvision": r"^features\.(\d+\.\d+)\.block\.",
        "transformers": r"encoder\.blocks\.(\d+)\.",
    }[found.library]
    matches = [re.search(pattern, name) for name in shapes]
    stem, top = shape("conv_stem.weight"), shape("conv_head.weight")
    squeezes = any(
        re.search(r"\.(se|squeeze_excite)\.|\.fc1\.", name) for name in shapes
    )
    return {
        "blocks": len({match[1] for match in matches if match}),
        "stem": stem[0] if stem else 0,
        "top": top[0] if top else 0,
        "lite": not squeezes,
    }


def describe(family: str, structure: Mapping[str, Any]) -> str:
    """Describes a structure, for errors."""
    if family == "EfficientNet":
        return (
            f"an EfficientNet{'-Lite' * structure['lite']} of {structure['blocks']} "
            f"blocks, {structure['stem']} channels in its stem and {structure['top']} "
            "at its end"
        )
    kind = "bottlenecks" if structure["inner"] else "basic blocks"
    counts = ", ".join(map(str, structure["depths"]))
    text = f"a ResNet of {counts} {kind}, {structure['width']} channels wide"
    if structure["inner"] > 1:
        text += f" and {structure['inner']} times that inside"
    if "groups" in structure:
        text += f", {structure['groups']} groups"
    return text
