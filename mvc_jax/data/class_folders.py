"""What the folder of a class is called where images are written as files.

It is the source's own name wherever a file system allows it; where one must change, it
still sorts as before, so that readers that number sorted folders (torchvision, Keras)
give each class the same number in the source and in what is written.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

_MAX_BYTES = 255
_RESERVED = ("", ".", "..", "metadata.jsonl")  # the last is a file beside the folders


def class_folder(name: str) -> str:
    """A valid name for the folder of a class: its own, or one with a hash."""
    return name if _is_valid(name) else next(_replacements(name, ""))


def class_folders(names: Sequence[str]) -> tuple[str, ...]:
    """Valid and distinct names of folders, which sort as `names` do.

    A name that no valid one can replace in order gets one that sorts elsewhere.
    """
    found: dict[str, str] = {name: name for name in names if _is_valid(name)}
    order = sorted(set(names))
    taken = set(found)
    for k, name in enumerate(order):
        if name in found:
            continue
        before = found[order[k - 1]] if k else ""
        after = next((found[x] for x in order[k + 1 :] if x in found), None)
        options = [x for x in _replacements(name, before) if x not in taken]
        sorted_ = [x for x in options if before < x and (after is None or x < after)]
        found[name] = (sorted_ or options)[0]
        taken.add(found[name])
    return tuple(found[name] for name in names)


def _is_valid(name: str) -> bool:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
    is_one_level = not set(name) & {"/", "\0"}
    return size <= _MAX_BYTES and is_one_level and name not in _RESERVED


def _replacements(name: str, before: str) -> Iterator[str]:
    """Valid names that may stand for an invalid one, the most readable first."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    printable = name.encode(errors="replace").decode()
    for mark in ("_", "-", ".", "0", " ", "~"):
        safe = re.sub(r"[/\0]", mark, printable)
        if safe in _RESERVED:
            safe = safe.replace(".", mark) or mark
        safe = f"{_cut(safe, _MAX_BYTES - 9)}-{digest}"
        if _is_valid(safe):
            yield safe
    for between in ("-", " ", "!", "\x01"):
        yield f"{_cut(before, _MAX_BYTES - 10)}{between}{digest}"


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")
