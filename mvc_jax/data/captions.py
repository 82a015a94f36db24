"""The caption file (`captions.jsonl`), and prompts built from captions."""

import bisect
import collections
import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from etils import epath

from mvc_jax import files
from mvc_jax.errors import UserError

PROMPT = "{caption}, a photo of {class_type} {label}"
# Not printable, but part of a word: joiners (Persian, Indic scripts, emoji families),
# and the tags that spell the flag of a region.
_KEPT = {"\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))}
# Not printable, but within words: soft hyphens, marks of direction, and the like.
_NO_WIDTH = {"\u00ad", "\u061c", "\u180e", "\u200e", "\u200f", "\ufeff"}
_NO_WIDTH |= {*map(chr, (*range(0x202A, 0x202F), *range(0x2060, 0x2070)))}
_NOT_SHOWN = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")  # categories of Unicode
_SKIN_TONES = {*map(chr, range(0x1F3FB, 0x1F400))}
_FLAG_LETTERS = {*map(chr, range(0x1F1E6, 0x1F200))}  # two of them are one flag
# Where a caption is cut: between words, behind a comma between two tags, and in scripts
# that are written without spaces between characters.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_PIECE = re.compile(
    rf"\s*(?:[{_UNSPACED}]|[^\s,;|，、。；{_UNSPACED}]+|.)[,;|，、。；]*"
)
LONGEST = 77  # tokens of a prompt, CLIP's, where they have to be limited
_MAX_CLASSES = 5  # that are named
_TRAILING = " ,.;|，、。；"


def write_captions(
    path: epath.PathLike,
    captions: dict[str, str],
    *,
    captioner: str,
    version: str,
) -> None:
    """Writes one row per image: `{"id", "caption", "captioner", "version"}`."""
    origin = {"captioner": captioner, "version": version}
    rows = [{"id": i, "caption": caption, **origin} for i, caption in captions.items()]
    files.write_jsonl(path, rows)


def read_captions(path: epath.PathLike, ids: Sequence[str]) -> list[str]:
    """Reads the captions of `ids`, in that order.

    Raises:
      UserError: some ids have no caption; the message names the first few.
    """
    captions = _read(path)
    missing = [i for i in ids if i not in captions]
    if missing:
        raise UserError(
            str(path),
            wanted=f"a caption for each of {len(ids)} images",
            got=f"none for {len(missing)}, e.g. {', '.join(missing[:3])}",
            fix='Add a row for each; with "caption": "" the prompt is the class alone.',
            details=missing,
        )
    return [captions[i] for i in ids]


def read_user_captions(
    path: epath.PathLike, ids: Sequence[str], known: Collection[str]
) -> list[str]:
    """Like `read_captions`, for a file that a user wrote or edited.

    Args:
      path: the file.
      ids: the images to caption.
      known: ids of every image of the source. Rows for images outside this run's split
        are ignored; rows with any other id are errors.

    Raises:
      UserError: the file is missing, or an id is unknown or has no caption.
    """
    if not epath.Path(path).is_file():
        raise UserError(
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
            got=f"{len(unknown)} unknown ids, e.g. {', '.join(unknown[:3])}",
            fix="Fix or delete these rows.",
            details=unknown,
        )
    return read_captions(path, ids)


