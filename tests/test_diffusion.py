"""Losses and guidance, by properties that only the right formulas have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.diffusion import loss
from mvc_jax.diffusion.guidance import image_text_guidance

ALPHAS = jnp.cumprod(1 - jnp.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_noisy_latents_and_v_are_a_rotation_of_latents_and_noise():
    """Norms are kept, and x_0 comes back by the inverse rotation."""
    latents, noise = _normal(0, 5, 2, 2, 4), _normal(1, 5, 2, 2, 4)
    timesteps = jnp.array([0, 1, 500, 998, 999])
    noisy = loss.add_noise(latents, noise, timesteps, ALPHAS)
    v = loss.prediction_target(latents, noise, timesteps, ALPHAS, "v_prediction")
    np.testing.assert_allclose(noisy**2 + v**2, latents**2 + noise**2, rtol=2e-4)
    signal = jnp.sqrt(ALPHAS[timesteps])[:, None, None, None]
    sigma = jnp.sqrt(1 - signal**2)
    np.testing.assert_allclose(signal * noisy - sigma * v, latents, atol=1e-4)


def test_the_epsilon_target_is_the_noise_and_other_types_are_refused():
    noise = _normal(1, 2, 2, 2, 4)
    steps = jnp.array([3, 900])
    target = loss.prediction_target(noise * 2, noise, steps, ALPHAS, "epsilon")
    np.testing.assert_array_equal(target, noise)
    with pytest.raises(ValueError, match="sample"):
        loss.prediction_target(noise, noise, steps, ALPHAS, "sample")


def test_posterior_sample_has_the_posterior_moments():
    mean, log_variance = 3.0, np.log(0.25)
    moments = jnp.concatenate(
        [jnp.full((200, 4, 4, 4), mean), jnp.full((200, 4, 4, 4), log_variance)], -1
    )
    drawn = loss.posterior_sample(moments, _normal(2, 200, 4, 4, 4))
    assert abs(drawn.mean() - mean) < 0.02
    assert abs(drawn.std() - 0.5) < 0.01
    np.testing.assert_array_equal(loss.posterior_mode(moments), moments[..., :4])


def test_kl_is_zero_only_for_the_standard_normal():
    standard = jnp.zeros((3, 2, 2, 8))
    np.testing.assert_array_equal(loss.kl_divergence(standard), 0)
    shifted = standard.at[..., :4].set(0.5)
    np.testing.assert_allclose(loss.kl_divergence(shifted), 0.5 * 16 * 0.25)


@given(
    st.floats(0, 1, exclude_max=True, width=32, allow_subnormal=False),
    st.floats(1e-6, 0.33),
)
@settings(deadline=None, max_examples=100)
def test_conditions_are_dropped_by_the_published_rule(uniform, rate):
    text, image = loss.drop_conditions(jnp.array([uniform], jnp.float32), rate)
    r, p = np.float32(uniform), np.float32(rate)
    assert bool(text[0]) == bool(r < np.float32(2 * rate))
    assert bool(image[0]) == bool(p <= r < np.float32(3 * rate))


def test_each_condition_and_both_are_dropped_with_rate_p():
    text, image = loss.drop_conditions(jnp.linspace(0, 1, 10_000, endpoint=False), 0.1)
    dropped = [(text & ~image), (image & ~text), (text & image)]
    np.testing.assert_allclose([d.mean() for d in dropped], 0.1, atol=2e-4)


def _guided(text_scale: float, image_scale: float):
    """Guidance over a linear network: e = x + 10 image + 100 text."""

    def denoise(latents, timesteps, states):
        noisy, cond = jnp.split(latents, 2, axis=-1)
        return noisy + 10 * cond + 100 * states.mean((1, 2))[:, None, None, None]

    guided = image_text_guidance(
        denoise,
        text_states=jnp.ones((2, 3, 5)),
        null_states=jnp.zeros((3, 5)),
        cond_latents=jnp.full((2, 1, 1, 4), 2.0),
        text_scale=float(text_scale),
        image_scale=float(image_scale),
    )
    return guided(jnp.zeros((2, 1, 1, 4)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    "scales, expected",
    [((0, 0), 0), ((0, 1), 20), ((1, 1), 120), ((7.5, 1.5), 780), ((2, 0), 200)],
)
def test_guidance_scales_weight_image_and_text_separately(scales, expected):
    np.testing.assert_allclose(_guided(*scales), expected, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_weights_the_error_of_x0_by_the_clipped_snr(gamma):
    """An error of the noise is SNR times the error of x_0; of v, SNR + 1 times."""
    timesteps = jnp.arange(1000)
    snr = ALPHAS / (1 - ALPHAS)
    of_noise = loss.loss_weights(timesteps, ALPHAS, "epsilon", gamma)
    of_v = loss.loss_weights(timesteps, ALPHAS, "v_prediction", gamma)
    clipped = jnp.minimum(snr, gamma)
    np.testing.assert_allclose(of_noise * snr, clipped, rtol=1e-4)
    np.testing.assert_allclose(of_v * (snr + 1), clipped, rtol=1e-4)
    noisy = snr < gamma
    assert noisy.any() and not noisy.all()
    np.testing.assert_allclose(of_noise[noisy], 1.0, rtol=1e-6)
    assert (jnp.diff(of_noise[~noisy]) > 0).all()


def test_min_snr_supports_epsilon_and_v_only():
    with pytest.raises(ValueError, match="sample"):
        loss.loss_weights(jnp.arange(3), ALPHAS, "sample", 5.0)
