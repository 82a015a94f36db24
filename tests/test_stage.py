"""Each numbered rule at the top of stage.py has at least one test."""

import copy
import os
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax import files, stage
from mvc_jax.errors import UserError, shell_word
from mvc_jax.stage import Spec, differences, is_complete, open_stage, read_manifest

SETTINGS = {"seed": 0, "mix": {"tokens": 4, "modes": ("coarse", "fine")}}
OTHERS = {"seed": 0, "mix": {"tokens": 5, "modes": ("coarse", "fine")}}


def contents(folder):
    """Relative path of every file below a folder -> (bytes, modification time)."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def make(workdir, name="mix", settings=SETTINGS, inputs=(), text="made"):
    """Runs a stage that writes two files."""
    stage = open_stage(workdir, Spec(name, settings, inputs))
    if not stage.complete:
        for file in ("a.txt", "below/b.txt"):
            files.write_text(stage.folder / file, f"{text} {file}")
        stage.finish(["a.txt", "below/b.txt"], things=2)
    return stage


def test_rule_1_the_manifest_is_written_last_and_describes_the_files(tmp_path):
    stage = open_stage(tmp_path, Spec("mix", SETTINGS))
    assert not stage.complete
    with pytest.raises(FileNotFoundError):
        stage.finish(["a.txt"])
    assert not is_complete(tmp_path, "mix")

    stage = make(tmp_path)
    assert stage.complete
    assert is_complete(tmp_path, "mix")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digests", "mix"]
    read = read_manifest(tmp_path, "mix")
    assert read["counts"] == {"things": 2}
    assert read["artifacts"]["a.txt"] == {
        "bytes": len("made a.txt"),
        "sha256": files.sha256(tmp_path / "mix" / "a.txt"),
    }
    assert not (tmp_path / "mix" / "started.json").exists()


def test_rule_2_a_finished_stage_does_nothing(tmp_path):
    make(tmp_path)
    before = contents(tmp_path)
    assert make(tmp_path, text="rewritten").complete
    assert contents(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False], ids=["rule 3", "rule 5"])
def test_rules_3_and_5_other_settings_are_an_error_that_names_them(tmp_path, finished):
    if finished:
        make(tmp_path)
    else:
        open_stage(tmp_path, Spec("mix", SETTINGS))
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        make(tmp_path, settings=OTHERS)
    message = str(error.value)
    assert "(mix.tokens: 4 -> 5)" in message
    assert "seed" not in message
    for fix in ("Undo these", "--redo=mix", f"--workdir and add --from={tmp_path}"):
        assert fix in message
    assert contents(tmp_path) == before


def test_rule_4_an_interrupted_stage_resumes_with_its_files(tmp_path):
    stage = open_stage(tmp_path, Spec("mix", SETTINGS))
    files.write_text(stage.folder / "a.txt", "half of the work")
    (stage.folder / ".tmp-0badf00d-b.txt").write_text("killed in the middle")
    again = open_stage(tmp_path, Spec("mix", SETTINGS))
    assert not again.complete
    found = sorted(path.name for path in (tmp_path / "mix").iterdir())
    assert found == ["a.txt", "started.json"]
    assert (tmp_path / "mix" / "a.txt").read_text() == "half of the work"


@pytest.mark.parametrize("gone", ["a.txt", "below/b.txt"])
def test_rule_6_a_missing_file_is_filled_in(tmp_path, gone):
    make(tmp_path)
    times = tmp_path / "digests" / "mix.jsonl"
    times.unlink()  # it would differ
    whole = {path: content for path, (content, _) in contents(tmp_path).items()}
    (tmp_path / "mix" / gone).unlink()
    assert not open_stage(tmp_path, Spec("mix", SETTINGS)).complete
    make(tmp_path)
    times.unlink()
    assert {path: content for path, (content, _) in contents(tmp_path).items()} == whole


@pytest.mark.parametrize("text", ["MADE {}", "short"], ids=["same size", "shorter"])
@pytest.mark.parametrize(
    ("edited", "gone"),
    [
        ("a.txt", None),
        ("below/b.txt", None),
        ("a.txt", "below/b.txt"),
        ("below/b.txt", "a.txt"),
    ],
)
def test_rule_7_an_edited_file_is_an_error(tmp_path, text, edited, gone):
    """Even where rule 6 would run the stage again, which might overwrite it."""
    make(tmp_path)
    (tmp_path / "mix" / edited).write_text(text.format(edited))
    if gone:
        (tmp_path / "mix" / gone).unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{edited}: wanted the file that this stage"):
        make(tmp_path)
    assert contents(tmp_path) == before


# Rule 8. Stage `encode` has settings that grow; `mix` reads it, and grows with it only
# if `follows`.


def grow(workdir, count, *, stop=False, follows=True):
    """Runs a stage of `count` rows; `stop` leaves it unfinished."""
    grows = ("mix.count", "mix.more") if follows else ()
    drawn = {"seed": 0, "mix": {"count": count, "more": False}}
    stage = open_stage(workdir, Spec("encode", drawn, grows=grows))
    if not stage.complete:
        content = b"".join(b"row %d\n" % i for i in range(count))
        stage.require_prefix("rows.txt", content)
        files.write_bytes(stage.folder / "rows.txt", content)
        if not stop:
            stage.finish(["rows.txt"], rows=count)
    return stage


def read_grown(workdir, *, follows=True, stop=False):
    grows_with = ("encode",) if follows else ()
    stage = open_stage(workdir, Spec("mix", {}, ["encode"], grows_with=grows_with))
    if not stage.complete:
        content = (workdir / "encode" / "rows.txt").read_bytes()
        files.write_bytes(stage.folder / "read.txt", content)
        if not stop:
            stage.finish(["read.txt"], rows=content.count(b"\n"))
    return stage


def test_rule_8_a_larger_setting_keeps_the_old_rows_and_adds_new_ones(tmp_path):
    grow(tmp_path, 2)
    stage = grow(tmp_path, 3, stop=True)
    assert not stage.complete
    assert stage.earlier["counts"] == {"rows": 2}
    assert not is_complete(tmp_path, "encode")
    stage = grow(tmp_path, 3)  # as after a kill
    assert stage.earlier["counts"] == {"rows": 2}
    assert read_manifest(tmp_path, "encode")["counts"] == {"rows": 3}
    before = contents(tmp_path)
    stage = grow(tmp_path, 3)
    assert stage.complete and not stage.earlier
    assert contents(tmp_path) == before


def test_rule_8_an_unfinished_stage_grows_too(tmp_path):
    grow(tmp_path, 2, stop=True)
    assert grow(tmp_path, 3, stop=True).earlier == {}
    grow(tmp_path, 3)
    assert grow(tmp_path, 4, stop=True).earlier["counts"] == {"rows": 3}
    assert grow(tmp_path, 5).earlier["counts"] == {"rows": 3}
    assert grow(tmp_path, 5).complete


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("count", "follows", "difference"),
    [
        (1, True, "mix.count: 2 -> 1"),
        (3, False, "mix.count: 2 -> 3"),
        (True, True, "mix.count: 2 -> True"),
        (3.0, True, "mix.count: 2 -> 3.0"),
        ("3", True, "mix.count: 2 -> '3'"),
    ],
)
def test_rule_8_is_for_larger_numbers_of_named_fields(
    tmp_path, count, follows, difference, finished
):
    grow(tmp_path, 2, stop=not finished)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        grow(tmp_path, count, follows=follows)
    assert f"({difference})" in str(error.value)
    assert contents(tmp_path) == before


def test_rule_8_growth_together_with_another_change_is_an_error(tmp_path):
    grow(tmp_path, 2)
    drawn = {"seed": 1, "mix": {"count": 3, "more": True}}
    with pytest.raises(UserError) as error:
        open_stage(tmp_path, Spec("encode", drawn, grows=("mix.count", "mix.more")))
    assert "(seed: 0 -> 1)" in str(error.value)
    drawn["seed"] = 0
    stage = open_stage(tmp_path, Spec("encode", drawn, grows=("mix.count", "mix.more")))
    assert stage.earlier and not stage.complete


def test_rule_8_refuses_changed_rows(tmp_path):
    grow(tmp_path, 2)
    stage = grow(tmp_path, 3, stop=True)
    for content in (b"row 1\nrow 1\nrow 2\n", b"row 0\n", b""):
        with pytest.raises(UserError, match="rows.txt: wanted the earlier file"):
            stage.require_prefix("rows.txt", content)
    stage.require_prefix("rows.txt", b"row 0\nrow 1\nmore")
    stage.require_prefix("another.txt", b"")


def test_rule_8_an_edited_file_does_not_grow(tmp_path):
    grow(tmp_path, 2)
    (tmp_path / "encode" / "rows.txt").write_text("row 9\nrow 1\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="one that was changed since"):
        grow(tmp_path, 3)
    assert contents(tmp_path) == before


def test_abandoned_growth_restores_the_finished_stage(tmp_path):
    grow(tmp_path, 2)
    before = {path: content for path, (content, _) in contents(tmp_path).items()}
    drawn = {"seed": 0, "mix": {"count": 3, "more": False}}
    stage = open_stage(tmp_path, Spec("encode", drawn, grows=["mix.count"]))
    stage.abandon()
    after = {path: content for path, (content, _) in contents(tmp_path).items()}
    assert after == before


@pytest.mark.parametrize("counts", [(2, 3), (2, 3, 5)], ids=["once", "twice"])
@pytest.mark.parametrize("finished", [True, False])
def test_rule_8_a_stage_grows_with_its_input(tmp_path, counts, finished):
    grow(tmp_path, counts[0])
    read_grown(tmp_path, stop=not finished)
    for count in counts[1:]:
        grow(tmp_path, count)
    stage = read_grown(tmp_path)
    earlier = {"rows": counts[0]} if finished else None
    assert stage.earlier.get("counts") == earlier
    assert (
        (tmp_path / "mix" / "read.txt").read_bytes().endswith(b"row %d\n" % (count - 1))
    )
    assert read_grown(tmp_path).complete


def test_rule_8_growth_is_remembered_when_rule_6_ran_in_between(tmp_path):
    grow(tmp_path, 2)
    read_grown(tmp_path)
    grow(tmp_path, 3)
    (tmp_path / "encode" / "rows.txt").unlink()
    assert grow(tmp_path, 3).earlier == {}
    assert read_grown(tmp_path).earlier["counts"] == {"rows": 2}


def test_rule_8_growth_is_a_changed_input_to_a_stage_that_does_not_grow_with_it(
    tmp_path,
):
    grow(tmp_path, 2)
    read_grown(tmp_path, follows=False)
    grow(tmp_path, 3)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="stage encode was run again"):
        read_grown(tmp_path, follows=False)
    assert contents(tmp_path) == before


def test_rule_8_an_input_that_was_run_again_has_not_grown(tmp_path):
    grow(tmp_path, 2)
    read_grown(tmp_path)
    for path in (tmp_path / "encode").iterdir():
        path.unlink()
    grow(tmp_path, 3)
    with pytest.raises(UserError, match="stage encode was run again"):
        read_grown(tmp_path)


def test_an_input_must_be_finished(tmp_path):
    open_stage(tmp_path, Spec("encode", {}))
    with pytest.raises(UserError, match="^stage mix: wanted the finished stage encode"):
        make(tmp_path, inputs=["encode"])
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_an_input_that_was_run_again_is_noticed(tmp_path, finished):
    make(tmp_path, "encode")
    if finished:
        make(tmp_path, inputs=["encode"])
    open_stage(tmp_path, Spec("mix", SETTINGS, ["encode"]))
    for path in (tmp_path / "encode").rglob("*.*"):
        path.unlink()
    make(tmp_path, "encode", text="changed")
    with pytest.raises(UserError, match="stage encode was run again"):
        make(tmp_path, inputs=["encode"])


def test_an_input_run_again_with_the_same_bytes_is_the_same(tmp_path, monkeypatch):
    make(tmp_path, "encode")
    make(tmp_path, inputs=["encode"])
    for path in (tmp_path / "encode").rglob("*.*"):
        path.unlink()
    monkeypatch.setattr(stage, "versions", lambda: {"jax": "99"})
    make(tmp_path, "encode")
    assert make(tmp_path, inputs=["encode"]).complete


leaves = st.integers() | st.text(max_size=3) | st.none() | st.lists(st.integers())
keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3))


def flat(tree, prefix=""):
    """Leaves and empty dicts by their dotted path."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    parts = (flat(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items())
    return {path: leaf for part in parts for path, leaf in part.items()}


