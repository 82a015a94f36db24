"""Recognises what is given as a base but is not a pipeline, and says how to make one.

Only names, small JSON files and headers are read. The advice is commands for PyTorch's
diffusers, which write a folder in its layout.
"""

import re
from collections.abc import Sequence

from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import tensor_file
from mvc_jax.errors import UserError

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".msgpack", ".gguf")
LORA_FILE = "pytorch_lora_weights.safetensors"
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
_FIX = "Use a folder saved by save_pretrained, or a name on the hub."
_CONVERT = "If you trust it, convert it once, with PyTorch: {command}."
# The state of accelerate's or transformers' trainers, beside the networks.
_TRAINER = re.compile(
    r"(optimizer|scheduler)(_\d+)?\.(bin|pt)|random_states_\d+\.pkl|rng_state.*\.pth"
    r"|scaler\.pt|trainer_state\.json"
)
_STEPS = re.compile(r"checkpoint[-_](\d+)")
# Names of a pair of matrices: kohya's, diffusers' (of attention processors, until 0.22)
# and peft's; then those of LyCORIS.
_LORA = re.compile(
    r"(^lora_(unet|te\d?)_|lora_(down|up)\.weight$|lora\.(down|up)\.weight$"
    r"|_lora\.(down|up)\.weight$|\.lora_[AB](\.\w+)?\.weight$)"
)
_PROCESSORS = re.compile(r"\.processor\.(to_\w+_lora|\w+)\.(down|up)\.weight$")
_LYCORIS = re.compile(r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks)$")


def is_single_file(name: str) -> bool:
    """Whether a path names a file of weights."""
    return name.endswith(SINGLE_FILES) and not epath.Path(name).is_dir()


def convert(pipeline: str, load: str, target: str) -> str:
    """The sentence with a command that writes a pipeline as safetensors.

    Args:
      pipeline: its class in diffusers.
      load: a call of a method of that class.
      target: the folder that the command writes.
    """
    return _CONVERT.format(command=_command(f"P.{load}", target, pipeline))


def describe(folder: epath.Path, name: str) -> tuple[str, str]:
    """Describes a path that is no folder of a pipeline.

    Args:
      folder: the path.
      name: as it was configured.

    Returns:
      what it is, and what to do.
    """
    inside = [] if not folder.is_dir() else sorted(p.name for p in folder.iterdir())
    nested = [x for x in inside if (folder / x / INDEX).exists()]
    if is_single_file(name):
        found = "" if folder.exists() else ", which does not exist"
        known = _recognised(folder) if not found else None
        return known or (f"a single file{found}", from_single_file(str(folder)))
    if not inside:
        return "an empty one" if folder.is_dir() else "no such folder", _FIX
    if nested:
        return f"one without {INDEX}, around {nested[0]}", f"Use {folder / nested[0]}."
    if LORA_FILE not in inside and (state := _training_state(folder, inside)):
        return state
    if "config.json" in inside:
        return _describe_network(folder)
    return describe_files(inside, str(folder), folder)


def describe_files(
    inside: Sequence[str],
    where: str,
    folder: epath.Path | None = None,
    source: str = "",
) -> tuple[str, str]:
    """Describes files among which is no model_index.json.

    Args:
      inside: their names.
      where: path or address of their folder.
      folder: of the files, where they can be read.
      source: name of the folder for PyTorch's libraries; by default `where`.
    """
    if LORA_FILE in inside:
        known = _recognised(folder / LORA_FILE) if folder is not None else None
        return known or _describe_lora(f"{source or where}", "diffusers")
    if _PEFT[0] in inside:
        return _describe_lora(f"{source or where}", "peft")
    single = [x for x in inside if x.endswith(SINGLE_FILES)]
    if single:
        if folder is not None and (known := _recognised(folder / single[0])):
            return known
        got = f"single files ({', '.join(single)})"
        return got, from_single_file(f"{where}/{single[0]}")
    return f"one without {INDEX}", _FIX


def from_single_file(path: str) -> str:
    """How to make a pipeline of one file with all weights."""
    load = f"from_single_file({path!r})"
    return convert("StableDiffusionPipeline", load, _target(path))


