"""What a run takes is known before it starts, and what cannot fit is refused."""

import dataclasses
import types

import numpy as np
import psutil
import pytest
from etils import epath

from mvc_jax import caption
from mvc_jax.checkpoints import base_sizes, hub
from mvc_jax.command import pipeline, plan, price
from mvc_jax.configs import digits, folder
from mvc_jax.errors import UserError
from mvc_jax.training import runtime

GIB = 2**30
TIMING = {"seconds": 90.0, "compile_seconds": 30.0}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 12 GiB of memory, a CPU, and 100 GiB of free disk."""
    found = types.SimpleNamespace(
        memory=12 * GIB, free=100 * GIB, devices=runtime.Devices("cpu", 1, 0), asked=0
    )

    def ask():
        found.asked += 1
        return found.devices

    def total(read):
        return lambda: types.SimpleNamespace(total=read())

    monkeypatch.setattr(psutil, "virtual_memory", total(lambda: found.memory))
    monkeypatch.setattr(psutil, "swap_memory", total(lambda: 0))
    monkeypatch.setattr(price, "free_bytes", lambda _: found.free)
    monkeypatch.setattr(runtime, "ask_devices", ask)
    return found


def config_of(*changes, base=digits.get_config):
    config = base()
    config.compilation_cache = ""
    for change in changes:
        name, _, value = change.partition("=")
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        kind = type(section[field])
        section[field] = tuple(value.split(",")) if kind is tuple else kind(value)
    return config


def prices_of(config, workdir, stages=None):
    workdir = epath.Path(workdir)
    steps = plan.make(stages or pipeline.select(config), config, workdir)
    return price.make(steps, config, workdir)


def works_of(config, workdir, stages=None):
    return {p.step.name: p.work for p in prices_of(config, workdir, stages)}


# Of 797 test images and three sets of 600 with each other and with 100 training images.
PAIRS = 797**2 // 2 + 79_700 + 3 * (600**2 // 2 + 60_000) + 100**2 // 2


def test_every_stage_of_the_digits_is_counted_and_nothing_is_written(tmp_path):
    works = works_of(digits.get_config(), tmp_path / "new")
    made = {name: work.makes for name, work in works.items()}
    assert made == {
        "caption": {"images": 1797, "captions": 1000},
        "pretrain": {
            "steps": 2300,
            "judge steps": 300,
            "vae steps": 500,
            "unet steps": 1500,
        },
        "encode": {"images": 100, "prompts, at most": 101},
        "pairs": {"pairs": 400},
        "finetune": {"steps": 300, "pairs": 15_000},
        "mix": {"recipes": 600},
        "generate": {"images": 1800, "UNet evaluations": 1800 * 12 * 3},
        "classify": {"classifiers": 45, "steps": 45 * 250},
        "evaluate": {"runs": 9, "images": 1800, "pairs of images": PAIRS},
        "report": {"page": 1},
    }
    assert [*made] == [*pipeline.STAGES]
    assert works["caption"].disk == {"pixels": 1797 * 16 * 16 * 3}
    assert works["encode"].disk["moments"] == 100 * 4 * 4 * 8 * 4
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("change", "name", "makes"),
    [
        ("mix.per_image=10", "mix", {"recipes": 1000}),
        ("generate.sets=mixed", "generate", {"images": 600}),
        ("generate.sampler=dpmpp_2m", "generate", {"UNet evaluations": 1800 * 36}),
        ("generate.limit=16", "generate", {"images": 16}),
        ("classify.epochs=3", "classify", {"steps": 45 * 6}),
        ("classify.seeds=2", "classify", {"classifiers": 18}),
        ("data.per_class=20", "caption", {"images": 1797, "captions": 1100}),
        ("data.per_class=20", "encode", {"images": 200}),
        ("pretrain.controlnet.steps=7", "pretrain", {"steps": 2307}),
    ],
)
def test_counts_follow_the_fields(change, name, makes, tmp_path):
    works = works_of(config_of(change), tmp_path)
    assert works[name].makes | makes == works[name].makes


def test_images_held_out_make_no_steps_of_an_epoch(tmp_path):
    config = config_of("classify.epochs=3", "classify.validation=0.5")
    assert works_of(config, tmp_path)["classify"].makes["steps"] == 45 * 3


def test_a_base_on_the_hub_is_priced_before_it_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    (tmp_path / "parts").mkdir()
    config = config_of(base=lambda: folder.get_config(f"path={tmp_path}/parts"))
    counts = _counts(0, [30, 20], 9)
    monkeypatch.setattr(caption, "count_images", lambda *_: counts)
    works = works_of(config, tmp_path / "new")
    assert works["encode"].disk == {
        "moments": 50 * 64 * 64 * 8 * 4,
        "text states": 3 * 77 * 768 * 4,  # by template: one of each class, and ""
    }
    finetune = works["finetune"]
    assert finetune.asks == 12 * 859_520_964  # weights and two moments
    assert finetune.disk["checkpoints"] == 3 * finetune.asks
    assert works["generate"].makes == {
        "images": 400,
        "UNet evaluations": 400 * 50 * 3,
    }


def _counts(pool, train, test):
    return {
        "pool": np.asarray([pool]),
        "train": np.asarray(train),
        "test": np.asarray([test]),
    }


def test_sizes_of_a_base_are_those_of_its_architecture(tiny, original):
    model, params = tiny
    sizes = base_sizes.find(str(original))
    for field in dataclasses.fields(sizes)[1:5]:
        assert getattr(sizes, field.name) == getattr(model, field.name)
    assert sizes.parameters == {name: model.count_parameters(name) for name in params}


HUGE = [
    ("encode.batch_size=1000000", "stage encode", "config.encode.batch_size"),
    ("finetune.batch_size=1000000", "stage finetune", "config.finetune.batch_size"),
    ("generate.batch_size=1000000", "stage generate", "config.generate.batch_size"),
    ("classify.batch_size=1000000", "stage classify", "config.classify.batch_size"),
    ("classify.steps=1000000000", "stage classify", "config.classify.steps"),
    ("pretrain.unet.batch_size=1000000", "stage pretrain", "unet.batch_size"),
    ("pretrain.vae.batch_size=1000000", "stage pretrain", "vae.batch_size"),
    ("pretrain.unet.channels=81920", "stage pretrain", "GiB weights"),
    ("mix.per_image=100000", "stage mix", "config.mix.per_image"),
]


@pytest.mark.parametrize(("change", "name", "words"), HUGE)
def test_what_cannot_fit_the_memory_is_refused(change, name, words, tmp_path, machine):
    config = config_of(change)
    if change.startswith("pretrain.unet.channels"):
        config.pretrain.unet.channels = (81920,)
    prices = prices_of(config, tmp_path)
    with pytest.raises(UserError, match=name) as refused:
        price.require_room(prices, epath.Path(tmp_path))
    assert words in str(refused.value)
    assert "12.0 GiB" in str(refused.value)


def test_every_pair_of_every_round_is_in_memory_at_once(tmp_path, machine):
    machine.memory = GIB // 8
    prices = prices_of(config_of("pairs.rounds=100000"), tmp_path)
    with pytest.raises(UserError, match=r"stage pairs.*config\.pairs\.rounds"):
        price.require_room(prices, epath.Path(tmp_path))


def test_devices_are_asked_only_where_they_must_be_larger_than_the_host(
    tmp_path, machine
):
    price.require_room(prices_of(config_of(), tmp_path), epath.Path(tmp_path))
    assert machine.asked == 0
    prices = prices_of(config_of("generate.batch_size=1000000"), tmp_path)
    machine.devices = runtime.Devices("H200", 8, 8 * 141 * GIB)
    price.require_room(prices, epath.Path(tmp_path))
    assert machine.asked == 1
    machine.devices = runtime.Devices("L4", 1, 8 * GIB)
    with pytest.raises(UserError, match=r"8\.0 GiB of memory of 1 x L4"):
        price.require_room(prices, epath.Path(tmp_path))


def test_a_disk_that_a_later_stage_would_find_full_is_refused_at_once(
    tmp_path, machine
):
    prices = prices_of(config_of("mix.per_image=50"), tmp_path)
    price.require_room(prices, epath.Path(tmp_path))
    asked = next(p.work.asks for p in prices if p.step.name == "generate")
    machine.free = asked  # the stages before it write something, and a tenth is spare
    with pytest.raises(UserError, match=r"stage (pretrain|generate): .*free disk for"):
        price.require_room(prices, epath.Path(tmp_path))
    begun = [_begun(p) for p in prices]  # such a stage knows what it has
    price.require_room(begun, epath.Path(tmp_path))


def _begun(priced):
    return dataclasses.replace(
        priced, step=dataclasses.replace(priced.step, state="resume")
    )


def test_hours_are_those_of_an_earlier_run_on_this_hardware(
    tmp_path, machine, monkeypatch
):
    config = config_of("pretrain.unet.steps=7")
    config.compilation_cache = str(tmp_path / "cache")
    workdir = epath.Path(tmp_path / "run")
    prices = prices_of(config, workdir)
    assert {p.seconds for p in prices} == {None}
    assert "time not known yet" in price.line(prices, workdir)
    assert machine.asked == 0
    monkeypatch.setattr(runtime, "own_devices", lambda: machine.devices)
    monkeypatch.setattr(runtime, "program_bytes", lambda name: 3 * GIB)
    for priced in prices:
        price.record(priced, str(tmp_path / "cache"), TIMING)
    known = prices_of(config, workdir)
    assert {p.seconds for p in known} == {90}
    assert price.line(known, workdir).endswith("about 15 min")
    assert "3.0 GiB per device" in price.table(known, workdir)
    config.finetune.steps = 900
    longer = {p.step.name: p.seconds for p in prices_of(config, workdir)}
    assert longer["finetune"] == 30 + 3 * 60
    config.finetune.batch_size = 8
    other = prices_of(config, workdir)
    assert [p.step.name for p in other if p.seconds is None] == ["finetune"]
    for prices in (other, [*other, *other]):  # of a run; of a sweep of two
        assert price.line(prices, workdir).endswith(" without finetune: not known yet")
    machine.devices = runtime.Devices("H200", 1, 141 * GIB)
    moved = {p.step.name for p in prices_of(config, workdir) if p.seconds}
    assert moved == {"caption", "pairs", "mix", "evaluate", "report"}


def test_a_stage_that_went_on_from_another_run_is_not_a_rate(tmp_path):
    config = config_of()
    config.compilation_cache = str(tmp_path / "cache")
    for priced in prices_of(config, tmp_path / "run"):
        price.record(_begun(priced), config.compilation_cache, TIMING)
    assert not (tmp_path / "cache").exists()


def test_a_finished_stage_costs_nothing_and_tells_how_many_images_there_are(tmp_path):
    config = config_of()
    caption.run(config, tmp_path)
    [first, *others] = prices_of(config, tmp_path)
    assert (first.step.state, first.work) == ("done", None)
    config.data.source = "folder:/gone"  # what is there is read, not the source
    counted = caption.count_images(config, epath.Path(tmp_path))
    assert {name: rows.sum() for name, rows in counted.items()} == {
        "pool": 900,
        "train": 100,
        "test": 797,
    }
    assert others[2].work.makes == {"pairs": 400}
    table = price.table([first, *others], epath.Path(tmp_path))
    assert table.splitlines()[1].split() == ["caption", "done"]
    assert "\n9 of 10 stages to do; 1,800 synthetic images" in table
    start = "samples start at timestep 999 of 0 to 999 (ddim, 12 steps, trailing)"
    assert f"\ngenerate: {start}\n" in table


def test_a_run_in_a_bucket_is_told_the_scratch_that_it_takes(tmp_path, machine):
    prices = prices_of(digits.get_config(), tmp_path)
    disks = {each.step.name: each.work.disk for each in prices if each.work}
    mapped = sum(disks["caption"].values()) + sum(disks["encode"].values())
    most = sum(disks["pretrain"].values())  # its checkpoints and its model
    assert price.scratch_bytes(prices) == mapped + most
    said = price.line(prices, epath.Path("gs://bucket/run"))
    assert "in the bucket; " in said and " of local scratch in " in said
    assert "100.0 GiB free" in said
    assert "scratch" not in price.line(prices, epath.Path(tmp_path))


def test_nothing_to_do_is_not_priced(tmp_path, monkeypatch):
    steps = [plan.Step(name, "done") for name in pipeline.STAGES]
    monkeypatch.setattr(price, "_sizes", lambda *_: 1 / 0)
    prices = price.make(steps, config_of(), epath.Path(tmp_path))
    assert price.line(prices, epath.Path(tmp_path)) == "nothing to do"
