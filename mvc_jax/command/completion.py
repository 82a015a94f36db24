"""`mvc-jax completion`: what a shell proposes while a command is typed.

A shell calls it with the command, the word that is typed and the one before it.
"""

import os
from collections.abc import Iterator, Sequence

from etils import epath

from mvc_jax import files
from mvc_jax.command import pipeline
from mvc_jax.configs import common, fields
from mvc_jax.errors import UserError

_BASH = "complete -o default -o nospace -C 'mvc-jax completion' mvc-jax"
_ZSH = f"autoload -Uz compinit bashcompinit && compinit && bashcompinit && {_BASH}"
_SHELLS = {"bash": _BASH, "zsh": _ZSH}
_HELP = """Completes commands, flags, fields and their values. A line for ~/.bashrc:
    eval "$(mvc-jax completion bash)"
and for ~/.zshrc:
    eval "$(mvc-jax completion zsh)"
"""
_NO_CONFIGS = ("__init__", "arguments", "common", "fields", "presets")
SUBCOMMANDS = (
    "train",
    "repeat",
    "sweep",
    "compare",
    "push",
    "report",
    "doctor",
    "completion",
)
_FLAGS = ("--config=", "--workdir=", "--dry_run ", "--help ", "--help=")
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
    "completion": (),
}
_OF_FLAGS = {  # flag -> what its value may be
    "--redo": ("all", *pipeline.STAGES),
    "--help": tuple(common.FIELDS.fields),
    "--what": ("dataset", "model", "classifiers"),
    "--config.stages": ("all", *pipeline.STAGES),
}


def run(argv: Sequence[str]) -> int:
    """Prints what a shell asks for: its set-up, or the proposals, one a line.

    Args:
      argv: the name of the program, "completion", and the name of a shell; or, as a
        shell calls it, the command, the word that is typed and the one before it.

    Raises:
      UserError: the shell is unknown.
    """
    line = os.environ.get("COMP_LINE")
    if line is not None:
        line = line[: int(os.environ.get("COMP_POINT", len(line)))]
        word = argv[3] if len(argv) > 3 else line.split(" ")[-1]  # zsh passes none
        print("\n".join(proposals(line, word)))
        return 0
    name = argv[2] if len(argv) == 3 else "--help"
    if name.lstrip("-") in ("help", "h"):
        print(_HELP, end="")
    elif name in _SHELLS:
        print(_SHELLS[name])
    else:
        raise UserError(
            "completion",
            wanted=" or ".join(_SHELLS),
            got=name,
            fix="`mvc-jax completion --help` has a line for each.",
        )
    return 0


def proposals(line: str, word: str) -> list[str]:
    """What a word may become.

    Args:
      line: all that is typed, up to the cursor.
      word: its last word, as the shell divides it: bash at blanks and at "=", zsh at
        blanks.
    """
    words = line.split()
    typed = "" if line.endswith(" ") or len(words) < 2 else words[-1]
    named = words[1] if len(words) > 1 and words[1] in SUBCOMMANDS else ""
    flag, equals, value = typed.partition("=")
    if equals:
        return _of_flag(flag, value, whole=word.startswith("-"))
    if named == "sweep" and words[-2 if typed else -1] == "--vary":
        return [f"{x}=" for x in _names() if x.startswith(typed)]
    if named == "completion":
        return [f"{x} " for x in _SHELLS if x.startswith(typed)]
    found = []
    if len(words) <= (2 if typed else 1):
        found += [f"{name} " for name in SUBCOMMANDS]
    if typed.startswith("-"):
        found += [*_FLAGS, *_MORE[named], *(f"--config.{x}=" for x in _names())]
    return [x for x in found if x.startswith(word)]


def _of_flag(flag: str, value: str, *, whole: bool) -> list[str]:
    """What the value of a flag may become, of a list its last item.

    Args:
      flag: before the "=".
      value: what is typed of it.
      whole: whether the shell replaces the flag, too, and proposes no files then.
    """
    known, is_list = _values(flag)
    first, comma, last = value.rpartition(",") if is_list else ("", "", value)
    found = [f"{first}{comma}{x}" for x in known if x.rstrip().startswith(last)]
    if whole and not found:
        start, slash, name = value.rpartition("/")
        folder = epath.Path(f"{start}{slash}" or ".")
        near = files.matching(folder, "*") if folder.is_dir() else []
        near = sorted(path for path in near if path.name.startswith(name))
        ends = ["/" if path.is_dir() else " " for path in near]
        found = [
            f"{start}{slash}{path.name}{end}"
            for path, end in zip(near, ends, strict=True)
        ]
    return [f"{flag}={x}" if whole else x for x in found]


def _names(section: fields.Section = common.FIELDS, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for key, part in section.fields.items():
        if isinstance(part, fields.Section):
            yield from _names(part, f"{prefix}{key}.")
        else:
            yield prefix + key


def _values(flag: str) -> tuple[list[str], bool]:
    """What a flag may be, [] where it is not one of a few; and whether it is a list.

    What cannot go on ends with a blank.
    """
    if flag == "--config":  # of an installed copy, which has no such folder
        folder = epath.Path(common.__file__).parent
        stems = sorted(path.stem for path in files.matching(folder, "*.py"))
        return [f"configs/{x}.py" for x in stems if x not in _NO_CONFIGS], False
    if flag in _OF_FLAGS:
        return [*_OF_FLAGS[flag]], flag != "--help"
    name = flag.removeprefix("--config.")
    if name not in {*_names()}:
        return [], False
    field = common.FIELDS.find(name)
    if field.kind is tuple:
        return [*field.choices], True
    known = ("True", "False") if field.kind is bool else field.choices
    return [f"{x} " for x in known], False
