"""`mvc-jax completion`: what a shell proposes while a command is typed.

bash calls it with the word that is typed and the one before it:
    complete -o default -o nospace -C 'mvc-jax completion' mvc-jax
"""

import os
from collections.abc import Iterator, Sequence

from mvc_jax.configs import common, fields

SUBCOMMANDS = ("train", "repeat", "sweep", "compare", "push", "report", "doctor")
_FLAGS = ("--config=", "--workdir=", "--dry_run ", "--help ")
_OF_TRAIN = ("--verify ", "--redo=", "--from=", "--version ")
_MORE = {  # subcommand -> its own flags
    "": _OF_TRAIN,
    "train": _OF_TRAIN,
    "repeat": ("--seeds=", *_OF_TRAIN),
    "sweep": ("--vary ", *_OF_TRAIN),
    "compare": ("--out=",),
    "push": (
        "--to=",
        "--what=",
        "--set=",
        "--license=",
        "--with_real ",
        "--private ",
        "--update ",
    ),
    "doctor": (),
    "report": (),
}


def run(argv: Sequence[str]) -> int:
    """Prints the proposals, one a line; see `proposals`."""
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT", len(line)))]
    word = argv[3] if len(argv) > 3 else ""
    print("\n".join(proposals(line, word)))
    return 0


def proposals(line: str, word: str) -> list[str]:
    """What a word may become.

    Args:
      line: all that is typed, up to the cursor.
      word: its last word, as the shell divides it: at blanks and at "=".
    """
    words = line.split()
    typed = "" if line.endswith(" ") or len(words) < 2 else words[-1]
    named = words[1] if len(words) > 1 and words[1] in SUBCOMMANDS else ""
    flag, equals, value = typed.partition("=")
    if equals:  # of which the shell replaces what is behind it
        return [x + " " for x in _values(flag) if x.startswith(value)]
    found = []
    if len(words) <= (2 if typed else 1):
        found += [f"{name} " for name in SUBCOMMANDS]
    if typed.startswith("-"):
        found += [*_FLAGS, *_MORE[named], *(f"--config.{x}=" for x in _names())]
    return [x for x in found if x.startswith(word)]


def _names(section: fields.Section = common.FIELDS, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for key, part in section.fields.items():
        if isinstance(part, fields.Section):
            yield from _names(part, f"{prefix}{key}.")
        else:
            yield prefix + key


def _values(flag: str) -> tuple[str, ...]:
    """What a flag may be; () where it is not one of a few."""
    name = flag.removeprefix("--config.")
    if name not in {*_names()}:
        return ()
    field = common.FIELDS.find(name)
    return ("True", "False") if field.kind is bool else field.choices
