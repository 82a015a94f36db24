"""`mvc-jax` and its subcommands: what each does, and what a shell proposes."""

import os
import subprocess
import sys

import made_stages
import pytest

from mvc_jax import train
from mvc_jax.command import command_line, completion, run_config
from mvc_jax.errors import UserError


@pytest.mark.parametrize("name", completion.SUBCOMMANDS)
def test_each_has_help(name, capsys):
    try:
        assert train.main(["mvc-jax", name, "--help"]) == 0
    except SystemExit as end:
        assert not end.code
    assert f"mvc-jax {name}" in capsys.readouterr().out


def test_a_report_is_made_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.runtime, "set_up", lambda _: None)
    worked = made_stages.install(monkeypatch)
    run = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    assert train.main(["mvc-jax", "train", *run]) == 0
    worked.clear()
    again = ["mvc-jax", "report", f"--workdir={tmp_path}"]
    assert train.main([*again, "--config.report.title=Two"]) == 0
    assert worked == ["report"]
    assert run_config.read(tmp_path)["report"]["title"] == "Two"
    assert train.main([*again, "--redo=mix"]) == 2
    assert "report: wanted --workdir, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "word", "some", "none"),
    [
        ("mvc-jax ", "", ["train ", "doctor "], ["--workdir="]),
        ("mvc-jax re", "re", ["repeat ", "report "], ["train "]),
        ("mvc-jax sweep --v", "--v", ["--vary ", "--verify "], ["--workdir="]),
        ("mvc-jax --config.gen", "--config.gen", ["--config.generate.steps="], []),
        ("mvc-jax train --config.generate.sampler=d", "d", ["ddim "], ["euler "]),
        ("mvc-jax --config.generate.folder=", "=", ["True ", "False "], []),
        ("mvc-jax --workdir=", "=", [], ["ddim "]),
        ("mvc-jax train runs", "runs", [], ["repeat "]),
    ],
)
def test_what_a_shell_proposes(line, word, some, none):
    found = completion.proposals(line, word)
    assert {*some} <= {*found}
    assert not {*none} & {*found}
    if not some:
        assert found == []


def test_bash_completes(tmp_path):
    """As bash calls it: the command, the word and the one before."""
    line = "mvc-jax comp"
    done = subprocess.run(
        [sys.executable, "-m", "mvc_jax.train", "completion", "mvc-jax", "comp", "x"],
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "compare \n"
    assert "jax" not in done.stderr


def test_a_report_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(UserError):
        command_line.parse_report(["mvc-jax", "report", "--redoo"])
    assert train.main(["mvc-jax", "report", f"--workdir={tmp_path}"]) == 2
