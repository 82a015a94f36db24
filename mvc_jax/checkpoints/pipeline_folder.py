"""The files of a Stable Diffusion checkpoint, in a folder or on the hub.

Only file names and small JSON files are read. The errors for missing files, and for
checkpoints of another kind or family, suggest a fix.
"""

import fnmatch
import re
from collections.abc import Collection, Set
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints import families, family, foreign, hub, tensor_file
from mvc_jax.errors import UserError

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",  # of Stable Diffusion XL
}
TOKENIZER_FILES = (  # of CLIP, in the forms of all releases of its library
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
INDEX = foreign.INDEX
SCHEDULER = "scheduler/scheduler_config.json"
CONFIGS = {name: f"{name}/config.json" for name in WEIGHTS} | {"scheduler": SCHEDULER}
MADE_BY = "mvc_jax.json"  # marks a model that this program fine-tuned
_OPTIONAL = (  # CLIP's image tower
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)
_TRANSFORMERS = ("text_encoder", "text_encoder_2")  # by which these are written
_NAMED = re.compile(  # weights of a variant, or the index of their shards
    r"[a-z_]*model\.([\w-]+?)(-\d{5}-of-\d{5})?\.safetensors"
    r"|[a-z_]*model\.safetensors\.(index\.)?(?P<index>[\w-]+)(\.index)?\.json"
)


def resolve(
    path: epath.PathLike, variant: str = "", revision: str = ""
) -> tuple[epath.Path, str | None]:
    """Finds a model folder; a name on the hub is downloaded first.

    Only the required files are downloaded: no pickles, no other variants, no safety
    checker. In offline mode they must be in the hub's cache.

    Args:
      path: a folder with `model_index.json` and a folder for each component, or a name
        on the Hugging Face hub.
      variant: of the weights, e.g. `fp16`; `""` for the default one.
      revision: branch, tag or commit of a hub name; `""` for its default branch.

    Returns:
      the folder, and the commit of a download.

    Raises:
      UserError: there is no such folder, files are missing (all are listed), or they
        are of another family.
    """
    name = str(path)
    if is_hub_name(name):
        patterns = _patterns(name, variant, revision)
        folder = hub.download(name, patterns, field=field(name), revision=revision)
        check_files(folder, name, variant, revision)
        return folder, hub.commit_of(folder)
    if revision:
        raise UserError(
            "config.base.revision",
            wanted="'' where config.base.path is a folder: only names on the hub "
            "have revisions",
            got=repr(revision),
            fix="Leave it empty.",
        )
    folder = _local(name)
    check_files(folder, name, variant)
    return folder, None


def look_up(
    path: epath.PathLike, variant: str = "", revision: str = ""
) -> epath.Path | None:
    """Like `resolve`, without a download.

    Returns:
      the folder; None for a hub name whose files are not all in the cache, of which the
      names are checked.

    Raises:
      UserError: as `resolve`.
    """
    name = str(path)
    if not is_hub_name(name):
        return resolve(path, variant, revision)[0]
    patterns = _patterns(name, variant, revision)
    found = hub.check_name(name, patterns, field=field(name), revision=revision)
    if isinstance(found, epath.Path):
        check_files(found, name, variant, revision)
        return found
    if INDEX not in found:
        inside = sorted(file for file in found if "/" not in file)
        address = f"https://huggingface.co/{name}/blob/main"
        got, fix = foreign.describe_files(inside, address, source=name)
        raise UserError(
            field(name), wanted="a model in the diffusers layout", got=got, fix=fix
        )
    _require_files(found, name, variant, revision, where="its repository on the hub")
    return None


def weight_files(
    folder: epath.PathLike, component: str, variant: str = ""
) -> list[epath.Path]:
    """The safetensors files of a component: one file, or its shards."""
    path = find_weights(epath.Path(folder), component, variant)
    return sorted({entry.path for entry in tensor_file.entries(path).values()})


def download_patterns(variant: str = "", present: Set[str] = frozenset()) -> list[str]:
    """`fnmatch` patterns of the files of a repository that `load` reads.

    Args:
      variant: of the weights.
      present: the repository's files; without them the patterns select the plain
        weights too, which `load` reads of a component without the variant.
    """
    of = family.of_files(present) if present else family.XL  # which has all parts
    patterns = [*_required(of), "README.md", MADE_BY, *_OPTIONAL]
    for tokenizer in of.tokenizers:
        patterns += [f"{tokenizer}/{name}" for name in TOKENIZER_FILES]
    for component in of.components:
        chosen = [_variant_of(component, variant, present)] if present else []
        for each in dict.fromkeys(chosen or [variant, ""]):
            names = [*_candidates(component, each), *_shards(component, each)]
            patterns += [f"{component}/{name}" for name in names]
    return patterns


def variants(folder: epath.Path, variant: str) -> dict[str, str]:
    """The variant that is read of each component: `variant`, or "" for lack of it.

    As in diffusers: `unet/diffusion_pytorch_model.non_ema.safetensors` may be the only
    file of that variant, beside plain weights of the others.
    """
    present = _files_in(folder)
    parts = family.of_files(present).components
    return {part: _variant_of(part, variant, present) for part in parts}


def missing_of_tokenizer(names: Collection[str]) -> list[str]:
    """What the files of CLIP's tokenizer lack; [] if its library can read them.

    Until 4.x it wrote `vocab.json` and `merges.txt`, from 5 on `tokenizer.json` alone.
    """
    parts, whole = TOKENIZER_FILES[:2], TOKENIZER_FILES[2]
    lacks = [name for name in parts if name not in names]
    return (
        [f"{' and '.join(lacks)} (or {whole})"] if lacks and whole not in names else []
    )


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
      UserError: the file is missing or damaged, or holds something else.
    """
    path = epath.Path(path)
    try:
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            str(path),
            wanted="the JSON file of a model",
            got="no such file" if not path.exists() else f"bad JSON ({error})",
            fix="Download the checkpoint again.",
        ) from error
    return content


def is_hub_name(path: epath.PathLike) -> bool:
    """Whether `resolve` would download `path` from the hub."""
    return not hub.is_local(str(path)) and not foreign.is_single_file(str(path))


def find_weights(folder: epath.Path, component: str, variant: str) -> epath.Path:
    """The file that holds a component's weights, or the index of its shards.

    It is the plain one where the component does not have the variant.
    """
    found = _find(folder, component, variant)
    if found is None:
        raise UserError(
            str(folder / component / _file_name(component, variant)),
            wanted="the weights of a component",
            got="no such file",
            fix="Download the whole checkpoint again.",
        )
    return folder / component / found


def field(path: epath.PathLike) -> str:
    """The config field with its value, for errors."""
    return f"config.base.path {str(path)!r}"


def read_family(folder: epath.Path) -> family.Family:
    """The family of the pipeline in a folder, whose files were checked."""
    return family.of_pipeline(read_json(folder / INDEX).get("_class_name"))


def check_files(
    folder: epath.Path, name: str, variant: str, revision: str = ""
) -> None:
    """Checks that a folder is a pipeline of a supported family, with all its files.

    Args:
      folder: to be checked.
      name: the value of config.base.path.
      variant: of the weights.
      revision: the value of config.base.revision.

    Raises:
      UserError: it is of another kind or family, or lacks files.
    """
    if foreign.is_single_file(name) or not (folder / INDEX).exists():
        got, fix = foreign.describe(folder, name)
        raise UserError(
            field(name), wanted="a folder in the diffusers layout", got=got, fix=fix
        )
    index = read_json(folder / INDEX)
    pipeline = index.get("_class_name")
    found = family.of_pipeline(pipeline)
    if found is None:
        known = [kind for each in family.ALL for kind in each.pipelines]
        raise UserError(
            field(name),
            wanted=f"one of {', '.join(known)} in its {INDEX}",
            got=f"{pipeline}",
            fix=families.FIX,
        )
    if found is family.XL:
        family.check_index(index, str(folder / INDEX))
    families.check_classes(index, str(folder / INDEX), found)
    _require_files(
        _files_in(folder), name, variant, revision, where=str(folder), kind=pipeline
    )


def _require_files(
    present: Set[str],
    name: str,
    variant: str,
    revision: str,
    *,
    where: str,
    kind: str = "",
) -> None:
    """Raises a `UserError` that lists the files that are missing, if any are.

    Args:
      present: files of the model, relative to its folder.
      name: the value of config.base.path.
      variant: of the weights.
      revision: the value of config.base.revision.
      where: the files are, for the error.
      kind: class of the pipeline; "": the one for texts of the files' family.
    """
    of = family.of_pipeline(kind) or family.of_files(present)
    kind = kind or of.pipelines[0]
    missing = [file for file in _required(of) if file not in present]
    for tokenizer in of.tokenizers:
        own = {file.removeprefix(f"{tokenizer}/") for file in present}
        missing += [f"{tokenizer}/{files}" for files in missing_of_tokenizer(own)]
    lacking = _lacking(present, variant, of)
    for part in lacking:
        weights = _weights_in(present, part)
        instead = f" (there is {', '.join(weights)})" if weights else ""
        missing.append(f"{part}/{_file_name(part, variant)}{instead}")
    if missing:
        got, details = tensor_file.listed(missing)
        raise UserError(
            field(name),
            wanted=f"all files of a {kind} in {where}",
            got=f"{len(missing)} missing: {got}",
            fix=_how_to_fix(name, variant, revision, kind, present),
            details=details,
        )


def _required(of: family.Family) -> list[str]:
    """The files of a family besides weights and tokenizers."""
    return [INDEX, *(CONFIGS[name] for name in (*of.components, "scheduler"))]


def _local(name: str) -> epath.Path:
    try:
        folder = epath.Path(name).expanduser()
        folder.exists()
    except Exception as error:  # no library for its scheme, or an error of the library
        raise UserError(
            field(name),
            wanted="a path that etils.epath can open",
            got=next(iter(str(error).splitlines()), type(error).__name__),
            fix="Check that it exists and that the library for its file system is "
            "installed; or use a local folder.",
        ) from error
    return folder


def _how_to_fix(
    name: str, variant: str, revision: str, pipeline: str, present: Set[str]
) -> str:
    """How to get missing files, given those that are present."""
    lacking = _lacking(present, variant)
    pickled = any(
        file.endswith(hub.PICKLES)
        for part in lacking
        for file in _weights_in(present, part)
    )
    if lacking and (known := _complete_variants(present)):
        first, *more = (found or repr("") for found in known)
        further = f", or {', '.join(more)}" if more else ""
        return f"Set --config.base.variant={first}, which is present{further}."
    source = repr(name) + (f", variant={variant!r}" if variant else "")
    load = f"from_pretrained({source}, safety_checker=None)"
    target = f"{epath.Path(name).name}-safetensors"
    convert = foreign.convert(pipeline, load, target)
    if variant:
        convert = convert.removesuffix(".") + " and --config.base.variant=''."
    if pickled:
        return f"Pickles are never opened. {convert}"
    if is_hub_name(name):
        command = hub.download_command(name, download_patterns(variant), revision)
        return (
            f"With a network, and without HF_HUB_OFFLINE, run: {command}. If the hub "
            f"has only pickles, which are never opened: {convert}"
        )
    if lacking and (moves := _without_variants(present)):
        return f"No variant has all: {moves}; set --config.base.variant=''."
    return "Download the whole checkpoint again."


def _without_variants(present: Set[str]) -> str:
    """How to rename weights so that none is of a variant; "" if that cannot be."""
    moves = []
    for part in _lacking(present, ""):
        stem = WEIGHTS[part].removesuffix(".safetensors")
        found = sorted(fnmatch.filter(present, f"{part}/{stem}.*.safetensors"))
        if not found or "-of-" in found[0]:
            return ""
        moves.append(f"rename {found[0]} to {WEIGHTS[part]}")
    return " and ".join(moves)


def _patterns(name: str, variant: str, revision: str) -> list[str]:
    """`download_patterns` of a hub name, whose files are looked up for a variant."""
    return download_patterns(variant, hub.names(name, revision) if variant else set())


def _files_in(folder: epath.Path) -> set[str]:
    """Files of a model, relative to its folder."""
    inner = files.matching(folder, "*/*")
    names = {f"{path.parent.name}/{path.name}" for path in inner}
    return names | {path.name for path in files.matching(folder, "*")}


def _weights_in(present: Set[str], part: str) -> list[str]:
    found = sorted(fnmatch.filter(present, f"{part}/*model*.*"))
    return [file.removeprefix(f"{part}/") for file in found]


def _has(present: Set[str], part: str, variant: str) -> bool:
    return any(f"{part}/{name}" in present for name in _candidates(part, variant))


def _variant_of(part: str, variant: str, present: Set[str]) -> str:
    """`variant` where the component has it, in safetensors or pickles; else ""."""
    pickles = fnmatch.filter(present, f"{part}/*model.{variant}[.-]*bin")
    return variant if pickles or _has(present, part, variant) else ""


def _lacking(
    present: Set[str], variant: str, of: family.Family | None = None
) -> list[str]:
    """The components without weights to read; all if none has the variant."""
    parts = (of or family.of_files(present)).components
    if variant and not any(_has(present, part, variant) for part in parts):
        return list(parts)
    return [
        part
        for part in parts
        if not _has(present, part, _variant_of(part, variant, present))
    ]


def _complete_variants(present: Set[str]) -> list[str]:
    """Variants with which every component has weights."""
    named = [_NAMED.fullmatch(file.rpartition("/")[2]) for file in sorted(present)]
    known = {match[1] or match["index"] for match in named if match}
    known -= {"index"}
    return [found for found in ("", *sorted(known)) if not _lacking(present, found)]


def _find(folder: epath.Path, component: str, variant: str) -> str | None:
    names = _candidates(component, variants(folder, variant)[component])
    return next((x for x in names if (folder / component / x).exists()), None)


def _candidates(component: str, variant: str) -> list[str]:
    """File names of weights or their index, in the order of the library's search.

    diffusers looks for an index first, transformers for one file. The third name is
    that of a variant's index before diffusers 0.30.
    """
    plain, one = WEIGHTS[component], _file_name(component, variant)
    indices = [f"{plain}.index.json"]
    if variant:
        indices = [f"{plain}.index.{variant}.json", f"{plain}.{variant}.index.json"]
    return [one, *indices] if component in _TRANSFORMERS else [*indices, one]


def _file_name(component: str, variant: str) -> str:
    plain = WEIGHTS[component]
    return plain.replace(".", f".{variant}.") if variant else plain


def _shards(component: str, variant: str) -> list[str]:
    """Patterns of the names of shards, in the current and the earlier spelling."""
    stem = WEIGHTS[component].removesuffix(".safetensors")
    number = "-?????-of-?????"
    if not variant:
        return [f"{stem}{number}.safetensors"]
    return [
        f"{stem}.{variant}{number}.safetensors",
        f"{stem}{number}.{variant}.safetensors",
    ]
