"""A workdir knows its settings: `config.json`, written before work and read again."""

import json

import made_stages
import pytest
from test_docs import ARGUMENTS, CONFIGS
from test_redo import content

from mvc_jax import files, train
from mvc_jax.command import command_line, run_config
from mvc_jax.configs import common, digits
from mvc_jax.diffusion import timesteps
from mvc_jax.errors import UserError
from mvc_jax.training import runtime


@pytest.fixture
def worked(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    return made_stages.install(monkeypatch)


@pytest.fixture
def run(tmp_path, worked):
    """Runs a command in a workdir without its config; returns the exit code."""
    return lambda *flags: train.main(["train", f"--workdir={tmp_path / 'run'}", *flags])


@pytest.fixture
def kept(tmp_path):
    """The config.json of that workdir."""
    return tmp_path / "run" / "config.json"


FLAGS = ("--config=configs/digits.py:ablation", "--config.mix.dims=4")
ONE = "--config.stages=caption"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_the_same_after_json(path, tmp_path):
    config = run_config.load(f"{path}{ARGUMENTS.get(path.stem, '')}")
    with config.unlocked():
        config.stages, config.generate.limit = "mix", 3
    run_config.write(config, tmp_path)
    read = run_config.load(f"{tmp_path / 'config.json'}")
    assert (read.stages, read.generate.limit) == ("all", 0)
    config.stages, config.generate.limit = "all", 0
    assert read.to_dict() == config.to_dict()
    types = [repr(sorted(x.items())) for x in (read.to_dict(), config.to_dict())]
    assert types[0] == types[1]  # 1 is not 1.0, a tuple not a list


def test_a_workdir_alone_goes_on_with_its_settings(run, worked, kept, capsys):
    assert run(*FLAGS) == 0
    first = content(kept.parent)
    worked.clear()
    capsys.readouterr()
    assert run() == 0
    assert worked == []
    assert content(kept.parent) == first
    printed = capsys.readouterr()
    assert "nothing to do" in printed.err and "the table" in printed.out
    assert run("--config.mix.dims=4") == 0
    assert run("--config.mix.dims=5") == 2
    assert "(mix.dims: 4 -> 5)" in capsys.readouterr().err
    assert run("--config=configs/digits.py:ablation") == 2
    assert "(mix.dims: 4 -> 8)" in capsys.readouterr().err
    assert content(kept.parent) == first


def test_the_config_of_a_workdir_is_one_for_another(run, kept, tmp_path):
    assert run(*FLAGS) == 0
    for folder in ("new", "lr:1e-4"):
        config = command_line.parse(["train", f"--config={kept}", "--workdir=w"]).config
        assert config.mix.dims == 4 and config.mix.levels
        other = tmp_path / folder
        other.mkdir()
        kept = kept.rename(other / "config.json")


def test_a_fresh_workdir_is_one_of_the_digits(run, worked, kept):
    assert run(ONE) == 0
    assert files.read_json(kept)["data"]["source"] == "digits"
    assert worked == ["caption"]


def test_it_is_written_before_the_first_stage_works(run, kept, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run_stage", lambda *_, **__: seen.append(kept.exists()))
    run("--config.stages=caption,pretrain")
    assert seen == [True, True]


def test_a_refused_run_does_not_write_it(run, kept, worked):
    assert run("--config.mix.dims=65") == 2
    assert run("--config.data.per_class=999") == 2
    assert run("--config.stages=mix") == 2
    assert not kept.exists()
    assert run(*FLAGS) == 0
    before = content(kept.parent)
    assert run("--config.classify.steps=7") == 2
    assert run("--config.classify.steps=7", "--config.stages=generate") == 0
    assert content(kept.parent) == before  # nothing worked


def test_a_partial_run_and_a_preview_are_not_the_settings_for_ever(run, kept, worked):
    first = ",".join(train.STAGES[:6])
    assert run(*FLAGS, f"--config.stages={first}") == 0
    assert run("--config.generate.limit=2", "--config.generate.steps=3") == 0
    assert run("--config.generate.limit=2") == 0
    assert worked == [*train.STAGES[:6], "preview", "preview"]
    record = files.read_json(kept)
    assert (record["stages"], record["generate"]["limit"]) == ("all", 0)
    assert record["generate"]["steps"] == 12
    worked.clear()
    record["stages"], record["generate"]["limit"] = "caption", 16  # as it once was
    files.write_json(kept, record)
    assert run() == 0
    assert worked == [*train.STAGES[6:]]


def test_fields_that_are_newer_than_the_file_have_their_defaults(run, kept, worked):
    assert run(*FLAGS) == 0
    record = files.read_json(kept)
    del record["mesh"], record["generate"]["filter"], record["mix"]["partner"]
    record["generate"]["text_scale"] = 2  # a float in the JSON of another program
    record["classify"]["milestones"] = [0.5, 0.75]
    files.write_json(kept, record)
    worked.clear()
    assert run() == 0
    assert worked == []
    assert type(run_config.read(kept.parent).generate.text_scale) is float


def test_stages_that_are_older_than_a_field_go_on_as_they_began(run, kept, worked):
    """Whatever the default of the field has become."""
    up_to = [*train.STAGES[: train.STAGES.index("generate") + 1]]
    only = f"--config.stages={','.join(up_to)}"
    spacing = "--config.generate.timestep_spacing"
    fields = {"mix": "partner_prompt", "generate": "timestep_spacing"}

    def recorded():
        records = {name: kept.parent / name / "manifest.json" for name in fields}
        found = {n: files.read_json(p)["settings"][n] for n, p in records.items()}
        return {name: found[name].get(field) for name, field in fields.items()}

    assert run(*FLAGS, f"--config.stages={','.join(up_to[:-1])}") == 0
    for file in (kept, kept.parent / "mix" / "manifest.json"):
        remove(file, "mix", "partner_prompt")  # as a version wrote it without the field
    assert run(*FLAGS, only) == 0 and worked == up_to
    for file in (kept, kept.parent / "generate" / "manifest.json"):
        remove(file, "generate", "timestep_spacing")
    worked.clear()
    old = run_config.read(kept.parent)
    assert (old.generate.timestep_spacing, old.mix.partner_prompt) == ("leading", "any")
    assert (
        run(only) == run(*FLAGS, only) == run(*FLAGS, only, f"{spacing}=leading") == 0
    )
    assert worked == [] and recorded() == {"mix": None, "generate": None}
    assert run(*FLAGS, only, f"{spacing}=trailing") == 2
    grown = (*FLAGS, only, "--config.mix.per_image=9")
    assert run(*grown) == 0 and worked == ["mix", "generate"]
    assert recorded() == {"mix": None, "generate": None}  # as all images were drawn
    assert run(*grown) == 0 and len(worked) == 2
    assert run(*grown, "--redo=generate") == 0
    assert recorded() == {"mix": None, "generate": timesteps.DEFAULT}


def remove(file, section, field):
    record = files.read_json(file)
    del record.get("settings", record)[section][field]
    files.write_json(file, record)


DAMAGED = {
    "": "a damaged file",
    "{": "a damaged file",
    "[1]": "got [1]",
    "null": "got None",
    "[" * 100_000: "a damaged file",
    '{"mix": 3}': "fields of mix, got 3",
    '{"mix": {"dims": "8"}}': "dims, got '8'",
    '{"mix": {"dims": true}}': "dims, got True",
    '{"mix": {"dims": {}}}': "dims, got {}",
    '{"mix": {"modes": "fine"}}': "modes, got 'fine'",
    '{"mix": {"modes": ["fine", 3]}}': "modes, got ('fine', 3)",
    '{"generate": {"text_scale": NaN}}': "text_scale, got nan",
    '{"mix": {"dims_once": 8}}': "also mix.dims_once",
    '{"once": 8}': "also once",
}


@pytest.mark.parametrize("text", DAMAGED, ids=[*range(len(DAMAGED))])
def test_a_damaged_file_is_a_sentence_and_healed_by_a_command_with_a_config(
    run, kept, worked, capsys, text
):
    assert run(*FLAGS) == 0
    good = kept.read_bytes()
    kept.write_text(text)
    worked.clear()
    before = content(kept.parent)
    capsys.readouterr()
    assert run() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {kept}: wanted ") and DAMAGED[text] in line
    assert "--config=configs/digits.py" in line
    assert content(kept.parent) == before
    assert run(*FLAGS) == 0
    assert worked == []
    assert kept.read_bytes() == good


def test_a_folder_in_its_place_and_bytes_that_are_no_text(run, kept, capsys):
    kept.mkdir(parents=True)
    assert run() == 2
    kept.rmdir()
    kept.write_bytes(b"\xff\xfe")
    assert run() == 2
    assert capsys.readouterr().err.count("a damaged file") == 2


def test_a_json_that_is_not_there(run, capsys, tmp_path):
    assert run(f"--config={tmp_path / 'config.json'}") == 2
    assert "wanted the config.json of a workdir, got no such" in capsys.readouterr().err


def test_other_versions_had_other_bounds(tmp_path):
    """What was allowed once is named with its file, not used."""
    record = json.loads(json.dumps(digits.get_config().to_dict()))
    record["seed"] = 2**40
    files.write_json(tmp_path / "config.json", record)
    with pytest.raises(UserError, match="config.json: wanted a whole number from 0"):
        run_config.load(f"{tmp_path / 'config.json'}")
    assert run_config.read(tmp_path) is None
    assert run_config.read(tmp_path / "nowhere") is None
    assert common.FIELDS.flat()["seed"].default == 0
