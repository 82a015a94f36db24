"""Several processes of one run on this machine: what they say, train, how they end."""

import contextlib
import json
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
from forked_processes import Many, free_port

from mvc_jax import hub, joining, processes
from mvc_jax.command import agreement, command_line
from mvc_jax.errors import UserError
from mvc_jax.training import host_work


def talk(flags, number):
    """In each of two processes."""
    port = flags[0].rpartition(":")[2]
    joining.join(f"127.0.0.1:{port}", 2, number)
    assert (processes.index(), processes.count()) == (number, 2)
    assert processes.share("abcde") == [*["ace", "bd"][number]]
    assert processes.gather("ids", {"mine": number}) == [{"mine": 0}, {"mine": 1}]
    alone = processes.on_first("choice", lambda: [processes.count(), processes.index()])
    assert alone == [1, 0] and processes.count() == 2
    nested = processes.on_first("alone", lambda: processes.gather("x", "mine"))
    assert nested == ["mine"]
    for _ in range(2):
        processes.note("images", 3 + number)
    processes.barrier("notes")
    assert processes.noted("images") == [4, 3][number]
    assert processes.on_all("sum", lambda: number + 1) == number + 1
    order = processes.first_then_all("order", lambda: number)
    assert order == number

    def fail():
        if processes.index() == 1 or processes.count() == 1:
            raise UserError("--workdir=x", wanted="w", got="g", fix="f", details=("d",))

    for ask, said in ((processes.on_first, ""), (processes.on_all, "process 1 on ")):
        with pytest.raises(UserError, match=f"{said}.*--workdir=x: wanted w") as caught:
            ask("check", fail)
        assert caught.value.shared and caught.value.details == ("d",)
    processes.require_same("equal", {"a": 1}, "f")
    with pytest.raises(UserError, match="process 1 on .*: config.x: wanted 0, as proc"):
        processes.require_same("config", {"y": 1, "config.x": number}, "f")
    processes.barrier("all")
    if number == 0:
        with pytest.raises(
            UserError, match="process 1 on .*: wanted all 2 processes at"
        ):
            processes.barrier("early", seconds=0.2)
    else:
        time.sleep(0.5)
        processes.barrier("early")
    joining.leave(0)
    assert (processes.index(), processes.count()) == (0, 1)


def test_two_processes_say_the_same_and_name_who_is_missing(fork_server, tmp_path):
    many = Many(fork_server, tmp_path / "run", "test_processes:talk", [1, 1])
    codes, said = many.wait()
    assert codes == [0, 0], said


def test_one_process_is_all_there_is():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather("x", "mine") == ["mine"]
    assert joining.detected() is None
    with pytest.raises(ZeroDivisionError):
        processes.on_first("x", lambda: 1 / 0)


def test_shares_are_all_items_and_about_equally_heavy(monkeypatch):
    weights, items = [5, 1, 1, 5, 1, 1, 1, 4], [*"abcdefgh"]
    monkeypatch.setattr(processes, "count", lambda: 3)
    shares, equal = [], []
    for index in range(3):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        shares.append(processes.share(items, weights))
        equal.append(processes.share(items))
    assert sorted(sum(shares, [])) == items and all(x == sorted(x) for x in shares)
    loads = [sum(weights[items.index(x)] for x in share) for share in shares]
    assert max(loads) - min(loads) <= 1
    assert equal == [["a", "d", "g"], ["b", "e", "h"], ["c", "f"]]


# Training, and how it ends.

STEPS = 12
_TOY = "forked_processes:train_toy"


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(workdir):
    return [row["loss"] for row in rows_of(workdir)]


