"""The argument of a config: what follows the colon of `--config=FILE:ARGUMENT`."""

import difflib
from collections.abc import Mapping, Sequence

from mvc_jax.errors import UserError

_ARGUMENT = "--config=FILE:ARGUMENT"
_NAMES = {  # of arguments -> (placeholder, example)
    "path": ("FOLDER", "/data/parts"),
    "class_type": ("WORDS", "part"),
    "size": ("PIXELS", "256"),
    "per_class": ("COUNT", "50"),
    "pool": ("COUNT", "2000"),
    "model": ("NAME", "wrn50_2"),
    "preset": ("NAME", "fast"),
    "pretrain": ("NAME", "small64"),
    "data": ("NAME", "brain_tumor"),
    "base": ("FOLDER", "/data/caltech101"),
    "weights": ("PATH", "/weights/efficientnet_lite0"),
    "family": ("NAME", "sdxl"),
}
_OTHER = ("VALUE", "VALUE")  # for names of a user's own config
_NAMED = ("model", "preset", "pretrain", "data", "family")
_WITHOUT_COMMAS = ("size", "per_class", "pool", *_NAMED)


def parse_argument(
    argument: str,
    *,
    known: Sequence[str] = (),
    needed: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> dict[str, str]:
    """Parses `"path=/data/a,b,size=256"` to `{"path": "/data/a,b", "size": "256"}`.

    In a text, such as a path, only a comma before a known name separates.

    Args:
      argument: what follows the colon of `--config=FILE:ARGUMENT`.
      known: names that take a value.
      needed: those of them that are required.
      flags: names without a value; given flags have the value "".

    Raises:
      UserError: a part is unknown, has no value or is repeated, or one is missing.
    """
    given: dict[str, str] = {}
    last = ""  # the name whose value a comma may continue
    for part in argument.split(",") if argument else []:
        name, equals, value = part.partition("=")
        is_ours = part in flags or (name in known and equals)
        if is_ours and name not in given and (value or part in flags):
            given[name] = value
            last = "" if name in flags or name in _WITHOUT_COMMAS else name
        elif last and not is_ours:
            given[last] += f",{part}"
        else:
            raise _bad_part(part, given, known, needed, flags)
    if any(name not in given for name in needed):
        raise _bad_part(argument, given, known, needed, flags)
    return given


def whole_number(
    given: Mapping[str, str], name: str, default: int, *, minimum: int = 0
) -> int:
    """The value of a parsed argument as a whole number.

    Raises:
      UserError: it is not one, or below `minimum`.
    """
    text = given.get(name, str(default))
    if not text.isdecimal() or int(text) < minimum:
        wanted = f"a whole number of at least {minimum} as {name}"
        raise bad_value(given, name, wanted)
    return int(text)


def choice(
    given: Mapping[str, str], name: str, choices: Sequence[str], default: str = ""
) -> str:
    """The value of a parsed argument, which must be one of `choices` or absent.

    Raises:
      UserError: it is something else.
    """
    if name in given and given[name] not in choices:
        raise bad_value(given, name, f"{name}={' or '.join(choices)}")
    return given.get(name, default)


def _bad_part(
    part: str,
    given: Mapping[str, str],
    known: Sequence[str],
    needed: Sequence[str],
    flags: Sequence[str],
) -> UserError:
    """The error for a part of an argument, with an argument that works."""
    forms = {name: f"{name}={_NAMES.get(name, _OTHER)[0]}" for name in known}
    wanted = [forms[name] for name in needed]
    optional = [*flags, *(forms[name] for name in known if name not in needed)]
    if optional:
        wanted.append(f"optionally {', '.join(optional)}")
    fix = "Leave out the colon and what follows it."
    if flags or known:
        values = {name: "" for name in flags}
        for name in known:
            values[name] = _NAMES.get(name, _OTHER)[1]
        examples = {_join({name: value}): name for name, value in values.items()}
        close = difflib.get_close_matches(part, examples, n=1, cutoff=0.5)
        names = [examples[example] for example in close]
        names += [name for name in [*needed, *flags, *known] if name not in given]
        fixed = {name: values[name] for name in needed} | dict(given)
        for name in names[:1]:
            fixed[name] = values[name]
        fix = f"Write e.g. {_join(fixed)} after the colon."
    wanted = ", ".join(wanted) or "no argument"
    return UserError(_ARGUMENT, wanted=wanted, got=repr(part), fix=fix)


def bad_value(given: Mapping[str, str], name: str, wanted: str) -> UserError:
    """The error for the value of one name, with an argument that works."""
    fixed = dict(given) | {name: _NAMES.get(name, _OTHER)[1]}
    return UserError(
        _ARGUMENT,
        wanted=wanted,
        got=repr(_join({name: given[name]})),
        fix=f"Write e.g. {_join(fixed)} after the colon.",
    )


def _join(given: Mapping[str, str]) -> str:
    """The argument that `parse_argument` parses to `given`."""
    parts = (f"{name}={value}" if value else name for name, value in given.items())
    return ",".join(parts)
