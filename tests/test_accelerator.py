"""The script for an accelerator: a rehearsal of all its parts, and how a part fails."""

import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import accelerator  # noqa: E402
from accelerator import ABSENT, FAILED, MEMORY, TIME, Run  # noqa: E402
from conftest import CACHE  # noqa: E402

# A rehearsal's time is compilation: of programs that may be slow.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def script(*flags, devices=1):
    """Runs the script in a process of its own; its exit code, output and errors."""
    xla = f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"
    ours = {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "XLA_FLAGS": xla,
    }
    done = subprocess.run(
        ["bash", "benchmarks/accelerator.sh", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | ours,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def rows_in(folder):
    lines = (folder / "accelerator.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# Parts that use a mesh: run on 8 devices as well.
SHARDED = ("fine-tuning", "sampling", "classifier", "encoding", "seeds")


@pytest.mark.parametrize(
    ("devices", "parts"), [(1, accelerator.PARTS), (8, SHARDED)], ids=["one", "eight"]
)
def test_every_part_runs_at_a_toy_size(devices, parts, tmp_path):
    flags = ["--rehearse", "--minutes=100", f"--parts={','.join(parts)}"]
    code, output, errors = script(*flags, f"--out={tmp_path}", devices=devices)
    rows = rows_in(tmp_path)
    assert code == 0, output + errors
    assert {row["part"] for row in rows} == {"card", *parts}
    without = os.environ.get("MVC_JAX_WITHOUT_TORCH") == "1"
    for row in rows:
        if without and row["part"] == "PyTorch":
            assert row["status"] == ABSENT
            continue
        assert "status" not in row and row["figure"] >= 0, row
        assert row["setting"]
    table = output.strip().splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    by_part = {row["part"]: row for row in rows}
    assert by_part["fine-tuning"]["ratio_to"] == "the record, 128"
    assert by_part["fine-tuning"]["tflops"] > 0
    assert by_part["seeds"]["ratio_to"] == "one after another"
    if devices == 1 and not without:
        assert by_part["PyTorch"]["ratio_to"] == "ours / PyTorch"


def test_without_an_accelerator_it_says_so_and_stops(tmp_path):
    code, output, errors = script(f"--out={tmp_path}")
    (row,) = rows_in(tmp_path)
    assert code == 1
    assert row["part"] == "card" and row["status"] == FAILED
    assert "wanted an accelerator that JAX finds, got 1 CPU device" in row["note"]
    assert "--rehearse" in output and "nothing else is run" in errors


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parts=card,sampling,slow", "wanted some of card,right,attention,"),
        ("--minutes=0", "wanted more than 0, got 0"),
        ("--minutes=nine", "invalid float value: 'nine'"),
        ("--out={file}", "--out: wanted a folder to write into, got "),
        ("--out={file}/below", "--out: wanted a folder to write into, got "),
    ],
)
def test_a_wrong_flag_is_named(flag, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    try:
        code = accelerator.main([flag.format(file=tmp_path / "file")])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def rows_of(function, tmp_path, **arguments):
    run = Run("part", f"toy_parts:{function}", 60, arguments, fresh=True)
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "part.log"
    return accelerator.rows_of(run, context, log, str(tmp_path / "xla"), 60.0)


@pytest.mark.parametrize(
    ("text", "kind", "status"),
    [
        ("a | b\nc", "RuntimeError", FAILED),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.",
            "RuntimeError",
            MEMORY,
        ),
        ("No module named 'torch'", "absent", ABSENT),
    ],
)
def test_an_exception_is_a_row_in_one_line(text, kind, status, tmp_path):
    first, last = rows_of("yields_then_raises", tmp_path, text=text, kind=kind)
    assert first == {"setting": "first", "figure": 1.0, "unit": "s"}
    assert last["status"] == status
    assert " ".join(text.replace("|", "/").split()) in last["note"]
    assert "Traceback" in (tmp_path / "part.log").read_text()


def test_a_killed_process_is_a_row(tmp_path):
    _, last = rows_of("kills_itself", tmp_path)
    note = "killed by SIGKILL; its log ends: the last words"
    assert last == {"status": FAILED, "note": note}


def test_a_process_ends_with_its_limit_and_takes_its_children_along(
    tmp_path, monkeypatch
):
    file = tmp_path / "pid"
    rows = rows_of("sleeps_with_a_child", tmp_path, file=str(file))
    next(rows)
    later = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1000)
    monkeypatch.setattr(accelerator, "time", later)
    assert list(rows) == [{"status": TIME, "note": "its limit of 60 s was over"}]
    for _ in range(600):  # until its new parent has collected it
        state = pathlib.Path(f"/proc/{file.read_text()}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a run is alive")


def test_what_the_time_does_not_allow_is_listed(tmp_path):
    flags = accelerator.parse(["--minutes=0.0001", f"--out={tmp_path}"])
    with (tmp_path / "accelerator.jsonl").open("a") as file:
        table = accelerator.Table(file)
        assert accelerator.measure_all(accelerator.selected(flags), flags, table) == 0
    assert [row["status"] for row in table.rows] == [TIME] * (1 + len(accelerator.RUNS))
    assert table.rows[3]["setting"] == "batch 32, remat none"


def test_lowered_programs_take_the_arguments_of_the_measured_ones(tmp_path):
    flags = accelerator.parse(["--lower"])
    runs = accelerator.selected(flags)
    assert {run.arguments["name"] for run in runs} == {
        "classify",
        "encode",
        "finetune",
        "generate",
    }
    import programs

    for run in runs:
        programs.Options(**{k: v for k, v in run.arguments.items() if k != "name"})
