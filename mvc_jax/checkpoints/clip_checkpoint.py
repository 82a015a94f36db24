"""CLIP checkpoints in transformers' layout: found, checked, read and written.

Both public layouts are read: a whole CLIPModel (as openai/clip-vit-large-patch14), and
an image tower alone, CLIPVisionModelWithProjection (the `image_encoder` of a diffusers
pipeline). Safetensors only, without PyTorch.
"""

from typing import Any

import numpy as np
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import clip_tokenizer, hub, pipeline_folder, weights
from mvc_jax.errors import UserError
from mvc_jax.models.clip import Clip, Params, image_processor
from mvc_jax.models.flax_classes import ACT2FN, transformers

IMAGE_ENCODER = "image_encoder"  # folder in a diffusers pipeline
PROCESSOR = "feature_extractor/preprocessor_config.json"
INDEX_ENTRIES = {  # for the model_index.json of a pipeline with an image encoder
    IMAGE_ENCODER: ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_MODEL_TYPES = ("clip", "clip_vision_model")
_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)
_PATTERNS = ("*.json", "*.txt", "model*.safetensors")
_TEXT_TOWER = r"^(text_model|text_projection|logit_scale)"
_WHOLE_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
)


def load(
    path: epath.PathLike, *, field: str, text: bool = False
) -> tuple[Clip, Params]:
    """Reads a CLIP checkpoint.

    Args:
      path: folder of a CLIPModel, of an image tower or of a pipeline with one; or a
        name on the Hugging Face hub.
      field: config field that holds the path, for errors.
      text: whether the text tower is needed too.

    Returns:
      the architecture, and host parameters in their stored precision.

    Raises:
      UserError: a file is missing or damaged, the model is not a CLIP, or tensors are
        missing, unexpected or of another shape.
    """
    folder = _find(path, field)
    model = _read_architecture(folder, field, text)
    file = next(folder / name for name in _WEIGHTS if (folder / name).exists())
    weights.check(file)
    return model, weights.read(file, model.shapes(), _unused(text))


def check(path: epath.PathLike, *, field: str, text: bool = False) -> Clip | None:
    """Raises the errors of `load`, but reads no tensor.

    Returns:
      the architecture; None for a hub name whose files are not all in the cache, of
      which the names are checked.
    """
    folder = None
    if not hub.is_local(str(path)):
        named = f"{field} {str(path)!r}"
        found = hub.check_name(str(path), _PATTERNS, field=named)
        if not isinstance(found, epath.Path):
            hub.require_files(found, (("config.json",), _WEIGHTS), field=named)
            if text and (lacks := pipeline_folder.missing_of_tokenizer(found)):
                hub.require_files(found, (lacks,), field=named)
            return None
        folder = found
    folder = _find(path, field, folder)
    model = _read_architecture(folder, field, text)
    file = next(folder / name for name in _WEIGHTS if (folder / name).exists())
    weights.check(file)
    weights.check_tensors(file, model.shapes(), _unused(text))
    return model


def has_text(path: epath.PathLike, *, field: str) -> bool:
    """Whether a checkpoint has a text tower; one on the hub is downloaded first."""
    config = pipeline_folder.read_json(_find(path, field) / "config.json")
    return config.get("model_type") == "clip"


def save(folder: epath.PathLike, model: Clip, params: Params) -> list[str]:
    """Writes the image tower into the folder of a diffusers pipeline.

    The pipeline's model_index.json needs `INDEX_ENTRIES`.

    Returns:
      the files written, relative to `folder`.
    """
    folder = epath.Path(folder)
    written = [f"{IMAGE_ENCODER}/config.json", f"{IMAGE_ENCODER}/{_WEIGHTS[0]}"]
    config = model.vision.to_diff_dict()
    config["architectures"] = ["CLIPVisionModelWithProjection"]
    files.write_json(folder / written[0], config)
    tower = {name: params[name] for name in ("vision_model", "visual_projection")}
    weights.write(folder / written[1], tower)
    files.write_json(folder / PROCESSOR, model.processor.to_dict())
    return [*written, PROCESSOR]


def _find(
    path: epath.PathLike, field: str, folder: epath.Path | None = None
) -> epath.Path:
    """The folder with config.json and weights; raises if one of them is missing.

    `folder` is the snapshot of a hub name; None: it is downloaded.
    """
    name = str(path)
    field = f"{field} {name!r}"
    folder = folder or hub.locate(name, _PATTERNS, field=field)
    if (folder / pipeline_folder.INDEX).exists():  # a pipeline
        folder = folder / IMAGE_ENCODER
    if not (folder / "config.json").exists():
        raise UserError(
            field,
            wanted="a folder with a CLIP model and its config.json",
            got=f"none at {folder}" if folder.is_dir() else f"no folder {folder}",
            fix=_how_to_complete(name),
        )
    if any((folder / file).exists() for file in _WEIGHTS):
        return folder
    pickles = sorted(
        file.name
        for end in ("bin", "pt", "msgpack")
        for file in files.matching(folder, f"*.{end}")
    )
    convert = (
        "Pickles are never opened. If you trust it, convert it once, with PyTorch: "
        "python -c \"from transformers import CLIPModel as M; M.from_pretrained('"
        f"{folder}').save_pretrained('{folder}')\"."
    )
    raise UserError(
        field,
        wanted=f"weights in {folder / _WEIGHTS[0]}",
        got=", ".join(pickles) or "none",
        fix=convert if pickles else _how_to_complete(name),
    )


