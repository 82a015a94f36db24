"""`mvc-jax sweep`: a run for each value of a field, sharing what they can."""

import importlib
import json

import numpy as np
import pytest
import swept_runs
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files, train
from mvc_jax.classification import comparisons
from mvc_jax.command import run_config, take_over, vary
from mvc_jax.errors import UserError
from mvc_jax.stage import Part
from mvc_jax.training import preemption

RUNS = "--config.classify.runs=real,combined,combined:unmixed"
AFTER_MIX = ["mix", "generate", "classify", "evaluate", "report"]


@pytest.fixture
def worked(monkeypatch):
    return swept_runs.install(monkeypatch)


def swept(workdir, *flags):
    words = ["mvc-jax", "sweep", f"--workdir={workdir}", RUNS, *flags]
    return train.main(words)


def summary_of(workdir):
    return json.loads((workdir / "sweep.json").read_text())


def test_points_share_the_stages_that_are_the_same(tmp_path, worked, capsys):
    assert swept(tmp_path, "--vary", "mix.tokens=2,4,8") == 0
    assert worked == [*train.STAGES, *AFTER_MIX, *AFTER_MIX]
    folders = [tmp_path / f"mix.tokens={x}" for x in (2, 4, 8)]
    for folder in folders[1:]:
        for name in train.STAGES[:5]:
            files_ = [x / name / "manifest.json" for x in (folders[0], folder)]
            assert files_[0].samefile(files_[1])
        assert run_config.read(folder).classify.runs[0] == "real"
    told = capsys.readouterr()
    assert (
        "mix.tokens=4 (2 of 3): caption, pretrain, encode, pairs, finetune from "
        "mix.tokens=2; makes mix, generate, classify, evaluate, report\n"
    ) in told.err
    assert "the table" not in told.out  # of each point
    assert told.out == (
        f"\n{(tmp_path / 'sweep.md').read_text()}\nreport: {tmp_path}/sweep.html\n"
    ).replace("![test accuracy by mix.tokens](sweep.png)\n\n", "")


def test_what_was_finished_is_kept_and_a_value_is_added(tmp_path, worked):
    assert swept(tmp_path, "--vary=mix.tokens=2,4", "--config.mix.per_image=3") == 0
    worked.clear()
    assert swept(tmp_path, "--vary=mix.tokens=2,4") == 0
    assert worked == []
    assert swept(tmp_path, "--vary=config.mix.tokens=4,8") == 0
    assert worked == AFTER_MIX
    assert run_config.read(tmp_path / "mix.tokens=8").mix.per_image == 3
    assert [x["name"] for x in summary_of(tmp_path)["points"]] == [
        "mix.tokens=4",
        "mix.tokens=8",
    ]


def test_a_sweep_that_was_stopped_goes_on(tmp_path, worked, monkeypatch):
    module = importlib.import_module("mvc_jax.generate")
    finished = module.run

    def stopped(config, workdir):
        if config.mix.tokens == 4:
            raise preemption.Preempted
        finished(config, workdir)

    monkeypatch.setattr(module, "run", stopped)
    assert swept(tmp_path, "--vary=mix.tokens=2,4,8") == 75
    assert not (tmp_path / "sweep.json").exists()
    monkeypatch.setattr(module, "run", finished)
    worked.clear()
    assert swept(tmp_path, "--vary=mix.tokens=2,4,8") == 0
    assert worked == [*AFTER_MIX[1:], *AFTER_MIX]


def test_a_point_that_is_refused_when_it_is_made_leaves_the_others(
    tmp_path, worked, monkeypatch, capsys
):
    """As `mix.tokens=8` where no caption has so many tokens."""
    module = importlib.import_module("mvc_jax.mix")
    finished = module.run

    def refusing(config, workdir):
        if config.mix.tokens == 8:
            raise UserError("config.mix.tokens", wanted="at most 7", got="8", fix="Go.")
        finished(config, workdir)

    monkeypatch.setattr(module, "run", refusing)
    assert swept(tmp_path, "--vary=mix.tokens=2,8,12") == 2
    error = capsys.readouterr().err
    assert "error: config.mix.tokens: wanted at most 7, got 8. Go." in error
    assert "so at mix.tokens=8" in error
    names = [x["name"] for x in summary_of(tmp_path)["points"]]
    assert names == ["mix.tokens=2", "mix.tokens=12"]


