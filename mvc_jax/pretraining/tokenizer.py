"""A small byte-pair tokenizer in CLIP's file format, for the small base."""

import json
from collections.abc import Iterable
from typing import Any

from etils import epath
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from mvc_jax import files

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_SETTINGS = "tokenizer_config.json"
_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's pre-tokenizer
)


def train(
    folder: epath.PathLike,
    texts: Iterable[str],
    *,
    vocab_size: int,
    max_length: int,
    pad_token: str = EOS,
) -> None:
    """Trains merges on `texts` and writes a tokenizer folder that CLIP's class reads.

    Args:
      folder: where `vocab.json`, `merges.txt`, `tokenizer_config.json` and
        `special_tokens_map.json` are written.
      texts: the corpus.
      vocab_size: at least 514: every byte twice (inside and at the end of a word), BOS
        and EOS; the rest are merges.
      max_length: context length of the text encoder, including BOS and EOS.
      pad_token: a token of the vocabulary.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = _train_merges(texts, vocab_size - 2, alphabet)
    merges = merges[: vocab_size - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *(f"{a}</w>" for a in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}

    folder = epath.Path(folder)
    files.write_text(
        folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    files.write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    special = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": pad_token,
        "unk_token": EOS,
    }
    files.write_json(folder / "special_tokens_map.json", special)
    settings = {"model_max_length": max_length, "tokenizer_class": "CLIPTokenizer"}
    files.write_json(folder / _SETTINGS, {**special, **settings})


def set_length(folder: epath.PathLike, max_length: int) -> None:
    """Sets the context length of a tokenizer folder that `train` wrote."""
    path = epath.Path(folder) / _SETTINGS
    files.write_json(path, files.read_json(path) | {"model_max_length": max_length})


def longest(read: Any, texts: Iterable[str], *, most: int) -> int:
    """Tokens of the longest of some texts, BOS and EOS included, but not above `most`.

    Args:
      read: transformers' tokenizer.
      texts: whole prompts.
      most: longer ones will be truncated.
    """
    ids = read(sorted({*texts}), truncation=False, verbose=False)["input_ids"]
    return min(max(map(len, ids)), most)


def _train_merges(
    texts: Iterable[str], vocab_size: int, alphabet: list[str]
) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
