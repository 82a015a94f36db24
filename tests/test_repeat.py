"""`mvc-jax repeat`: a run for each seed, and intervals over them."""

import json

import made_stages
import pytest
from etils import epath
from PIL import Image

from mvc_jax import files, train
from mvc_jax.command import command_line, pipeline, repeat, run_config
from mvc_jax.errors import UserError

ACCURACIES = {0: (0.80, 0.83), 1: (0.85, 0.854), 2: (0.84, 0.874)}  # by seed


def metrics(seed):
    """What `evaluate` would write of two runs."""
    real, combined = ACCURACIES[seed]
    runs = [
        {"name": name, "title": title, "accuracy": {"mean": mean}}
        for name, title, mean in (
            ("real", "Real only", real),
            ("combined", "Real + synthetic", combined),
        )
    ]
    question = "Do the synthetic images help? Real + synthetic, over real only:"
    asked = {"question": question, "run": "combined", "against": "real"}
    asked |= {"mean": combined - real, "verdict": "yes", "sentence": "Yes: it does."}
    return {"confidence": 0.95, "runs": runs, "questions": [asked]}


@pytest.fixture
def program():
    """A single run, as a function; `program.commands` are those it was given."""

    def run(argv):
        run.commands.append(argv[1:])
        command = command_line.parse(argv)
        config, workdir = command.config, command.workdir
        if config.seed == run.fails_at:
            return 75
        run_config.write(config, workdir)
        made_stages.finish(workdir, config, *pipeline.STAGES[:-1])
        files.write_json(workdir / "evaluate" / "metrics.json", metrics(config.seed))
        return 0

    run.commands, run.fails_at = [], None
    return run


def repeated(program, *flags):
    return repeat.run(["mvc-jax", "repeat", *flags], program)


def test_the_headline_is_the_interval_over_the_splits(tmp_path, program, capsys):
    workdir = f"--workdir={tmp_path}"
    assert repeated(program, workdir, "--config.mix.modes=fine") == 0
    for seed, words in enumerate(program.commands):
        own = [f"--workdir={tmp_path}/seed-{seed}", f"--config.seed={seed}"]
        assert words[-3:] == ["--config.mix.modes=fine", *own]
    assert len(program.commands) == 3
    text = (tmp_path / "splits.md").read_text()
    best = "Real + synthetic (85.3 %), the most accurate of 2 by its mean over the sp"
    said = (
        "Real + synthetic (85.3 %), against Real only (83.0 %). No evidence either "
        "way: +2.3 points (95% interval -1.8 to +6.3)."
    )
    assert text.index(best) < text.index(said)
    assert "| Real + synthetic | 83.0 | 85.4 | 87.4 | 85.3 |" in text
    shown = capsys.readouterr().out
    assert said in shown and f"report: {tmp_path}/splits.html" in shown
    assert "its own split, base, generator and classifiers." in text
    assert "![test accuracy by split](splits.png)" in text
    with Image.open(tmp_path / "splits.png") as picture:
        assert min(picture.size) > 100
    page = (tmp_path / "splits.html").read_text()
    assert said in page and "−1.8 to +6.3" in page
    assert 'href="seed-2/report/report.html"' in page and "://" not in page
    summary = json.loads((tmp_path / "splits.json").read_text())
    assert summary["seeds"] == [0, 1, 2]
    assert summary["rows"][1]["accuracies"] == [0.83, 0.854, 0.874]


def test_a_seed_is_added_with_the_settings_of_the_others(tmp_path, program):
    workdir = f"--workdir={tmp_path}"
    field = "--config.mix.modes=fine"
    assert repeated(program, workdir, "--seeds=0,1", field) == 0
    assert repeated(program, workdir, "--seeds=0,1,2") == 0
    assert program.commands[2:4] == [
        [f"--workdir={tmp_path}/seed-{x}", f"--config.seed={x}"] for x in (0, 1)
    ]
    assert program.commands[4][0] == f"--config={tmp_path}/seed-0/config.json"
    config = run_config.read(epath.Path(tmp_path) / "seed-2")
    assert config.mix.modes == ("fine",) and config.seed == 2


