"""The caption file (`captions.jsonl`) and the prompt made from a caption."""

import bisect
import dataclasses
import json
import re
import string
from collections.abc import Callable, Collection, Sequence

from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError, require

PROMPT = "{caption}, a photo of {class_type} {label}"


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
    captions = _read(path)
    missing = [i for i in ids if i not in captions]
    if missing:
        raise UserError(
            str(path),
            wanted=f"a caption for each of {len(ids)} images",
            got=f"none for {len(missing)}, e.g. {', '.join(missing[:3])}",
            fix='Add a row for each; "caption": "" leaves the class prompt alone.',
            details=missing,
        )
    return [captions[i] for i in ids]


def read_own(
    path: epath.PathLike, ids: Sequence[str], known: Collection[str]
) -> list[str]:
    """`read_captions` of a file that a user wrote, or edited and hands back.

    Args:
      path: of the file.
      ids: the images to caption.
      known: ids of every image of the source; rows of images that are not in this
        run's split are left alone, others are mistakes.

    Raises:
      UserError: an id is unknown, or has no caption.
    """
    require(
        epath.Path(path).is_file(),
        "config.caption.file",
        wanted='a file of lines {"id": ..., "caption": ...}',
        got=f"{str(path)!r}, no such file",
        fix="The stage caption writes one: <workdir>/caption/captions.jsonl.",
    )
    unknown = [i for i in _read(path) if i not in known]
    if unknown:
        raise UserError(
            str(path),
            wanted="ids of images of the source",
            got=f"{len(unknown)} that it has not, e.g. {', '.join(unknown[:3])}",
            fix="Mend or delete these rows.",
            details=unknown,
        )
    return read_captions(path, ids)


def _read(path: epath.PathLike) -> dict[str, str]:
    """id -> caption of a caption file; each id at most once."""
    captions: dict[str, str] = {}
    try:
        lines = epath.Path(path).read_text().lstrip("\ufeff").split("\n")
    except ValueError as error:
        raise _not_a_row(path, 0, error) from error
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            id_, caption = row["id"], row["caption"]
            if not isinstance(id_, str) or not isinstance(caption, str | None):
                raise TypeError("id and caption must be texts")
        except (ValueError, KeyError, TypeError) as error:
            raise _not_a_row(path, n, error) from error
        require(
            captions.setdefault(id_, caption or "") == (caption or ""),
            f"{path}, line {n}",
            wanted="one caption for each image",
            got=f"a second one for {id_!r}",
            fix="Delete one of the two.",
        )
    return captions


def _not_a_row(path: epath.PathLike, line: int, error: Exception) -> UserError:
    return UserError(
        f"{path}, line {line}",
        wanted='a line {"id": ..., "caption": ...} for each image',
        got=f"one that is not ({type(error).__name__}: {error})",
        fix="Mend that line.",
    )


def readable(class_name: str) -> str:
    """`brain_tumor` -> `brain tumor`: a class name as one would write it."""
    return " ".join(class_name.replace("_", " ").split())


def clean(caption: str, *, collapse: bool = True) -> str:
    """A caption as a person would write it.

    Whitespace becomes single spaces, control characters go. With `collapse`, a phrase
    that a captioner repeats at once is said once: `"a brain, a brain and a brain"` ->
    `"a brain"`.
    """
    printable = (c if c.isprintable() else " " for c in str(caption))
    words = "".join(printable).split()
    return " ".join(_said_once(words) if collapse else words).rstrip(" ,;:")


def _said_once(words: list[str]) -> list[str]:
    """Drops every phrase that stands right after itself, also behind an `and`."""
    plain = [word.strip(".,;:!?").casefold() for word in words]
    kept: list[int] = []
    i = 0
    while i < len(words):
        skip = 0
        for joint in (0, 1):  # an "and" between the two
            if joint and plain[i] != "and":
                continue
            for n in range(min(len(kept), len(words) - i - joint), 0, -1):
                before = [plain[k] for k in kept[-n:]]
                if before == plain[i + joint : i + joint + n] and any(before):
                    skip = joint + n
                    break
        if skip:
            i += skip
        else:
            kept.append(i)
            i += 1
    return [words[k] for k in kept]


def check_template(template: str, name: str, fields: Collection[str]) -> None:
    """Raises a `UserError` unless `template` has `{label}` and only known fields."""
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(template)]
        found = [field for field in found if field is not None]
    except ValueError as error:
        found = [str(error)]
    unknown = [field for field in found if field not in fields]
    twice = [field for field in set(found) if found.count(field) > 1]
    require(
        not unknown and not twice and "label" in found,
        name,
        wanted=f"a text with {{label}} and, if you like, others of "
        f"{', '.join(f'{{{field}}}' for field in fields)}, each once",
        got=repr(template),
        fix=f"The default is {PROMPT!r}.",
    )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and where the caption stands in it.

    Attributes:
      text: all of it.
      before: what stands before the caption.
      caption: as much of it as fitted.
    """

    text: str
    before: str
    caption: str


def fill(template: str, caption: str, *, class_type: str, class_name: str) -> Prompt:
    """The prompt of a caption; without one, the class prompt alone.

    `"{caption}, a photo of {class_type} {label}"` is the supplement's, "a photo of
    class type class label", put behind the caption.
    """
    if "{caption}" not in template:
        caption = ""
    if not caption:  # and not the comma behind or before it
        template = re.sub(
            r"^\s*\{caption\}\s*[,;:]?|[,;:]?\s*\{caption\}", "", template
        )
    before, _, after = template.partition("{caption}")
    if not caption:
        before, after = "", template
    values = {"class_type": class_type, "label": readable(class_name)}
    before, after = (part.format(**values) for part in (before, after))
    before, after = (re.sub(r"\s+", " ", part) for part in (before, after))
    before, after = before.lstrip(), after.rstrip()
    text = f"{before}{caption}{after}".strip()
    return Prompt(text, before, caption)


def prompt(
    template: str,
    caption: str,
    *,
    class_type: str,
    class_name: str,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> Prompt:
    """`fill`, the caption cut by words until it fits.

    The supplement combines a BLIP-2 caption with a class prompt; that the label must
    survive CLIP's context, so that it is the caption that is cut, is ours.

    Args:
      template: with `{caption}`, `{class_type}` and `{label}`.
      caption: any text; empty gives the class prompt alone.
      class_type: what the classes are kinds of, e.g. `"digit"`; may be empty.
      class_name: as the source writes it.
      count_tokens: tokens of a text with its two markers (BOS and EOS).
      max_tokens: length of the text encoder's context.

    Raises:
      UserError: the class prompt alone does not fit.
    """
    words = caption.split()

    def with_words(count: int) -> Prompt:
        kept = " ".join(words[:count]).rstrip(" ,.;")
        return fill(template, kept, class_type=class_type, class_name=class_name)

    # The longest that fits, by bisection; a caption may have thousands of words.
    most = bisect.bisect_right(
        range(1, len(words) + 1),
        max_tokens,
        key=lambda count: count_tokens(with_words(count).text),
    )
    alone = with_words(0).text
    if count_tokens(alone) > max_tokens:
        raise UserError(
            f"class prompt {alone!r}",
            wanted=f"at most {max_tokens} tokens",
            got=f"{count_tokens(alone)}",
            fix="Shorten config.data.class_type, config.data.prompt or the class name.",
        )
    return with_words(most)