@given(st.dictionaries(keys, trees, min_size=1), st.data())
@settings(deadline=None, max_examples=100)
def test_one_changed_leaf_is_one_line(tree, data):
    assert differences(tree, tree) == []
    path, old = data.draw(st.sampled_from(sorted(flat(tree).items(), key=str)))
    inner, *above = path.split(".")[::-1]
    changed = copy.deepcopy(tree)
    place = changed
    for part in above[::-1]:
        place = place[part]
    place[inner] = "another value"
    [line] = differences(changed, tree)
    assert line == f"{path}: {old!r} -> 'another value'"


@pytest.mark.parametrize(
    ("new", "old", "lines"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, ["a.b: 3 -> 1", "c: '(none)' -> 2"]),
        ({"a": 1}, {"a": {"b": 1}}, ["a: {'b': 1} -> 1"]),
        ({"a": None}, {}, ["a: '(none)' -> None"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1, 2] -> [1]"]),
    ],
)
def test_nested_differences(new, old, lines):
    found = differences(new, old)
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.endswith(expected)


def test_a_field_that_is_newer_than_a_stage_had_its_default(tmp_path):
    """Only its default: anything else would have given other files."""
    default = {"mix": {"modes": ["coarse"], "partner": "class"}}
    make(tmp_path, settings={"mix": {"modes": ["coarse"]}})
    before = contents(tmp_path)
    assert make(tmp_path, settings=default).complete
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match=r"\(mix.partner: 'class' -> 'any'\)"):
        make(tmp_path, settings={"mix": {"modes": ["coarse"], "partner": "any"}})
    with pytest.raises(UserError, match=r"\(mix.unknown: '\(none\)' -> 0\)"):
        make(tmp_path, settings={"mix": {"modes": ["coarse"], "unknown": 0}})

    (tmp_path / "mix" / "a.txt").unlink()  # rule 6: it stays the same input to others
    known = stage.read_manifest(tmp_path, "mix")
    assert not make(tmp_path, settings=default, text="made").inputs
    assert stage.read_manifest(tmp_path, "mix") == known


