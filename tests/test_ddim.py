"""The scheduler config that a base brings, and the one we sample and export with."""

import jax.numpy as jnp
import numpy as np
import pytest
from sd_families import SCHEDULERS

from mvc_jax.checkpoints.scheduler_config import ddim_config
from mvc_jax.errors import UserError
from mvc_jax.models.stable_diffusion import StableDiffusion

NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)


def _model(tiny, **scheduler):
    configs = {**tiny[0].configs, "scheduler": SCHEDULERS["sd1"] | scheduler}
    return StableDiffusion(configs, tiny[0].tokenizer)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_noise_is_kept_and_the_solver_is_latent_ddim(family):
    config = ddim_config(SCHEDULERS[family])
    published = {"prediction_type": "epsilon"} | SCHEDULERS[family]
    assert {field: config[field] for field in NOISE} == {
        field: published[field] for field in NOISE
    }
    solver = {field: config[field] for field in config if field not in NOISE}
    assert solver == {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    assert ddim_config(config) == config


def test_a_solver_of_the_base_does_not_change_our_samples(tiny):
    """PyTorch's and Flax's own default of `clip_sample` is True."""
    config = {key: SCHEDULERS["sd1"][key] for key in NOISE if key != "prediction_type"}
    bare = StableDiffusion({**tiny[0].configs, "scheduler": config}, tiny[0].tokenizer)
    odd = _model(tiny, clip_sample=True, set_alpha_to_one=True, steps_offset=0)
    latents = 30 * jnp.ones((1, 2, 2, 4))
    for model in (bare, odd):
        solver = model.solver("ddim", 4)
        assert solver.timesteps.tolist() == [751, 501, 251, 1]
        last = solver.step(latents, jnp.zeros_like(latents), 3)
        first, second = model.alphas_cumprod[:2]  # no noise: the signal is rescaled
        np.testing.assert_allclose(last, latents * np.sqrt(first / second), rtol=1e-6)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rescale_betas_zero_snr", True),
        ("thresholding", True),
        ("prediction_type", "sample"),
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
    ],
)
def test_noise_of_another_kind_is_refused_by_name_and_value(tiny, field, value):
    with pytest.raises(UserError) as error:
        _model(tiny, **{field: value})
    assert error.value.name == f"scheduler_config.json: {field}"
    assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize("field", ["beta_start", "num_train_timesteps"])
def test_a_missing_field_of_the_noise_is_named(field):
    config = {key: SCHEDULERS["sd1"][key] for key in SCHEDULERS["sd1"] if key != field}
    with pytest.raises(UserError, match=field):
        ddim_config(config)


@pytest.mark.parametrize("steps", [0, 1000])
def test_ddim_takes_fewer_steps_than_there_are_timesteps(tiny, steps):
    with pytest.raises(UserError, match="1 to 999"):
        _model(tiny).solver("ddim", steps)


def test_all_timesteps_are_of_the_training_schedule(tiny):
    for steps in (1, 3, 50, 500, 501, 999):
        timesteps = _model(tiny).solver("ddim", steps).timesteps
        assert len(set(timesteps.tolist())) == steps
        assert timesteps.min() >= 0 and timesteps.max() <= 999


@pytest.mark.parametrize(
    "noise",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
    ],
    ids=["linear", "squaredcos_cap_v2", "trained_betas"],
)
def test_every_noise_schedule_equals_pytorch(tiny, torch, noise):
    del torch
    import diffusers

    model = _model(tiny, **noise)
    theirs = diffusers.DDIMScheduler.from_config(model.configs["scheduler"])
    expected = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(model.alphas_cumprod, expected, rtol=0, atol=1e-6)
