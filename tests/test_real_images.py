"""Classifiers of real images alone: no generator, no set, no prompt."""

import pytest
from etils import epath

from mvc_jax import classify, evaluate, files, generate, report
from mvc_jax import train as command
from mvc_jax.command import pipeline
from mvc_jax.configs import digits, real_images
from mvc_jax.errors import UserError
from mvc_jax.stage import read_manifest

STAGES = ["caption", "classify", "evaluate", "report"]


@pytest.mark.parametrize("data", real_images.DATA)
def test_no_stage_of_the_generator_is_selected_or_read(data):
    config = real_images.get_config(f"data={data},path=a")
    assert pipeline.select(config) == STAGES
    assert pipeline.needed(STAGES, config) == STAGES
    with pytest.raises(UserError, match="generate.sets.*got none"):
        generate.check(config)
    config.classify.runs = ("real", "combined")
    with pytest.raises(UserError, match="a set of config.generate.sets"):
        classify.check(config)


def test_with_sets_all_is_as_before():
    config = digits.get_config()
    assert pipeline.select(config) == [*pipeline.STAGES]
    assert classify.stage_spec(config).inputs == ("generate",)
    assert evaluate.stage_spec(config).inputs == ("classify",)
    assert {"mix", "generate"} < {*report.stage_spec(config).inputs}


@pytest.mark.parametrize("sets", [("mixed",), ()])
def test_captions_that_are_the_same_matter_to_mixing(
    sets, tmp_path, monkeypatch, caplog
):
    config = digits.get_config()
    config.data.size, config.data.per_class, config.data.pool = 8, 2, 0
    config.caption.captioner, config.base.path = "template", "a/base"
    config.stages, config.generate.sets = "caption", sets
    config.classify.runs = ("real",)
    monkeypatch.setattr(command.runtime, "set_up", lambda folder: None)
    command.run(config, epath.Path(tmp_path) / "run")
    assert ("mixing them has no effect" in caplog.text) == bool(sets)


def test_a_run_of_real_images_ends_with_a_report(tmp_path, monkeypatch):
    config = digits.get_config()
    config.data.size, config.data.per_class, config.data.test_fraction = 8, 2, 0.02
    config.data.pool = 0
    config.generate.sets = ()
    config.classify.runs = ("real",)
    config.classify.seeds, config.classify.steps = 1, 2
    monkeypatch.setattr(command.runtime, "set_up", lambda folder: None)
    workdir = epath.Path(tmp_path) / "run"
    command.run(config, workdir)
    made = {path.name for path in workdir.iterdir() if path.is_dir()}
    assert {*STAGES} < made and not made & {"generate", "mix", "encode", "finetune"}
    assert read_manifest(workdir, "classify")["inputs"].keys() == {"caption"}
    metrics = files.read_json(workdir / "evaluate" / "metrics.json")
    assert [run["name"] for run in metrics["runs"]] == ["real"]
    page = (workdir / "report" / "report.html").read_text()
    assert "Is it the mixing?" not in page and "Images of every class" in page