def test_a_newer_field_may_have_had_another_value_than_its_default():
    new, old = {"generate": {"timestep_spacing": "leading"}}, {"generate": {}}
    earlier = {"generate.timestep_spacing": "leading"}
    assert differences(new, old, earlier=earlier) == []
    assert differences(new, old) == ["generate.timestep_spacing: 'auto' -> 'leading'"]


def test_a_user_s_file_is_known_by_its_content(tmp_path, caplog):
    """Moved, or named by another path, it is the same; deleted, it was the recorded."""

    def spec(path, digest):
        named = {"mix.file": "mix.file_sha256"}
        settings = {"mix": {"file": path, "file_sha256": digest}}
        return Spec("mix", settings, named_files=named)

    def changed(path, digest):
        return stage.compare(tmp_path, spec(path, digest), {}).changed

    opened = open_stage(tmp_path, spec("a.jsonl", "12"))
    assert changed("a.jsonl", "") == ["mix.file_sha256: '12' -> ''"]  # is yet needed
    assert changed("/b.jsonl", "12") == []
    opened.finish([])
    before = contents(tmp_path)
    for path, digest in (("a.jsonl", "12"), ("/b.jsonl", "12")):
        assert open_stage(tmp_path, spec(path, digest)).complete
    assert caplog.text == ""
    assert open_stage(tmp_path, spec("a.jsonl", "")).complete
    assert "a.jsonl is no longer there; the stage mix, which is finished" in caplog.text
    assert contents(tmp_path) == before
    assert len(changed("b.jsonl", "34")) == len(changed("b.jsonl", "")) == 2
    assert changed("a.jsonl", "34") == ["mix.file_sha256: '12' -> '34'"]