def _how_to_complete(name: str) -> str:
    if hub.is_local(name):
        return (
            "Use openai/clip-vit-large-patch14, or the whole folder of such a "
            "checkpoint."
        )
    command = hub.download_command(name, _PATTERNS)
    return f"With a network, and without HF_HUB_OFFLINE, run: {command}"


def _unused(text: bool) -> str:
    return r"(?!)" if text else _TEXT_TOWER


def _read_architecture(folder: epath.Path, field: str, text: bool) -> Clip:
    config = pipeline_folder.read_json(folder / "config.json")
    field = f"{field} {str(folder)!r}"
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise UserError(
            field,
            wanted=f"model_type {' or '.join(map(repr, _MODEL_TYPES))} in config.json",
            got=repr(kind),
            fix="Use a CLIP with an image tower, as openai/clip-vit-large-patch14.",
        )
    if text and kind != "clip":
        raise UserError(
            field,
            wanted="a CLIP with a text tower, to compare images with texts",
            got="an image tower alone",
            fix="Use a whole CLIPModel, as openai/clip-vit-large-patch14.",
        )
    text_config = None
    if kind == "clip":
        whole = transformers.CLIPConfig.from_dict(config)
        vision, text_config = whole.vision_config, whole.text_config
        vision.projection_dim = text_config.projection_dim = whole.projection_dim
    else:
        vision = transformers.CLIPVisionConfig.from_dict(config)
    for part in (vision, text_config) if text else (vision,):
        _check_config(part, str(folder / "config.json"))
    tokenizer = clip_tokenizer.read(folder)[0] if text else None
    processor = _read_processor(folder, vision.image_size)
    return Clip(vision, processor, text_config if text else None, tokenizer)


def _check_config(config: Any, path: str) -> None:
    """Requires sizes that form a network, and an activation that Flax supports."""
    numbers = [*_WHOLE_NUMBERS]
    if isinstance(config, transformers.CLIPVisionConfig):
        numbers += ["image_size", "patch_size"]
    problems = [
        f"{name} is {value!r}, not a whole number above 0"
        for name in numbers
        if type(value := getattr(config, name)) is not int or value < 1
    ]
    if config.hidden_act not in ACT2FN:
        problems.append(f"hidden_act is {config.hidden_act!r}")
    if not problems and config.hidden_size % config.num_attention_heads:
        problems.append(
            f"{config.num_attention_heads} heads do not divide {config.hidden_size}"
        )
    if not problems and getattr(config, "num_channels", 3) != 3:
        problems.append(f"num_channels is {config.num_channels}, not 3")
    if problems:
        raise UserError(
            path,
            wanted="the options of CLIP",
            got="; ".join(problems),
            fix="Use the checkpoint's config.json unchanged.",
        )


def _read_processor(folder: epath.Path, side: int) -> transformers.CLIPImageProcessor:
    """The checkpoint's image processor, or CLIP's default if there is no file of it."""
    path, config = _processor_config(folder)
    if not config:
        return image_processor(side)
    kinds = ("image_processor_type", "feature_extractor_type")
    kind = next((config[name] for name in kinds if name in config), _PROCESSORS[0])
    try:
        processor = transformers.CLIPImageProcessor.from_dict(config)
        black = np.zeros((8, 12, 3), np.uint8)
        made = processor(black, input_data_format="channels_last")["pixel_values"]
        shape = np.shape(made[0])
    except Exception as error:  # of the library, Pillow or NumPy, depending on options
        raise UserError(
            str(path),
            wanted="the options of CLIP's image processor",
            got=f"options that fail ({type(error).__name__}: {error})",
            fix="Use the checkpoint's file unchanged.",
        ) from error
    if kind not in _PROCESSORS or shape != (3, side, side):
        raise UserError(
            str(path),
            wanted=f"a {_PROCESSORS[0]} that makes images of {side} pixels, the "
            "image_size of config.json",
            got=f"a {kind} that makes {' x '.join(map(str, shape[1:]))}",
            fix="Use preprocessor_config.json and config.json of the same checkpoint.",
        )
    return processor


def _processor_config(folder: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    """The file of the image processor, and its options; {} if there is none.

    From 5 on, transformers' CLIPProcessor writes them into its own file.
    """
    for path in (folder / "preprocessor_config.json", folder.parent / PROCESSOR):
        if path.exists():
            return path, pipeline_folder.read_json(path)
    path = folder / "processor_config.json"
    config = pipeline_folder.read_json(path) if path.exists() else {}
    return path, config.get("image_processor") or {}
