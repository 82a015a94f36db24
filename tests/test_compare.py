"""`mvc-jax compare`: finished workdirs side by side."""

import json

import pytest
import swept_runs

from mvc_jax import files, train

RUNS = "--config.classify.runs=real,combined"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a finished workdir."""
    swept_runs.install(monkeypatch)

    def make(name, *flags):
        folder = tmp_path / name
        assert train.main(["train", f"--workdir={folder}", RUNS, *flags]) == 0
        return str(folder)

    return make


def compared(tmp_path, *words):
    code = train.main(["mvc-jax", "compare", *words, f"--out={tmp_path}/out"])
    path = tmp_path / "out" / "compare.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def test_settings_accuracies_and_paired_differences(tmp_path, made, capsys):
    a, b = made("a"), made("b", "--config.mix.tokens=9", "--config.classify.seeds=4")
    record = files.read_json(f"{a}/config.json")
    del record["mix"]["dims_on"]  # as if the workdir were older than the field
    files.write_json(f"{a}/config.json", record)
    capsys.readouterr()
    code, found = compared(tmp_path, a, b)
    assert code == 0
    assert found["fields"] == {"mix.tokens": [4, 9], "classify.seeds": [5, 4]}
    assert found["runs"]["combined"]["b"]["accuracy"] == pytest.approx(0.8)
    [difference] = found["differences"]  # seeds 0 to 3 are those of both
    assert difference["mean"] == pytest.approx(0.1)
    assert (difference["run"], difference["verdict"]) == ("combined", "yes")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "Real + synthetic is higher in b than in a: +10.0 points" in text
    assert "1 run made the same predictions as in a." in text
    assert "| mix.tokens | 4 | 9 |" in text
    assert text in capsys.readouterr().out
    assert "+10.0" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("names", "of"),
    [
        ("real,combined", "of one split and one generator in each workdir"),
        ("real,real+flip", "of one split in each workdir"),
    ],
)
def test_what_is_drawn_once_is_named(tmp_path, made, names, of):
    made_of = f"--config.classify.runs={names}"
    compared(tmp_path, made("a", made_of), made("b", made_of))
    assert of in (tmp_path / "out" / "compare.md").read_text()


def test_other_test_images_have_no_paired_differences(tmp_path, made):
    a, b = made("a"), made("b", "--config.data.per_class=5")
    code, found = compared(tmp_path, a, b)
    assert code == 0 and found["differences"] == []
    why = "image 1 is '5-0', and '10-0'"
    assert found["other_test_images"] == {"b": why}
    text = (tmp_path / "out" / "compare.md").read_text()
    assert f"b was tested on other images than a ({why}), so there are no" in text


def test_other_classes_are_refused_with_the_first_difference(tmp_path, made, capsys):
    a = made("a", "--config.data.classes=one,two", "--config.data.pool=100")
    b = made("b", "--config.data.classes=one,six", "--config.data.pool=100")
    assert compared(tmp_path, a, b) == (2, None)
    error = capsys.readouterr().err
    assert f"error: {b}: wanted the classes of {a}, got other classes: 'six'" in error
    assert f"is only in it, and 'two' is only in {a}" in error


def test_workdirs_of_one_name_are_called_by_their_paths(tmp_path, made):
    a, b = made("x/run"), made("y/run", "--config.mix.tokens=9")
    assert compared(tmp_path, a, b)[1]["workdirs"] == [a, b]


def test_an_unfinished_or_overtaken_workdir_is_refused(tmp_path, made, capsys):
    a, b = made("a"), made("b", "--config.stages=caption")
    for words, got in (
        ([a, b], "one whose stage classify is not finished"),
        ([a, f"{a}/nothing"], "no such folder"),
        ([a, f"{a}/mix"], "a folder without a config.json"),
        ([a], "mvc-jax compare: wanted two or more workdirs, each once"),
        ([a, a], "mvc-jax compare: wanted two or more workdirs, each once"),
        ([a, "--mode=x"], "wanted workdirs, and perhaps --out=FOLDER, got --mode=x"),
    ):
        assert compared(tmp_path, *words) == (2, None)
        assert got in capsys.readouterr().err
    c = made("c")
    flags = ["--config.mix.per_image=7", "--config.stages=mix,generate"]
    assert train.main(["train", f"--workdir={c}", *flags]) == 0
    assert compared(tmp_path, a, c) == (2, None)
    assert "one that is behind (stage classify is behind" in capsys.readouterr().err


def test_help_is_of_its_own(capsys):
    with pytest.raises(SystemExit):
        train.main(["mvc-jax", "compare", "--help"])
    assert "compare runs/digits runs/fine" in capsys.readouterr().out
