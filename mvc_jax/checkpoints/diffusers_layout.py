"""A Stable Diffusion pipeline in the diffusers layout: found, checked, read, written.

Weights on disk are safetensors under PyTorch's names. `load` reads any base: the one
that `pretrain` wrote, a folder, or a checkpoint on the Hugging Face hub.
"""

import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import (
    clip_tokenizer,
    families,
    family,
    pipeline_folder,
    scheduler_config,
    tensor_file,
    weights,
)
from mvc_jax.errors import UserError
from mvc_jax.models.stable_diffusion import Params, StableDiffusion

WEIGHTS = pipeline_folder.WEIGHTS
_TORCH_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    # Not CLIPTokenizer, which without ftfy splits Chinese and Japanese into characters.
    "tokenizer": ("transformers", "CLIPTokenizerFast"),
    "tokenizer_2": ("transformers", "CLIPTokenizerFast"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
_TEXT_MODEL = "text_model."  # begins the names of a text encoder
_ZERO_EMPTY = "force_zeros_for_empty_prompt"  # in the index of XL's pipelines
_NO_LENGTH = 1e9  # a tokenizer's model_max_length above it stands for none


def load(
    path: epath.PathLike,
    components: Sequence[str] | None = None,
    variant: str = "",
    revision: str = "",
) -> tuple[StableDiffusion, Params]:
    """Reads a model in the diffusers layout: safetensors only, no PyTorch.

    Args:
      path: see `pipeline_folder.resolve`, also for `variant` and `revision`.
      components: whose weights are read, of `StableDiffusion.components`; None: all.

    Returns:
      the architecture, and host parameters by component in their stored precision:
      fp32, fp16 or bfloat16 (see `weights.read`).

    Raises:
      UserError: a file is missing, damaged or of another family, or tensors do not fit
        the architecture.
    """
    folder, _ = pipeline_folder.resolve(path, variant, revision)
    model = _read_architecture(folder)
    params, kinds = {}, {}
    components = model.components if components is None else components
    for name in components:
        file = pipeline_folder.find_weights(folder, name, variant)
        kinds[name] = weights.check(file)
        params[name] = weights.read(
            file, _shapes(folder, model, name), name_of=_name_of(file, name)
        )
    read = pipeline_folder.variants(folder, variant)
    if plain := [name for name in components if read[name] != variant]:
        logging.info(
            "%s: variant %s of %s alone; %s has none and is read without",
            path,
            variant,
            ", ".join(name for name in read if read[name] == variant),
            ", ".join(plain),
        )
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        logging.info("%s is stored in several precisions: %s", path, found)
    return model, params


def require_finite(folder: epath.PathLike, component: str, variant: str = "") -> None:
    """Raises a `UserError` if a weight of a component is not finite."""
    file = pipeline_folder.find_weights(epath.Path(folder), component, variant)
    weights.require_finite(file)


def check_base(
    path: epath.PathLike,
    variant: str = "",
    revision: str = "",
    *,
    finetuned: bool = False,
    size: int = 0,
) -> None:
    """Checks that a checkpoint can be the base, without a download or a device.

    Everything but the tensors is read. Of a hub name this is possible only where the
    library's cache has all files; otherwise the name and the list of its files are
    looked up, and the downloaded folder has to be checked later.

    Args:
      path: see `pipeline_folder.resolve`, also for `variant` and `revision`.
      finetuned: whether a model that this program fine-tuned is accepted.
      size: of the images, in pixels; 0: not checked.

    Raises:
      UserError: an error that `load` would raise before it reads a tensor; a model that
        was fine-tuned before; a size that the networks cannot halve.
    """
    if not re.fullmatch(r"[\w-]*", variant):
        raise UserError(
            "config.base.variant",
            wanted="the word between the dots of "
            "diffusion_pytorch_model.WORD.safetensors",
            got=repr(variant),
            fix="Typical are fp16 and, for none, ''.",
        )
    folder = pipeline_folder.look_up(path, variant, revision)
    if folder is None:
        return
    model = _read_architecture(folder)
    for name in model.components:
        file = pipeline_folder.find_weights(folder, name, variant)
        weights.check(file)
        shapes = _shapes(folder, model, name)
        weights.check_tensors(file, shapes, name_of=_name_of(file, name))
    if size:
        families.check_size(model.configs, size)
    if (folder / pipeline_folder.MADE_BY).exists() and not finetuned:
        made_by = pipeline_folder.read_json(folder / pipeline_folder.MADE_BY)
        raise UserError(
            pipeline_folder.field(path),
            wanted="a base model",
            got=f"one that was fine-tuned already, of base {made_by.get('base')!r} on "
            f"data {made_by.get('data')!r}",
            fix="Use that base; or, to train this one further, set "
            "--config.base.finetuned=True.",
        )


def recorded_base(workdir: epath.PathLike) -> dict[str, Any]:
    """The base model that `encode` recorded, as arguments of `load`.

    Its revision is the commit of the download, so that all stages read the same files;
    a path of `""` is the folder that `pretrain` wrote.
    """
    workdir = epath.Path(workdir)
    record = pipeline_folder.read_json(workdir / "encode" / "base.json")
    return {
        "path": record["path"] or workdir / "pretrain" / "model",
        "variant": record["variant"],
        "revision": record["revision"] or "",
    }


def resolved_base(workdir: epath.PathLike) -> epath.Path:
    """The folder of the base model that `encode` recorded."""
    return pipeline_folder.resolve(**recorded_base(workdir))[0]


def save(
    folder: epath.PathLike,
    model: StableDiffusion,
    params: Params,
    *,
    made_by: dict[str, Any] | None = None,
    index_entries: Mapping[str, list[str]] | None = None,
) -> list[str]:
    """Writes a model folder in the diffusers layout, under PyTorch's class names.

    Args:
      folder: to write to.
      model: the architecture.
      params: by component; written in fp32, fetched one tensor at a time.
      made_by: origin of a fine-tuned model, `{"stage", "base", "data"}`: written beside
        it, so that `check_base` recognises it.
      index_entries: library and class of further components in the folder, by name.

    Returns:
      the files written, relative to `folder`.
    """
    folder = epath.Path(folder)
    written = []
    for name in model.components:
        file = WEIGHTS[name]
        files.write_json(folder / name / "config.json", model.configs[name])
        weights.write(folder / name / file, params[name])
        written += [f"{name}/config.json", f"{name}/{file}"]
    files.write_json(folder / pipeline_folder.SCHEDULER, model.configs["scheduler"])
    of = family.of_files(model.components)
    for name in of.tokenizers:
        read, found = getattr(model, name), getattr(model, f"{name}_files")
        tokenizer = clip_tokenizer.write(folder / name, read, found)
        written += [f"{name}/{file}" for file in tokenizer]
    index = {
        "_class_name": of.edits if model.conditioned else of.pipelines[0],
        "_diffusers_version": importlib.metadata.version("diffusers"),
        **of.index,
        **{name: list(_TORCH_CLASSES[name]) for name in (*of.classes, "scheduler")},
        **({_ZERO_EMPTY: model.zero_empty} if of is family.XL else {}),
        **(index_entries or {}),
    }
    if made_by is not None:
        files.write_json(folder / pipeline_folder.MADE_BY, made_by)
        written.append(pipeline_folder.MADE_BY)
    files.write_json(folder / pipeline_folder.INDEX, index)
    return [*written, pipeline_folder.SCHEDULER, pipeline_folder.INDEX]


def _read_architecture(folder: epath.Path) -> StableDiffusion:
    """The architecture in a folder; checks its JSON files and tokenizer."""
    index = pipeline_folder.read_json(folder / pipeline_folder.INDEX)
    of, configs = pipeline_folder.read_family(folder), {}
    for name in (*of.components, "scheduler"):
        file = folder / pipeline_folder.CONFIGS[name]
        config = pipeline_folder.read_json(file)
        configs[name] = families.completed(name, config)
        families.check_config(name, configs[name], str(file), of)
    configs["scheduler"] = scheduler_config.ddim_config(configs["scheduler"])
    fields, sizes = {}, {}
    for name in of.tokenizers:
        text = configs[name.replace("tokenizer", "text_encoder")]
        length = text["max_position_embeddings"]
        tokenizer, found = _read_tokenizer(folder / name, length)
        fields |= {name: tokenizer, f"{name}_files": found}
        sizes[name] = len(tokenizer), tokenizer.model_max_length
    families.check_fit(configs, tokenizers=sizes, folder=str(folder))
    zeros = of is family.XL and index.get(_ZERO_EMPTY, True)
    return StableDiffusion(configs, **fields, zero_empty=zeros)


def _read_tokenizer(folder: epath.Path, positions: int) -> tuple[Any, dict[str, bytes]]:
    """A tokenizer and its files; one without a length gets the encoder's positions.

    PyTorch's pipeline would pad prompts to that length.
    """
    tokenizer, found = clip_tokenizer.read(folder)
    length = tokenizer.model_max_length
    if isinstance(length, int | float) and length > _NO_LENGTH:
        tokenizer.model_max_length = positions
        found = clip_tokenizer.with_length(found, positions)
    return tokenizer, found


def _name_of(file: epath.Path, component: str) -> Callable[[weights.Path], str]:
    """How a component's file names its parameters.

    From transformers 5 on, a text encoder's names leave out `text_model.`.
    """
    if component.startswith("text_encoder"):
        stored = tensor_file.entries(file)
        if not any(name.startswith(_TEXT_MODEL) for name in stored):
            return lambda path: weights.torch_name(path).removeprefix(_TEXT_MODEL)
    return weights.torch_name


def _shapes(folder: epath.Path, model: StableDiffusion, component: str) -> Any:
    try:
        return model.shapes(component)
    except Exception as error:  # of Flax, JAX or the library, depending on the options
        raise UserError(
            str(folder / pipeline_folder.CONFIGS[component]),
            wanted="the options of a network",
            got=f"some that cannot be built ({type(error).__name__}: {error})",
            fix="Use the checkpoint's config.json unchanged.",
        ) from error