def test_a_parquet_file_that_the_stage_did_not_write_is_named(tmp_path):
    opened = open_stage(tmp_path, Spec("generate", {}))
    files.write_text(opened.folder / "mixed/data/train-00000.parquet", "rows")
    opened.finish(["mixed/data/train-00000.parquet"])
    files.write_text(opened.folder / "mixed/data/notes.txt", "of the user")
    stage.require_inputs(tmp_path, Spec("classify", {}, ["generate"]))
    stray = opened.folder / "mixed" / "data" / "train-00001.parquet"
    files.write_text(stray, "rows")
    for attempt in (
        lambda: stage.require_inputs(tmp_path, Spec("classify", {}, ["generate"])),
        lambda: open_stage(tmp_path, Spec("generate", {})),
    ):
        with pytest.raises(UserError, match="got another one. Move it") as error:
            attempt()
        assert error.value.name == str(stray)


def test_rule_6_a_damaged_file_that_the_stage_makes_again_is_deleted(tmp_path):
    made = make(tmp_path).folder
    whole = (made / "a.txt").read_bytes()
    (made / "a.txt").write_text("MADE a.txt")
    spec = Spec("mix", SETTINGS, restores=("a.*",))
    assert not open_stage(tmp_path, spec).complete
    assert not (made / "a.txt").exists()
    make(tmp_path)
    assert (made / "a.txt").read_bytes() == whole

    for name in ("a.txt", "below/b.txt"):  # nothing is deleted where another is named
        (made / name).write_text("MADE")
    with pytest.raises(UserError, match="below/b.txt: wanted the file that this stage"):
        open_stage(tmp_path, spec)
    assert (made / "a.txt").exists()


