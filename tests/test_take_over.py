"""--from: stages of another workdir are taken over where everything agrees."""

import os
import pathlib
import subprocess
import sys

import made_stages
import pytest
from etils import epath
from fork_server import ROOT, user_environment
from test_redo import content, run

from mvc_jax import files, train
from mvc_jax.command import run_folder
from mvc_jax.training import runtime


@pytest.fixture
def worked(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    return made_stages.install(monkeypatch)


@pytest.fixture
def source(tmp_path, worked, capsys):
    """A finished run with settings of its own."""
    folder = tmp_path / "source"
    assert run(folder, "--config.mix.tokens=3") == 0
    rows = [{"stage": f"{name}/x", "step": 1} for name in ("finetune", "classify")]
    files.write_jsonl(folder / "metrics.jsonl", rows)
    for name in ("finetune", "classify_real_seed-0"):
        files.write_text(folder / "tensorboard" / name / "events", name)
    files.write_text(folder / "finetune" / "checkpoints" / "4" / "state", "s")
    worked.clear()
    capsys.readouterr()
    return folder


def test_the_stages_that_agree_are_taken_over(source, worked, tmp_path, capsys):
    before = content(source)
    new = tmp_path / "new"
    assert run(new, f"--from={source}", "--config.mix.modes=fine") == 0
    assert worked == ["mix", "generate", "classify", "evaluate", "report"]
    stages = "caption, pretrain, encode, pairs, finetune"
    assert f"taken over from {source}: {stages}\n" in capsys.readouterr().err
    for path, found in content(new).items():
        relative = path.relative_to(new)
        if relative.parts[0] in train.STAGES[:5] and found is not None:
            assert found == before[source / relative]
            assert path.samefile(source / relative)
    assert (new / "finetune" / "checkpoints" / "4" / "state").exists()
    record = files.read_json(new / "config.json")
    assert (record["mix"]["tokens"], record["mix"]["modes"]) == (3, ["fine"])
    assert [r["stage"] for r in files.read_jsonl(new / "metrics.jsonl")] == [
        "finetune/x"
    ]
    assert [p.name for p in (new / "tensorboard").iterdir()] == ["finetune"]
    assert {*files.read_json(new / "timings.json")} == {*train.STAGES}
    records = [folder / "digests" / "encode.jsonl" for folder in (source, new)]
    assert records[0].read_bytes() == records[1].read_bytes()
    assert not records[0].samefile(records[1])  # rows are appended to them
    assert content(source) == before
    worked.clear()
    assert run(new) == 0
    assert run(new, f"--from={source}", "--config.mix.modes=fine") == 0
    assert worked == []


def test_without_a_change_all_is_taken_over(source, worked, tmp_path, capsys):
    assert run(tmp_path / "new", f"--from={source}") == 0
    assert worked == []
    printed = capsys.readouterr()
    assert "the table" in printed.out and "nothing to do" in printed.err
    assert run(source, "--config.mix.per_image=7", "--config.stages=mix,generate") == 0
    assert run(tmp_path / "new") == 0  # which has the earlier files
    assert worked == ["mix", "generate"]


def test_a_stage_that_grows_is_taken_over_first(source, worked, tmp_path):
    before = content(source)
    new = tmp_path / "new"
    assert run(new, f"--from={source}", "--config.mix.per_image=7") == 0
    assert worked == ["mix", "generate", "classify", "evaluate", "report"]
    assert files.read_json(new / "mix" / "manifest.json")["grew_from"]
    assert content(source) == before


def test_stages_that_are_read_are_taken_over_unselected(source, worked, tmp_path):
    flags = ["--config.stages=classify", "--config.classify.steps=7"]
    assert run(tmp_path / "new", f"--from={source}", *flags) == 0
    assert worked == ["classify"]
    made = {path.name for path in (tmp_path / "new").iterdir() if path.is_dir()}
    assert made == {*train.STAGES[:8], "tensorboard", "digests"}


def test_redo_and_from_together(source, worked, tmp_path):
    assert run(tmp_path / "new", f"--from={source}", "--redo=generate") == 0
    assert worked == ["generate", "classify", "evaluate", "report"]


@pytest.mark.parametrize("fault", ["edited", "lost", "damaged", "unfinished"])
def test_a_stage_with_a_fault_is_not_taken_over(source, worked, tmp_path, fault):
    folder = source / "encode"
    if fault == "edited":
        (folder / "made.json").write_text("{}")
    elif fault == "lost":
        (folder / "made.json").unlink()
    elif fault == "damaged":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").rename(folder / "started.json")
    assert run(tmp_path / "new", f"--from={source}") == 0
    assert worked == [*train.STAGES[2:]]


def test_a_folder_that_has_files_already_is_kept(source, worked, tmp_path):
    new = tmp_path / "new"
    files.write_text(new / "report" / "mine.txt", "mine")
    (new / "mix").mkdir()
    assert run(new, f"--from={source}") == 0
    assert worked == ["report"]
    assert (new / "report" / "mine.txt").read_text() == "mine"


def test_files_are_copied_where_links_are_not_possible(
    source, worked, tmp_path, monkeypatch
):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    new = tmp_path / "new"
    assert run(new, f"--from={source}") == 0
    assert worked == []
    for path, found in content(new).items():
        relative = path.relative_to(new)
        if found is not None and relative.parts[0] in train.STAGES:
            assert found == content(source)[source / relative]  # the time, too
            assert not path.samefile(source / relative)


def test_a_config_can_be_named_besides(source, worked, tmp_path):
    flags = [f"--from={source}", "--config=configs/digits.py"]
    assert run(tmp_path / "new", *flags) == 0
    assert worked == ["mix", "generate", "classify", "evaluate", "report"]


@pytest.mark.parametrize("case", ["nothing", "itself", "no config", "empty", "in use"])
def test_a_source_that_cannot_be_used(source, worked, tmp_path, capsys, case):
    new, flags = tmp_path / "new", [f"--from={source}"]
    if case == "nothing":
        flags = [f"--from={tmp_path / 'nowhere'}"]
    elif case == "itself":
        new = source
    elif case == "no config":
        (source / "config.json").unlink()
    elif case == "empty":
        flags = ["--from="]
    if case == "in use":
        with run_folder.locked(epath.Path(source)):
            assert run(new, *flags) == 2
    else:
        assert run(new, *flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --from")
    assert worked == []
    if case == "no config":  # the message has a config
        assert run(new, *flags, "--config=configs/digits.py") == 0


KILLED = pathlib.Path(__file__).parent / "killed_at_every_write.py"


@pytest.mark.parametrize("flag", ["--from", "--redo"])
def test_a_kill_at_any_write_is_survived(flag, tmp_path):
    """The same command again ends with the files of a run that was not killed."""
    done = subprocess.run(
        [sys.executable, KILLED, flag, tmp_path],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
