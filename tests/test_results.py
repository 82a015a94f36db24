"""What is printed at the end of a run is the result of that run's settings."""

import made_stages
import pytest
from etils import epath
from test_redo import printed_flags, run

from mvc_jax import train
from mvc_jax.training import runtime


@pytest.fixture
def worked(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    return made_stages.install(monkeypatch)


@pytest.fixture
def workdir(tmp_path, worked, capsys):
    assert run(tmp_path / "run") == 0
    worked.clear()
    capsys.readouterr()
    return tmp_path / "run"


CURRENT = [
    [],
    ["--config.stages=generate"],
    ["--config.stages=caption,mix"],
    ["--config.stages=report"],
    ["--config.generate.batch_size=3"],  # changes no result
]


@pytest.mark.parametrize("flags", CURRENT)
def test_a_result_that_is_up_to_date_is_printed(workdir, worked, capsys, flags):
    assert run(workdir, *flags) == 0
    printed = capsys.readouterr()
    path = workdir / "report" / "report.html"
    assert printed.out == f"the table\n\nreport: {path}\n"
    assert "not shown" not in printed.err
    assert worked == []


# Flags of a run that works, and the stage that is behind after it.
BEHIND = [
    (["--config.stages=mix", "--config.mix.per_image=7"], "generate"),
    (["--config.stages=mix,generate", "--config.mix.per_image=7"], "classify"),
    (["--config.stages=generate", "--config.generate.include_real=1"], "classify"),
    (["--config.stages=generate", "--config.classify.steps=9"], "classify"),
    (["--config.stages=pairs", "--config.finetune.steps=9"], "finetune"),
    (["--config.stages=pairs", "--config.evaluate.confidence=0.5"], "evaluate"),
]


@pytest.mark.parametrize(("flags", "stage"), BEHIND)
def test_a_result_that_a_change_has_overtaken_is_not_printed(
    workdir, worked, capsys, flags, stage
):
    assert run(workdir, *flags) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    for what in ("the table", "the report"):
        assert f"{what} of an earlier run is not shown: stage {stage} is behind (" in (
            printed.err
        )
    line = printed.err.splitlines()[-1]
    assert line.startswith("warning: to bring the results up to date, use --config.s")
    assert run(workdir, *flags, *printed_flags(line)) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("the table\n\nreport: ")
    assert "not shown" not in printed.err


def test_only_what_is_behind_is_left_out(workdir, capsys):
    assert run(workdir, "--config.stages=evaluate", "--config.report.title=x") == 0
    printed = capsys.readouterr()
    assert printed.out == "the table\n"
    assert "the report of an earlier run is not shown: stage report is b" in printed.err


def test_an_unfinished_stage_and_an_edited_table_are_not_printed(workdir, capsys):
    folder = workdir / "mix"
    (folder / "manifest.json").rename(folder / "started.json")
    assert run(workdir, "--config.stages=caption,encode") == 0
    assert "stage mix is behind (it is unfinished)" in capsys.readouterr().err
    (folder / "started.json").rename(folder / "manifest.json")
    (workdir / "evaluate" / "metrics.json").write_text("{}")
    assert run(workdir, "--config.stages=caption,encode") == 0
    printed = capsys.readouterr()
    assert "the table\n" not in printed.out
    assert "metrics.json is missing or damaged" in printed.err


def test_a_stage_that_was_deleted_to_free_space_is_not_behind(workdir, capsys):
    epath.Path(workdir / "pretrain").rmtree()
    assert run(workdir, "--config.stages=classify,evaluate") == 0
    assert capsys.readouterr().out.startswith("the table\n")


def test_captions_alone_end_with_their_table(workdir, capsys):
    assert run(workdir, "--config.stages=caption") == 0
    assert capsys.readouterr().out == "the captions\n"
    assert train.STAGES[0] == "caption"
