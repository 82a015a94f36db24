"""The declarations of the fields: each refuses what it must, by its name.

The bad values are made from the declarations, so a new field is tested unnamed.
"""

import importlib
import math
import pathlib
import re
import sys

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from mvc_jax import augment
from mvc_jax.classification import regimes
from mvc_jax.classification import runs as classification_runs
from mvc_jax.command import command_line
from mvc_jax.configs import common
from mvc_jax.configs.fields import Field, Section, as_flag, help_of
from mvc_jax.data import attribute_captions, decode
from mvc_jax.diffusion import samplers, timesteps
from mvc_jax.errors import UserError
from mvc_jax.generation import conditionings, synthetic
from mvc_jax.mixing import recipes
from mvc_jax.models import attention, blip2, classifiers, remat, vit_gpt2
from mvc_jax.training import optim

sys.path.append(str(ROOT / "benchmarks"))
import every_value  # noqa: E402

FIELDS = common.FIELDS.flat()
CONFIGS = pathlib.Path(common.__file__).parent
ARGUMENTS = dict.fromkeys(("folder", "brain_tumor", "tiny_imagenet"), "path=a")
ARGUMENTS["real_images"] = "data=caltech101,path=a"


def bad_values(field):
    """Yields values that the field must not accept, of every kind."""
    if field.kind is tuple:
        good = list(field.default) or ["a"]
        yield from (None, "a", 3, 0.5, True, (*good, None), ((*good,),), {"a": 1})
        least, most = field.length
        if least:
            yield ()
        if most < 10_000:
            yield (good[0],) * (most + 1)
        if field.distinct:
            yield (good[0], good[0])
        if field.ascending:
            yield (good[-1], good[0])
        yield from ((*good[1:], bad) for bad in bad_items(field, field.item))
    else:
        yield from bad_items(field, field.kind)


def bad_items(field, kind):
    yield from (None, (1,), [], {}, b"a")
    if kind is bool:
        yield from ("True", 0, 1, 0.0)
    elif kind is str:
        yield from (0, 1.5, True, math.nan)
        if field.choices:
            yield from ("no such choice", f"{field.choices[-1]} ", "0")
        if field.word or (field.choices and "" not in field.choices):
            yield from ("", " ")
    else:
        yield from ("1", "x", True, False, math.nan, math.inf, -math.inf, 1e300, -1e300)
        if kind is int:
            yield from (1.5, 1.0, 10**20, -(10**20), 2**64)
        low = field.at_least if field.above is None else field.above
        high = field.at_most if field.below is None else field.below
        step = 1 if kind is int else 1e-6
        below, above = low - step, high + step * max(1, abs(high))
        yield from (x for x in (below, above) if x not in field.also)
        if field.above is not None:
            yield low
        if field.below is not None:
            yield high


def config_with(name, value):
    config = common.get_config()
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = section[part]
    with config.ignore_type():
        section[field] = value
    return config


@pytest.mark.parametrize("name", FIELDS)
def test_every_bad_value_is_refused_by_the_name_of_its_field(name):
    values = list(bad_values(FIELDS[name]))
    assert len(values) >= 5
    for value in values:
        assert not FIELDS[name].accepts(value), value
        if isinstance(value, bool) and FIELDS[name].kind is float:
            continue  # which a ConfigDict makes a number
        with pytest.raises(UserError) as caught:
            common.FIELDS.check(config_with(name, value))
        message = str(caught.value)
        assert re.match(rf"config\.{re.escape(name)}(\.\w+)?: wanted ", message), value
        assert message.endswith("."), message


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_says_what_it_is_and_accepts_its_bounds(name):
    field = FIELDS[name]
    assert field.accepts(field.default)
    assert field.help.strip() == field.help and not field.help.endswith(".")
    if field.kind is tuple:
        assert all(type(item) is field.item for item in field.default)
        return
    if field.kind in (int, float):
        assert (field.at_least is None) != (field.above is None)
        assert (field.at_most is None) != (field.below is None)
        bounds = [b for b in (field.at_least, field.at_most) if b is not None]
        for good in (*bounds, *field.also, *field.choices):
            assert field.accepts(good)
    assert all(field.accepts(choice) for choice in field.choices)


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_is_the_same_after_the_command_line(name):
    field = FIELDS[name]
    found, value = command_line._parse_override(
        f"--config.{name}={as_flag(field.default)}", iter(())
    )
    assert (found, value) == (name, field.default)
    assert type(value) is field.kind


def test_every_field_is_in_the_help_of_its_section():
    for name, section in common.FIELDS.fields.items():
        text = help_of(section, name)
        flat = section.flat() if isinstance(section, Section) else {}
        for field in flat:
            assert f"--config.{name}.{field}=" in text
        assert section.help
        for line in text.splitlines():  # a flag can be copied whole, however long
            assert len(line) <= 95 or line.startswith("--"), line