def test_a_grid_loses_the_value_of_a_refused_point():
    axes = [vary.Axis("a", (1, 2, 3)), vary.Axis("b", (4, 5))]
    points = [
        vary.Point(f"{a},{b}", {"a": a, "b": b}, ConfigDict())
        for a in (1, 2, 3)
        for b in (4, 5)
    ]
    left, kept = vary.without(axes, points, {"2,5"})
    assert [x.values for x in left] == [(1, 3), (4, 5)]
    assert [x.name for x in kept] == ["1,4", "1,5", "3,4", "3,5"]
    assert vary.without(axes, points, ()) == (axes, points)
    assert vary.without(axes, points, {x.name for x in points})[1] == []


def test_a_finished_run_is_the_first_to_share_with(tmp_path, worked, capsys):
    assert train.main(["train", f"--workdir={tmp_path}/run", RUNS]) == 0
    before = {x: x.stat().st_mtime_ns for x in (tmp_path / "run").rglob("*")}
    worked.clear()
    flags = [f"--from={tmp_path}/run", "--vary=mix.tokens=2,4"]
    assert swept(tmp_path / "sweep", *flags) == 0
    assert worked == AFTER_MIX
    assert f"from {tmp_path}/run; nothing to make" in capsys.readouterr().err
    assert summary_of(tmp_path / "sweep")["reference"] == "mix.tokens=4"
    assert before == {x: x.stat().st_mtime_ns for x in (tmp_path / "run").rglob("*")}


def test_differences_that_are_there_are_found(tmp_path, worked):
    assert swept(tmp_path, "--vary=mix.tokens=2,4,12", "--config.classify.seeds=4") == 0
    summary = summary_of(tmp_path)
    assert summary["reference"] == "mix.tokens=4"  # the config's own
    assert summary["affected"] == ["combined"]
    assert summary["same"] == ["real", "combined:unmixed"]
    found = {x["point"]: x for x in summary["differences"]}
    assert found["mix.tokens=12"]["mean"] == pytest.approx(0.16)
    assert found["mix.tokens=12"]["verdict"] == "yes"
    assert found["mix.tokens=12"]["asked"] == 2
    added = [(x["point"], x["against"], round(x["mean"], 3)) for x in summary["added"]]
    assert added == [
        ("mix.tokens=2", "real", 0.05),
        ("mix.tokens=4", "real", 0.09),
        ("mix.tokens=12", "real", 0.25),
    ]
    text = (tmp_path / "sweep.md").read_text()
    assert "real + synthetic at mix.tokens=12: +16.0 points" in text
    assert "| mix.tokens | 2 | 4 | 12 |" in text
    page = (tmp_path / "sweep.html").read_text()
    assert "+16.0" in page and 'href="mix.tokens=12/report/report.html"' in page
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_where_there_is_no_difference_it_says_so(tmp_path, worked, monkeypatch):
    def draw(config, name, seed):
        tokens = config.mix.tokens if name == "combined" else 0
        return np.random.default_rng([seed, tokens]).permutation(swept_runs.IMAGES)

    monkeypatch.setattr(swept_runs, "draw", draw)
    monkeypatch.setattr(swept_runs, "accuracy", lambda config, name: 0.7)
    assert swept(tmp_path, "--vary=mix.tokens=2,4", "--config.classify.seeds=4") == 0
    text = (tmp_path / "sweep.md").read_text()
    assert "No difference from mix.tokens=4 is seen at any other value" in text


