"""What the processes of one run tell each other, in processes on this machine."""

import socket
import subprocess
import sys

import pytest

from mvc_jax import processes

PROGRAM = """
import sys, jax
from mvc_jax import processes
from mvc_jax.errors import UserError
port, number = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number), [0])
assert (processes.index(), processes.count()) == (int(number), 2)
assert processes.share("abcde") == [*["ace", "bd"][int(number)]]
assert processes.gather("ids", {"mine": int(number)}) == [{"mine": 0}, {"mine": 1}]
assert processes.on_first("choice", lambda: [processes.index(), "x"]) == [0, "x"]
alone = processes.on_first("alone", lambda: processes.gather("x", processes.count()))
assert alone == [1] and processes.count() == 2
for _ in range(2):
    processes.note("images", 3 + int(number))
processes.barrier("notes")
assert processes.noted("images") == [4, 3][int(number)]
def fail():
    raise UserError("--workdir=x", wanted="w", got="g", fix="f", details=("d",))
try:
    processes.on_first("check", fail)
except UserError as error:
    assert (str(error), [*error.details]) == ("--workdir=x: wanted w, got g. f", ["d"])
else:
    raise AssertionError("no error")
processes.barrier("all")
if number == "0":
    try:
        processes.barrier("alone", seconds=0.2)
    except UserError as error:
        print(error)
"""


def test_two_processes_say_the_same_and_name_who_is_missing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, "-c", PROGRAM, port]
    runs = [
        subprocess.Popen([*program, n], stdout=-1, stderr=-1, text=True) for n in "01"
    ]
    outs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    assert "process 1: wanted all 2 processes at alone within 0.2 s" in outs[0][0]


def test_one_process_is_all_there_is():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather("x", "mine") == ["mine"]
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
