"""Regimes are orders of indices: which images each one shows, and how often."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.classification import regimes

N, FIRST, M = 30, 50, 90  # real rows 0-29, synthetic ones 50-139, three for each real
REAL = np.arange(N, dtype=np.int32)
DRAWN = np.arange(FIRST, FIRST + M, dtype=np.int32)
SOURCES = np.tile(REAL, 3)
LABELS = np.zeros(FIRST + M, np.int32)
LABELS[:N] = REAL % 4
LABELS[FIRST:] = LABELS[SOURCES]
POOLS = regimes.Pools(REAL, DRAWN, SOURCES, LABELS)
OPTIONS = {
    "seed": 3,
    "repeat": 1,
    "steps": 40,
    "batch_size": 12,
    "probability": 0.8,
    "phase_two": 0.25,
}
PHASE_TWO = slice(30, None)  # a quarter of 40 steps
UNMIXED = ("real", "synthetic_only")


def schedule(regime, pools=POOLS, **options):
    return regimes.schedule(regime, pools, **OPTIONS | options)


def is_real(index):
    return np.isin(index, REAL)


@pytest.mark.parametrize("regime", regimes.REGIMES)
@given(
    steps=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    fraction=st.floats(0, 1),
    repeat=st.integers(0, 3),
)
@settings(deadline=None, max_examples=25)
def test_every_regime_takes_the_same_steps_on_its_own_images(
    regime, steps, batch_size, fraction, repeat
):
    options = {"steps": steps, "batch_size": batch_size, "phase_two": fraction}
    rows = schedule(regime, repeat=repeat, **options)
    width = batch_size * (2 if regime == "probabilistic" else 1)
    assert rows["index"].shape == rows["weight"].shape == (steps, width)
    assert [rows[name].dtype for name in rows] == [np.int32, np.float32]
    drawn = np.isin(rows["index"], DRAWN)
    assert (is_real(rows["index"]) | drawn).all()
    if regime in UNMIXED:
        assert drawn.all() if regime == "synthetic_only" else not drawn.any()
    assert set(np.unique(rows["weight"])) <= {0, 1}
    again = schedule(regime, repeat=repeat, **options)
    for name, array in rows.items():
        np.testing.assert_array_equal(array, again[name])


def test_the_real_stream_of_a_repeat_is_the_same_in_all_regimes():
    real = schedule("real")["index"]
    beside = schedule("probabilistic")
    np.testing.assert_array_equal(beside["index"][:, :12], real)
    assert (beside["weight"][:, :12] == 1).all()
    two_phase = schedule("two_phase")["index"]
    np.testing.assert_array_equal(two_phase[PHASE_TWO], real[PHASE_TWO])
    assert (schedule("real", repeat=2)["index"] != real).any()
    assert (schedule("real", seed=4)["index"] != real).any()


def test_combined_is_one_dataset():
    """120 images in batches of 12: ten steps show each of them once."""
    index = schedule("combined")["index"].reshape(4, 120)
    everything = np.concatenate([REAL, DRAWN])
    np.testing.assert_array_equal(np.sort(index, 1), np.tile(everything, (4, 1)))


def test_two_phase_is_combined_then_real():
    both, two_phase = schedule("combined"), schedule("two_phase")
    np.testing.assert_array_equal(two_phase["index"][:30], both["index"][:30])
    assert is_real(two_phase["index"][PHASE_TWO]).all()
    assert regimes.first_phase(40, 0.25) == 30


@pytest.mark.parametrize(("fraction", "same_as"), [(0.0, "combined"), (1.0, "real")])
def test_the_extremes_of_two_phase_are_combined_and_real(fraction, same_as):
    index = schedule("two_phase", phase_two=fraction)["index"]
    np.testing.assert_array_equal(index, schedule(same_as)["index"])


@pytest.mark.parametrize("probability", [0.0, 0.8, 1.0])
def test_probabilistic_adds_a_synthetic_image_to_a_slot_with_probability_p(probability):
    rows = schedule("probabilistic", probability=probability, steps=400)
    beside, weight = rows["index"][:, 12:], rows["weight"][:, 12:]
    assert not is_real(beside).any()
    deviation = np.sqrt(probability * (1 - probability) / weight.size)
    assert abs(weight.mean() - probability) <= 5 * deviation
    if 0 < probability < 1:  # slots are drawn independently
        np.testing.assert_allclose(weight.mean(0), probability, atol=0.1)
        np.testing.assert_allclose(weight.mean(1).std(), deviation * 20, rtol=0.15)


MATCHES = {
    "replace_same_source": lambda real, drawn: SOURCES[drawn - FIRST] == real,
    "replace_same_class": lambda real, drawn: LABELS[drawn] == LABELS[real],
    "replace_any": lambda real, drawn: drawn >= FIRST,
}


@pytest.mark.parametrize("regime", MATCHES)
@pytest.mark.parametrize("probability", [0.0, 0.8, 1.0])
def test_a_slot_is_replaced_by_a_matching_synthetic_image(regime, probability):
    index = schedule(regime, probability=probability, steps=400)["index"]
    real = schedule("real", steps=400)["index"]
    gone = ~is_real(index)
    np.testing.assert_array_equal(index[~gone], real[~gone])
    assert MATCHES[regime](real[gone], index[gone]).all()
    deviation = np.sqrt(probability * (1 - probability) / gone.size)
    assert abs(gone.mean() - probability) <= 5 * deviation
    if probability:  # every synthetic image is used
        assert set(index[gone]) == set(DRAWN)


def test_a_slot_without_a_match_keeps_its_own_image():
    """Only the images of source 7 are left; it is of class 3."""
    few = SOURCES == 7
    pools = regimes.Pools(REAL, DRAWN[few], SOURCES[few], LABELS)
    real = schedule("real")["index"]
    for regime, has_match in (
        ("replace_same_source", real == 7),
        ("replace_same_class", LABELS[real] == LABELS[7]),
    ):
        index = schedule(regime, pools, probability=1.0)["index"]
        np.testing.assert_array_equal(~is_real(index), has_match)


def test_without_synthetic_images_regimes_are_real():
    none = regimes.Pools(REAL, DRAWN[:0], SOURCES[:0], LABELS)
    for regime in ("real", "replace_same_class"):
        without = schedule(regime, none)["index"]
        np.testing.assert_array_equal(without, schedule("real")["index"])
    control, probabilistic = (schedule("probabilistic", x) for x in (none, POOLS))
    assert is_real(control["index"]).all()
    assert (control["index"][:, :12] != control["index"][:, 12:]).any()
    np.testing.assert_array_equal(control["weight"], probabilistic["weight"])


@pytest.mark.parametrize(("ratio", "used"), [(0.0, 90), (1.0, 30), (3.0, 90)])
def test_a_ratio_takes_the_first_synthetic_images(ratio, used):
    pools = POOLS.per_real(ratio)
    np.testing.assert_array_equal(pools.synthetic, DRAWN[:used])
    np.testing.assert_array_equal(pools.sources, SOURCES[:used])


@pytest.mark.parametrize("gone", [0, 30], ids=["all", "filtered"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.35])
def test_a_ratio_takes_evenly_from_all_classes(ratio, gone):
    real = np.arange(200, dtype=np.int32)
    labels = np.tile(np.repeat(np.arange(10), 20), 5)  # sorted by class, as in folders
    drawn, sources = np.arange(200, 1000, dtype=np.int32), np.tile(real, 4)
    pools = regimes.Pools(real, drawn[gone:], sources[gone:], labels).per_real(ratio)
    np.testing.assert_array_equal(pools.sources, sources[pools.synthetic - 200])
    assert (np.diff(pools.synthetic) > 0).all()
    counts = np.bincount(labels[pools.synthetic], minlength=10)
    assert counts.sum() == 200 * ratio
    assert np.ptp(counts) <= (2 if gone else 1)
    assert np.bincount(pools.sources).max() <= np.ceil(ratio) + (gone > 0)


@given(held=st.sets(st.integers(0, N - 1)))
@settings(deadline=None, max_examples=25)
def test_images_made_from_a_held_out_image_are_held_out_too(held):
    partners = np.random.default_rng(0).integers(0, N, M)
    parents = [[s, p] for s, p in zip(SOURCES.tolist(), partners.tolist(), strict=True)]
    pools = POOLS.without(np.array(sorted(held), np.int32), parents)
    assert set(pools.real) == set(REAL.tolist()) - held
    kept = {int(row) - FIRST for row in pools.synthetic}
    assert kept == {m for m in range(M) if held.isdisjoint(parents[m])}
    np.testing.assert_array_equal(pools.sources, SOURCES[pools.synthetic - FIRST])
