"""CLIP's tokenizer in all forms that its library has written.

Until 4.x transformers wrote `vocab.json` and `merges.txt`, and from 5 on it writes
`tokenizer.json` alone. Tokens that were added to the vocabulary, as textual inversion
does, are in `added_tokens.json` until 4.33, then in `tokenizer_config.json` or
`tokenizer.json`. The library's own class reads each form; the ids are its.
"""

import json
import tempfile
from collections.abc import Mapping

from etils import epath

from mvc_jax import files
from mvc_jax.checkpoints.pipeline_folder import (
    TOKENIZER_FILES,
    missing_of_tokenizer,
)
from mvc_jax.errors import UserError
from mvc_jax.models import tokenizer_release
from mvc_jax.models.flax_classes import transformers

_PARTS = ("vocab.json", "merges.txt")
_ADDED = "added_tokens.json"
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_FIX = "Copy the checkpoint's whole tokenizer folder."


def read(
    folder: epath.PathLike,
) -> tuple[transformers.CLIPTokenizerFast, dict[str, bytes]]:
    """Reads a tokenizer from its folder, local or remote.

    Returns:
      the tokenizer, and the content of its files by name.

    Raises:
      UserError: a file is missing or damaged.
    """
    folder = epath.Path(folder)
    found = {
        name: (folder / name).read_bytes()
        for name in TOKENIZER_FILES
        if (folder / name).exists()
    }
    if lacks := missing_of_tokenizer(found):
        raise UserError(
            str(folder),
            wanted="the files of CLIP's tokenizer",
            got=f"no {lacks[0]}",
            fix=_FIX,
        )
    with tempfile.TemporaryDirectory() as local:  # the library reads local files only
        try:
            for name, content in found.items():
                (epath.Path(local) / name).write_bytes(content)
            _, options = tokenizer_release.class_and_options(local)
            tokenizer = transformers.CLIPTokenizerFast.from_pretrained(local, **options)
            return tokenizer, found
        except Exception as error:  # the type that the library's Rust code raises
            raise UserError(
                str(folder),
                wanted="the files of CLIP's tokenizer",
                got=f"damaged ones ({error})",
                fix=_FIX,
            ) from error


def with_length(found: Mapping[str, bytes], length: int) -> dict[str, bytes]:
    """A tokenizer's files in which `model_max_length` is `length`."""
    config = json.loads(found[_CONFIGS[0]]) if _CONFIGS[0] in found else {}
    config = {"tokenizer_class": "CLIPTokenizer"} | config
    text = json.dumps(config | {"model_max_length": length}, indent=2)
    return {**found, _CONFIGS[0]: text.encode()}


def _with_earlier_names(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files in which release 5's list of special tokens has its name in 4.x."""
    config = json.loads(found.get(_CONFIGS[0], b"{}"))
    if not isinstance(config.get("extra_special_tokens"), list):
        return dict(found)
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return {**found, _CONFIGS[0]: json.dumps(config, indent=2).encode()}


def write(
    folder: epath.Path,
    tokenizer: transformers.CLIPTokenizerFast,
    found: Mapping[str, bytes],
) -> list[str]:
    """Writes a tokenizer so that any release of its library reads it.

    Args:
      folder: to write to.
      tokenizer: to be written.
      found: the files that it was read from, which are copied. Where `vocab.json` or
        `merges.txt` is not among them it is made, since releases before 5 need both;
        and a list that they cannot read is written under its earlier name. With {} all
        are made.

    Returns:
      the names of the files.
    """
    content = {}
    if not {*_PARTS} <= found.keys():
        made = (*_PARTS, _ADDED) if found else (*_PARTS, _ADDED, *_CONFIGS)
        with tempfile.TemporaryDirectory() as local:
            tokenizer.save_pretrained(local)
            for path in map(epath.Path(local).joinpath, made):
                if path.exists():
                    content[path.name] = path.read_bytes()
    content |= _with_earlier_names(found)
    for name, data in content.items():
        files.write_bytes(folder / name, data)
    return list(content)
