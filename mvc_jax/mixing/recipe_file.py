"""Reads and checks `recipes.jsonl`, as `mix` wrote it or as a person edited it."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mvc_jax.errors import UserError
from mvc_jax.mixing.recipes import MODES, POOLED

_MAX_SEED = 2**31 - 1  # an int32 on the device
_MAX_LISTED = 10  # missing indices
_TYPES = {
    "index": "an integer of at least 0",
    "source": "a string",
    "partners": "a list of strings",
    "label": "a string",
    "mode": "a string",
    "positions": "a list of integers",
    "donors": "a list of integers",
    "dims": "a list of lists of integers",
    "dim_donors": "a list of integers",
    "dim_tokens": "two integers",
    "noise_seed": "an integer of at least 0",
    "text_scale": "a number of at least 0",
    "image_scale": "a number of at least 0",
}


def read_recipes(
    path: epath.PathLike,
    rows: Sequence[Mapping] | None = None,
    *,
    length: int | None = None,
    width: int | None = None,
    any_partner: bool = False,
) -> list[dict]:
    """Reads a file of recipes and checks each of them.

    Args:
      path: of the file.
      rows: of `encode`, one for each training image; None: ids and classes are not
        checked.
      length: L, tokens of a text state; None: unknown.
      width: D, dims of a text state; None: unknown.
      any_partner: whether partners may be of another class than the source.

    Returns:
      rows with the fields of `mixing/recipes.py`, sorted by `index`, 0, 1, 2, ...

    Raises:
      UserError: some rows are invalid; its details list all of them.
    """
    known = None if rows is None else {row["id"]: row for row in rows}
    invalid: list[str] = []
    line_of: dict[int, int] = {}
    recipes = []
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        try:
            recipe = json.loads(text)
        except ValueError as error:
            invalid.append(f"line {line}: no JSON ({error})")
            continue
        problems = [*_type_problems(recipe)]
        if not problems:
            problems += _id_problems(recipe, known, any_partner)
            problems += _token_problems(recipe, length or math.inf, width or math.inf)
            first = line_of.setdefault(recipe["index"], line)
            if first != line:
                problems.append(f"index {recipe['index']} is that of line {first}")
            recipes.append(recipe)
        if problems:
            invalid.append(f"line {line}: {'; '.join(problems)}")
    if not invalid:
        invalid += _index_problems(line_of)
    if invalid:
        raise UserError(
            str(path),
            wanted="valid recipes",
            got=f"{len(invalid)} invalid: {invalid[0]}",
            fix="Fix these rows; mvc_jax/mixing/recipes.py describes each field.",
            details=invalid,
        )
    return sorted(recipes, key=lambda recipe: recipe["index"])


def problems(recipe: Mapping, partners: int, length: int, width: int) -> list[str]:
    """What is wrong with the fields of a recipe that are given; [] if nothing is.

    Args:
      recipe: with at least the fields that say what is mixed.
      partners: how many there are, whoever they are.
      length: L, tokens of a text state.
      width: D, dims of a text state.
    """
    others = {"index": 0, "source": "", "label": "", "mode": "both", "noise_seed": 0}
    scales = {"text_scale": 0, "image_scale": 0}
    own = {**others, **scales, **recipe, "partners": [""] * partners}
    found = [*_type_problems(own)]
    return found or [*_token_problems(own, length, width)]


def _lines(path: epath.PathLike) -> list[str]:
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(
            str(path),
            wanted="a file of recipes",
            got="a folder" if path.is_dir() else "no such file",
            fix="The stage mix writes one: <workdir>/mix/recipes.jsonl.",
        )
    try:
        return path.read_text().lstrip("\ufeff").split("\n")
    except ValueError as error:
        raise UserError(
            str(path),
            wanted="a text file in UTF-8",
            got=str(error),
            fix="Save it as UTF-8.",
        ) from error


def _type_problems(recipe: Any) -> Iterator[str]:
    """Missing and unknown fields, and values of a wrong type."""
    if not isinstance(recipe, dict):
        yield f"a {type(recipe).__name__} instead of an object {{...}}"
        return
    for name in sorted({*recipe} - {*_TYPES, "level", "pooled"}):
        yield f"no such field: {name}"
    for name, type_ in _TYPES.items():
        if name not in recipe:
            yield f"no {name}"
        elif not _has_type(recipe[name], type_):
            yield f"{name} is {json.dumps(recipe[name])}, not {type_}"


def _has_type(value: Any, type_: str) -> bool:
    if type_ == "a string":
        return isinstance(value, str)
    if type_ == "an integer of at least 0":
        return _is_integer(value) and 0 <= value <= _MAX_SEED
    if type_ == "a number of at least 0":
        number = _is_integer(value) or isinstance(value, float)
        return number and 0 <= value < math.inf
    if not isinstance(value, list):
        return False
    if type_ == "a list of strings":
        return all(isinstance(item, str) for item in value)
    if type_ == "a list of lists of integers":
        return all(_has_type(item, "a list of integers") for item in value)
    if type_ == "two integers" and len(value) != 2:
        return False
    return all(map(_is_integer, value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _id_problems(
    recipe: dict, known: Mapping[str, Mapping] | None, any_partner: bool
) -> Iterator[str]:
    """Problems of mode, source, partners and label."""
    if recipe["mode"] not in MODES:
        yield f"mode is {recipe['mode']!r}, not {' or '.join(MODES)}"
    if recipe.get("pooled", POOLED[0]) not in POOLED:
        yield f"pooled is {recipe['pooled']!r}, not {' or '.join(POOLED)}"
    if not recipe["partners"]:
        yield "no partner (the source itself may be one)"
    if known is None:
        return
    for name, ids in (("source", [recipe["source"]]), ("partner", recipe["partners"])):
        for id_ in ids:
            if id_ not in known:
                yield f"{name} {id_!r} is not a training image"
    if recipe["source"] not in known:
        return
    source = known[recipe["source"]]
    if recipe["label"] != source["class_name"]:
        yield f"label is {recipe['label']!r}, the source's is {source['class_name']!r}"
    for id_ in recipe["partners"] if not any_partner else ():
        if id_ in known and known[id_]["label"] != source["label"]:
            yield (
                f"partner {id_!r} is of class {known[id_]['class_name']!r}, which "
                'requires config.mix.partner="any"'
            )


def _token_problems(
    recipe: dict, length: int | float, width: int | float
) -> Iterator[str]:
    """Problems of positions, dims and their donors."""
    positions, dims = recipe["positions"], recipe["dims"]
    if recipe["mode"] == "coarse" and dims:
        yield 'mode "coarse" takes no dims: write "both"'
    if recipe["mode"] == "fine" and positions:
        yield 'mode "fine" takes no positions: write "both"'
    yield from _range_problems("positions", positions, 1, length)
    start, stop = recipe["dim_tokens"]
    if not 1 <= start <= stop <= length:
        yield f"dim_tokens is [{start}, {stop}], not within [1, {length}]"
    elif len(dims) not in (0, 1, stop - start):
        yield f"{len(dims)} lists of dims, not 1 or one per token ({stop - start})"
    for row in dims:
        yield from _range_problems("dims", row, 0, width)
    widths = {len(row) for row in dims} or {0}
    if len(widths) > 1:
        yield "the lists of dims differ in length"
    for name, count in (("donors", len(positions)), ("dim_donors", max(widths))):
        donors, partners = recipe[name], len(recipe["partners"])
        if len(donors) != count:
            yield f"{len(donors)} {name}, not {count}"
        if not all(0 <= donor < partners for donor in donors):
            yield f"{name} is {donors}, not indices of {partners} partners"


def _range_problems(
    name: str, values: Sequence[int], start: int, stop: int | float
) -> Iterator[str]:
    if not all(start <= value < stop for value in values):
        yield f"{name} is {values}, not within [{start}, {stop})"
    if any(b <= a for a, b in zip(values, values[1:], strict=False)):
        yield f"{name} is {values}, not ascending"


def _index_problems(line_of: Mapping[int, int]) -> Iterator[str]:
    """Missing indices; as few are computed as are listed."""
    if not line_of:
        yield "no rows"
        return
    absent = (i for i in range(max(line_of) + 1) if i not in line_of)
    missing = list(itertools.islice(absent, _MAX_LISTED + 1))
    if missing:
        more = ", ..." if len(missing) > _MAX_LISTED else ""
        listed = ", ".join(map(str, missing[:_MAX_LISTED]))
        yield f"no row has index {listed}{more}: number the rows 0, 1, 2, ..."
