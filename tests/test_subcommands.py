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
    words = f"mvc-jax {name}".replace("train", "[train]")
    assert words in capsys.readouterr().out


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
        ("mvc-jax --config.track=wandb,m", "wandb,m", ["wandb,mlflow"], ["mlflow"]),
        ("mvc-jax --redo=gen", "gen", ["generate"], ["all"]),
        ("mvc-jax --help=m", "m", ["mesh", "mix"], ["data"]),
        ("mvc-jax --config=configs/fol", "configs/fol", ["configs/folder.py"], []),
        ("mvc-jax sweep --vary mix.tok", "mix.tok", ["mix.tokens="], []),
        ("mvc-jax completion ", "", ["bash ", "zsh "], ["train "]),
        # zsh replaces the whole word, and proposes no files of a flag's value itself.
        ("mvc-jax --redo=gen", "--redo=gen", ["--redo=generate"], ["generate"]),
        ("mvc-jax --workdir=tes", "--workdir=tes", ["--workdir=tests/"], []),
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
    """A live shell, which calls a stand-in that calls the program."""
    program = tmp_path / "mvc-jax"
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m mvc_jax.train "$@"\n', "utf-8"
    )
    program.chmod(0o755)
    script = """
eval "$(mvc-jax completion bash)"
complete -p mvc-jax
COMP_LINE='mvc-jax comp' COMP_POINT=12 mvc-jax completion mvc-jax comp mvc-jax
compgen -C 'mvc-jax completion' se 2>/dev/null
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    first, *others = done.stdout.splitlines()
    assert "-C 'mvc-jax completion' mvc-jax" in first
    assert others[:2] == ["compare ", "completion "]
    assert "jax" not in done.stderr


@pytest.mark.parametrize("buffered", [True, False])
def test_what_reads_the_output_may_end(buffered):
    """As with `mvc-jax --help | head -1`."""
    unread, written = os.pipe()
    os.close(unread)
    flags = [] if buffered else ["-u"]
    try:
        done = subprocess.run(
            [sys.executable, *flags, "-m", "mvc_jax.train", "completion", "bash"],
            stdout=written,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(written)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_command_that_is_mistyped_is_named(capsys):
    assert train.main(["mvc-jax", "sweeep"]) == 2
    error = capsys.readouterr().err
    assert "or one of train, repeat" in error and "Write mvc-jax sweep." in error
    assert train.main(["mvc-jax", "completion", "fish"]) == 2
    assert "wanted bash or zsh, got fish" in capsys.readouterr().err


def test_a_report_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(UserError):
        command_line.parse_report(["mvc-jax", "report", "--redoo"])
    assert train.main(["mvc-jax", "report", f"--workdir={tmp_path}"]) == 2