def test_the_defaults_are_plain_values_of_the_declared_names():
    config = common.get_config()
    assert isinstance(config, ConfigDict)
    flat = dict(_flat(config.to_dict()))
    assert flat == {name: field.default for name, field in FIELDS.items()}


def _flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
@pytest.mark.parametrize("preset", [False, True])
def test_every_shipped_config_passes(path, preset):
    module = importlib.import_module(f"mvc_jax.configs.{path.stem}")
    if not hasattr(module, "get_config"):
        return
    argument = ARGUMENTS.get(path.stem, "")
    if preset and path.stem not in ("common", "real_images"):
        argument += ",preset=fast" if argument else "preset=fast"
    common.FIELDS.check(module.get_config(argument))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.data.__setitem__("sise", 3), r"config.data.sise: wanted a field"),
        (lambda c: c.__setitem__("mine", 3), r"config.mine: wanted a field of config"),
        (lambda c: c.__delattr__("mesh"), r"config.mesh: wanted .* got nothing"),
        (lambda c: c.mix.__delattr__("dims"), r"config.mix.dims: wanted .* nothing"),
        (lambda c: c.__setitem__("mesh", 3), r"config.mesh: wanted a section .*got 3"),
    ],
)
def test_a_config_has_the_declared_names_and_no_others(change, message):
    config = common.get_config()
    with config.ignore_type():
        change(config)
    with pytest.raises(UserError, match=message):
        common.FIELDS.check(config)


def test_every_value_has_a_run_to_the_report():
    """`benchmarks/every_value.py`, which takes minutes, has it, or says why not."""
    for name, field in FIELDS.items():
        missing = {*field.choices} - every_value.NOT_HERE.get(name, {}).keys()
        missing -= every_value.values(name) if name in every_value.fields() else set()
        assert not missing or name in every_value.NETWORKS, (name, missing)
    runs = every_value.values("classify.runs")
    for part in (*regimes.REGIMES, *augment.NAMES, *classification_runs.MIXES):
        if part != "none":
            assert any(part in re.split("[:+]", run) for run in runs), part
    networks = {*FIELDS["classify.model"].choices}
    others = {*FIELDS["evaluate.features"].choices} - networks
    assert others == {"pixels", *every_value.NOT_HERE["evaluate.features"]}


def test_choices_are_those_of_the_rooms():
    rooms = {
        "caption.attributes": tuple(attribute_captions.KINDS),
        "caption.dtype": blip2.DTYPES,
        "classify.model": tuple(classifiers.VARIANTS),
        "classify.optimizer": optim.OPTIMIZERS,
        "classify.schedule": optim.SCHEDULES,
        "data.resample": tuple(decode.RESAMPLING),
        "data.resize": decode.RESIZING,
        "finetune.attention": attention.CHOICES,
        "finetune.remat": tuple(remat.MODES),
        "generate.attention": attention.CHOICES,
        "generate.format": tuple(synthetic.SUFFIXES),
        "generate.sampler": tuple(samplers.SAMPLERS),
        "generate.sets": tuple(conditionings.CONDITIONINGS),
        "generate.timestep_spacing": (timesteps.AUTO, *timesteps.SPACINGS),
        "mix.dims_on": recipes.DIMS_ON,
        "mix.modes": recipes.MODES,
        "mix.partner": recipes.PARTNERS,
        "mix.partner_prompt": ("auto", *recipes.PARTNER_PROMPTS),
        "mix.positions": recipes.POSITIONS,
    }
    for name, choices in rooms.items():
        assert {*FIELDS[name].choices} == {*choices}, name
    assert {*vit_gpt2.DTYPES} <= {*blip2.DTYPES}


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (Field(1, "", at_least=0, at_most=10**6), "a whole number from 0 to 1,000,000"),
        (Field(-1, "", at_least=1, at_most=9, also=(-1,)), "-1, or a whole number fr"),
        (Field(0.5, "", above=0, below=1), "a number between 0 and 1"),
        (Field(0.5, "", at_least=0, below=1), "a number of at least 0 and below 1"),
        (Field(0.5, "", above=0, at_most=1), "a number above 0 and at most 1"),
        (Field(True, ""), "True or False"),
        (Field("", "", choices=("", "a")), '"" or a'),
        (Field("x", "", word=True), "a text that is not blank"),
        (
            Field((0.0, 1.0), "", item=float, at_least=0, at_most=1, length=(2, 2)),
            "2 numbers from 0 to 1",
        ),
        (Field((1,), "", item=int, at_least=1, at_most=9), "whole numbers from 1 to 9"),
        (Field(("a",), "", choices=("a", "b"), length=(1, 2)), "some of a, b"),
    ],
)
def test_what_is_wanted_in_words(field, words):
    assert field.wanted.startswith(words)
