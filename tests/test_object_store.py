"""Buckets as folders: whole objects or none, whatever fails in between."""

import functools
import itertools
import pathlib
import threading

import numpy as np
import pytest
import stores
from etils import epath

from mvc_jax import (
    artifacts,
    files,
    object_store,
    scratch,
    store_client,
    store_folders,
)
from mvc_jax.errors import UserError

NUMBERS = itertools.count()
LARGE = bytes(range(256)) * (6 << 12)  # 6 MiB: more than one request of Google's


@pytest.fixture(params=["s3", "gs"])
def place(request, s3, tmp_path, monkeypatch):
    with stores.place(monkeypatch, request.param, s3, tmp_path, next(NUMBERS)) as made:
        yield made


def names(folder):
    return sorted(object_store.below(folder))


def local_content(path):
    return pathlib.Path(files.local(path)).read_bytes()


def opened_content(path):
    with path.open("rb") as file:
        return file.read()


def test_files_are_read_as_written(place):
    rows = [{"a": 1}, {"é": "\u2028"}]
    files.write_jsonl(place.folder / "a" / "rows.jsonl", rows)
    array = np.arange(12).reshape(3, 4)
    files.write_array(place.folder / "a" / "b" / "a.npy", array)
    stores.forget()
    assert files.read_jsonl(place.folder / "a" / "rows.jsonl") == rows
    for read in (files.read_array, files.map_array):
        np.testing.assert_array_equal(read(place.folder / "a" / "b" / "a.npy"), array)
    assert isinstance(files.map_array(place.folder / "a/b/a.npy").base, np.memmap)
    with (place.folder / "a" / "rows.jsonl").open() as file:
        assert file.readline() == '{"a": 1}\n'
    assert names(place.folder) == ["a/b/a.npy", "a/rows.jsonl"]
    assert files.matching(place.folder, "*/*") == [
        place.folder / "a" / "b",
        place.folder / "a" / "rows.jsonl",
    ]
    assert files.matching(place.folder, "*/*/*.npy") == [place.folder / "a/b/a.npy"]
    assert (place.folder / "a").is_dir() and not (place.folder / "c").exists()
    assert not (place.folder / "a" / "rows.jsonl").is_dir()