def test_two_fields_make_a_grid(tmp_path, worked):
    flags = ["--vary=mix.tokens=2,4", "--vary=mix.partner=class,any"]
    assert swept(tmp_path, *flags) == 0
    names = sorted(x.name for x in tmp_path.iterdir() if x.is_dir())
    assert names == [
        f"mix.tokens={k},mix.partner={p}" for k in (2, 4) for p in ("any", "class")
    ]
    text = (tmp_path / "sweep.md").read_text()
    assert "| mix.tokens \\\\ mix.partner | class | any |" in text.replace("\\", "\\\\")
    page = (tmp_path / "sweep.html").read_text()
    assert page.count('class="n shaded" style="--shade: 0.60"') == 1
    assert page.count('class="n"') and "Darker is higher" in page


def test_a_learning_curve_has_no_paired_differences(tmp_path, worked):
    assert swept(tmp_path, "--vary=data.per_class=5,10") == 0
    assert worked == 2 * [*train.STAGES]
    summary = summary_of(tmp_path)
    assert summary["differences"] == [] and len(summary["added"]) == 4
    assert "different test images" in (tmp_path / "sweep.md").read_text()


def test_values_grow_from_smaller_ones(tmp_path, worked):
    assert swept(tmp_path, "--vary=mix.per_image=6,2", "--config.mix.tokens=3") == 2
    first = tmp_path / "mix.per_image=2" / "mix" / "manifest.json"
    record = files.read_json(tmp_path / "mix.per_image=6" / "mix" / "manifest.json")
    assert record["grew_from"] and first.exists()


def test_a_field_without_effect_on_any_classifier_is_said(tmp_path, worked, capsys):
    assert swept(tmp_path, "--vary=mix.dims=4,8") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --vary mix.dims: wanted a field that changes")
    assert "got the same predictions of every classifier at mix.dims=4,8" in error


