"""The files of a captioner's checkpoint, in a folder or on the Hugging Face hub.

No weights are read, and neither JAX nor PyTorch is imported.
"""

import dataclasses
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import hub
from mvc_jax.errors import UserError

# One suffices; the second is what the processors of transformers 5 write.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")  # one suffices
_SMALL_FILES = ("*.json", "*.txt", "*.model")
_INDEX = ".index.json"  # suffix of the index of weights in shards


@dataclasses.dataclass(frozen=True)
class Layout:
    """A captioner's files in a checkpoint folder, besides processor and tokenizer.

    Attributes:
      model_type: of the architecture, in config.json.
      torch_class: its PyTorch class in transformers, which converts old weights.
      weights: names of weights, of which one file suffices; a name that ends in
        `.index.json` means the shards that it lists.
      shards: pattern of the names of such shards.
    """

    model_type: str
    torch_class: str
    weights: tuple[str, ...]
    shards: str = ""


def find(model: str, layout: Layout) -> epath.Path:
    """The folder of a checkpoint; a name on the hub is downloaded first.

    Raises:
      UserError: there is none, the download failed, or it is another kind of
        checkpoint.
    """
    if hub.is_local(model):
        return _check_folder(model, layout)
    folder = hub.download(model, _patterns(layout), field=field(model))
    return _check_folder(folder, layout, model)


def check(model: str, layout: Layout) -> epath.Path | None:
    """Raises the errors of `find`, without a download.

    Returns:
      the folder; None for a hub name whose files are not all in the cache, of which the
      names are checked.
    """
    if hub.is_local(model):
        return _check_folder(model, layout)
    found = hub.check_name(model, _patterns(layout), field=field(model))
    if isinstance(found, epath.Path):
        return _check_folder(found, layout, model)
    hub.require_files(
        found,
        (layout.weights,),
        field=field(model),
        fix=_how_to_convert("", layout, model),
    )
    others = (("config.json",), _PROCESSORS, _TOKENIZERS)
    hub.require_files(found, others, field=field(model))
    return None


def _patterns(layout: Layout) -> list[str]:
    return [*_SMALL_FILES, *layout.weights, *filter(None, [layout.shards])]


def _check_folder(
    folder: epath.PathLike, layout: Layout, model: str | None = None
) -> epath.Path:
    """Checks that a folder is a checkpoint of this layout; reads no weights.

    Args:
      folder: with config.json, weights, and the files of processor and tokenizer.
      layout: the expected one.
      model: the config field's value, where it is not the folder.

    Raises:
      UserError: the folder or a file is missing, or it is of another architecture.
    """
    model, folder = model or str(folder), epath.Path(folder).expanduser()
    remote = "://" in model
    if remote or not folder.is_dir():
        raise UserError(
            field(model),
            wanted="a checkpoint folder on a local disk, or a name on the Hugging Face "
            "hub",
            got="a folder elsewhere" if remote else "no such folder",
            fix="Copy it to a local disk." if remote else "Check the path.",
        )
    fix = "Copy the whole checkpoint, as save_pretrained writes it."
    if not hub.is_local(model):
        command = hub.download_command(model, _patterns(layout))
        fix = f"With a network, and without HF_HUB_OFFLINE, run: {command}"
    kind = _read_json(folder / "config.json", model, fix).get("model_type")
    if kind != layout.model_type:
        raise UserError(
            field(model),
            wanted=f"model_type {layout.model_type!r} in its config.json",
            got=repr(kind),
            fix="Use another checkpoint, or another config.caption.captioner.",
        )
    _check_weights(folder, layout, model, fix)
    for names in (_PROCESSORS, _TOKENIZERS):
        if not any((folder / name).exists() for name in names):
            raise UserError(
                field(model),
                wanted=" or ".join(names),
                got=f"none in {folder}",
                fix=fix,
            )
    return folder


def _read_json(path: epath.Path, model: str, fix: str) -> dict[str, Any]:
    try:
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            field(model),
            wanted=f"a checkpoint folder with its {path.name}",
            got=f"bad JSON in it ({error})" if path.exists() else f"none at {path}",
            fix=fix,
        ) from error
    return content


def _check_weights(folder: epath.Path, layout: Layout, model: str, fix: str) -> None:
    """Requires one of the weight files and, for an index, all shards in it."""
    found = [name for name in layout.weights if (folder / name).exists()]
    pickles = [path.name for path in files.matching(folder, "*.bin")]
    if not found:
        raise UserError(
            field(model),
            wanted=f"weights in {' or '.join(layout.weights)}",
            got=f"{', '.join(pickles) or 'none'} in {folder}; a pickle is never opened",
            fix=_how_to_convert(folder, layout, model) if pickles else fix,
        )
    if not found[0].endswith(_INDEX):
        return
    index = _read_json(folder / found[0], model, fix)
    shards = set(index.get("weight_map", {}).values())
    missing = sorted(name for name in shards if not (folder / name).exists())
    if missing:
        raise UserError(
            field(model),
            wanted=f"the {len(shards)} files in {found[0]}",
            got=f"{folder} without {', '.join(missing)}",
            fix=fix,
        )


def _how_to_convert(folder: epath.PathLike, layout: Layout, model: str) -> str:
    download, target = "", str(folder)
    if not hub.is_local(model):  # the hub's cache should not be modified
        download, target = f"hf download {model} --local-dir FOLDER, then ", "FOLDER"
    return (
        f"If you trust it, convert it once, with PyTorch: {download}"
        f'python -c "from transformers import {layout.torch_class} as M; '
        f"M.from_pretrained('{target}').save_pretrained('{target}')\", and use "
        f"{target}."
    )


def field(model: str) -> str:
    """The config field with its value, for errors."""
    return f"config.caption.model {model!r}"
