"""`--vary`: a field of the config, and the values that a sweep gives it."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ml_collections import ConfigDict

from mvc_jax.classification.comparisons import RIVALS
from mvc_jax.command import pipeline, run_config
from mvc_jax.configs import common, fields
from mvc_jax.errors import UserError
from mvc_jax.stage import hash_of

_EXAMPLE = "Write e.g. --vary mix.tokens=1,2,4,8."
_SAFE = re.compile(r"[^\w.,+:=-]")
_LONGEST = 120  # characters of a folder's name


@dataclasses.dataclass(frozen=True)
class Axis:
    """A field and its values.

    Attributes:
      field: its dotted name.
      values: at least two, each once.
    """

    field: str
    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder, e.g. "mix.tokens=4".
      values: field -> value.
      config: of its run.
    """

    name: str
    values: dict[str, Any]
    config: ConfigDict


def without(
    axes: Sequence[Axis], points: Sequence[Point], refused: Collection[str]
) -> tuple[list[Axis], list[Point]]:
    """The fields and points that are left without values at which a point was refused.

    Of several fields, the one with the most values loses one.

    Args:
      axes: what was varied.
      points: their grid.
      refused: names of points.

    Returns:
      the axes, of which one may have a single value or none; the points of their grid.
    """
    left, remaining = list(points), list(axes)
    while wrong := [point for point in left if point.name in refused]:
        longest = max(remaining, key=lambda axis: len(axis.values))
        value = wrong[0].values[longest.field]
        kept = tuple(each for each in longest.values if each != value)
        remaining[remaining.index(longest)] = Axis(longest.field, kept)
        left = [point for point in left if point.values[longest.field] != value]
    return remaining, left


def label(value: Any) -> str:
    """A value as it is shown and typed."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return fields.as_flag(value) or "(empty)"


def parse(text: str) -> Axis:
    """Parses `FIELD=V1,V2,...`; with semicolons, these separate the values.

    Raises:
      UserError: there is no such field, or it cannot be varied; a value is wrong or is
        there twice; or there are not two.
    """
    name, equals, listed = text.partition("=")
    name = name.strip().removeprefix("config.")
    flag = f"--vary {name}"
    if not equals or not name:
        raise UserError(
            "--vary", wanted="FIELD=VALUE,VALUE,...", got=repr(text), fix=_EXAMPLE
        )
    if name == "seed":
        raise UserError(
            flag,
            wanted="a field of one split of the data",
            got="the seed, which draws another one",
            fix="Use `mvc-jax repeat --seeds=0,1,2`, which has intervals over splits.",
        )
    field = common.FIELDS.find(name)
    if isinstance(field, fields.Section):
        raise field.error(f"config.{name}", "a sweep over a section")
    if name in run_config.OF_A_COMMAND:
        raise UserError(
            flag,
            wanted="a field that changes what a run ends with",
            got="one that says what one command does",
            fix="Vary another field.",
        )
    separator = ";" if ";" in listed else ","
    is_list = field.kind is tuple
    if is_list and separator == ",":
        raise UserError(
            flag,
            wanted="values separated by semicolons, as each is a list: "
            f"--vary '{name}=A;A,B'",
            got=repr(listed),
            fix="Write them so, in quotes.",
        )
    texts = [part.strip() for part in listed.split(separator)]
    values = tuple(_value(name, field, part) for part in texts)
    twice = [label(value) for i, value in enumerate(values) if value in values[:i]]
    if len(values) < 2 or twice:
        raise UserError(
            flag,
            wanted="two or more values, each once",
            got=f"{twice[0]} twice" if twice else f"only {texts[0]!r}",
            fix="Correct the list."
            if twice
            else f"Add another, or run it by itself: --config.{name}={texts[0]}.",
        )
    return Axis(name, values)


def _value(name: str, field: fields.Field, text: str) -> Any:
    try:
        value = field.parse(text)
    except ValueError as error:
        raise field.error(f"config.{name}", repr(text)) from error
    field.require(f"config.{name}", value)
    return value


def points(axes: Sequence[Axis], config: ConfigDict) -> list[Point]:
    """Every combination of values, as a run with the rest of a config.

    Raises:
      UserError: two of the axes are of one field; or a field changes nothing that the
        results depend on.
    """
    names = [axis.field for axis in axes]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(
            f"--vary {twice[0]}",
            wanted="each field once",
            got="it twice",
            fix="Write all its values in one --vary.",
        )
    made = []
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = dict(zip(names, combination, strict=True))
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(values)
        made.append(Point(_folder(values), values, own.lock()))
    for axis in axes:
        _require_effect(axis, made)
    return made


def _folder(values: dict[str, Any]) -> str:
    """The name of a point's folder; one that a disk may refuse ends in a hash."""
    name = ",".join(f"{field}={label(value)}" for field, value in values.items())
    safe = _SAFE.sub("_", name)
    if safe == name and len(name) <= _LONGEST:
        return name
    return f"{safe[:_LONGEST]}-{hash_of(name)[:8]}"