def test_a_dry_run_shows_every_point_and_changes_nothing(tmp_path, worked, capsys):
    assert swept(tmp_path / "new", "--vary=mix.tokens=2,4", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mix.tokens=2: makes {', '.join(train.STAGES)}"
    shared = "mix.tokens=4: caption, pretrain, encode, pairs, finetune from"
    assert lines[2].startswith(f"{shared} mix.tokens=2; makes mix, generate")
    assert "all 2 points: 15 of 20 stages to do; 3,600 synthetic images" in lines[5]
    assert not list(tmp_path.iterdir()) and worked == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--vary: wanted a field and its values, got none"),
        (["--vary"], "--vary: wanted FIELD=VALUE,VALUE,..."),
        (["--vary=mix.tokens"], "--vary: wanted FIELD=VALUE,VALUE,..."),
        (["--vary=mix.token=1,2"], "config.mix.token: wanted a field of config.mix"),
        (["--vary=mix=1,2"], "config.mix: wanted a section"),
        (["--vary=seed=1,2"], "Use `mvc-jax repeat --seeds"),
        (["--vary=stages=all,mix"], "one that says what one command does"),
        (["--vary=mix.tokens=1"], "got only '1'. Add another"),
        (["--vary=mix.tokens=1,2,1"], "got 1 twice"),
        (["--vary=generate.text_scale=1,1.0"], "got 1 twice"),
        (["--vary=mix.tokens=1,x"], "config.mix.tokens: wanted a whole number"),
        (["--vary=mix.tokens=1,-1"], "config.mix.tokens: wanted a whole number"),
        (["--vary=mix.tokens=1,16"], "fewer than the 16 tokens of a prompt"),
        (["--vary=mix.modes=coarse,fine"], "separated by semicolons"),
        (["--vary=mix.tokens=1,2", "--vary=mix.tokens=3,4"], "each field once"),
        (
            ["--vary=mix.tokens=1,2", "--config.mix.modes=fine"],
            "read only where recipes are drawn with mix.modes=coarse",
        ),
        (["--vary=classify.probability=0.2,0.8"], "has probabilistic or replace_*"),
        (["--vary=report.title=A,B"], "the stage classify and all before it"),
        (["--vary=generate.batch_size=10,20"], "the stage classify and all before"),
        (
            ["--vary=mix.tokens=1,2", "--config.classify.runs=real"],
            "of which classify.runs uses none",
        ),
        (["--vary=mix.tokens=1,2", "--mode=x"], "command line: wanted"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything(
    tmp_path, worked, capsys, flags, message
):
    assert swept(tmp_path / "new", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and worked == []


def test_every_wrong_point_is_named_at_once(tmp_path, worked, capsys):
    assert swept(tmp_path / "new", "--vary=mix.dims=8,80,90") == 2
    first, *details = capsys.readouterr().err.splitlines()
    assert "at most the 64 dims of a text state, got 80" in first
    assert details[0].strip() == "so at mix.dims=80"
    assert details[1].strip().startswith("mix.dims=90: config.mix.dims: wanted at most")


def test_values_of_lists_and_texts(tmp_path, worked):
    axis = vary.parse("mix.modes=coarse;fine;coarse,fine")
    assert axis.values == (("coarse",), ("fine",), ("coarse", "fine"))
    made = vary.points([axis], run_config.load("configs/digits.py"))
    assert made[2].name == "mix.modes=coarse,fine"
    assert made[2].config.mix.modes == ("coarse", "fine")
    texts = vary.parse("data.prompt=a {label}, yes;b/{label}")
    assert texts.values == ("a {label}, yes", "b/{label}")
    folders = [p.name for p in vary.points([texts], made[0].config)]
    assert all("/" not in name and " " not in name for name in folders)
    assert vary.label(7.5) == "7.5" and vary.label(2.0) == "2"


def test_help_is_of_its_own(capsys):
    with pytest.raises(SystemExit):
        train.main(["mvc-jax", "sweep", "--help"])
    assert "sweep --vary mix.tokens=1,2,4,7" in capsys.readouterr().out


def test_a_part_of_a_stage_is_begun_with(tmp_path, worked, monkeypatch, capsys):
    """Where the stage as a whole cannot be taken over."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(["train", f"--workdir={first}", RUNS]) == 0
    for name, run in (("real", "real"), ("combined", "combined")):
        files.write_text(first / "classify" / "models" / name / "weights", run)
    rows = [{"stage": f"classify/{x}/seed-0", "step": 1} for x in ("real", "combined")]
    files.write_jsonl(first / "metrics.jsonl", rows)
    module = importlib.import_module("mvc_jax.classify")
    part = Part("real", ("results/real.json", "models/real"))
    lost = Part("combined", ("results/combined.json", "models/none"))
    monkeypatch.setattr(module, "parts", lambda *_: [part, lost])
    flags = [f"--from={first}", "--config.mix.tokens=2"]
    capsys.readouterr()
    assert train.main(["train", f"--workdir={second}", *flags]) == 0
    assert f"classify: taken over from {first}: real\n" in capsys.readouterr().err
    for name in ("results/real.json", "models/real/weights"):
        assert (second / "classify" / name).samefile(first / "classify" / name)
    assert not (second / "classify" / "models" / "combined").exists()
    assert not (second / "classify" / "started.json").exists()
    logged = files.read_jsonl(second / "metrics.jsonl")
    assert [row["stage"] for row in logged] == ["classify/real/seed-0"]


def test_a_damaged_part_is_made_again(tmp_path, worked, monkeypatch):
    first = tmp_path / "first"
    assert train.main(["train", f"--workdir={first}", RUNS]) == 0
    folder = epath.Path(first) / "classify"
    stage = train.stage.artifacts.digests_of(folder)
    path = folder / "results" / "real.json"
    stage.add(path)
    assert take_over._is_intact(folder, Part("real", ("results/real.json",)))
    path.write_text("{}")
    assert not take_over._is_intact(folder, Part("real", ("results",)))


def test_comparing_more_seeds_with_fewer():
    many = np.random.default_rng(0).random((4, 300)) < 0.7
    [found] = comparisons.compared([(many, many[:3] & False)], 0.95)
    assert found["mean"] == pytest.approx(many[:3].mean())
    assert found["verdict"] == "yes"
    interval = comparisons.accuracy(many, 0.95)
    assert interval["low"] < many.mean() < interval["high"] <= 1


def test_a_wrong_flag_has_a_message_of_its_own():
    with pytest.raises(UserError, match="--vary: wanted FIELD"):
        vary.parse("=1,2")
