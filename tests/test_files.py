"""Files are complete or absent, and are read as they were written."""

import concurrent.futures
import gc
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvc_jax import files


@pytest.fixture
def old(tmp_path):
    """An existing file."""
    path = tmp_path / "old.txt"
    files.write_text(path, "old")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_appears_only_at_the_end(old):
    with files.replacing(old) as temporary:
        temporary.write_text("new")
        assert temporary.parent == old.parent
        assert temporary.suffix == ".txt"
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert names(old.parent) == ["old.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("started", [True, False])
def test_an_exception_leaves_the_old_file_and_nothing_else(old, error, started):
    with pytest.raises(error), files.replacing(old) as temporary:
        if started:
            temporary.write_text("ne")
        raise error
    assert old.read_text() == "old"
    assert names(old.parent) == ["old.txt"]


def test_a_killed_process_leaves_the_old_file(old):
    program = (
        "import os, sys; from mvc_jax import files\n"
        "with files.replacing(sys.argv[1]) as path:\n"
        "    path.write_text('ne')\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, old], timeout=60)
    assert done.returncode == 9
    assert old.read_text() == "old"
    assert len(names(old.parent)) == 2  # and the temporary one
    files.remove_temporaries(epath.Path(old.parent))
    assert names(old.parent) == ["old.txt"]


def test_temporaries_are_removed_from_folders_below_too(tmp_path):
    """Images and shards are written below the stage's folder, to `train/<class>/`."""
    left = tmp_path / "train" / "cat" / ".tmp-0badf00d-1.png"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    files.remove_temporaries(epath.Path(tmp_path))
    assert names(left.parent) == []


def test_object_arrays_are_refused(old):
    with pytest.raises(ValueError, match="allow_pickle"):
        files.write_array(old, np.array([{}], object))
    assert old.read_text() == "old"
    np.save(old.with_suffix(".npy"), np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        files.read_array(old.with_suffix(".npy"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float16, bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_arrays_are_read_as_written(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    files.write_array(tmp_path / "below" / "a.npy", array)
    back = files.read_array(tmp_path / "below" / "a.npy")
    np.testing.assert_array_equal(back, array)
    assert back.dtype == dtype


values = st.text() | st.integers() | st.none() | st.lists(st.text(), max_size=2)


@given(st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=4))
@example([{"NEL": "a\x85b"}, {"line and paragraph separators": "a\u2028b\u2029c"}])
@example([{"é\n\r\x0b\x0c\x1c": "\t\U0001f600"}, {}])
@settings(deadline=None, max_examples=100)
def test_any_text_survives_json_lines(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    files.write_jsonl(path, rows)
    assert path.read_bytes().count(b"\n") == len(rows)
    assert files.read_jsonl(path) == rows
    files.write_json(path, rows)
    assert files.read_json(path) == rows


def test_non_ascii_letters_are_not_escaped(tmp_path):
    files.write_jsonl(tmp_path / "rows.jsonl", [{"class": "naïve 数"}])
    assert (tmp_path / "rows.jsonl").read_bytes() == '{"class": "naïve 数"}\n'.encode()


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 1])
def test_the_hash_equals_sha256sum(tmp_path, size):
    (tmp_path / "f").write_bytes(bytes(size))
    ours = files.sha256(tmp_path / "f")
    expected = subprocess.run(["sha256sum", tmp_path / "f"], capture_output=True)
    assert expected.stdout.decode().split()[0] == ours


_NAMES = st.text(
    st.sampled_from("a[]*?!.~ -\u00e9'\"{}"), min_size=1, max_size=6
).filter(lambda name: name not in (".", ".."))


@settings(max_examples=60)
@given(folder=_NAMES, children=st.sets(_NAMES, max_size=4))
@example(folder="lr[1e-4]", children={"a**b", "x?"})
def test_the_name_of_a_folder_is_never_a_pattern(tmp_path_factory, folder, children):
    folder = tmp_path_factory.mktemp("folder") / folder
    for child in children:
        (folder / child).mkdir(parents=True)
        (folder / child / "data.json").write_text("{}")
    hidden = {child for child in children if child[0] == "." or child[-1] == "~"}
    visible = sorted(children - hidden)
    assert [path.name for path in files.matching(folder, "*")] == visible
    found = files.matching(folder, "*/*.json")
    assert [path.parent.name for path in found] == visible
    assert files.matching(folder, "*/*.npy") == []


def test_a_pattern_selects_as_in_a_shell(tmp_path):
    for name in (
        "train-1.parquet",
        "train-0.parquet",
        "real-0.parquet",
        ".tmp-train-2",
    ):
        (tmp_path / name).touch()
    found = [path.name for path in files.matching(tmp_path, "train-*")]
    assert found == ["train-0.parquet", "train-1.parquet"]
    assert [path.name for path in files.matching(tmp_path, ".tmp-*")] == [
        ".tmp-train-2"
    ]
    assert files.matching(tmp_path / "none", "*") == []


def test_threads_read_headers_at_the_same_time(tmp_path):
    """Parsing one may be interrupted anywhere, as by a collection of garbage."""
    path = tmp_path / "a.npy"
    files.write_array(path, np.arange(6))

    def read(depth):
        if depth:
            return read(depth - 1)
        return [files.map_array(path).sum() for _ in range(300)]

    thresholds = gc.get_threshold()
    gc.callbacks.append(pause := lambda *_: time.sleep(0))
    gc.set_threshold(3)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert set(sum(threads.map(read, (0, 7, 14, 21)), [])) == {15}
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(pause)