@pytest.fixture(scope="module")
def alone(fork_server, tmp_path_factory):
    """The toy trained by one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = (str(folder / "run"), STEPS, 1, 0.0)
    codes, said = Many(fork_server, folder / "said", _TOY, [1], *arguments).wait()
    assert codes == [0], said
    return folder / "run"


def test_one_of_four_is_killed_the_others_name_it_and_two_go_on(
    fork_server, tmp_path, alone
):
    workdir = tmp_path / "run"
    devices = [1, 1, 2, 2]
    arguments = (str(workdir), STEPS, 2, 0.2)
    many = Many(fork_server, tmp_path / "four", _TOY, devices, *arguments)
    many.await_file(workdir / "checkpoints" / "4")
    os.kill(many.pids()[2], signal.SIGKILL)
    began = time.monotonic()
    codes, said = many.wait()
    assert time.monotonic() - began < 60
    assert codes == [75, 75, -signal.SIGKILL, 75], said
    for text in (said[0], said[1], said[3]):
        assert "process 2 on " in text and " was lost" in text
        assert "Traceback" not in text
    many = Many(fork_server, tmp_path / "two", _TOY, [1, 1], *arguments[:2], 1, 0.0)
    codes, said = many.wait()
    assert codes == [0, 0], said
    assert "damaged" not in said[0]
    np.testing.assert_allclose(losses_of(workdir), losses_of(alone), rtol=1e-5)
    ends = [np.load(folder / "end.npy") for folder in (workdir, alone)]
    np.testing.assert_allclose(*ends, rtol=1e-5)
    rows = rows_of(workdir)
    assert {"host_seconds_0", "host_seconds_1"} <= rows[-1].keys()


def test_sigterm_to_one_saves_the_same_step_in_all(fork_server, tmp_path, alone):
    workdir = tmp_path / "run"
    arguments = (str(workdir), STEPS, 1, 0.2)
    many = Many(fork_server, tmp_path / "two", _TOY, [1, 2], *arguments)
    many.await_file(workdir / "checkpoints" / "4")
    os.kill(many.pids()[1], signal.SIGTERM)
    codes, said = many.wait()
    assert codes == [75, 75], said
    steps = [int(x.name) for x in (workdir / "checkpoints").iterdir()]
    newest = max(steps)
    assert 4 < newest < STEPS
    assert f"stopped by SIGTERM in toy after step {newest};" in said[0]
    assert "SIGTERM" not in said[1]
    arguments = (str(workdir), STEPS, 1, 0.0)
    codes, said = Many(fork_server, tmp_path / "one", _TOY, [1], *arguments).wait()
    assert codes == [0], said
    np.testing.assert_allclose(losses_of(workdir), losses_of(alone), rtol=1e-5)


def test_a_slow_host_is_found():
    assert host_work.slow([0.1, 0.1, 0.9, 0.1], step_seconds=1.0) == [2]
    assert host_work.slow([0.1, 0.1, 0.3, 0.1], step_seconds=9.0) == []
    assert host_work.slow([0.5, 0.5], step_seconds=1.0) == []


# What must be the same.


def test_hosts_with_other_files_under_the_same_path_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "one").mkdir(parents=True)
        (tmp_path / name / "one" / "x.png").write_bytes(b"1234")
        (tmp_path / name / "y.parquet").write_bytes(b"12")
    seen = [agreement.seen_at(str(tmp_path / name)) for name in ("a", "b")]
    assert seen[0] == seen[1] and seen[0].startswith("2 files, 6 bytes")
    (tmp_path / "b" / "one" / "x.png").rename(tmp_path / "b" / "one" / "z.png")
    assert agreement.seen_at(str(tmp_path / "b")) != seen[0]
    files = [str(tmp_path / name / "y.parquet") for name in ("a", "b")]
    assert agreement.seen_at(files[0]) == agreement.seen_at(files[1])
    (tmp_path / "b" / "y.parquet").write_bytes(b"21")
    assert agreement.seen_at(files[0]) != agreement.seen_at(files[1])
    assert agreement.seen_at(str(tmp_path / "*" / "*.parquet")).startswith("2 files, 4")
    assert agreement.seen_at(str(tmp_path / "none")) == "no files"


def test_a_sweep_in_several_processes_says_how_to_make_its_points():
    agreement.require_sweep_alone(None)
    with pytest.raises(UserError, match="single process, got 2. Make each point in al"):
        agreement.require_sweep_alone(command_line.Place("10.0.0.2:81", 2, 0))


# Joining.


def test_the_flags_say_which_process_this_is():
    place = ["--coordinator=10.0.0.2:81", "--num_processes", "4", "--process_id=3"]
    rest, found = command_line.take_place(["train", "--workdir=x", *place, "--verify"])
    assert rest == ["train", "--workdir=x", "--verify"]
    assert found == command_line.Place("10.0.0.2:81", 4, 3)
    assert command_line.take_place(["train", "--verify"])[1] is None
    for flags, said in (
        (
            place[:1],
            "--num_processes: wanted --coordinator=HOST:PORT, --num_processes=",
        ),
        ([*place[:3], "--process_id=4"], "--process_id: wanted a whole number, 0 to 3"),
        (
            [*place[:2], "0", place[3]],
            "--num_processes: wanted a whole number, 1 or mor",
        ),
        (["--coordinator=here", *place[1:]], "--coordinator: wanted HOST:PORT of proc"),
    ):
        with pytest.raises(UserError, match=said):
            command_line.take_place(["train", *flags])


def refused(port, number, count, seconds=5.0):
    lines = joining._call(f"127.0.0.1:{port}", seconds)
    hello = {"process": number, "count": count, "host": "B", "time": time.time()}
    lines.send({"hello": hello})
    return lines


def answer(lines):
    with contextlib.closing(lines.socket), pytest.raises(UserError) as caught:
        joining._answer(lines, "x", 5.0)
    return str(caught.value)


def test_a_wrong_coordinator_is_named():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"--coordinator={address}: wanted process 0"):
        joining.join(address, 2, 1, seconds=0.3)


def test_numbers_twice_other_counts_and_who_is_missing_are_named(monkeypatch):
    reading, writing = (os.fdopen(x, m) for x, m in zip(os.pipe(), "rw", strict=True))
    monkeypatch.setattr(hub.sys, "stdin", reading)
    port = free_port()
    table = hub.Hub(port, 3, 1.0)
    thread = threading.Thread(target=table.run)
    thread.start()
    with socket.create_connection(("127.0.0.1", port)) as other:
        other.sendall(b"GET / HTTP/1.1\n\n")  # who is not of the run is not heard
    first = refused(port, 0, 3)
    time.sleep(0.05)
    assert (
        "--process_id=0: wanted a number that no other process has, got it twice"
        in (answer(refused(port, 0, 3)))
    )
    assert "--num_processes=4: wanted 3, as process 0 has" in answer(
        refused(port, 1, 4)
    )
    assert "process 1, 2: wanted all 3 processes within 1 s, got 1" in answer(first)
    thread.join()
    reading.close()
    writing.close()
