"""Finds classifier checkpoints in a folder or on the Hugging Face hub.

A checkpoint is `model.safetensors` with a `config.json`, as on the hub, or a single
file with torchvision's names. The library is recognised by the tensors' names, the
network by their shapes; the config says how pixels were normalised.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mvc_jax.checkpoints import classifier_names as names
from mvc_jax.checkpoints import hub, pipeline_folder, tensor_file
from mvc_jax.errors import UserError
from mvc_jax.models.classifiers import VARIANTS

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
_INDEX = f"{WEIGHTS}.index.json"
_PATTERNS = (WEIGHTS, _INDEX, "model-?????-of-?????.safetensors", CONFIG, PROCESSOR)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, ImageNet
OURS = "mvc_jax_"  # prefix of architectures that timm does not have
_SAME_TENSORS = re.compile(r"resnet(aa|blur)\d+", re.IGNORECASE)
TENSORFLOW = {"padding": "same", "epsilon": 1e-3}  # fields of `tf_efficientnet_*`


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as described by its names, shapes and config; no tensor is read.

    Attributes:
      name: as configured.
      field: the setting that holds the name, for errors.
      weights: path of the tensors.
      naming: the library's naming of its tensors; None for our own naming, of a network
        that no library has.
      variant: a key of `VARIANTS`, or "" if it is none of them.
      fields: what `VARIANTS[variant].make` takes besides the number of classes.
      num_classes: of its head; 0 if it has no head, or one of several layers.
      mean, std: per channel, of pixels in [0, 1]; the network's input is
        (pixel - mean) / std.
      size: image size that it was made for, in pixels.
      prefix: of all names of the network, as DataParallel or `torch.compile` adds one.
      class_names: of its classes, in the order of the head; () if it does not say.
    """

    name: str
    field: str
    weights: epath.Path
    naming: names.Naming | None
    variant: str
    fields: dict[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    prefix: str = ""
    class_names: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the network's tensors by name, without `prefix`."""
        entries = tensor_file.entries(self.weights)
        return _without(self.prefix, {k: entry.shape for k, entry in entries.items()})


def find(name: str, *, field: str, revision: str = "") -> Checkpoint:
    """Finds and describes a checkpoint; one on the hub is downloaded first.

    Args:
      name: a folder, a `.safetensors` file, or a name on the Hugging Face hub.
      field: the setting that holds the name, for errors.
      revision: of a hub name; "" for its default branch.

    Raises:
      UserError: there is none, it is damaged, or it is of another kind of network; the
        error says which.
    """
    path, folder = _locate(name, field, revision)
    config = _read_json(folder / CONFIG) if folder is not None else {}
    entries = tensor_file.entries(path)
    shapes = {key: entry.shape for key, entry in entries.items()}
    naming, prefix = _recognised(shapes, name, field)
    shapes = _without(prefix, shapes)
    architecture = str(config.get("architecture", ""))
    if architecture.startswith(OURS):
        naming, variant = _ours(naming, architecture.removeprefix(OURS), name, field)
        fields = _hashable(config.get("model_args", {}))
    elif naming is None:
        raise _unknown_network(field, name, config, shapes)
    else:
        variant = variant_of(naming.family, names.structure_of(shapes, naming))
        fields = _fields(naming, variant, config, name, field)
    mean, std, size = _input(naming, config, folder, name, field)
    classes = _classes(shapes, naming.head if naming else "fc")
    if size == 0:
        size = VARIANTS[variant].size if variant else 224
    if prefix:
        logging.info("%s %r: %r is stripped from its names", field, name, prefix)
    if naming and not config:
        _tell_what_was_taken(naming, variant, path, name, field)
    return Checkpoint(
        name=name,
        field=field,
        weights=path,
        naming=naming,
        variant=variant,
        fields=fields,
        num_classes=classes,
        mean=mean,
        std=std,
        size=size,
        prefix=prefix,
        class_names=tuple(config.get("label_names", ())),
    )


def check(name: str, *, field: str, revision: str = "") -> str:
    """Checks that `find` will find a checkpoint, without a download.

    Returns:
      the path of its folder or file, for `find`; "" for a hub name whose files are not
      all in the cache, of which the names are checked.

    Raises:
      UserError: the hub has no such model, or only pickles of it.
    """
    if hub.is_local(name):
        return name
    field = f"{field} {name!r}"
    found = hub.check_name(name, _PATTERNS, field=field, revision=revision)
    if isinstance(found, epath.Path):
        return str(found)
    hub.require_files(found, ((WEIGHTS, _INDEX),), field=field)
    return ""


def variant_of(family: str, parts: Mapping[str, Any]) -> str:
    """The variant with this structure, whatever its stem; "" if there is none."""
    for name, variant in VARIANTS.items():
        model = variant.make(num_classes=1)
        if names.family_of(model) == family and names.structure(model) == parts:
            return name
    return ""


def _without(prefix: str, shapes: dict[str, Any]) -> dict[str, Any]:
    """Tensors by name without a prefix; those that do not have it are left out."""
    return {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }


def _recognised(
    shapes: dict[str, Any], name: str, field: str
) -> tuple[names.Naming | None, str]:
    """The naming of a checkpoint's tensors, and a prefix that all have.

    Raises:
      UserError: it holds several networks.
    """
    if naming := names.recognise(shapes):
        return naming, ""
    prefixes = names.prefixes(shapes)
    if len(prefixes) > 1:
        raise UserError(
            f"{field} {name!r}",
            wanted="one network",
            got=f"several, whose names begin with {', '.join(sorted(prefixes))}",
            fix="Keep the tensors of one, in a file of their own.",
        )
    prefix = next(iter(prefixes), "")
    return names.recognise(_without(prefix, shapes)), prefix


def _classes(shapes: Mapping[str, Any], head: str) -> int:
    """Classes of the last layer `head`; 0 if others are beside it in the head."""
    inside = {x for x in shapes if x.split(".")[0] == head.split(".")[0]}
    if inside - {f"{head}.weight", f"{head}.bias"}:
        return 0
    return shapes.get(f"{head}.weight", (0,))[0]


def _tell_what_was_taken(
    naming: names.Naming, variant: str, path: epath.Path, name: str, field: str
) -> None:
    """Says what a file without a config is read as, which its tensors cannot prove.

    Raises:
      UserError: its name is that of another network with the same tensors.
    """
    if naming.family == "ResNet" and (other := _SAME_TENSORS.search(path.stem)):
        raise UserError(
            f"{field} {name!r}",
            wanted="a ResNet that is not anti-aliased",
            got=f"{other[0]}, which has its tensors and computes otherwise",
            fix=f"Name a checkpoint of {variant or 'a ResNet'}.",
        )
    doubt = ""
    if naming.family == "ResNet":
        doubt = "; timm's resnetaa and resnetblur have the same tensors, and would be "
        doubt += "misread"
    logging.warning(
        "%s %r has no %s: it is taken for %s of %s, with images normalised by "
        "ImageNet's mean and deviation%s",
        field,
        name,
        CONFIG,
        variant or f"a {naming.family}",
        naming.library,
        doubt,
    )


def _locate(
    name: str, field: str, revision: str
) -> tuple[epath.Path, epath.Path | None]:
    """The weights, and the folder that may hold their config (None: a single file)."""
    path = hub.locate(name, _PATTERNS, field=field, revision=revision)
    if path.suffix == ".safetensors" and not path.is_dir():
        return path, path.parent if path.name == WEIGHTS else None
    there = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    for found in (WEIGHTS, _INDEX):
        if found in there:
            return path / found, path
    pickles = [x for x in there if x.endswith((".bin", ".pth", ".pt"))]
    is_pickle = bool(pickles) or path.suffix in (".bin", ".pth", ".pt")
    raise UserError(
        f"{field} {name!r}",
        wanted=f"a folder or a hub name with {WEIGHTS}, or a .safetensors file",
        got=f"{', '.join(pickles) or ', '.join(there[:3]) or 'nothing there'}",
        fix="A pickle is never opened: convert it once, with PyTorch, by "
        "`safetensors.torch.save_file(torch.load(path, weights_only=True), ...)`."
        if is_pickle
        else "Check the path.",
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Reads an optional file; {} if there is none."""
    return pipeline_folder.read_json(path) if path.exists() else {}


def _hashable(value: Any) -> Any:
    """Converts lists in JSON to tuples, so that a module can have them as fields."""
    if isinstance(value, dict):
        return {key: _hashable(inner) for key, inner in value.items()}
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _ours(
    naming: names.Naming | None, variant: str, name: str, field: str
) -> tuple[names.Naming | None, str]:
    """The naming and variant of a checkpoint that `classifier_export` wrote."""
    if variant not in VARIANTS:
        raise UserError(
            f"{field} {name!r}",
            wanted=f"an architecture of mvc_jax: {', '.join(VARIANTS)}",
            got=repr(variant),
            fix="Use the version of mvc_jax that wrote it.",
        )
    family = names.family_of(VARIANTS[variant].make(num_classes=1))
    return (naming if family else None), variant


def _fields(
    naming: names.Naming, variant: str, config: Mapping, name: str, field: str
) -> dict[str, Any]:
    """The network's fields that only its config tells.

    Raises:
      UserError: the config describes a network that ours cannot be.
    """
    architecture = config.get("architecture", "")
    if naming.library == "transformers":
        _check_transformers(naming.family, config, name, field)
    elif architecture and variant:
        known = [variant] + [f"tf_{variant}"] * (naming.family == "EfficientNet")
        if architecture not in known:
            raise UserError(
                f"{field} {name!r}",
                wanted=f"the architecture of its tensors, {' or '.join(known)}",
                got=repr(architecture),
                fix="Name another checkpoint.",
            )
    if naming.family == "ResNet" or naming.library == "torchvision":
        return {}
    if naming.library == "transformers":
        return {**TENSORFLOW, "epsilon": config.get("batch_norm_eps", 1e-3)}
    if not architecture:
        raise UserError(
            f"{field} {name!r}",
            wanted=f"timm's {CONFIG} beside its tensors: efficientnet and "
            "tf_efficientnet have the same tensors but compute differently",
            got="none, or one without an architecture",
            fix=f"Download {CONFIG} too, and name the folder.",
        )
    return dict(TENSORFLOW) if architecture.startswith("tf_") else {}


def _check_transformers(family: str, config: Mapping, name: str, field: str) -> None:
    wanted: dict[str, Any] = {
        "ResNet": {
            "model_type": "resnet",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        },
        "EfficientNet": {
            "model_type": "efficientnet",
            "hidden_act": "swish",
            "pooling_type": "mean",
        },
    }[family]
    differing = {k: config[k] for k, v in wanted.items() if config.get(k, v) != v}
    if differing:
        raise UserError(
            f"{field} {name!r}",
            wanted=", ".join(f"{key} {wanted[key]!r}" for key in differing),
            got=", ".join(f"{key} {value!r}" for key, value in differing.items()),
            fix="Name another checkpoint.",
        )


def _input(
    naming: names.Naming | None,
    config: Mapping,
    folder: epath.Path | None,
    name: str,
    field: str,
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and deviation of pixels in [0, 1], and the image size (0: unknown)."""
    if naming is None or naming.library != "transformers":
        cfg = {**config, **config.get("pretrained_cfg", {})}
        size = cfg.get("input_size", (3, 0, 0))[-1]
        return tuple(cfg.get("mean", MEAN)), tuple(cfg.get("std", STD)), size
    processor = _read_json(folder / PROCESSOR) if folder is not None else {}
    if not processor:
        raise UserError(
            f"{field} {name!r}",
            wanted=f"{PROCESSOR} beside the weights, which says how pixels are "
            "normalised",
            got="none",
            fix="Download it too, and name the folder.",
        )
    # The library computes (pixel * factor - offset - mean) / std, pixel up to 255.
    factor = 255.0 * processor.get("rescale_factor", 1 / 255)
    factor = factor if processor.get("do_rescale", True) else 255.0
    offset = 1.0 if processor.get("rescale_offset", False) else 0.0
    mean, std = np.zeros(3), np.ones(3)
    deviation = np.asarray(processor.get("image_std", STD), float)
    if processor.get("do_normalize", True):
        mean, std = np.asarray(processor.get("image_mean", MEAN), float), deviation
    kind = processor.get("image_processor_type", "")
    if kind.startswith("EfficientNet") and processor.get("include_top", True):
        std = std * deviation  # it divides twice
    mean, std = (mean + offset) / factor, std / factor
    size = processor.get("crop_size") or processor.get("size") or {}
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 0
    return tuple(mean.tolist()), tuple(std.tolist()), config.get("image_size") or size


def _unknown_network(
    field: str, name: str, config: Mapping, shapes: Mapping
) -> UserError:
    kind = config.get("architecture") or config.get("model_type")
    first = ", ".join(sorted(shapes)[:3]) or "none"
    return UserError(
        f"{field} {name!r}",
        wanted="a ResNet or an EfficientNet of timm, torchvision or transformers",
        got=f"{kind or 'another network'}, with tensors {first}",
        fix=f"Name a checkpoint of {', '.join(v for v in VARIANTS if _published(v))}.",
    )


def _published(variant: str) -> bool:
    return VARIANTS[variant].size > 32
