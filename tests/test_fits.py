"""What fits which card follows from the tables of compiled programs."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fits  # noqa: E402
import rows  # noqa: E402

TABLE = """
| p | device | settings | s | memory | TFLOP | GB | roofline | k | c | x |
|---|---|---|---:|---|---:|---:|---|---|---|---|
| finetune | 1 h100 | batch 10, sd15, 512 px | 9 | 1 + 19 = 20 of 79.6 | 1 | 1 | 1 | k |  | x |
| finetune | 1 h100 | batch 30, sd15, 512 px | 9 | 1 + 39 = 40 of 79.6 | 1 | 1 | 1 | k |  | x |
| finetune | 8 h100 | batch 8, sd15, 512 px | 9 | 1 + 1 = 2 of 79.6 | 1 | 1 | 1 | k | s | x |
| finetune | 1 h100 | batch 40, sd15, 256 px | 9 | 1 + 19 = 20 of 79.6 | 1 | 1 | 1 | k |  | x |
| finetune | 1 l4 | batch 10, sd15, 512 px | 9 | 1 + 29 = 30 of 22.5: does not fit | 1 | 1 | 1 | k | | x |
| finetune | 1 v5e | batch 2, sd15, 512 px | 9 | 1 + 12 = 13 of 15.8, without code | 1 | 1 | 1 | k | | x |
| finetune | 1 v5e | batch 4, sd15, 512 px | 9 | 1 + 13 = 14 of 15.8, without code | 1 | 1 | 1 | k | | x |
| finetune | 1 v5p | batch 14, sd15, 512 px | 9 | 1 + 33 = 34 of 95.7, without code | 1 | 1 | 1 | k | | x |
| finetune | 1 v5e | batch 2, sd15, 512 px, ema 0.99 | 9 | 1 + 99 = 100 of 15.8 | 1 | 1 | 1 | k | | x |
| generate | 1 h100 | batch 16, sd15, 256 px | 9 | 1 + 5 = 6 of 79.6 | 1 | 1 | 1 | k |  | x |
"""  # noqa: E501


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(fits, "compiled", lambda: tuple(rows.read(TABLE)))


@pytest.mark.parametrize(
    ("kinds", "size", "room", "largest"),
    [
        ("9.0", 512, 20.5, 10),
        ("9.0", 512, 11.5, 1),  # before the first that was compiled
        ("9.0", 512, 10.5, 0),
        ("9.0", 512, 60.0, 50),
        ("9.0", 256, 20.0, 40),  # 10 GiB are held with images of any size
        ("8.x", 512, 30.0, 10),  # its own example, and what an H100 holds
        ("8.x", 256, 20.0, 40),  # as on an H100
        ("TPU", 512, 13.6, 3),  # between each two a line of their own
        ("TPU", 512, 24.0, 9),
        ("TPU", 512, 44.0, 19),
    ],
)
def test_the_largest_batch_is_on_the_lines_through_those_that_were_compiled(
    table, kinds, size, room, largest
):
    assert fits.memory(kinds, "finetune", "", size).largest(room) == largest


def test_examples_of_another_size_take_memory_by_their_pixels(table):
    found = fits.memory("TPU", "finetune", "", 256)
    assert found.estimated and found.held == pytest.approx(6.0)
    assert found.largest(34.0) == 4 * 14


def test_what_was_not_compiled_is_not_guessed(table):
    assert fits.memory("9.0", "lora", "", 512) is None
    assert fits.memory("9.0", "generate", "", 256) is None  # of one batch
    cells = {cell for line in fits.of_cards() for cell in line.strip("| ").split(" | ")}
    assert {"not compiled", "at least 16"} <= cells


def test_the_document_has_a_row_for_every_card():
    text = fits.DOCUMENT.read_text()
    written = text[text.index(fits.BEGIN) : text.index(fits.END)]
    for card in fits.CARDS:
        assert f"| {card} (" in written
