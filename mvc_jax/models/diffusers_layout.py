"""A pipeline folder in the diffusers layout: checked, read, written.

Weights on disk are safetensors under PyTorch's names. A base without downloadable
weights (`pretrain`) and a real checkpoint come in by the same `load`.
"""

import importlib.metadata
import tempfile
from collections.abc import Sequence
from typing import Any

import transformers
from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError, require
from mvc_jax.models import weights
from mvc_jax.models.stable_diffusion import Params, StableDiffusion

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
_TORCH_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}


def load(
    folder: epath.PathLike, components: Sequence[str] = tuple(WEIGHTS)
) -> tuple[StableDiffusion, Params]:
    """Reads a model folder in the diffusers layout: safetensors only, no PyTorch.

    Args:
      folder: holds `model_index.json` and a folder for each component.
      components: whose weights to read; keys of `WEIGHTS`.

    Returns:
      the architecture, and host parameters in fp32, by component.

    Raises:
      UserError: a file is missing, or tensors do not fit the architecture.
    """
    folder = check_folder(folder)
    configs = {name: _read_config(folder / name / "config.json") for name in WEIGHTS}
    configs["scheduler"] = _read_config(folder / "scheduler" / "scheduler_config.json")
    model = StableDiffusion(configs, read_tokenizer(folder / "tokenizer"))
    _check_widths(folder, configs)
    params = {
        name: weights.read(folder / name / WEIGHTS[name], model.shapes(name))
        for name in components
    }
    return model, params


def check_folder(folder: epath.PathLike) -> epath.Path:
    """Refuses, without reading weights, what is no folder in the diffusers layout."""
    folder = epath.Path(folder)
    require(
        (folder / "model_index.json").exists(),
        f"config.base.path {str(folder)!r}",
        wanted="a folder in the diffusers layout",
        got="one without model_index.json" if folder.exists() else "no such folder",
        fix="Point it at a folder saved by save_pretrained.",
    )
    return folder


def save(folder: epath.PathLike, model: StableDiffusion, params: Params) -> list[str]:
    """Writes a model folder in the diffusers layout, under PyTorch's class names.

    Returns:
      the files written, relative to `folder`.
    """
    folder = epath.Path(folder)
    written = []
    for name, file in WEIGHTS.items():
        files.write_json(folder / name / "config.json", model.configs[name])
        weights.write(folder / name / file, params[name])
        written += [f"{name}/config.json", f"{name}/{file}"]
    scheduler = "scheduler/scheduler_config.json"
    files.write_json(folder / scheduler, model.configs["scheduler"])
    _write_tokenizer(folder / "tokenizer", model.tokenizer)
    pipeline = "StableDiffusionPipeline"
    if model.conditioned:
        pipeline = "StableDiffusionInstructPix2PixPipeline"
    index = {
        "_class_name": pipeline,
        "_diffusers_version": importlib.metadata.version("diffusers"),
    }
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {"requires_safety_checker": False}
    index |= {name: list(class_) for name, class_ in _TORCH_CLASSES.items()}
    files.write_json(folder / "model_index.json", index)
    tokenizer = [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    return [*written, *tokenizer, scheduler, "model_index.json"]


def read_tokenizer(folder: epath.PathLike) -> transformers.CLIPTokenizerFast:
    """CLIP's tokenizer from its folder, wherever that is."""
    folder = epath.Path(folder)
    for name in TOKENIZER_FILES[:2]:
        require(
            (folder / name).exists(),
            str(folder / name),
            wanted="a file of CLIP's tokenizer",
            got="no such file",
            fix="Copy the tokenizer folder of the checkpoint whole.",
        )
    with tempfile.TemporaryDirectory() as local:  # the library reads local files only
        for name in TOKENIZER_FILES:
            if (folder / name).exists():
                (folder / name).copy(epath.Path(local) / name)
        return transformers.CLIPTokenizerFast.from_pretrained(local)


def _write_tokenizer(folder: epath.Path, tokenizer) -> None:
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        for name in TOKENIZER_FILES:
            content = (epath.Path(local) / name).read_bytes()
            files.write_bytes(folder / name, content)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            str(path),
            wanted="the JSON file of a diffusers model",
            got="no such file" if not path.exists() else f"bad JSON ({error})",
            fix="Download the checkpoint again.",
        ) from error


def _check_widths(folder: epath.Path, configs: dict[str, dict]) -> None:
    width = configs["text_encoder"]["hidden_size"]
    wanted = configs["unet"]["cross_attention_dim"]
    require(
        width == wanted,
        f"{folder}/text_encoder",
        wanted=f"a text width of {wanted}, the UNet's cross_attention_dim",
        got=width,
        fix="Take all parts from the same checkpoint.",
    )
