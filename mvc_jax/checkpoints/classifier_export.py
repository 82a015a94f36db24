"""Trained classifiers out, as timm, torchvision or transformers would store them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import classifier_names as names
from mvc_jax.checkpoints import weights
from mvc_jax.checkpoints.classifier_checkpoint import (
    CONFIG,
    OURS,
    PROCESSOR,
    TENSORFLOW,
    WEIGHTS,
)
from mvc_jax.errors import require
from mvc_jax.models.classifiers import VARIANTS


def write(
    folder: epath.PathLike,
    model: Any,
    variables: Mapping[str, Any],
    *,
    variant: str,
    library: str = "timm",
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
) -> None:
    """Writes `model.safetensors`, `config.json` and what the library reads besides.

    `classifier_checkpoint.find` and `classifier_weights.read` give back exactly what
    went in.

    Args:
      folder: made if it is not there.
      model: a module of `classifiers.VARIANTS`.
      variables: `params` and `batch_stats`.
      variant: the name that `model` was made by.
      library: of `classifier_names.LIBRARIES`. A network that timm does not have is
        written as timm would; its architecture is named `mvc_jax_<variant>`.
      class_names: K of them.
      mean, std: of pixels in [0, 1], as in training.
      size: pixels of the images.

    Raises:
      UserError: the library has no such network, or not for images of this size.
    """
    folder, family = epath.Path(folder), names.family_of(model)
    naming = names.naming(library, family)
    _check(folder, model, variant, library, size)
    depths = model.depths() if family == "EfficientNet" else ()

    def name_of(path):
        timm = names.timm_name(path)
        return naming.name(timm, depths) if naming else timm

    leaves = flax.traverse_util.flatten_dict(variables)
    means = [name_of(path) for path in leaves if path[-1] == "mean"]
    counters = [name.replace("running_mean", "num_batches_tracked") for name in means]
    weights.write(folder / WEIGHTS, variables, name_of=name_of, counters=counters)
    normalisation = {"mean": list(mean), "std": list(std)}
    if library == "transformers":
        files.write_json(folder / PROCESSOR, _processor(size, **normalisation))
        files.write_json(folder / CONFIG, _transformers(model, class_names, size))
    else:
        config = _timm(model, variant, class_names, size, normalisation)
        files.write_json(folder / CONFIG, config)


def _check(
    folder: epath.Path, model: Any, variant: str, library: str, size: int
) -> None:
    family = names.family_of(model)
    naming = names.naming(library, family)
    require(
        library == "timm" or (naming is not None and _is_in(library, model)),
        str(folder),
        wanted=f"a network that {library} has",
        got=variant,
        fix="Write it in timm's layout.",
    )
    require(
        (library, family, size % 2) != ("transformers", "EfficientNet", 1),
        str(folder),
        wanted="images of an even size, which transformers' EfficientNet pads rightly",
        got=size,
        fix="Write it in timm's layout.",
    )


def _is_in(library: str, model: Any) -> bool:
    if names.family_of(model) == "EfficientNet":
        return library == "timm" or (model.padding == "same") == (
            library == "transformers"
        )
    return model.stem == "imagenet" and (library != "transformers" or model.inner < 2)


def _timm(
    model: Any,
    variant: str,
    class_names: Sequence[str],
    size: int,
    normalisation: Mapping[str, list[float]],
) -> dict[str, Any]:
    """timm's config.json, as on the hub."""
    made = VARIANTS[variant].make(num_classes=model.num_classes)
    differ = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(made)
        if field.name not in ("parent", "name", "dtype", "num_classes")
        and getattr(model, field.name) != getattr(made, field.name)
    }
    traditional = {key: differ[key] for key in TENSORFLOW if key in differ}
    rates = differ.keys() <= TENSORFLOW.keys() | {"dropout", "drop_path"}
    is_timm = VARIANTS[variant].size > 32 and rates
    if is_timm and traditional in ({}, TENSORFLOW):
        config = {"architecture": f"tf_{variant}" if traditional else variant}
    else:
        config = {"architecture": OURS + variant, "model_args": differ}
    naming = names.naming("timm", names.family_of(model))
    efficient = names.family_of(model) == "EfficientNet"
    classes = len(class_names)
    return config | {
        "num_classes": classes,
        "label_names": list(class_names),
        "pretrained_cfg": {
            "tag": "",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            **normalisation,
            "num_classes": classes,
            "first_conv": "conv_stem" if efficient else "conv1",
            "classifier": naming.head if naming else "fc",
        },
    }


def _transformers(model: Any, class_names: Sequence[str], size: int) -> dict[str, Any]:
    """transformers' config.json."""
    labels = {str(index): name for index, name in enumerate(class_names)}
    family = names.family_of(model)
    config: dict[str, Any] = {
        "architectures": [f"{family}ForImageClassification"],
        "model_type": family.lower(),
        "num_channels": 3,
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
    }
    if family == "ResNet":
        expansion = 4 if model.inner else 1
        stages = range(len(model.depths))
        return config | {
            "layer_type": "bottleneck" if model.inner else "basic",
            "embedding_size": model.width,
            "depths": list(model.depths),
            "hidden_sizes": [expansion * model.width * 2**stage for stage in stages],
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        }
    columns = zip(*model.stages, strict=True)
    expand, sizes, strides, widths, depths = map(list, columns)
    return config | {
        "image_size": size,
        "width_coefficient": model.width,
        "depth_coefficient": model.depth,
        "kernel_sizes": sizes,
        "in_channels": [32, *widths[:-1]],
        "out_channels": widths,
        "depthwise_padding": _odd_inputs(model, size),
        "strides": strides,
        "num_block_repeats": depths,
        "expand_ratios": expand,
        "squeeze_expansion_ratio": 0.25,
        "hidden_act": "swish",
        "hidden_dim": model.scaled(1280),
        "pooling_type": "mean",
        "batch_norm_eps": model.epsilon,
        "batch_norm_momentum": 0.1,
        "dropout_rate": model.dropout,
        "drop_connect_rate": model.drop_path,
    }


def _odd_inputs(model: Any, size: int) -> list[int]:
    """Numbers of the blocks that stride over an odd side, as the library asks."""
    side, number, odd = -(-size // 2), 0, []
    for stage, depth in zip(model.rows(), model.depths(), strict=True):
        if stage.stride > 1 and side % 2:
            odd.append(number)
        side, number = -(-side // stage.stride), number + depth
    return odd


def _processor(size: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """transformers' preprocessor_config.json: to a square, to [0, 1], normalised."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
