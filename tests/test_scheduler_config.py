"""The scheduler config of a base, and the one that we sample and export with."""

import pytest
from sd_families import SCHEDULERS

from mvc_jax.checkpoints.scheduler_config import ddim_config
from mvc_jax.errors import UserError
from mvc_jax.pretraining import small

NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_noise_is_kept_and_the_sampler_is_latent_ddim(family):
    config = ddim_config(SCHEDULERS[family])
    published = {"prediction_type": "epsilon"} | SCHEDULERS[family]
    assert {field: config[field] for field in NOISE} == {
        field: published[field] for field in NOISE
    }
    sampler = {field: config[field] for field in config if field not in NOISE}
    assert sampler == {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
    assert ddim_config(config) == config


def test_the_sampler_of_a_base_makes_no_difference():
    """PyTorch's own default of `clip_sample` is True."""
    noise = {key: SCHEDULERS["sd1"][key] for key in NOISE if key != "prediction_type"}
    odd = {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0}
    assert ddim_config(noise) == ddim_config(noise | odd)


def test_the_base_that_pretrain_makes_has_such_a_config():
    assert list(small.SCHEDULER.items()) == list(ddim_config(small.SCHEDULER).items())


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
def test_other_noise_is_refused_by_name_and_value(field, value):
    with pytest.raises(UserError) as error:
        ddim_config(SCHEDULERS["sd1"] | {field: value})
    assert error.value.name == f"scheduler_config.json: {field}"
    assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize("field", ["beta_start", "num_train_timesteps"])
def test_a_missing_field_of_the_noise_is_named(field):
    config = {key: SCHEDULERS["sd1"][key] for key in SCHEDULERS["sd1"] if key != field}
    with pytest.raises(UserError, match=field):
        ddim_config(config)
