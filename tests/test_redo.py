"""Changes of a workdir: planned before anything is written, and made by --redo."""

import importlib
import os
import re
import shlex

import made_stages
import pytest
from etils import epath

from mvc_jax import files, train
from mvc_jax.command import command_line, pipeline, plan
from mvc_jax.configs import digits
from mvc_jax.training import runtime


@pytest.fixture
def worked(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    return made_stages.install(monkeypatch)


@pytest.fixture
def workdir(tmp_path, worked):
    """A finished run of the digits, by its own command."""
    folder = tmp_path / "a run's folder"
    assert run(folder, "--config=configs/digits.py") == 0
    assert worked == list(train.STAGES)
    worked.clear()
    return folder


def run(workdir, *flags):
    return train.main(["train", f"--workdir={workdir}", *flags])


def content(folder):
    """Every path below a folder -> (bytes, modification time) if it is a file."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def printed_flags(message):
    """The flags that a message says to use, as a shell reads them."""
    found = re.finditer(r"--(?:redo|from|config\.stages)=", message)
    lexers = [shlex.shlex(message[x.start() :], posix=True) for x in found]
    for lexer in lexers:
        lexer.whitespace_split = True
    return [lexer.get_token().rstrip(",.;") for lexer in lexers]


def steps_of(workdir, *flags, stages=None):
    command = command_line.parse(["train", f"--workdir={workdir}", *flags])
    stages = stages or pipeline.select(command.config)
    return {
        step.name: step for step in plan.make(stages, command.config, command.workdir)
    }


def states(steps):
    return {name: step.state for name, step in steps.items()}


CHANGES = {  # what is typed in a finished workdir -> what the message says to redo
    "mix.per_image=7": "classify",
    "mix.dims=4": "mix",
    "pairs.rounds=2": "pairs",
    "classify.steps=11": "classify",
    "seed=1": "caption",
    "report.title=Mine": "report",
    "generate.include_real=True": "classify",
    "mix.levels=True": "classify",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_refusal_comes_before_any_work_with_a_command_that_works(
    workdir, worked, capsys, change
):
    before = content(workdir)
    capsys.readouterr()
    assert run(workdir, f"--config.{change}") == 2
    assert content(workdir) == before
    assert worked == []
    [line] = capsys.readouterr().err.splitlines()
    flags = [flag for flag in printed_flags(line) if flag.startswith("--redo")]
    assert flags == [f"--redo={CHANGES[change]}"]

    assert run(workdir, f"--config.{change}", *flags) == 0
    first = train.STAGES.index(CHANGES[change])
    hanging = {"pairs": {"mix"}}.get(CHANGES[change], set())
    expected = {*train.STAGES[first:]} - hanging
    if change == "mix.per_image=7" or change == "mix.levels=True":
        expected |= {"mix", "generate"}  # which have grown
    elif change == "generate.include_real=True":
        expected |= {"generate"}
    assert {*worked} == expected
    out = capsys.readouterr().out
    assert "the table" in out and "report: " in out
    worked.clear()
    assert run(workdir) == 0  # with the changed settings
    assert worked == []
    moved = {path.name for path in (workdir / "earlier").glob("*/*")}
    assert moved >= {*train.STAGES[first:]} - hanging


def test_the_other_way_out_is_a_new_workdir(workdir, worked, capsys, tmp_path):
    before = content(workdir)
    assert run(workdir, "--config.mix.dims=4") == 2
    flags = printed_flags(capsys.readouterr().err)
    [source] = [flag for flag in flags if flag.startswith("--from")]
    assert source == f"--from={workdir}"
    new = tmp_path / "new"
    assert run(new, source, "--config.mix.dims=4") == 0
    assert worked == ["mix", "generate", "classify", "evaluate", "report"]
    assert content(workdir) == before


def test_all_refusals_of_a_run_are_one_message(workdir, worked, capsys):
    changes = ["--config.pairs.rounds=2", "--config.mix.dims=4"]
    assert run(workdir, *changes, "--config.classify.steps=9") == 2
    line = capsys.readouterr().err
    assert "pairs.rounds: 4 -> 2" in line and "mix.dims: 8 -> 4" in line
    flags = [flag for flag in printed_flags(line) if flag.startswith("--redo")]
    assert flags == ["--redo=pairs,mix"]
    assert run(workdir, *changes, "--config.classify.steps=9", *flags) == 0
    assert worked == [*train.STAGES[3:]]


def test_a_wrong_value_is_refused_before_the_stage_is_moved(workdir, worked, capsys):
    before = content(workdir)
    for flags in (["--config.mix.dims=65"], ["--config.mix.dims=65", "--redo=mix"]):
        capsys.readouterr()
        assert run(workdir, *flags) == 2
        assert capsys.readouterr().err.startswith("error: config.mix.dims: wanted")
    assert content(workdir) == before


@pytest.mark.parametrize(
    ("gone", "flags"),
    [
        (["generate"], ["--config.stages=classify"]),
        (["finetune", "generate"], ["--config.stages=classify,evaluate"]),
        ([], ["--config.stages=generate", "--config.mix.per_image=7"]),
        ([], ["--config.stages=classify", "--config.mix.dims=4"]),
        ([], ["--config.stages=generate", "--config.caption.captioner=template"]),
        (["generate"], ["--config.stages=classify", "--config.classify.steps=9"]),
        (train.STAGES, ["--config.stages=report"]),
        (["pretrain", "classify"], ["--config.stages=classify"]),
        (["pretrain", "mix/made.json", "classify"], ["--config.stages=classify"]),
        (["generate"], ["--config.stages=pairs,generate", "--config.pairs.rounds=2"]),
    ],
)
def test_stages_that_are_not_selected_are_named_with_a_command_that_works(
    workdir, worked, capsys, gone, flags
):
    for name in gone:
        path = epath.Path(workdir / name)
        path.rmtree() if path.is_dir() else path.unlink()
    before = content(workdir)
    assert run(workdir, *flags) == 2
    assert content(workdir) == before
    line = capsys.readouterr().err
    more = [flag for flag in printed_flags(line) if not flag.startswith("--from")]
    assert run(workdir, *flags, *more) == 0, capsys.readouterr().err
    assert worked


def test_growth_is_planned_for_every_stage_that_grows(workdir):
    steps = steps_of(workdir, "--config.mix.per_image=7")
    assert states(steps) == {
        **dict.fromkeys(train.STAGES[:5], "done"),
        "mix": "grow",
        "generate": "grow",
        "classify": "refused",
        "evaluate": "refused",
        "report": "refused",
    }
    assert steps["mix"].reason == "mix.per_image: 6 -> 7"
    assert steps["classify"].reason == "stage generate grows"
    assert steps["evaluate"].reason == "needs the stage classify"
    assert [name for name, step in steps.items() if step.error] == ["classify"]


def test_an_unfinished_stage_and_one_with_a_lost_file_are_resumed(workdir):
    (workdir / "mix" / "made.json").unlink()
    (workdir / "report" / "manifest.json").rename(workdir / "report" / "started.json")
    steps = steps_of(workdir)
    assert steps["mix"].state == "resume" and "made.json" in steps["mix"].reason
    assert steps["report"].state == "resume"
    others = {*train.STAGES} - {"mix", "report"}
    assert {steps[name].state for name in others} == {"done"}


@pytest.mark.parametrize("file", ["made.json", "manifest.json"])
def test_a_damaged_later_stage_stops_the_run_before_work(workdir, worked, capsys, file):
    (workdir / "mix" / "made.json").unlink()  # there is work for `mix`
    (workdir / "classify" / file).write_text("{}")
    before = content(workdir)
    assert run(workdir) == 2
    assert content(workdir) == before
    [flag] = printed_flags(capsys.readouterr().err)
    assert flag == "--redo=classify"
    assert run(workdir, flag) == 0
    assert worked == ["mix", "classify", "evaluate", "report"]


def test_a_damaged_file_that_its_stage_makes_again_stops_nothing(workdir, worked):
    whole = (workdir / "evaluate" / "metrics.json").read_bytes()
    (workdir / "evaluate" / "metrics.json").write_text("{}")
    assert states(steps_of(workdir))["evaluate"] == "resume"
    assert run(workdir) == 0
    assert worked == ["evaluate"]
    assert (workdir / "evaluate" / "metrics.json").read_bytes() == whole


def test_a_stage_that_was_deleted_is_made_again_and_the_others_stand(workdir, worked):
    epath.Path(workdir / "encode").rmtree()
    assert states(steps_of(workdir))["encode"] == "run"
    assert run(workdir) == 0
    assert worked == ["encode"]


def test_a_stage_that_was_deleted_and_changes_makes_the_others_refuse(
    workdir, worked, capsys
):
    epath.Path(workdir / "pairs").rmtree()
    before = content(workdir)
    assert run(workdir, "--config.pairs.rounds=2") == 2
    assert content(workdir) == before
    [flag] = [f for f in printed_flags(capsys.readouterr().err) if "redo" in f]
    assert flag == "--redo=finetune"
    assert run(workdir, "--config.pairs.rounds=2", flag) == 0


def test_redo_moves_the_stage_and_all_that_depends_on_it(workdir, worked, capsys):
    before = {path.relative_to(workdir): x for path, x in content(workdir).items()}
    rows = [{"stage": f"{name}/x", "step": 1} for name in ("finetune", "classify")]
    files.write_jsonl(workdir / "metrics.jsonl", rows)
    (workdir / "tensorboard" / "classify_real").mkdir(parents=True)
    (workdir / "tensorboard" / "finetune").mkdir()
    assert run(workdir, "--redo=generate") == 0
    assert worked == ["generate", "classify", "evaluate", "report"]
    [aside] = (workdir / "earlier").iterdir()
    for path, found in before.items():
        if path.parts[0] in worked and found is not None:
            assert (aside / path).read_bytes() == found[0]
    assert files.read_jsonl(workdir / "metrics.jsonl") == rows[:1]
    assert files.read_jsonl(aside / "metrics.jsonl") == rows[1:]
    assert (aside / "tensorboard" / "classify_real").exists()
    assert (aside / "digests" / "classify.jsonl").exists()
    assert [p.name for p in (workdir / "tensorboard").iterdir()] == ["finetune"]
    assert {*files.read_json(workdir / "timings.json")} == {*train.STAGES}
    assert not (workdir / "redo.json").exists()
    assert f"moved to {aside}: generate, classify" in capsys.readouterr().err


def test_redo_of_all_and_of_several(workdir, worked, capsys):
    assert run(workdir, "--redo=all") == 0
    assert worked == list(train.STAGES)
    worked.clear()
    assert run(workdir, "--redo=evaluate", "--redo=pairs") == 0
    assert worked == [*train.STAGES[3:5], *train.STAGES[6:]]
    worked.clear()
    assert run(workdir, "--redo=mix", "--config.stages=mix") == 0
    assert worked == ["mix"]
    assert not (workdir / "classify").exists()
    assert run(workdir, "--redo=nope") == 2
    assert "all, or some stages of this run: caption" in capsys.readouterr().err
    assert run(workdir, "--redo=mix", "--config.stages=caption") == 2
    assert "add them to --config.stages" in capsys.readouterr().err


class Killed(BaseException):
    pass


def stop_before(monkeypatch, name, error):
    """Makes the stage raise once."""
    module = importlib.import_module(f"mvc_jax.{name}")
    whole = module.run

    def run(config, workdir):
        monkeypatch.setattr(module, "run", whole)
        raise error

    monkeypatch.setattr(module, "run", run)


def test_the_same_redo_goes_on_after_a_kill(workdir, worked, monkeypatch):
    command = ["--redo=finetune", "--config.finetune.steps=9"]
    stop_before(monkeypatch, "classify", Killed())
    with pytest.raises(Killed):
        run(workdir, *command)
    assert worked == ["finetune", "generate"]
    made = content(workdir / "generate")
    assert run(workdir, *command) == 0
    assert worked == ["finetune", "generate", "classify", "evaluate", "report"]
    assert content(workdir / "generate") == made
    assert len([*(workdir / "earlier").iterdir()]) == 1
    worked.clear()
    assert run(workdir, *command) == 0  # it had ended: this is another one
    assert worked == ["finetune", "generate", "classify", "evaluate", "report"]


def test_another_change_after_a_kill_is_another_redo(workdir, worked, monkeypatch):
    stop_before(monkeypatch, "classify", Killed())
    with pytest.raises(Killed):
        run(workdir, "--redo=finetune", "--config.finetune.steps=9")
    worked.clear()
    assert run(workdir, "--redo=finetune", "--config.finetune.steps=8") == 0
    assert worked == ["finetune", "generate", "classify", "evaluate", "report"]


def test_an_error_that_asks_for_a_redo_ends_the_one_before(
    workdir, worked, monkeypatch
):
    error = train.UserError("classify", wanted="a", got="b", fix="Add --redo=finetune.")
    stop_before(monkeypatch, "classify", error)
    assert run(workdir, "--redo=finetune") == 2
    worked.clear()
    assert run(workdir, "--redo=finetune") == 0
    assert worked == ["finetune", "generate", "classify", "evaluate", "report"]


def test_a_run_that_needs_nothing_does_not_end_an_interrupted_redo(
    workdir, worked, monkeypatch
):
    stop_before(monkeypatch, "classify", Killed())
    with pytest.raises(Killed):
        run(workdir, "--redo=finetune")
    assert run(workdir, "--config.stages=caption") == 0
    assert (workdir / "redo.json").exists()
    assert run(workdir) == 0
    assert not (workdir / "redo.json").exists()


def test_every_dependent_of_a_stage_is_known():
    config = digits.get_config()
    folder = epath.Path("nowhere")
    assert pipeline.dependents(["caption"], config, folder) == list(train.STAGES)
    assert pipeline.dependents(["pairs"], config, folder) == [
        "pairs",
        "finetune",
        *train.STAGES[6:],
    ]
    assert pipeline.needed(["mix"], config) == ["caption", "pretrain", "encode", "mix"]
    config.base.path = "sd15"
    assert pipeline.needed(["mix"], config) == ["caption", "encode", "mix"]


def test_verify_names_what_cannot_be_made_again_and_makes_the_rest(
    workdir, worked, capsys
):
    """Even where size and modification time are as they were."""
    for name, file in (("evaluate", "metrics.json"), ("mix", "made.json")):
        path = workdir / name / file
        whole, times = path.read_bytes(), os.stat(path).st_mtime_ns
        path.write_bytes(whole.swapcase())
        os.utime(path, ns=(times, times))
        code = run(workdir, "--verify")
        errors = capsys.readouterr().err
        if name == "evaluate":
            assert code == 0
            assert f"{name}: 1 files compared" in errors
            assert path.read_bytes() == whole
        else:
            assert code == 2
            assert f"  {path}\n" in errors
            assert printed_flags(errors) == ["--redo=mix"]
            assert run(workdir, "--verify", "--redo=mix") == 0
    assert run(workdir, "--verify") == 0
