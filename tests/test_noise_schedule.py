"""Noise schedules equal PyTorch's."""

import jax
import numpy as np
import pytest
from sd_families import SCHEDULERS

from mvc_jax.models import noise_schedule


@pytest.mark.parametrize(
    "noise",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
    ],
    ids=["scaled_linear", "linear", "squaredcos_cap_v2", "trained_betas"],
)
def test_every_noise_schedule_equals_pytorch(torch, noise):
    del torch
    import diffusers

    config = SCHEDULERS["sd1"] | noise
    theirs = diffusers.DDIMScheduler.from_config(config)
    made = noise_schedule.alphas_cumprod(config)
    np.testing.assert_allclose(made, theirs.alphas_cumprod.numpy(), rtol=0, atol=1e-6)


def test_it_is_known_within_a_jit():
    """As when the first use of a model is to trace its training step."""
    known = []
    jax.jit(lambda: known.append(noise_schedule.alphas_cumprod(SCHEDULERS["sd1"])))()
    assert known[0].shape == (1000,) and (np.diff(known[0]) < 0).all()


def test_an_unknown_schedule_is_refused():
    config = SCHEDULERS["sd1"] | {"beta_schedule": "sigmoid"}
    with pytest.raises(ValueError, match="sigmoid"):
        noise_schedule.alphas_cumprod(config)
