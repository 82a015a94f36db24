"""Workdirs in buckets: their lock, checkpoints, logs, and stages that come and go."""

import itertools
import json
import logging
import pathlib
import re
import shutil
import threading

import made_stages
import pytest
import stores
from etils import epath
from test_checkpoint import bits, make_state, restore, save
from test_object_store import interrupted, names

from mvc_jax import files, object_store, scratch, store_folders, train
from mvc_jax.command import run_folder, store_lock
from mvc_jax.errors import UserError
from mvc_jax.training import metrics, runtime
from mvc_jax.training.checkpoint import Checkpoints

NUMBERS = itertools.count(1000)


@pytest.fixture(params=["gs"])
def place(request, s3, tmp_path, monkeypatch):
    with stores.place(monkeypatch, request.param, s3, tmp_path, next(NUMBERS)) as made:
        yield made


both = pytest.mark.parametrize("place", ["s3", "gs"], indirect=True)


# Checkpoints.


def steps_in(folder):
    done = (x.split("/")[0] for x in names(folder) if x.endswith("/committed.json"))
    return sorted(int(step) for step in done if step.isdigit())


@both
def test_the_newest_checkpoint_is_restored_and_old_ones_are_deleted(place):
    folder = place.folder / "checkpoints"
    save(folder, 1, 2, 3, 4, best="loss")
    save(folder, 5, best="other")
    assert steps_in(folder) == [4, 5]
    assert {name.split("/")[0] for name in names(folder)} == {"4", "5"}
    assert bits(restore(folder)) == bits(make_state(5))
    assert not list(scratch.folder().iterdir())


def test_the_best_checkpoint_is_kept(place):
    checkpoints = Checkpoints(place.folder, every=1, best="loss")
    for step, loss in enumerate((3.0, 1.0, 2.0, 5.0), start=1):
        checkpoints.save(step, make_state(step), {"loss": loss})
    checkpoints.close()
    assert steps_in(place.folder) == [2, 3, 4]
    checkpoints = Checkpoints(place.folder, every=1, best="loss")
    assert checkpoints.best_step == 2
    assert bits(checkpoints.restore_best(make_state(0))) == bits(make_state(2))
    checkpoints.close()


def test_a_checkpoint_whose_upload_was_cut_is_deleted(place):
    save(place.folder, 1, 2)
    (place.folder / "2" / "committed.json").unlink()
    assert bits(restore(place.folder)) == bits(make_state(1))
    assert {name.split("/")[0] for name in names(place.folder)} == {"1"}


