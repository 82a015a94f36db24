"""The caption file (`captions.jsonl`) and the prompt made from a caption."""

import bisect
from collections.abc import Callable, Sequence

from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError


def write_captions(
    path: epath.PathLike,
    captions: dict[str, str],
    *,
    captioner: str,
    version: str,
) -> None:
    """Writes one row an image: `{"id", "caption", "captioner", "version"}`."""
    stamp = {"captioner": captioner, "version": version}
    rows = [{"id": i, "caption": caption, **stamp} for i, caption in captions.items()]
    files.write_jsonl(path, rows)


def read_captions(path: epath.PathLike, ids: Sequence[str]) -> list[str]:
    """The captions of `ids`, in their order.

    Raises:
      UserError: an id has no caption; the first few are named.
    """
    try:
        captions = {row["id"]: str(row["caption"]) for row in files.read_jsonl(path)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            str(path),
            wanted='a line {"id": ..., "caption": ...} for each image',
            got=f"one that is not ({error})",
            fix="Mend that line.",
        ) from error
    missing = [i for i in ids if i not in captions]
    if missing:
        raise UserError(
            str(path),
            wanted=f"a caption for each of {len(ids)} images",
            got=f"none for {len(missing)}, e.g. {', '.join(missing[:3])}",
            fix="Add the rows or remove the caption folder to caption again.",
        )
    return [captions[i] for i in ids]


def readable(class_name: str) -> str:
    """`brain_tumor` -> `brain tumor`: a class name as one would write it."""
    return " ".join(class_name.replace("_", " ").split())


def class_prompt(class_type: str, class_name: str) -> str:
    """`"a photo of digit three"`: the part of the prompt that is never cut."""
    words = f"a photo of {class_type} {readable(class_name)}"
    return " ".join(words.split())


def prompt(
    caption: str,
    suffix: str,
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> str:
    """`"{caption}, {suffix}"`, the caption cut by words until it fits.

    The supplement combines a BLIP-2 caption with a class prompt; that the label must
    survive CLIP's context, so that it is the caption that is cut, is ours.

    Args:
      caption: any text; empty gives the class prompt alone.
      suffix: the class prompt.
      count_tokens: tokens of a text with its two markers (BOS and EOS).
      max_tokens: length of the text encoder's context.

    Raises:
      UserError: the class prompt alone does not fit.
    """
    words = caption.split()

    def with_words(count: int) -> str:
        kept = " ".join(words[:count]).rstrip(" ,.;")
        return f"{kept}, {suffix}" if kept else suffix

    # The longest that fits, by bisection; a caption may have thousands of words.
    most = bisect.bisect_right(
        range(1, len(words) + 1),
        max_tokens,
        key=lambda count: count_tokens(with_words(count)),
    )
    if count_tokens(suffix) > max_tokens:
        raise UserError(
            f"class prompt {suffix!r}",
            wanted=f"at most {max_tokens} tokens",
            got=f"{count_tokens(suffix)}",
            fix="Shorten config.data.class_type or the class name.",
        )
    return with_words(most)