def _recognised(path: epath.Path) -> tuple[str, str] | None:
    """Describes a file of adapters or embeddings by the names in it; else None."""
    if path.suffix != ".safetensors":
        return None
    try:
        names = tensor_file.entries(path)
    except UserError:  # is damaged
        return None
    found = f"a single file ({path.name})"
    if any(map(_LYCORIS.search, names)):
        return (
            f"{found} with LyCORIS adapters, and no pipeline",
            "Merge them into their base with the program that trained them, and use "
            "the result.",
        )
    if any(map(_LORA.search, names)):
        kind = "kohya" if any(x.startswith("lora_") for x in names) else "diffusers"
        if all(x.startswith("base_model.model.") for x in names):
            kind = "peft"
        if any(map(_PROCESSORS.search, names)):
            kind = "diffusers before 0.22"
        return _describe_lora(str(path if kind != "peft" else path.parent), kind)
    if names and len(names) <= 2 and not any("." in name for name in names):
        load = f"p.load_textual_inversion({str(path)!r})"
        return (
            f"{found} with embeddings of a textual inversion, and no pipeline",
            _into_base(load, _target(str(path))),
        )
    return None


def _describe_lora(path: str, kind: str) -> tuple[str, str]:
    """Describes adapters by the library that wrote them."""
    merge = f"p.load_lora_weights({path!r}); p.fuse_lora(); p.unload_lora_weights()"
    if kind == "diffusers before 0.22":
        merge = (
            f"u = p.unet; u.load_attn_procs({path!r}); u.fuse_lora(); u.unload_lora()"
        )
    if kind == "peft":
        merge = (
            "from peft import PeftModel as A; "
            f"p.unet = A.from_pretrained(p.unet, {path!r}).merge_and_unload()"
        )
    return (
        f"LoRA adapters in the form of {kind}, and no pipeline",
        _into_base(merge, _target(path)),
    )


def _describe_network(folder: epath.Path) -> tuple[str, str]:
    """Describes a folder with one network."""
    try:
        config = files.read_json(folder / "config.json")
        kind = config.get("_class_name") or config.get("architectures")
        kind = kind[0] if isinstance(kind, list) and kind else kind
        kind = kind or config.get("model_type") or config.get("architecture")
    except (OSError, ValueError, AttributeError):
        kind = "with a damaged config.json"
    if kind is None:
        return "one whose config.json is of no model that is known", _FIX
    if kind != "UNet2DConditionModel":
        return f"one model, {kind}, and no pipeline", _FIX
    return f"one model, {kind}, and no pipeline", _with_unet(folder, "", "")


def _training_state(folder: epath.Path, inside: list[str]) -> tuple[str, str] | None:
    """Describes a folder in which a trainer keeps its state; None for another one."""
    steps = {int(m[1]): m[0] for m in map(_STEPS.fullmatch, inside) if m}
    if steps and not any(map(_TRAINER.fullmatch, inside)):
        last = folder / steps[max(steps)]
        names = sorted(path.name for path in last.iterdir())
        inner = _training_state(last, names)
        if inner is None:
            return None
        found = f"a folder of training checkpoints, of which {last.name} is the last"
        return f"{found}, without {INDEX}", inner[1]
    if not any(map(_TRAINER.fullmatch, inside)):
        return None
    found = "the state of a training run, which is no pipeline"
    if (folder.parent / INDEX).exists():
        return found, f"Use {folder.parent}, which its training wrote at its end."
    part = next((x for x in ("unet_ema", "unet") if x in inside), None)
    if part is None:
        return found, (
            f"Use the folder with {INDEX} that its training writes at its end; the "
            "training can be resumed for that."
        )
    average = ", with the averaged weights" if part == "unet_ema" else ""
    return found, _with_unet(folder, part, average)


def _with_unet(folder: epath.Path, part: str, average: str) -> str:
    """How to put a UNet into the pipeline that it was trained from."""
    arguments = f"{str(folder)!r}" + (f", subfolder={part!r}" if part else "")
    load = (
        "from diffusers import UNet2DConditionModel as U; "
        f"p.unet = U.from_pretrained({arguments})"
    )
    return _into_base(load, _target(str(folder)), average)


def _into_base(change: str, target: str, what: str = "") -> str:
    command = _command(
        "P.from_pretrained('BASE', safety_checker=None)",
        target,
        "DiffusionPipeline",  # of any family
        change,
    )
    return (
        f"Put it into the base that it was trained on{what}, once, with PyTorch, that "
        f"base in place of BASE: {command}."
    )


def _command(load: str, target: str, pipeline: str, change: str = "") -> str:
    steps = [f"from diffusers import {pipeline} as P", f"p = {load}"]
    steps += [change] if change else []
    steps += [f"p.save_pretrained('{target}', safe_serialization=True)"]
    return f'python -c "{"; ".join(steps)}", and set --config.base.path={target}'


def _target(path: str) -> str:
    """The name of a new folder for what is made of a path."""
    name = path.rstrip("/").rpartition("/")[2]
    stem = name.rpartition(".")[0] if name.endswith(SINGLE_FILES) else name
    return f"{stem}-diffusers"