def test_a_damaged_checkpoint_is_put_aside(place, caplog):
    save(place.folder, 1, 2)
    listed = files.read_json(place.folder / "2" / "committed.json")["files"]
    name = max(listed, key=lambda name: listed[name] * ("state" in name))
    content = (place.folder / "2" / name).read_bytes()
    object_store.put(content[: len(content) // 2], place.folder / "2" / name)
    with caplog.at_level(logging.WARNING):
        assert bits(restore(place.folder)) == bits(make_state(1))
    assert "renamed to damaged-2, step 1 is restored" in caplog.text
    assert steps_in(place.folder)[0] == 1
    save(place.folder, 2)
    assert bits(restore(place.folder)) == bits(make_state(2))


def test_a_save_that_cannot_be_put_is_an_error_of_the_next_call(place):
    checkpoints = Checkpoints(place.folder, every=1)
    place.fault("POST /upload", 403)
    checkpoints.save(1, make_state(1))
    with pytest.raises(UserError, match="Sign in"):
        checkpoints.close()
    place.server.faults.clear()
    assert steps_in(place.folder) == []


# The lock.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(store_lock, "BEAT", 0.05)
    monkeypatch.setattr(store_lock, "_SETTLE", 0.0)


def other_machine(place, **changes):
    record = {"run": "other", "machine": "far", "boot": "x", "process": 7} | changes
    object_store.put(json.dumps(record).encode(), place.folder / ".lock")


@both
def test_one_run_holds_the_lock_and_leaves_nothing(place, quick):
    with run_folder.locked(place.folder):
        with (
            pytest.raises(UserError, match="in use by process"),
            run_folder.locked(place.folder),
        ):
            pass
        with (
            pytest.raises(UserError, match="--from=.* in use by process"),
            run_folder.locked(place.folder, "from"),
        ):
            pass
    with run_folder.locked(place.folder, "from"), run_folder.locked(place.folder):
        pass
    assert names(place.folder) == []


def test_the_lock_of_a_killed_run_is_taken(place, quick, monkeypatch):
    me = {"machine": store_lock.socket.gethostname(), "boot": store_lock._boot()}
    other_machine(place, **me, process=2**30)  # a process that ended: at once
    with run_folder.locked(place.folder):
        pass
    monkeypatch.setattr(store_lock, "EXPIRES", 1.0)
    other_machine(place)  # of another machine: once it expires
    with run_folder.locked(place.folder):
        pass
    assert names(place.folder) == []


def test_a_run_that_lost_its_lock_writes_no_more(place, quick):
    with run_folder.locked(place.folder):
        while not object_store._refused:
            other_machine(place)
            store_lock.time.sleep(0.1)
        with pytest.raises(UserError, match="in use by process 7 of far"):
            files.write_text(place.folder / "a", "")
    assert names(place.folder) == [".lock"]
    files.write_text(place.folder / "a", "")


# Metrics.


def test_metrics_and_events_are_there_at_the_end(place):
    log = metrics.MetricsLog(place.folder, "finetune/x")
    log.write(1, loss=0.5)
    log.close()
    assert metrics.read_rows(place.folder)[0]["loss"] == 0.5
    (event,) = files.matching(place.folder, "tensorboard/finetune_x/*")
    assert b"loss" in event.read_bytes()
    assert not list(scratch.folder().iterdir())


# Stages.


@pytest.fixture
def worked(monkeypatch, quick):
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    return made_stages.install(monkeypatch)


def run(folder, *flags):
    return train.main(["train", f"--workdir={folder}", *flags])


def content(folder):
    """What does not depend on where a workdir is, or when its files were made."""
    if object_store.is_remote(folder):
        found = {name: (folder / name).read_bytes() for name in names(folder)}
    else:
        paths = [x for x in pathlib.Path(folder).rglob("*") if x.is_file()]
        found = {str(x.relative_to(folder)): x.read_bytes() for x in paths}
    timed = ("digests/", "timings.json", "earlier/")
    return {x: y for x, y in found.items() if not any(t in x for t in timed)}


@both
def test_a_bucket_ends_with_the_files_of_a_local_run(place, worked, tmp_path, capsys):
    local = tmp_path / "local"
    for folder in (local, place.folder):
        assert run(folder) == 0
    assert content(place.folder) == content(local)
    stores.forget()
    worked.clear()
    place.asked()
    assert run(place.folder) == 0 and worked == []
    asked = len(place.asked())
    assert asked < 400 or place.scheme == "gs"  # whose lists have three entries here
    for folder in (local, place.folder):
        assert run(folder, "--config.mix.modes=fine", "--redo=mix") == 0
    assert content(place.folder) == content(local)
    moved = {x.split("/", 2)[2] for x in names(place.folder) if "earlier/" in x}
    assert {"mix/manifest.json", "report/report.html", "digests/mix.jsonl"} <= moved


def test_stages_are_taken_over_from_and_to_a_bucket(place, worked, tmp_path):
    local, new = tmp_path / "local", tmp_path / "new"
    assert run(local) == 0
    worked.clear()
    for source, folder in (
        (local, place.folder),
        (place.folder, place.folder.parent / "second"),
        (place.folder, new),
    ):
        assert run(folder, f"--from={source}", "--config.mix.modes=fine") == 0
        assert content(folder).keys() == content(local).keys()
    assert worked == ["mix", "generate", "classify", "evaluate", "report"]
    assert content(new) == content(place.folder)


WRITES = ("pipe_file", "put_file", "cp_file", "rm_file")


def once_at_each(killed):
    """Kills at the first change of an object that `killed` does not have yet.

    Between two changes it makes no difference where a process is killed.
    """
    dead = False

    def dies(kind, path):
        nonlocal dead
        about = kind, re.sub("[0-9a-f]{8,}|[0-9]+", "#", str(path))
        main = threading.current_thread() is threading.main_thread()
        if main and not dead and kind in WRITES and about not in killed:
            killed.add(about)
            dead = True
        return dead

    return dies


STAGES = "--config.stages=caption,pretrain,encode,pairs,finetune,mix"


@pytest.fixture
def finished(place, worked, tmp_path, monkeypatch):
    """A finished local run; and a function that makes and remakes one in the bucket.

    The function is given flags, and kills the run before each of its changes in turn.
    """
    monkeypatch.setattr(store_lock, "_is_dead", lambda found: True)
    monkeypatch.setattr(store_lock, "BEAT", 1e6)  # a killed run's thread is killed too
    monkeypatch.setattr(store_lock, "_SETTLE", 0)
    assert run(tmp_path / "source") == 0

    def killed_before_each_change(*flags):
        killed, reruns, codes = set(), 0, []
        act = lambda: codes.append(run(place.folder, *flags))  # noqa: E731
        while not interrupted(monkeypatch, once_at_each(killed), act):
            object_store._refused.clear()
            stores.forget()
            reruns += 1
        assert codes == [0] and reruns == len(killed)
        return reruns

    return epath.Path(tmp_path / "source"), killed_before_each_change


def test_a_run_that_is_killed_before_each_change_ends_with_the_same_files(
    place, finished, tmp_path
):
    """Each rerun gets further, up to a change that none before was killed at."""
    source, killed_before_each_change = finished
    flags = [f"--from={source}", "--config.mix.modes=fine", STAGES]
    assert run(tmp_path / "whole", *flags) == 0
    assert killed_before_each_change(*flags) > 25
    assert content(place.folder) == content(tmp_path / "whole")


def test_a_redo_that_is_killed_before_each_change_ends_with_the_same_files(
    place, finished, tmp_path
):
    source, killed_before_each_change = finished
    shutil.copytree(source, tmp_path / "whole")
    store_folders.copy_tree(source, place.folder)
    flags = ["--redo=mix", "--config.mix.modes=fine", STAGES]
    assert run(tmp_path / "whole", *flags) == 0
    assert killed_before_each_change(*flags) > 50
    assert content(place.folder) == content(tmp_path / "whole")


@both
def test_a_run_outlives_faults_of_the_store(place, worked, tmp_path, monkeypatch):
    stores.be_impatient(monkeypatch, place.scheme)
    assert run(tmp_path / "local") == 0
    faults = [503, "lost", "cut", "stalled", 429, "slow"]
    place.fault("/", *(x for fault in 4 * faults for x in [None] * 11 + [fault]), None)
    assert run(place.folder) == 0
    assert place.server.faults["/"] == [None]
    assert content(place.folder) == content(tmp_path / "local")


# Bad input.


@both
@pytest.mark.parametrize(
    "prepare, wanted",
    [
        ("locked", "Sign in"),
        ("missing", "no bucket .*no-such-bucket. Create it, or correct the name"),
        ("read-only", "Sign in .*with an account that may read and write"),
        ("silent", "Check the connection, then rerun"),
    ],
)
def test_an_unusable_bucket_is_one_sentence_before_any_work(
    place, worked, capsys, prepare, wanted
):
    folder = place.folder
    if prepare == "locked":
        place.server.locked = True
    elif prepare == "missing":
        folder = epath.Path(f"{place.scheme}://no-such-bucket/run")
    elif prepare == "read-only":
        for part in ("PUT /", "POST /upload"):
            place.fault(part, 403)
    else:
        place.fault("/", 503)
    assert run(folder) == 2
    assert worked == []
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{wanted}", line), line
