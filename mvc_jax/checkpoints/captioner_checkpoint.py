"""A captioner's checkpoint: found, as a folder or on the Hugging Face hub; looked over.

No weights are read here, and neither JAX nor PyTorch is imported: `blip2` needs this
where JAX must not be, `vit_gpt2` where PyTorch is not.
"""

import dataclasses
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import hub
from mvc_jax.errors import UserError, require

_PROCESSOR = "preprocessor_config.json"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")  # any one of them
_SMALL_FILES = ("*.json", "*.txt", "*.model")
_INDEX = ".index.json"  # follows the name of weights that are split into shards


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a captioner finds in a checkpoint folder, besides processor and tokenizer.

    Attributes:
      model_type: what config.json calls the architecture.
      torch_class: its PyTorch class in transformers, which converts old weights.
      weights: files of which any one will do; a name that ends in `.index.json` stands
        for the shards that it lists.
      shards: a pattern of the names of such shards.
    """

    model_type: str
    torch_class: str
    weights: tuple[str, ...]
    shards: str = ""


def find(model: str, layout: Layout) -> epath.Path:
    """The folder of a checkpoint; one named by its hub name is downloaded first.

    Raises:
      UserError: there is none, the hub does not give it, or it is no such checkpoint.
    """
    if hub.is_local(model):
        return _check_folder(model, layout)
    patterns = [*_SMALL_FILES, *layout.weights, *filter(None, [layout.shards])]
    folder = hub.download(model, patterns, field=field(model))
    return _check_folder(folder, layout, model)


def check(model: str, layout: Layout) -> epath.Path | None:
    """The folder, unless `find` would refuse it; None for a name that the hub has."""
    if hub.is_local(model):
        return _check_folder(model, layout)
    hub.check_name(model, field=field(model))
    return None


def _check_folder(
    folder: epath.PathLike, layout: Layout, model: str | None = None
) -> epath.Path:
    """Refuses, without reading weights, what is no checkpoint of this layout.

    Args:
      folder: holds config.json, weights, and the files of processor and tokenizer.
      layout: what is expected of it.
      model: the name that the user gave, where it is not the folder.

    Raises:
      UserError: the folder or a file is missing, or it is of another architecture.
    """
    model, folder = model or str(folder), epath.Path(folder).expanduser()
    require(
        "://" not in model and folder.is_dir(),
        field(model),
        wanted="a checkpoint folder on a local disk, or a name on the Hugging Face hub",
        got="a folder elsewhere" if "://" in model else "no such folder",
        fix="Copy it here." if "://" in model else "Check the path.",
    )
    kind = _read_json(folder / "config.json", model).get("model_type")
    require(
        kind == layout.model_type,
        field(model),
        wanted=f"a checkpoint of model_type {layout.model_type!r} in its config.json",
        got=repr(kind),
        fix="Name another checkpoint, or another config.caption.captioner.",
    )
    _check_weights(folder, layout, model)
    for names in ((_PROCESSOR,), _TOKENIZERS):
        require(
            any((folder / name).exists() for name in names),
            field(model),
            wanted=" or ".join(names),
            got=f"none in {folder}",
            fix="Download the checkpoint whole, with its processor and tokenizer.",
        )
    return folder


def _read_json(path: epath.Path, model: str) -> dict[str, Any]:
    try:
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            field(model),
            wanted=f"a checkpoint folder with its {path.name}",
            got=f"bad JSON in it ({error})" if path.exists() else f"none at {path}",
            fix="Point it at a folder saved by save_pretrained.",
        ) from error
    return content


def _check_weights(folder: epath.Path, layout: Layout, model: str) -> None:
    """Requires one of the weight files, and of an index all shards that it names."""
    found = [name for name in layout.weights if (folder / name).exists()]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    require(
        bool(found),
        field(model),
        wanted=f"weights in {' or '.join(layout.weights)}",
        got=f"{', '.join(pickles) or 'none'} in {folder}; a pickle is never opened",
        fix=_how_to_convert(folder, layout.torch_class, model),
    )
    if not found[0].endswith(_INDEX):
        return
    index = _read_json(folder / found[0], model)
    shards = set(index.get("weight_map", {}).values())
    missing = sorted(name for name in shards if not (folder / name).exists())
    require(
        not missing,
        field(model),
        wanted=f"the {len(shards)} files that {found[0]} names",
        got=f"{folder} without {', '.join(missing)}",
        fix="Download the checkpoint again.",
    )


def _how_to_convert(folder: epath.Path, torch_class: str, model: str) -> str:
    load, place = "", str(folder)
    if str(folder) != model:  # the hub's cache is no place to write to
        load, place = f"hf download {model} --local-dir FOLDER, then ", "FOLDER"
    return (
        f"If you trust it, convert it once, with PyTorch: {load}"
        f'python -c "from transformers import {torch_class} as M; '
        f"M.from_pretrained('{place}').save_pretrained('{place}')\", and name {place}."
    )


def field(model: str) -> str:
    """The name of the setting, for errors."""
    return f"config.caption.model {model!r}"
