"""ControlNet checkpoints in the diffusers layout: found, checked, read and written."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import families, hub, pipeline_folder, weights
from mvc_jax.errors import UserError
from mvc_jax.models.controlnet import ControlNet, Params

_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_PATTERNS = ("config.json", *_WEIGHTS, "diffusion_pytorch_model-*.safetensors")


def load(
    path: epath.PathLike, base: Mapping[str, dict[str, Any]], *, field: str
) -> tuple[ControlNet, Params]:
    """Reads a ControlNet in the diffusers layout: safetensors only, no PyTorch.

    Args:
      path: its folder, or its name on the Hugging Face hub.
      base: configs of the base model that it controls.
      field: config field that holds the path, for errors.

    Returns:
      the architecture, and host parameters in their stored precision.

    Raises:
      UserError: a file is missing or damaged, the network is of another kind or for
        another base, or tensors are missing, unexpected or of another shape.
    """
    folder, file = _find(path, field)
    network = _read_architecture(folder, base)
    shapes = _shapes(folder, network)
    weights.check(file)
    return network, weights.read(file, shapes)


def check(
    path: epath.PathLike, base: Mapping[str, dict[str, Any]] | None, *, field: str
) -> None:
    """Raises the errors of `load`, but reads no tensor.

    Of a hub name whose files are not all in the cache, the names are checked. Without
    `base`, whether the network fits it is not.
    """
    folder = None
    if not hub.is_local(str(path)):
        named = f"{field} {str(path)!r}"
        found = hub.check_name(str(path), _PATTERNS, field=named)
        if not isinstance(found, epath.Path):
            hub.require_files(found, (("config.json",), _WEIGHTS), field=named)
            return
        folder = found
    folder, file = _find(path, field, folder)
    shapes = _shapes(folder, _read_architecture(folder, base))
    weights.check(file)
    weights.check_tensors(file, shapes)


def save(folder: epath.PathLike, network: ControlNet, params: Params) -> list[str]:
    """Writes the folder that diffusers' ControlNetModel reads.

    Returns:
      the files written, relative to `folder`.
    """
    folder = epath.Path(folder)
    files.write_json(folder / "config.json", network.config)
    weights.write(folder / _WEIGHTS[1], params)
    return ["config.json", _WEIGHTS[1]]


def _find(
    path: epath.PathLike, field: str, folder: epath.Path | None = None
) -> tuple[epath.Path, epath.Path]:
    """The folder, and in it the weights or the index of their shards.

    `folder` is the snapshot of a hub name; None: it is downloaded.
    """
    name = str(path)
    field = f"{field} {name!r}"
    folder = folder or hub.locate(name, _PATTERNS, field=field)
    names = [x.name for x in files.matching(folder, "*")]
    found = next((file for file in _WEIGHTS if file in names), None)
    if "config.json" not in names or found is None:
        fix = (
            "Use lllyasviel/sd-controlnet-canny for Stable Diffusion 1.x, or the "
            "folder of such a checkpoint. Pickles (.bin, .pth) are never opened."
        )
        if not hub.is_local(name):
            command = hub.download_command(name, _PATTERNS)
            fix = f"With a network, and without HF_HUB_OFFLINE, run: {command}"
        raise UserError(
            field,
            wanted=f"a folder with a ControlNet: config.json and {_WEIGHTS[1]}",
            got=", ".join(names[:8]) or f"nothing at {folder}",
            fix=fix,
        )
    return folder, folder / found


def _shapes(folder: epath.Path, network: ControlNet) -> Params:
    try:
        return network.shapes()
    except Exception as error:  # of Flax, JAX or the library, depending on the options
        raise UserError(
            str(folder / "config.json"),
            wanted="the options of a ControlNet",
            got=f"some that cannot be built ({type(error).__name__}: {error})",
            fix="Use the checkpoint's config.json unchanged.",
        ) from error


def _read_architecture(
    folder: epath.Path, base: Mapping[str, dict[str, Any]] | None
) -> ControlNet:
    path = folder / "config.json"
    config = families.completed("controlnet", pipeline_folder.read_json(path))
    if config.get("_class_name") != "ControlNetModel":
        raise UserError(
            str(path),
            wanted="_class_name 'ControlNetModel'",
            got=repr(config.get("_class_name")),
            fix="Use a ControlNet in the diffusers layout.",
        )
    families.check_config("controlnet", config, str(path))
    if base is not None:
        families.check_controlnet(config, base, str(path))
    return ControlNet(config)
