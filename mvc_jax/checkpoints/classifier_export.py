"""Writes trained classifiers as timm would store them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import classifier_card, model_card, weights
from mvc_jax.checkpoints import classifier_names as names
from mvc_jax.checkpoints.classifier_checkpoint import CONFIG, OURS, TENSORFLOW, WEIGHTS
from mvc_jax.models.classifiers import VARIANTS


def write(
    folder: epath.PathLike,
    model: Any,
    variables: Mapping[str, Any],
    *,
    variant: str,
    class_names: Sequence[str],
    preprocessing: classifier_card.Preprocessing,
) -> None:
    """Writes `model.safetensors` and `config.json` in timm's layout, and a card.

    `classifier_checkpoint.find` and `classifier_weights.read` read exactly the same
    variables back. A network that timm does not have is written as timm would write it,
    with the architecture `mvc_jax_<variant>`.

    Args:
      folder: created if it does not exist.
      model: a network of `classifiers.VARIANTS`.
      variables: `params` and `batch_stats`.
      variant: the name that `model` was made by.
      class_names: K names.
      preprocessing: of the images, as in training.
    """
    folder = epath.Path(folder)
    leaves = flax.traverse_util.flatten_dict(variables)
    means = [names.timm_name(path) for path in leaves if path[-1] == "mean"]
    counters = [name.replace("running_mean", "num_batches_tracked") for name in means]
    weights.write(
        folder / WEIGHTS, variables, name_of=names.timm_name, counters=counters
    )
    config = _config(model, variant, class_names, preprocessing)
    files.write_json(folder / CONFIG, config)
    in_timm = not config["architecture"].startswith(OURS)
    card = classifier_card.text(config, preprocessing, in_timm=in_timm)
    files.write_text(folder / model_card.FILE, card)


def _config(
    model: Any,
    variant: str,
    class_names: Sequence[str],
    done: classifier_card.Preprocessing,
) -> dict[str, Any]:
    """timm's config.json, as on the Hugging Face hub."""
    default = VARIANTS[variant].make(num_classes=model.num_classes)
    changed = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(default)
        if field.name not in ("parent", "name", "dtype", "num_classes")
        and getattr(model, field.name) != getattr(default, field.name)
    }
    as_tensorflow = {key: changed[key] for key in TENSORFLOW if key in changed}
    # timm's config does not hold the rates of dropout and drop path.
    known = changed.keys() <= TENSORFLOW.keys() | {"dropout", "drop_path"}
    if VARIANTS[variant].size > 32 and known and as_tensorflow in ({}, TENSORFLOW):
        described = {"architecture": f"tf_{variant}" if as_tensorflow else variant}
    else:
        described = {"architecture": OURS + variant, "model_args": changed}
    family = names.family_of(model)
    naming = names.naming("timm", family)
    return {
        **described,
        "num_classes": len(class_names),
        "label_names": list(class_names),
        "pretrained_cfg": {
            "tag": "",
            "custom_load": False,
            "input_size": [3, done.size, done.size],
            "fixed_input_size": False,
            "interpolation": done.interpolation,
            "crop_pct": 1.0,
            "crop_mode": classifier_card.CROP_MODES[done.resize],
            "mean": list(done.mean),
            "std": list(done.std),
            "num_classes": len(class_names),
            "first_conv": "conv_stem" if family == "EfficientNet" else "conv1",
            "classifier": naming.head if naming else "fc",
        },
        "mvc_jax": done.for_config(),
    }
