"""DINOv2 checkpoints in transformers' layout: found, checked and read.

Safetensors only, without PyTorch.
"""

from typing import Any

from etils import epath

from mvc_jax.checkpoints import hub, pipeline_folder, weights
from mvc_jax.errors import UserError
from mvc_jax.models.dinov2 import Dinov2, Params
from mvc_jax.models.flax_classes import ACT2FN, transformers

EXAMPLE = "facebook/dinov2-base"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PATTERNS = ("config.json", "model*.safetensors", _WEIGHTS[1])
_MASK = r"mask_token$"  # of training


def load(path: epath.PathLike, *, field: str) -> tuple[Dinov2, Params]:
    """Reads a checkpoint.

    Args:
      path: a folder, or a name on the Hugging Face hub.
      field: config field that holds the path, for errors.

    Returns:
      the architecture, and host parameters in their stored precision.

    Raises:
      UserError: a file is missing or damaged, the model is not a DINOv2, or tensors are
        missing, unexpected or of another shape.
    """
    folder = hub.locate(str(path), _PATTERNS, field=f"{field} {str(path)!r}")
    model, file = _read(folder, f"{field} {str(path)!r}")
    return model, weights.read(file, model.shapes(), _MASK)


def check(path: epath.PathLike, *, field: str) -> None:
    """Raises the errors of `load`, but reads no tensor and downloads nothing."""
    field = f"{field} {str(path)!r}"
    folder = epath.Path(path)
    if not hub.is_local(str(path)):
        found = hub.check_name(str(path), _PATTERNS, field=field)
        if not isinstance(found, epath.Path):
            hub.require_files(found, (("config.json",), _WEIGHTS), field=field)
            return
        folder = found
    model, file = _read(folder, field)
    weights.check_tensors(file, model.shapes(), _MASK)


def _read(folder: epath.Path, field: str) -> tuple[Dinov2, epath.Path]:
    """The architecture, and the file of the weights."""
    files = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    if not (folder / "config.json").exists() or not files:
        raise UserError(
            field,
            wanted=f"a folder with config.json and {_WEIGHTS[0]}",
            got="one without" if folder.is_dir() else f"no folder {folder}",
            fix=f"Name a DINOv2 of transformers, as {EXAMPLE}.",
        )
    config: dict[str, Any] = pipeline_folder.read_json(folder / "config.json")
    kind = config.get("model_type")
    activation = config.get("hidden_act", "gelu")
    if kind != "dinov2" or activation not in ACT2FN:
        raise UserError(
            field,
            wanted="model_type 'dinov2' in config.json",
            got=f"{kind!r}, activation {activation!r}",
            fix=f"Name a DINOv2 of transformers without registers, as {EXAMPLE}.",
        )
    weights.check(files[0])
    # The initial value, by which the Flax class would multiply what was read.
    config["layerscale_value"], config["use_mask_token"] = 1.0, False
    return Dinov2(transformers.Dinov2Config.from_dict(config)), files[0]
