"""Rates of earlier runs: kept, found again, and never in the way."""

import concurrent.futures
import json

import pytest

from mvc_jax.training.rates import Rate, Rates

SETTINGS = {"batch_size": 50, "mesh": {"data": -1}, "modes": ("coarse", "fine")}
CARD = {"processor": "one", "cores": 2, "devices": "H200", "count": 1}
RATE = Rate("steps", 100, 60.0, 10.0, 2**30)


@pytest.fixture
def rates(tmp_path):
    found = Rates(str(tmp_path / "cache"))
    found.record("finetune", SETTINGS, CARD, RATE)
    return found


def test_a_rate_is_found_again_on_the_same_hardware_with_the_same_settings(rates):
    assert rates.find("finetune", SETTINGS, CARD) == RATE
    assert rates.known("finetune", SETTINGS)
    assert rates.find("finetune", SETTINGS | {"batch_size": 8}, CARD) is None
    assert rates.find("finetune", SETTINGS, CARD | {"count": 8}) is None
    assert rates.find("generate", SETTINGS, CARD) is None
    assert not rates.known("finetune", SETTINGS | {"batch_size": 8})


def test_compilation_is_paid_once_and_the_rest_in_proportion():
    assert RATE.seconds_for(100) == 60
    assert RATE.seconds_for(1000) == 10 + 10 * 50


def test_the_last_run_counts(rates):
    rates.record("finetune", SETTINGS, CARD, Rate("steps", 10, 1.0))
    assert rates.find("finetune", SETTINGS, CARD) == Rate("steps", 10, 1.0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        b"{",
        b"[]",
        b"null",
        b'{"unit": "steps"}',
        *(
            json.dumps(
                {"unit": "steps", "count": 5, "seconds": 1, "compile_seconds": 0}
                | {"program_bytes": 0, name: value}
            ).encode()
            for name, value in (
                ("count", 0),
                ("count", "many"),
                ("seconds", -1),
                ("seconds", float("nan")),
                ("seconds", None),
                ("compile_seconds", float("inf")),
            )
        ),
    ],
)
def test_a_damaged_file_is_a_rate_not_known_and_is_written_again(
    rates, tmp_path, content
):
    [path] = (tmp_path / "cache" / "rates").iterdir()
    path.write_bytes(content)
    assert rates.find("finetune", SETTINGS, CARD) is None
    rates.record("finetune", SETTINGS, CARD, RATE)
    assert rates.find("finetune", SETTINGS, CARD) == RATE


def test_without_a_cache_or_where_it_cannot_be_written_nothing_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    for cache in ("", str(tmp_path / "file")):
        none = Rates(cache)
        none.record("finetune", SETTINGS, CARD, RATE)
        assert none.find("finetune", SETTINGS, CARD) is None
        assert not none.known("finetune", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _record(cache: str, number: int) -> None:
    for _ in range(20):
        rate = Rate("recipes", number, float(number))
        Rates(cache).record("mix", SETTINGS, CARD, rate)


def test_runs_at_the_same_time_leave_the_rate_of_one(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(_record, [str(tmp_path)] * 3, (1, 2, 3)))
    found = Rates(str(tmp_path)).find("mix", SETTINGS, CARD)
    assert found in [Rate("recipes", n, float(n)) for n in (1, 2, 3)]
    [_] = (tmp_path / "rates").iterdir()


def test_a_file_says_what_was_measured_on_what(rates, tmp_path):
    [path] = (tmp_path / "cache" / "rates").iterdir()
    assert json.loads(path.read_text()) == {
        "stage": "finetune",
        "settings": {**SETTINGS, "modes": ["coarse", "fine"]},
        "hardware": CARD,
        "unit": "steps",
        "count": 100,
        "seconds": 60.0,
        "compile_seconds": 10.0,
        "program_bytes": 2**30,
    }