def test_a_large_file_is_sent_once_and_read_from_scratch(place):
    with files.replacing(place.folder / "large.npy") as temporary:
        temporary.write_bytes(LARGE)
    place.asked()
    stores.forget()  # another process of this machine
    assert local_content(place.folder / "large.npy") == LARGE
    assert all("media" not in x and "GET /bucket" not in x for x in place.asked())
    for path in scratch.folder().iterdir():
        path.unlink()
    assert local_content(place.folder / "large.npy") == LARGE
    with (place.folder / "large.npy").open("rb") as file:
        file.seek(100)
        assert file.read(4) == LARGE[100:104]
    files.write_bytes(place.folder / "large.npy", LARGE[::-1])
    assert local_content(place.folder / "large.npy") == LARGE[::-1]
    assert not list(scratch.folder().glob(".tmp-*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_object_and_nothing_in_scratch(place, error):
    files.write_text(place.folder / "a.txt", "old")
    with pytest.raises(error), files.replacing(place.folder / "a.txt") as temporary:
        temporary.write_text("ne")
        raise error
    assert (place.folder / "a.txt").read_text() == "old"
    assert names(place.folder) == ["a.txt"]
    assert not list(scratch.folder().iterdir())


@pytest.mark.parametrize("fault", [503, 429, "lost"])
@pytest.mark.parametrize("content", [b"small", LARGE])
def test_an_upload_that_fails_in_passing_is_tried_again(place, fault, content):
    files.write_bytes(place.folder / "a", b"old")
    for part in ("PUT /", "POST /upload"):
        place.fault(part, fault, None)
    files.write_bytes(place.folder / "a", content)
    assert (place.folder / "a").read_bytes() == content
    assert names(place.folder) == ["a"]


@pytest.mark.parametrize("fault", [503, "cut", "lost"])
def test_a_read_that_fails_in_passing_is_tried_again(place, fault):
    files.write_bytes(place.folder / "a", LARGE)
    for read in (
        lambda path: path.read_bytes(),
        local_content,
        opened_content,
    ):
        for path in scratch.folder().iterdir():
            path.unlink()
        place.fault("GET /", None, fault, None)
        assert read(place.folder / "a") == LARGE
    place.fault("GET /", fault, None)
    assert names(place.folder) == ["a"]
    place.fault("DELETE", fault, None)
    (place.folder / "a").unlink()
    assert names(place.folder) == []


@pytest.mark.parametrize("fault", ["slow", "stalled"])
def test_a_read_that_stalls_is_tried_again(place, fault, monkeypatch):
    files.write_bytes(place.folder / "a", LARGE)
    stores.be_impatient(monkeypatch, place.scheme)
    for read in (lambda path: path.read_bytes(), local_content, opened_content):
        for path in scratch.folder().iterdir():
            path.unlink()
        place.fault("GET /", fault, None)
        assert read(place.folder / "a") == LARGE
        assert place.server.faults["GET /"] == [None]


def test_what_fails_for_good_is_one_sentence(place):
    files.write_bytes(place.folder / "a", b"old")
    place.fault("/", 503)
    for action in (
        lambda: files.write_bytes(place.folder / "a", b"new"),
        lambda: files.read_json(place.folder / "a"),
        lambda: (place.folder / "a").exists(),
        lambda: files.matching(place.folder, "*"),
    ):
        with pytest.raises(UserError) as error:
            action()
        assert "\n" not in str(error.value)
        assert "rerun the same command to resume" in str(error.value)
    place.server.faults.clear()
    assert (place.folder / "a").read_bytes() == b"old"


def test_a_missing_bucket_and_a_refusal_say_what_to_do(place):
    nowhere = epath.Path(f"{place.scheme}://no-such-bucket/run/a")
    assert not nowhere.exists()
    with pytest.raises(UserError, match="no bucket .*no-such-bucket. Create it"):
        files.write_text(nowhere, "")
    place.server.locked = True
    for action in ((place.folder / "a").exists, lambda: files.write_text(nowhere, "")):
        with pytest.raises(UserError, match="Sign in"):
            action()


def test_changed_objects_are_noticed_and_copies_are_not(place):
    digests = artifacts.digests_of(place.folder / "mix")
    path = place.folder / "mix" / "a.json"
    files.write_bytes(path, b"abc")
    described = digests.describe(path)
    stores.forget()
    place.asked()
    again = artifacts.digests_of(place.folder / "mix")
    assert again.holds(path, described) and again.intact(path)
    reads = ("GET /bucket", "a.json?alt=media")  # of each store
    asked = [x for x in place.asked() if "a.json" in x]
    assert not any(read in x for read in reads for x in asked)
    files.write_bytes(path, b"abd")
    stores.forget()
    assert not artifacts.digests_of(place.folder / "mix").intact(path)
    files.write_bytes(path, b"abc")
    assert artifacts.digests_of(place.folder / "mix").intact(path)


def test_a_stage_of_many_files_is_compared_by_one_list(place):
    folder = place.folder / "generate"
    digests = artifacts.digests_of(folder)
    for k in range(9):
        files.write_text(folder / f"{k}.png", f"{k}")
    listed = {f"{k}.png": digests.describe(f"{k}.png") for k in range(9)}
    stores.forget()
    place.asked()
    digests = artifacts.digests_of(folder)
    place.asked()
    assert artifacts.lost(digests, folder, listed) == []
    pages = 3 if place.scheme == "gs" else 1  # of three entries
    assert len(place.asked()) <= pages
    (folder / "3.png").unlink()
    assert artifacts.lost(digests, folder, listed) == [folder / "3.png"]


class Killed(BaseException):
    """Of the process, at a request."""


class Asked:
    """A client of a store that kills the process in place of some requests."""

    def __init__(self, client, dies):
        self._client, self._dies = client, dies

    def __getattr__(self, kind):
        def ask(path, *arguments, **options):
            named = arguments[0] if kind in ("put_file", "cp_file") else path
            if not self._dies(kind, named):
                return getattr(self._client, kind)(path, *arguments, **options)
            if threading.current_thread() is threading.main_thread():
                raise Killed
            raise PermissionError  # the lock's thread goes on until the main one ends

        return ask


def interrupted(monkeypatch, dies, action):
    """Runs an action in which the process is killed; returns whether it ended.

    Args:
      monkeypatch: of the test.
      dies: (kind of a request, path) -> whether the process is killed there.
      action: to run.
    """
    system = store_client._system
    with monkeypatch.context() as patch:
        patch.setattr(store_client, "_system", lambda x: Asked(system(x), dies))
        patch.setattr(object_store.servers, "parallel", lambda f, x: [*map(f, x)])
        try:
            action()
        except Killed:
            return False
    return True


def at(number):
    """Kills at the request of this number and all later ones."""
    numbers = itertools.count()
    return lambda kind, path: next(numbers) >= number


@pytest.mark.parametrize("place", ["gs"], indirect=True)  # the faster server
def test_a_move_that_is_killed_anywhere_loses_nothing(place, monkeypatch):
    contents = {"manifest.json": b"{}", "b/c": b"2"}
    for number in itertools.count():
        source = place.folder / f"{number}" / "mix"
        target = place.folder / f"{number}" / "earlier" / "mix"
        for name, content in contents.items():
            object_store.put(content, source / name)
        move = functools.partial(source.rename, target)
        ended = interrupted(monkeypatch, at(number), move)
        for folder in (source.parent, target.parent):
            store_folders.remove_incomplete(folder)
        if source.exists():
            assert not ended
            assert {x: (source / x).read_bytes() for x in names(source)} == contents
            source.rename(target)
        assert {x: (target / x).read_bytes() for x in names(target)} == contents
        assert len(names(source.parent)) == len(contents)
        if ended:
            break
    assert number > 8


@pytest.mark.parametrize("place", ["gs"], indirect=True)  # the faster server
def test_an_interrupted_copy_has_no_manifest(place, monkeypatch, tmp_path):
    local = epath.Path(tmp_path) / "mix"
    for name in ("manifest.json", "a", "b/c"):
        files.write_text(local / name, name)
    for number in itertools.count():
        target = place.folder / f"{number}"
        copy = functools.partial(store_folders.copy_tree, local, target)
        if interrupted(monkeypatch, at(number), copy):
            break
        assert not (target / "manifest.json").exists()
    assert names(target) == ["a", "b/c", "manifest.json"]
    back = epath.Path(tmp_path) / "back"
    store_folders.copy_tree(target, back)
    assert (back / "b" / "c").read_text() == "b/c"


def test_scratch_of_a_full_disk_is_named(place, monkeypatch):
    files.write_bytes(place.folder / "a", LARGE)
    for path in scratch.folder().iterdir():
        path.unlink()
    usage = type("Usage", (), {"total": 100, "used": 99, "free": 1})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="set TMPDIR"):
        files.local(place.folder / "a")


def test_the_least_recently_used_files_of_scratch_make_room(place, monkeypatch):
    for name in "ab":
        files.write_bytes(place.folder / name, LARGE)
    kept = files.local(place.folder / "a")  # used last
    left = [len(LARGE) // 2]

    def usage(folder):
        used = sum(path.stat().st_size for path in scratch.folder().iterdir())
        free = 2 * len(LARGE) + left[0] - used
        return type("Usage", (), {"total": free + used, "used": used, "free": free})

    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr(scratch, "_SPARE", 0.1)
    scratch.make_room(len(LARGE) // 2)
    assert [str(path) for path in scratch.folder().iterdir()] == [kept]