def chain(config: ConfigDict) -> dict[str, str]:
    """Selected stage -> a hash of its settings and of all that it depends on.

    Stages of two configs with the same hash end with the same files.
    """
    found: dict[str, str] = {}
    for name in pipeline.needed(pipeline.select(config), config):
        spec = pipeline.module(name).stage_spec(config)
        inputs = {input_: found[input_] for input_ in spec.inputs}
        found[name] = hash_of([name, spec.settings, inputs])
    return found


def _mixes(config: ConfigDict, *modes: str) -> bool:
    return bool({*modes, "both"} & {*config.mix.modes}) and not config.mix.file


def _has_run(config: ConfigDict, *parts: str) -> bool:
    return any(part in name for name in config.classify.runs for part in parts)


# A field -> whether it is read, and where it is, in words.
_READ: dict[str, tuple[Callable[[ConfigDict], bool], str]] = {
    **dict.fromkeys(
        ("mix.tokens", "mix.tokens_most", "mix.positions", "mix.class_prompt"),
        (lambda c: _mixes(c, "coarse"), "recipes are drawn with mix.modes=coarse"),
    ),
    **dict.fromkeys(
        ("mix.dims", "mix.dims_per_token", "mix.dims_on"),
        (lambda c: _mixes(c, "fine"), "recipes are drawn with mix.modes=fine"),
    ),
    **dict.fromkeys(
        ("mix.per_image", "mix.modes", "mix.partner", "mix.partners"),
        (lambda c: not c.mix.file, "mix.file is empty"),
    ),
    "mix.partner_prompt": (lambda c: not c.mix.file, "mix.file is empty"),
    "generate.noise_scale": (
        lambda c: "noised" in c.generate.sets,
        "generate.sets has noised",
    ),
    "generate.interpolation": (
        lambda c: "interpolated" in c.generate.sets,
        "generate.sets has interpolated",
    ),
    "generate.strength": (
        lambda c: bool({*RIVALS} & {*c.generate.sets}),
        f"generate.sets has {', '.join(RIVALS)}",
    ),
    "generate.perturbation": (
        lambda c: "gif_sd" in c.generate.sets,
        "generate.sets has gif_sd",
    ),
    "generate.soft_label_gamma": (
        lambda c: "diff_mix" in c.generate.sets,
        "generate.sets has diff_mix",
    ),
    "classify.probability": (
        lambda c: _has_run(c, "probabilistic", "replace_"),
        "classify.runs has probabilistic or replace_*",
    ),
    **dict.fromkeys(
        ("classify.phase_two", "classify.phase_two_rate"),
        (lambda c: _has_run(c, "two_phase"), "classify.runs has two_phase"),
    ),
    "classify.alpha": (
        lambda c: _has_run(c, "mixup", "cutmix"),
        "classify.runs has mixup or cutmix",
    ),
    **dict.fromkeys(
        ("classify.randaugment_count", "classify.randaugment_magnitude"),
        (lambda c: _has_run(c, "randaugment"), "classify.runs has randaugment"),
    ),
    "classify.steps": (lambda c: not c.classify.epochs, "classify.epochs is 0"),
    "classify.momentum": (
        lambda c: c.classify.optimizer == "sgd",
        "classify.optimizer is sgd",
    ),
    **dict.fromkeys(
        ("classify.milestones", "classify.gamma"),
        (
            lambda c: c.classify.schedule == "multistep",
            "classify.schedule is multistep",
        ),
    ),
    "data.fraction": (lambda c: not c.data.per_class, "data.per_class is 0"),
}
_OF_SYNTHETIC = ("base", "pretrain", "encode", "pairs", "finetune", "mix", "generate")


def _require_effect(axis: Axis, made: Sequence[Point]) -> None:
    """Checks that a field can change the results, as far as that is known before.

    Raises:
      UserError: it cannot.
    """
    why = ""
    read, where = _READ.get(axis.field, (lambda c: True, ""))
    selected = [name for point in made for name in pipeline.select(point.config)]
    last = "classify" if "classify" in selected else selected[-1]
    hashes = {
        (
            chain(point.config)[last],
            *(v for k, v in point.values.items() if k != axis.field),
        )
        for point in made
    }
    if not any(read(point.config) for point in made):
        why = f"one that is read only where {where}"
    elif len(hashes) * len(axis.values) == len(made):
        why = f"one of which the stage {last} and all before it are independent"
    elif (
        last == "classify"
        and axis.field.split(".")[0] in _OF_SYNTHETIC
        and not any(_has_synthetic(point.config) for point in made)
    ):
        why = "one of synthetic images, of which classify.runs uses none"
    if why:
        raise UserError(
            f"--vary {axis.field}",
            wanted="a field that changes what classifiers are trained on, or how",
            got=why,
            fix="Vary another field, or change that.",
        )


def _has_synthetic(config: ConfigDict) -> bool:
    return any(name.split("+")[0] != "real" for name in config.classify.runs)
