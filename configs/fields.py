"""What a field may be, beside its default: of this, checks, messages and help are made.

`common.py` declares the fields. Nothing here knows one of them by name.
"""

import ast
import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mvc_jax.errors import UserError

Number = int | float
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_KINDS = {  # type of a number -> one of them, many of them
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the config. For a tuple, bounds and choices are those of its items.

    Attributes:
      default: the value if nothing else is said; its type is that of the field.
      help: what the field is, without what it may be.
      at_least: the smallest number allowed.
      at_most: the largest number allowed.
      above: all numbers allowed are above this one.
      below: all numbers allowed are below this one.
      also: numbers allowed besides.
      choices: the texts allowed; (): any.
      word: whether a text must not be blank.
      item: type of a tuple's items.
      length: the smallest and the largest number of a tuple's items.
      distinct: whether no item may be there twice.
      ascending: whether each item must be larger than the one before it.
      hint: what to do about a wrong value; "": the default is named.
    """

    default: Any
    help: str
    at_least: Number | None = None
    at_most: Number | None = None
    above: Number | None = None
    below: Number | None = None
    also: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    word: bool = False
    item: type = str
    length: tuple[Number, Number] = (0, math.inf)
    distinct: bool = False
    ascending: bool = False
    hint: str = ""

    @property
    def kind(self) -> type:
        return type(self.default)

    def accepts(self, value: Any) -> bool:
        """Whether a value has the type of the field and is within its bounds."""
        if self.kind is not tuple:
            return self._accepts_one(value, self.kind)
        least, most = self.length
        return (
            isinstance(value, tuple)
            and least <= len(value) <= most
            and all(self._accepts_one(item, self.item) for item in value)
            and not (self.distinct and len({*value}) < len(value))
            and not (self.ascending and list(value) != sorted({*value}))
        )

    def _accepts_one(self, value: Any, kind: type) -> bool:
        if kind is bool:
            return isinstance(value, bool)
        if kind is str:
            if not isinstance(value, str) or (
                self.choices and value not in self.choices
            ):
                return False
            return bool(value.strip()) or not self.word
        numbers = int if kind is int else int | float
        if not isinstance(value, numbers) or isinstance(value, bool):
            return False
        if value in self.also:
            return True
        return (  # so written that NaN is refused
            value == value
            and abs(value) != math.inf
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def parse(self, text: str) -> Any:
        """The value that a text on the command line stands for; bounds are not checked.

        Items of a tuple are separated by commas, or the text is a tuple of Python.

        Raises:
          ValueError: it stands for none of this type.
        """
        if self.kind is not tuple:
            return _parse_one(text, self.kind)
        if not text.startswith(("(", "[")):
            items = (item.strip() for item in text.split(","))
            return tuple(_parse_one(item, self.item) for item in items if item)
        try:
            items = tuple(ast.literal_eval(text))
        except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(text) from error
        whole = self.item is float
        return tuple(float(x) if whole and type(x) is int else x for x in items)

    @property
    def wanted(self) -> str:
        """What is allowed, in words, as in `a whole number from 1 to 999`."""
        if self.kind is bool:
            return "True or False"
        if self.kind is tuple:
            return self._wanted_items()
        if self.kind is not str:
            also = "".join(f"{number}, or " for number in self.also)
            return f"{also}{_KINDS[self.kind][0]} {self._range()}"
        if self.choices:
            return " or ".join(choice or '""' for choice in self.choices)
        return "a text that is not blank" if self.word else "a text"

    def _wanted_items(self) -> str:
        rules = [", each once"] if self.distinct else []
        rules += [", ascending"] if self.ascending else []
        least, most = self.length
        count = "one or more " if least else ""
        if least == most:
            count = f"{least} "
        if self.choices:
            return f"{count and 'some of '}{', '.join(self.choices)}{''.join(rules)}"
        names = "names" if self.item is str else f"{_KINDS[self.item][1]} "
        bounds = "" if self.item is str else self._range()
        none = "" if least else ", or none"
        return f"{count}{names}{bounds}{''.join(rules)}{none}"

    def _range(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {_number(self.at_least)} to {_number(self.at_most)}"
        if self.above is not None and self.below is not None:
            return f"between {_number(self.above)} and {_number(self.below)}"
        low = (
            f"above {_number(self.above)}"
            if self.at_least is None
            else f"of at least {_number(self.at_least)}"
        )
        high = (
            f"below {_number(self.below)}"
            if self.at_most is None
            else f"at most {_number(self.at_most)}"
        )
        return f"{low} and {high}"

    def require(self, name: str, value: Any) -> None:
        """Raises a `UserError` that names the field unless it accepts `value`."""
        if not self.accepts(value):
            raise self.error(name, repr(value))

    def error(self, name: str, got: str) -> UserError:
        fix = self.hint or f"The default is {as_flag(self.default) or 'empty'}."
        return UserError(name, wanted=self.wanted, got=got, fix=fix)


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields of the config that belong together; `help` says to what."""

    help: str
    fields: Mapping[str, "Field | Section"]

    def defaults(self) -> ConfigDict:
        """A config of every field's default."""
        return ConfigDict(
            {
                name: part.defaults() if isinstance(part, Section) else part.default
                for name, part in self.fields.items()
            }
        )

    def flat(self, prefix: str = "") -> dict[str, Field]:
        """Dotted name -> field, of all fields of this section and those within it."""
        found: dict[str, Field] = {}
        for name, part in self.fields.items():
            within = isinstance(part, Section)
            found |= part.flat(f"{prefix}{name}.") if within else {prefix + name: part}
        return found

    def find(self, name: str, prefix: str = "config") -> "Field | Section":
        """The field or the section of a dotted name.

        Raises:
          UserError: there is none; the message has the names that there are.
        """
        part: Field | Section = self
        where = prefix
        for word in name.split("."):
            known = part.fields if isinstance(part, Section) else {}
            if word not in known:
                raise _unknown(where, word, known)
            part, where = known[word], f"{where}.{word}"
        return part

    def check(self, config: Any, prefix: str = "config") -> None:
        """Checks that a config has these fields, no others, and allowed values.

        Raises:
          UserError: of the first field that is wrong.
        """
        self.check_names(config, prefix)
        for name, part in self.fields.items():
            if isinstance(part, Section):
                part.check(config[name], f"{prefix}.{name}")
            else:
                part.require(f"{prefix}.{name}", config[name])

    def check_names(self, config: Any, prefix: str = "config") -> None:
        """Checks that a config has these sections and fields, and no others.

        Raises:
          UserError: one is missing, or unknown.
        """
        if not isinstance(config, ConfigDict):
            raise self.error(prefix, repr(config))
        for name in config:
            if name not in self.fields:
                raise _unknown(prefix, name, self.fields)
        for name, part in self.fields.items():
            if name not in config:
                raise UserError(
                    f"{prefix}.{name}",
                    wanted=part.help,
                    got="nothing",
                    fix="Start from common.get_config(), which has every field.",
                )
            if isinstance(part, Section):
                part.check_names(config[name], f"{prefix}.{name}")

    def error(self, name: str, got: str) -> UserError:
        """The error for a value in the place of this section."""
        field = next(iter(self.flat()))
        return UserError(
            name,
            wanted=f"a section of the fields {', '.join(sorted(self.fields))}",
            got=got,
            fix=f"Set one of them, e.g. --{name}.{field}=VALUE.",
        )


def count(default: int, help: str, at_most: int = 10**9, **more: Any) -> Field:
    """A whole number of at least 1."""
    return Field(default, help, at_least=1, at_most=at_most, **more)


def optional(
    default: Number, help: str, at_most: Number = 10**9, *, hint: str = "", **more: Any
) -> Field:
    """A number of at least 0, where 0 switches something off."""
    hint = hint or "0 switches it off."
    return Field(default, help, at_least=0, at_most=at_most, hint=hint, **more)


def fraction(default: Number, help: str, **more: Any) -> Field:
    """A number from 0 to 1."""
    return Field(default, help, at_least=0, at_most=1, **more)


def one_of(default: str, choices: Sequence[str], help: str) -> Field:
    """One of some texts."""
    hint = "Choose one of these."
    return Field(default, help, choices=tuple(choices), hint=hint)


def word(default: str, help: str, **more: Any) -> Field:
    """A text that is not blank."""
    return Field(default, help, word=True, **more)


def help_of(part: Field | Section, name: str) -> str:
    """Every field of a section, or one field, as lines for a terminal.

    Args:
      part: the section or the field.
      name: its dotted name.
    """
    if isinstance(part, Field):
        return _help_of_field(part, name)
    lines = [f"{name}: {part.help}", ""]
    lines += [_help_of_field(f, f"{name}.{key}") for key, f in part.flat().items()]
    return "\n".join(lines)


def _help_of_field(field: Field, name: str) -> str:
    about = field.help if field.wanted == "a text" else f"{field.help} [{field.wanted}]"
    lines = textwrap.wrap(about, 80, break_long_words=False, break_on_hyphens=False)
    return "\n        ".join([f"--config.{name}={as_flag(field.default)}", *lines])


def as_flag(value: Any) -> str:
    """A value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse_one(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    return kind(text)


def _number(value: Number) -> str:
    whole = abs(value) < 1e15 and value == int(value)
    return f"{int(value):,}" if whole else f"{value:g}"


def _unknown(where: str, name: str, known: Sequence[str] | Mapping) -> UserError:
    return UserError(
        f"{where}.{name}",
        wanted=f"a field of {where}: {', '.join(sorted(known)) or '(it has none)'}",
        got=repr(name),
        fix="Choose one of these.",
    )
