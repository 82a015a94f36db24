"""The tokens of prompts, also of words that were added to a vocabulary as several.

Textual inversion of three vectors adds `<my-cat>`, `<my-cat>_1` and `<my-cat>_2`, and
PyTorch's pipelines read `<my-cat>` as all of them (`maybe_convert_prompt` of diffusers'
`TextualInversionLoaderMixin`). So do we; where a prompt has them all written out, it
stays as it is, of which theirs would repeat a part.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from mvc_jax.models.flax_classes import transformers

Offsets = list[tuple[int, int]]


def padded(
    tokenizer: transformers.CLIPTokenizerFast, texts: Sequence[str], length: int
) -> Int[np.ndarray, "B L"]:
    """Token ids with BOS, EOS and padding to `length`; longer texts are truncated."""
    rows = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
    for row, (ids, _) in zip(rows, encoded(tokenizer, texts, length), strict=True):
        row[: len(ids)] = ids
    return rows


def encoded(
    tokenizer: transformers.CLIPTokenizerFast,
    texts: Sequence[str],
    length: int | None = None,
) -> Iterator[tuple[list[int], Offsets]]:
    """Of each text the ids, with BOS and EOS, and the characters of each token.

    Args:
      tokenizer: CLIP's.
      texts: any number.
      length: at most so many tokens are left of each, the last of them EOS.
    """
    further = _further(tokenizer)
    found = tokenizer(
        list(texts),
        truncation=length is not None and not further,
        max_length=length,
        return_offsets_mapping=True,
        verbose=False,
    )
    rows = zip(found["input_ids"], found["offset_mapping"], strict=True)
    for ids, offsets in rows:
        if further:
            ids, places = zip(*_expanded(ids, further), strict=True)
            offsets = [offsets[place] for place in places]
        if length is not None and len(ids) > length:
            ids, offsets = ([*row[: length - 1], row[-1]] for row in (ids, offsets))
        yield list(ids), offsets


def _further(tokenizer: transformers.CLIPTokenizerFast) -> dict[int, list[int]]:
    """Id of an added token -> those of its further vectors, if it has any."""
    added = tokenizer.get_added_vocab()
    found = {}
    for token, id_ in added.items():
        rest = (added.get(f"{token}_{n}") for n in itertools.count(1))
        if known := list(itertools.takewhile(lambda other: other is not None, rest)):
            found[id_] = known
    return found


def _expanded(
    ids: Sequence[int], further: dict[int, list[int]]
) -> Iterator[tuple[int, int]]:
    """Ids with those of further vectors, and the place in `ids` that each is of."""
    for place, id_ in enumerate(ids):
        yield id_, place
        rest = further.get(id_, [])
        if list(ids[place + 1 : place + 1 + len(rest)]) != rest:
            yield from ((other, place) for other in rest)
