"""Regimes are orders of indices: what each one shows, how often, at what rate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import regimes

REAL, DRAWN, OPTIONS = (0, 30), (50, 140), {"seed": 3, "repeat": 1, "steps": 40}
OPTIONS |= {"batch_size": 12, "learning_rate": 0.1, "probability": 0.8}
OPTIONS |= {"phase_two": 0.25, "phase_two_rate": 0.1}
PHASE_TWO = slice(30, None)  # a quarter of 40 steps


def schedule(regime, real=REAL, synthetic=DRAWN, **options):
    return regimes.schedule(regime, real, synthetic, **OPTIONS | options)


def is_real(index):
    return (index >= REAL[0]) & (index < REAL[1])


@pytest.mark.parametrize("regime", regimes.REGIMES)
@given(
    steps=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    share=st.floats(0, 1),
    repeat=st.integers(0, 3),
)
@settings(deadline=None, max_examples=25)
def test_every_regime_takes_the_same_steps_over_its_own_images(
    regime, steps, batch_size, share, repeat
):
    options = {"steps": steps, "batch_size": batch_size, "phase_two": share}
    rows = schedule(regime, repeat=repeat, **options)
    width = batch_size * (2 if regime == "probabilistic" else 1)
    assert rows["index"].shape == rows["weight"].shape == (steps, width)
    assert rows["rate"].shape == (steps,)
    dtypes = [rows[name].dtype for name in ("index", "weight", "rate")]
    assert dtypes == [np.int32, np.float32, np.float32]
    drawn = (rows["index"] >= DRAWN[0]) & (rows["index"] < DRAWN[1])
    assert (is_real(rows["index"]) | drawn).all()
    if regime == "real":
        assert is_real(rows["index"]).all()
    assert set(np.unique(rows["weight"])) <= {0, 1}
    assert ((rows["rate"] > 0) & (rows["rate"] <= np.float32(0.1))).all()
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
    everything = np.r_[slice(*REAL), slice(*DRAWN)]
    np.testing.assert_array_equal(np.sort(index, 1), np.tile(everything, (4, 1)))


def test_two_phase_is_combined_then_real_at_a_smaller_rate():
    both, two_phase = schedule("combined"), schedule("two_phase")
    np.testing.assert_array_equal(two_phase["index"][:30], both["index"][:30])
    assert is_real(two_phase["index"][PHASE_TWO]).all()
    expected = np.r_[regimes.half_cosine(0.1, 30), regimes.half_cosine(0.01, 10)]
    np.testing.assert_allclose(two_phase["rate"], expected, rtol=1e-6)


@pytest.mark.parametrize(("share", "same_as"), [(0.0, "combined"), (1.0, "real")])
def test_two_phase_has_combined_and_real_at_its_ends(share, same_as):
    index = schedule("two_phase", phase_two=share)["index"]
    np.testing.assert_array_equal(index, schedule(same_as)["index"])


@pytest.mark.parametrize("probability", [0.0, 0.8, 1.0])
def test_probabilistic_adds_a_synthetic_image_to_a_slot_with_probability_p(probability):
    rows = schedule("probabilistic", probability=probability, steps=400)
    beside, weight = rows["index"][:, 12:], rows["weight"][:, 12:]
    assert not is_real(beside).any()
    deviation = np.sqrt(probability * (1 - probability) / weight.size)
    assert abs(weight.mean() - probability) <= 5 * deviation
    if 0 < probability < 1:  # slots are drawn one by one
        np.testing.assert_allclose(weight.mean(0), probability, atol=0.1)
        np.testing.assert_allclose(weight.mean(1).std(), deviation * 20, rtol=0.15)


@pytest.mark.parametrize("regime", ["real", "combined", "probabilistic"])
def test_the_rate_falls_from_its_peak_to_almost_nothing(regime):
    rate = schedule(regime, steps=1000)["rate"]
    assert rate[0] == np.float32(0.1)
    assert (np.diff(rate) < 0).all()
    assert rate[-1] < 1e-6
    np.testing.assert_allclose(rate.mean(), 0.05, rtol=0.01)


def test_real_needs_no_synthetic_images():
    without = schedule("real", synthetic=(0, 0))["index"]
    np.testing.assert_array_equal(without, schedule("real")["index"])
