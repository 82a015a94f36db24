"""Tokenizer folders of transformers 5, for the pinned release, which is older."""

import json
import pathlib
from typing import Any


def class_and_options(folder: str) -> tuple[str, dict[str, Any]]:
    """How the pinned release reads a tokenizer folder on a local disk.

    Release 5 calls a tokenizer that is nothing but its `tokenizer.json` a
    TokenizersBackend, which was PreTrainedTokenizerFast before; and its list
    `extra_special_tokens` was `additional_special_tokens`.

    Returns:
      the name of the class in transformers, and options of its `from_pretrained`.

    Raises:
      ValueError: its tokenizer_config.json is damaged.
    """
    path = pathlib.Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds no object")
    name, options = "AutoTokenizer", {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        name = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):
        options = {"additional_special_tokens": extra, "extra_special_tokens": {}}
    return name, options
