"""The sheet of the benchmarks: rows, tables, the plot, and what is called worse."""

import importlib
import inspect
import json
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import accelerator  # noqa: E402
import peers  # noqa: E402
import sheet  # noqa: E402

CPU = sheet.Hardware("cpu", "2 cores, a processor")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the sheet with made-up rows, by part; its exit code and output."""
    monkeypatch.setattr(sheet, "find_hardware", lambda: CPU)
    monkeypatch.setattr(sheet.signal, "signal", lambda *_: None)
    (tmp_path / "RESULTS.md").write_text("# Results\n\n## By hand\n\nKept.\n")

    def start(rows, *flags):
        def rows_of(run, *_):
            yield from rows.get(run.part, [{"status": accelerator.FAILED}])

        monkeypatch.setattr(accelerator, "rows_of", rows_of)
        out = [f"--out={tmp_path}", f"--logs={tmp_path / 'logs'}"]
        code = sheet.main([*out, f"--only={','.join(rows)}", *flags])
        return code, capsys.readouterr().out

    return start


def made(ratio=1.5, figure=30.0):
    return {
        "ceilings": [
            peers.row("a product", [0.1], "TFLOP/s"),
            peers.row("a copy", [10.0], "GB/s, both ways"),
        ],
        "classifier": [
            peers.row(
                "wrn16_4, batch 128",
                [figure, 1.02 * figure, 0.98 * figure],
                "examples/s",
                theirs=[figure / ratio, figure / ratio, figure / ratio],
                peer="PyTorch",
                flops=1e9,
            )
        ],
        "mixing": [peers.row("states", [1e4, 1.01e4], "states/s", bytes=5e5)],
        "starting": [peers.row("`--help`", [0.3, 0.31], "s")],
    }


def test_rows_become_tables_a_plot_and_what_the_hardware_allows(run, tmp_path):
    code, out = run(made())
    assert code == 0 and "Nothing is worse" in out and "at most" in out
    rows = [json.loads(x) for x in (tmp_path / "sheet.jsonl").read_text().splitlines()]
    of = {row["part"]: row for row in rows}
    assert of["classifier"]["tflops"] == pytest.approx(0.03)
    assert of["classifier"]["of_ceiling"] == pytest.approx(0.3)
    assert of["mixing"]["of_ceiling"] == pytest.approx(1.005e4 * 5e5 / 10e9)
    assert of["classifier"]["noise"] == pytest.approx(0.02, rel=0.01)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Results\n\n<!-- sheet: begin -->\n## The sheet")
    assert text.endswith("<!-- sheet: end -->\n\n## By hand\n\nKept.\n")
    assert "| classifier | wrn16_4, batch 128 | 30 | examples/s | 2.0% | 1.50 " in text
    assert "2 cores, a processor; python" in text
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    before = text.count("\n")
    run(made())
    assert (tmp_path / "RESULTS.md").read_text().count("\n") == before


def test_what_is_worse_by_more_than_the_noise_is_named(run, tmp_path):
    run(made())
    slower = made(ratio=1.2, figure=10.0) | {"starting": made()["starting"]}
    code, out = run(slower)
    assert code == 3
    (line,) = (x for x in out.splitlines() if x.startswith("Worse"))
    assert "classifier, wrn16_4, batch 128: 1.2x of PyTorch, 1.5 on " in line
    assert "-20 %" in line
    assert line in (tmp_path / "RESULTS.md").read_text()
    code, out = run(slower | {"mixing": [{"status": accelerator.FAILED}]})
    assert code == 1 and "Nothing is worse" in out  # than the last time


@pytest.mark.parametrize(
    ("old", "new", "unit", "found"),
    [
        ([100, 101], [97, 98], "images/s", False),
        ([100, 101], [90, 91], "images/s", True),
        ([100, 140], [90, 91], "images/s", False),  # noise
        ([1.0, 1.01], [1.2, 1.21], "s", True),
        ([1.2, 1.21], [1.0, 1.01], "s", False),
    ],
)
def test_worse_is_less_of_a_rate_and_more_of_a_time(old, new, unit, found):
    common = {"hardware": "a", "part": "b", "sheet": "2026-11-29", "commit": "c"}
    rows = [peers.row("d", x, unit) | common for x in (old, new)]
    assert bool(sheet.worse(rows[:1], rows[1:])) == found


def test_other_hardware_is_not_compared():
    row = peers.row("d", [100, 101], "images/s") | {"part": "b", "hardware": "a"}
    slower = row | {"figure": 1.0, "hardware": "z"}
    assert not sheet.worse([row], [slower])


def test_a_dry_run_lists_what_would_run(run, tmp_path):
    code, out = run({"mixing": []}, "--dry-run")
    assert code == 0 and "| mixing | peers:mixing |" in out and "reading" not in out
    assert not (tmp_path / "sheet.jsonl").exists()


def test_an_unknown_part_is_named(run, capsys):
    assert run({"mixin": []})[0] == 2


def test_the_benchmarks_take_their_arguments():
    for entry in (sheet.CEILINGS, *sheet.ON_CPU):
        module, _, name = entry.function.partition(":")
        assert module == "peers"
        for arguments in (entry.arguments, entry.arguments | (entry.toy or {})):
            inspect.signature(getattr(peers, name)).bind(**arguments)


@pytest.mark.parametrize(
    ("part", "module"),
    [
        ("fine-tuning", "finetune_step"),
        ("classifier", "classifier_step"),
        ("sampling", "sample"),
    ],
)
def test_a_part_sets_all_that_its_benchmark_is_given(monkeypatch, part, module):
    given = []

    def record(name, sides, options, **more):
        given.append(options)
        return {}

    benchmark = importlib.import_module(module)
    [entry] = [entry for entry in sheet.ON_CPU if entry.part == part]
    monkeypatch.setattr(sys, "argv", [module])
    monkeypatch.setattr(peers, "without_torch", lambda sides: {})
    monkeypatch.setattr(peers, "against_torch", record)
    for slow in (
        "architectures.write",
        "classifier_step.forward_flops",
        "measure.flops",
    ):
        monkeypatch.setattr(slow, lambda *_: 0)
    list(getattr(peers, entry.function.partition(":")[2])(**entry.arguments))
    cpu = [False] if inspect.signature(benchmark.parse).parameters else []
    assert vars(benchmark.parse(*cpu)).keys() <= vars(given[0]).keys()


def test_a_row_beside_a_peer_compares_turn_by_turn():
    found = peers.row("a", [2.0, 4.0], "s", theirs=[4.0, 4.0], peer="b",
                      faster_is_less=True)  # fmt: skip
    assert found["ratios"] == [2.0, 1.0] and found["ratio"] == 1.5
