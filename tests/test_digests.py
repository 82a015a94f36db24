"""Files are known by their content, and hashed no more often than needed."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax import digests, files

RECORDS = "records.jsonl"


def known(folder):
    return digests.Digests(folder, folder.parent / RECORDS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "files"


@pytest.fixture
def hashed(monkeypatch):
    """The names of files that were hashed, in order."""
    names, sha256 = [], files.sha256

    def counted(path):
        names.append(os.path.basename(path))
        return sha256(path)

    monkeypatch.setattr(files, "sha256", counted)
    return names


def write(folder, name="a.npy", text="content"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rows(folder):
    return [json.loads(x) for x in (folder.parent / RECORDS).read_text().splitlines()]


def test_a_file_is_hashed_once_while_size_and_time_stay_the_same(folder, hashed):
    path = write(folder)
    known(folder).add(path)
    for _ in range(3):
        again = known(folder)
        assert again.intact(path)
        assert again.holds(path, again.describe(path))
        again.add(path)
    assert hashed == ["a.npy"]
    assert len(rows(folder)) == 1


@pytest.mark.parametrize("text", ["CONTENT", "shorter", "", "content and more"])
def test_a_change_is_noticed_at_once(folder, text):
    """Also one in the very tick of the clock in which the file was written."""
    path = write(folder)
    record = known(folder)
    record.add(path)
    described = record.describe(path)
    path.write_text(text)
    for read in (record, known(folder)):
        assert not read.intact(path)
        assert not read.holds(path, described)
    path.write_text("content")
    assert known(folder).intact(path)


def test_a_file_that_is_not_there_is_not_intact(folder):
    path = write(folder)
    record = known(folder)
    record.add(path)
    path.unlink()
    assert not record.intact(path)
    assert not record.intact(folder / "never written")
    assert not known(folder / "no folder" / "files").intact(path)


def test_a_file_without_a_record_is_recorded_as_it_is(folder):
    path = write(folder)
    assert known(folder).intact(path)
    path.write_text("CONTENT")
    assert not known(folder).intact(path)


def test_a_copy_with_other_times_is_hashed_once_more(folder, hashed):
    path = write(folder)
    known(folder).add(path)
    os.utime(path, ns=(0, 1_234_567_890))
    assert known(folder).intact(path)
    assert known(folder).intact(path)
    assert hashed == ["a.npy"] * 2


def test_content_that_changed_without_a_trace_is_found_by_hashing_again(folder):
    path = write(folder)
    record = known(folder)
    record.add(path)
    described, times = record.describe(path), path.stat().st_mtime_ns
    path.write_text("CONTENT")
    os.utime(path, ns=(times, times))
    assert record.holds(path, described)
    assert not record.holds(path, described, again=True)


def test_a_folder_that_cannot_be_written_is_read(folder, monkeypatch):
    path = write(folder)
    described = {"bytes": 7, "sha256": files.sha256(path)}

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(digests.Digests, "_append", refuse)
    assert known(folder).holds(path, described)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_record_changes_no_answer(tmp_path_factory, data):
    """Whatever is in it: files that were written are intact, changed ones are not held.

    A change is always seen by the content that a manifest lists.
    """
    folder = tmp_path_factory.mktemp("files") / "folder"
    paths = [write(folder, f"{name}.npy", name) for name in "abc"]
    record = known(folder)
    record.add(*paths)
    described = [record.describe(path) for path in paths]
    content = bytearray((folder.parent / RECORDS).read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    content[cut:] = data.draw(st.binary(max_size=20))
    (folder.parent / RECORDS).write_bytes(content)
    assert all(map(known(folder).holds, paths, described))
    known(folder).add(*paths)
    assert all(map(known(folder).intact, paths))
    paths[0].write_text("A")
    assert not known(folder).holds(paths[0], described[0])
    known(folder).add(write(folder, "d.npy"))
    assert {*known(folder).recorded()} == {"a.npy", "b.npy", "c.npy", "d.npy"}


def test_records_of_files_that_are_gone_can_be_forgotten(folder):
    paths = [write(folder, f"{name}.npy", name) for name in "ab"]
    record = known(folder)
    record.add(*paths)
    paths[0].unlink()
    record.forget_missing()
    assert {*record.recorded()} == {*known(folder).recorded()} == {"b.npy"}
    assert known(folder).intact(paths[1])
