"""Hours and prices follow from the tables of compiled programs."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import hours  # noqa: E402
import rows  # noqa: E402

TABLE = """
| program | device | settings | compiled in, s | memory | TFLOP | GB | roofline | k | c | x |
|---|---|---|---:|---|---:|---:|---|---|---|---|
| generate | 1 h100 | batch 16, sd15, 512 px | 73 | 7.7 | 1,600.00 | 100 | 1 | k |  | x |
| generate | 1 v5e | batch 16, sd15, 512 px | 19 | 8.9 | 1,600.00 | at least 50 | 1 | k | | x |
| encode | 1 h100 | batch 16, sd15, 512 px | 4 | 1.8 | 16.00 | 1 | 1 | k |  | x |
| finetune | 1 h100 | batch 8, sd15, 512 px | 79 | 17.9 | 16.00 | 900 | 30 | k |  | x |
| finetune | 1 h100 | batch 8, sd15, 512 px, remat full | 9 | 13 | 32.00 | 9 | 42 | k |  | x |
| finetune | 8 h100 | batch 8, sd15, 512 px | 79 | 13.1 | 2.00 | 64 | 19 | k | 9 sums | x |
| classify | 1 h100 | batch 128, wrn28_10, none, 32 px | 9 | 1 | 5.54 | 1 | 1 | k |  | x |
"""  # noqa: E501


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(hours, "compiled", lambda: tuple(rows.read(TABLE)))


def test_an_example_takes_the_longer_of_its_flops_and_its_bytes(table):
    assert len(hours.compiled()) == 6
    assert hours.seconds("generate", "h100", 512) == (pytest.approx(100 / 989), "")
    assert hours.seconds("generate", "v5e", 512)[0] == pytest.approx(100 / 197)
    by_bytes, by_flops = 900 / 8 / 3352, 4 / 989  # the second recomputes activations
    assert by_bytes > by_flops
    assert hours.seconds("finetune", "h100", 512)[0] == pytest.approx(by_flops)


def test_what_was_not_compiled_is_marked(table):
    assert hours.seconds("generate", "h200", 512) == (pytest.approx(100 / 989), "a")
    assert hours.seconds("generate", "v6e", 512) == (pytest.approx(100 / 918), "b")
    assert hours.seconds("generate", "h100", 256) == (pytest.approx(25 / 989), "b")


def test_twice_the_chips_take_half_the_hours_of_generate_for_the_same_price(table):
    one, two = (hours.hours("h100", chips, 10_000, 512) for chips in (8, 16))
    assert one.generate == pytest.approx(2 * two.generate)
    assert one.generate == pytest.approx(3 * 10_000 * 100 / 989 / 8 / 3600)


def test_the_document_has_a_row_for_every_dataset_machine_and_chip():
    text = hours.DOCUMENT.read_text()
    written = text[text.index(hours.BEGIN) : text.index(hours.END)]
    for dataset in hours.DATASETS:
        for machine in hours.MACHINES:
            assert f"| {dataset} | {machine}" in written
    assert {kind for kind, _ in hours.MACHINES.values()} <= {*hours.prices()}