def test_a_base_with_a_seed_of_its_own_is_taken_over_from_the_first(tmp_path, program):
    workdir = f"--workdir={tmp_path}"
    assert repeated(program, workdir, "--config.pretrain.seed=0") == 0
    sources = [[x for x in c if x.startswith("--from")] for c in program.commands]
    first = [f"--from={tmp_path}/seed-0"]
    assert sources == [[], first, first]
    assert "classifiers; the base is the same." in (tmp_path / "splits.md").read_text()


def test_of_real_images_alone_no_base_is_named(tmp_path, program):
    words = ["--config.generate.sets=", "--config.classify.runs=real,real+affine"]
    assert repeated(program, f"--workdir={tmp_path}", *words) == 0
    text = (tmp_path / "splits.md").read_text()
    assert "Every seed draws its own split and classifiers." in text


def test_stages_are_taken_over_from_the_same_seeds_of_another(tmp_path, program):
    first, second = tmp_path / "first", tmp_path / "second"
    repeated(program, f"--workdir={first}", "--seeds=0,2", "--config.pretrain.seed=0")
    words = [f"--from={first}", "--config.classify.steps=7"]
    assert repeated(program, f"--workdir={second}", "--seeds=0,2", *words) == 0
    for seed, command in zip((0, 2), program.commands[2:], strict=True):
        sources = [x for x in command if x.startswith("--from")]
        assert sources == [f"--from={first}/seed-{seed}"]
    with pytest.raises(UserError, match=r"none of seed 1, 4 in it"):
        repeated(program, f"--workdir={second}", "--seeds=0,1,4", *words)


def test_the_first_run_that_does_not_succeed_ends_it(tmp_path, program):
    program.fails_at = 1
    assert repeated(program, f"--workdir={tmp_path}") == 75
    assert len(program.commands) == 2
    assert not (tmp_path / "splits.md").exists()
    program.fails_at = None
    assert repeated(program, f"--workdir={tmp_path}") == 0
    assert (tmp_path / "splits.md").exists()


def test_runs_of_other_settings_are_not_compared(tmp_path, program):
    repeated(program, f"--workdir={tmp_path}", "--seeds=0")
    with pytest.raises(UserError, match=r"seed-1.*mix.per_image: \d+ -> 7") as error:
        repeated(
            program, f"--workdir={tmp_path}", "--seeds=1", "--config.mix.per_image=7"
        )
        repeated(program, f"--workdir={tmp_path}", "--seeds=0,1")
    assert "but for the seed" in str(error.value)


def test_without_results_there_is_no_table(tmp_path, capsys):
    def captions_alone(argv):
        return 0

    assert repeated(captions_alone, f"--workdir={tmp_path}", "--seeds=0") == 0
    assert "the stage evaluate was not run" in capsys.readouterr().out
    assert repeated(captions_alone, f"--workdir={tmp_path}", "--dry_run") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0,x"], "--seeds: wanted different whole numbers"),
        (["--seeds=1,1"], "--seeds: wanted different whole numbers"),
        (["--seeds="], "--seeds: wanted different whole numbers"),
        (["--seeds=-1"], "--seeds: wanted different whole numbers"),
        (["--config.seed=3"], "--config.seed: wanted a flag of all seeds alike"),
        (["--from=x"], "--from=x: wanted the folder of another repetition, with the s"),
        (["--from="], "--from: wanted --from=FOLDER"),
        (["--workdir", "x"], "--workdir: wanted --workdir=FOLDER"),
        (["--mode=x"], "command line: wanted"),
        (["words"], "command line: wanted only flags"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, tmp_path, capsys):
    words = flags if "--workdir" in flags else [*flags, f"--workdir={tmp_path}"]
    assert train.main(["mvc-jax", "repeat", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_workdir_it_says_so(capsys):
    assert train.main(["mvc-jax", "repeat", "--seeds=0"]) == 2
    assert "--workdir: wanted a folder" in capsys.readouterr().err


def test_it_has_a_help_of_its_own(capsys):
    with pytest.raises(SystemExit):
        train.main(["mvc-jax", "repeat", "--help"])
    assert "repeat --seeds=0,1,2" in capsys.readouterr().out