def _read(path: epath.PathLike) -> dict[str, str]:
    """Caption by id; each id occurs at most once."""
    captions: dict[str, str] = {}
    try:
        lines = epath.Path(path).read_text().lstrip("\ufeff").split("\n")
    except ValueError as error:
        raise _malformed(path, 0, error) from error
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "file_name" in row and "id" not in row:  # Hugging Face's metadata.jsonl
                row = {"id": row["file_name"], "caption": row.get("text")} | row
            id_, caption = row["id"], row["caption"]
            if not isinstance(id_, str) or not isinstance(caption, str | None):
                raise TypeError("id and caption must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise _malformed(path, n, error) from error
        if captions.setdefault(id_, caption or "") != (caption or ""):
            raise UserError(
                f"{path}, line {n}",
                wanted="one caption per image",
                got=f"a second one for {id_!r}",
                fix="Delete one of the two.",
            )
    return captions


def _malformed(path: epath.PathLike, line: int, error: Exception) -> UserError:
    return UserError(
        f"{path}, line {line}",
        wanted='a line {"id": ..., "caption": ...} per image',
        got=f"{type(error).__name__}: {error}",
        fix="Fix that line.",
    )


def readable(class_name: str) -> str:
    """Turns a class name into words: `brain_tumor` -> `brain tumor`."""
    return " ".join(class_name.replace("_", " ").split())


def clean(caption: str, *, collapse: bool = True) -> str:
    """Normalises a caption.

    Whitespace becomes single spaces, and control characters and trailing punctuation
    are removed; joiners, which are part of words and of emoji, stay. With `collapse`, a
    phrase that the captioner repeats immediately is kept once: `"a brain, a brain and a
    brain"` -> `"a brain"`.
    """
    visible = (c for c in str(caption) if c not in _NO_WIDTH)
    shown = (c if _is_shown(c) or c in _KEPT else " " for c in visible)
    words = [w for w in "".join(shown).split() if {*w} - _KEPT]
    return " ".join(_collapse_repeats(words) if collapse else words).rstrip(" ,;:")


def _is_shown(c: str) -> bool:
    """Whether a character is seen; also one that is newer than Python's Unicode."""
    is_none = ord(c) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(c) <= 0xFDEF
    return unicodedata.category(c) not in _NOT_SHOWN and not is_none


def _collapse_repeats(words: list[str]) -> list[str]:
    """Drops every phrase that directly follows itself, optionally after an `and`."""
    plain = [word.strip(".,;:!?").casefold() for word in words]
    kept: list[int] = []
    i = 0
    while i < len(words):
        skip = 0
        for joint in (0, 1):  # words between the two: none, or an "and"
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


def check_template(template: str, name: str, fields: Sequence[str]) -> None:
    """Checks a template: `{label}` and optionally other fields, each once.

    Format specs (`{label:d}`), conversions (`{label!r}`), attributes, positional fields
    and literal braces are refused.

    Args:
      template: the template.
      name: of the config field, for the message.
      fields: the known fields, `label` among them.

    Raises:
      UserError: the template does not have this form.
    """
    pattern = rf"\{{({'|'.join(fields)})\}}"
    found = re.findall(pattern, template)
    rest = re.sub(pattern, "", template)
    is_valid = "label" in found and len(set(found)) == len(found)
    if not is_valid or "{" in rest or "}" in rest:
        others = [f"{{{field}}}" for field in fields if field != "label"]
        raise UserError(
            name,
            wanted=f"a text with {{label}} and optionally {' and '.join(others)}, each "
            "at most once, and no other braces",
            got=repr(template),
            fix="Write e.g. 'a photo of {class_type} {label}'.",
        )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and the position of the caption in it.

    Attributes:
      text: the whole prompt.
      before: the part of it that precedes the caption.
      caption: as much of the caption as fits.
      kept: of the caption: `"all"`, a `"part"` or, though there is one, `"none"`.
    """

    text: str
    before: str
    caption: str
    kept: str = "all"


def fill(template: str, caption: str, *, class_type: str, class_name: str) -> Prompt:
    """Fills in a template; without a caption, the class prompt alone.

    The default `"{caption}, a photo of {class_type} {label}"` appends the supplement's
    "a photo of class type class label" to the caption.

    Args:
      template: as accepted by `check_template`.
      caption: any text; if empty, the punctuation that joins it is dropped, too.
      class_type: what the classes are kinds of, e.g. `"digit"`; may be empty.
      class_name: as the source writes it.
    """
    if "{caption}" not in template:
        caption = ""
    if not caption:
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
    """Fills in a template with as much of the caption as fits.

    The supplement combines a BLIP-2 caption with a class prompt. That the caption is
    truncated, so that the label survives CLIP's context length, is our choice. It is
    cut between words, behind a comma within one, or between the characters of a script
    without spaces; where the next of these pieces would not even fit alone, or nothing
    is before it, within it.

    Args:
      template: with `{caption}`, `{class_type}` and `{label}`.
      caption: any text; if empty, the prompt is the class prompt alone.
      class_type: what the classes are kinds of, e.g. `"digit"`; may be empty.
      class_name: as the source writes it.
      count_tokens: counts the tokens of a text, BOS and EOS included.
      max_tokens: the text encoder's context length.

    Raises:
      UserError: the class prompt alone does not fit.
    """
    caption = " ".join(caption.split())

    def made(text: str) -> Prompt:
        text = text.rstrip(_TRAILING)
        return fill(template, text, class_type=class_type, class_name=class_name)

    def fits(text: str) -> bool:
        return count_tokens(made(text).text) <= max_tokens

    if not fits(""):
        class_prompt = made("").text
        raise UserError(
            f"class prompt {class_prompt!r}",
            wanted=f"at most {max_tokens} tokens",
            got=f"{count_tokens(class_prompt)}",
            fix="Shorten config.data.class_type, config.data.prompt or the class name; "
            "or raise config.pretrain.context_length, where the base is made here.",
        )
    if fits(caption):
        return made(caption)
    ends = [found.end() for found in _PIECE.finditer(caption)]
    ends = [i for i in ends if i == len(caption) or _is_between(caption, i)]
    end = _longest(caption, ends, fits)
    after = next(stop for stop in ends if stop > end)
    if not made(caption[:end]).caption or not fits(caption[end:after]):
        inside = [i for i in range(end + 1, after) if _is_between(caption, i)]
        end = _longest(caption, inside, fits, at_least=end)
    found = made(caption[:end])
    kept = "part" if found.caption else "none"
    return dataclasses.replace(found, kept=kept)


def _longest(
    text: str, ends: Sequence[int], fits: Callable[[str], bool], at_least: int = 0
) -> int:
    """The last of these ends up to which a text fits; `at_least` if none does."""
    # Bisection, since a caption may have thousands of words.
    count = bisect.bisect_left(ends, True, key=lambda end: not fits(text[:end]))
    while count and not fits(text[: ends[count - 1]]):
        count -= 1  # a longer text may have fewer tokens
    return ends[count - 1] if count else at_least


def _is_between(text: str, i: int) -> bool:
    """Whether no character as it is read is cut apart before `text[i]`."""
    joins = text[i] in _KEPT | _SKIN_TONES
    joins |= unicodedata.category(text[i]) in ("Mn", "Mc", "Me")
    if text[i] in _FLAG_LETTERS:
        start = i
        while start and text[start - 1] in _FLAG_LETTERS:
            start -= 1
        joins |= (i - start) % 2 == 1
    return not joins and text[i - 1] not in _KEPT


CutCaptions = dict[str, collections.Counter[str]]


def cut_by_class(rows: Sequence[Mapping[str, Any]]) -> CutCaptions:
    """How many captions do not fit into their prompts.

    Args:
      rows: of `prompts.jsonl`.

    Returns:
      `part`, those that were cut, and `none`, those that were lost: class -> number.
    """
    return {
        kept: collections.Counter(
            row["class_name"] for row in rows if row.get("caption_kept") == kept
        )
        for kept in ("part", "none")
    }


def counted(cut: CutCaptions, kept: str) -> str:
    """As in `12 captions were cut (cat 10, dog 2)`; the largest classes are named."""
    counts = cut[kept]
    named = [f"{name} {n}" for name, n in counts.most_common(_MAX_CLASSES)]
    rest = len(counts) - len(named)
    more = f" and {rest} more classes" if rest else ""
    what = {"part": "cut", "none": "lost"}[kept]
    return f"{counts.total()} captions were {what} ({', '.join(named)}{more})"


def class_texts(class_names: Sequence[str], class_type: str) -> list[str]:
    """`"a photo of {class_type} {class name}"` of each class, for zero-shot labels."""
    names = map(readable, class_names)
    return [f"a photo of {f'{class_type} {name}'.strip()}" for name in names]