@pytest.mark.parametrize("damaged", ["a.txt", "below/b.txt"])
@pytest.mark.parametrize("indirectly", [False, True])
def test_rule_9_a_stage_with_work_compares_all_before_it(tmp_path, damaged, indirectly):
    make(tmp_path, "encode")
    make(tmp_path, "pairs", inputs=["encode"])
    reads = ["pairs"] if indirectly else ["encode"]
    (tmp_path / "encode" / damaged).write_text("MADE")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"encode/{damaged}: wanted the file that the"):
        make(tmp_path, inputs=reads)
    assert contents(tmp_path) == before
    (tmp_path / "encode" / damaged).unlink()
    with pytest.raises(
        UserError, match=f"encode/{damaged}.*no such file. .*add encode"
    ):
        make(tmp_path, inputs=reads)
    make(tmp_path, "encode")
    make(tmp_path, inputs=reads)
    (tmp_path / "encode" / damaged).write_text("MADE")
    assert make(tmp_path, inputs=reads).complete  # it reads nothing


def test_rule_9_an_input_that_is_behind_its_own_is_named(tmp_path):
    make(tmp_path, "encode")
    make(tmp_path, "pairs", inputs=["encode"])
    shutil.rmtree(tmp_path / "encode")
    make(tmp_path, "encode", settings=OTHERS)
    with pytest.raises(UserError, match="pairs: wanted a stage made from the present"):
        make(tmp_path, inputs=["pairs"])


def test_verifying_hashes_all_and_deletes_what_is_made_again(tmp_path, caplog):
    opened = make(tmp_path)
    files.write_text(opened.folder / "picture.png", "of the stage")
    opened.digests.add(opened.folder / "picture.png")
    spec = Spec("mix", SETTINGS, restores=("a.*",))
    assert stage.verify(tmp_path, spec) == (3, [])
    for name in ("a.txt", "below/b.txt", "picture.png"):
        path = opened.folder / name
        times = os.stat(path).st_mtime_ns
        content = path.read_text()
        path.write_text(content.upper())
        os.utime(path, ns=(times, times))  # no trace but the content
        if name == "below/b.txt":
            assert stage.verify(tmp_path, spec)[1] == [path]
            path.write_text(content)
        else:
            assert stage.verify(tmp_path, spec)[1] == []
            assert not path.exists()
            assert name in caplog.text
    assert not open_stage(tmp_path, spec).complete


@pytest.mark.parametrize(
    "text", ["runs/a", "a b", "a  b", "two\nlines 'q' \\n $HOME", "\t", "é\n\u0939  "]
)
def test_a_word_of_a_printed_command_is_what_a_shell_reads(text):
    word = shell_word(text)
    assert " ".join(word.split()) == word  # as messages are printed
    done = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == text
