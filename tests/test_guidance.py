"""Guidance: in an interval, rescaled, with scales of each image's own."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from sd_families import normal

from mvc_jax.diffusion import guidance, instruct_pix2pix, samplers


class Passing:
    """A solver that passes the prediction on; its timesteps are of 10."""

    num_train_timesteps = 10

    def __init__(self, *timesteps):
        self.timesteps = np.array(timesteps, np.int32)

    def start(self, noise):
        return noise

    def inputs(self, carry, i):
        return carry

    def step(self, carry, prediction, i):
        return prediction

    def latents(self, carry):
        return carry


FIVE = Passing(9, 7, 5, 3, 1)
INTERVALS = {  # which steps are guided
    (0.0, 1.0): "ggggg",
    (0.2, 0.8): "-ggg-",
    (0.3, 0.7): "-ggg-",  # both ends belong to it
    (0.0, 0.5): "--ggg",
    (0.5, 1.0): "ggg--",
    (0.45, 0.55): "--g--",
    (0.0, 0.0): "-----",
}


@pytest.mark.parametrize("interval", INTERVALS)
def test_guidance_acts_where_the_noise_level_is_in_the_interval(interval):
    marks = INTERVALS[interval]
    # The guided prediction appends a 1 to the number in the latents, the other a 0.
    drawn = samplers.sample(
        lambda latents, timesteps: 2 * latents + 1,
        FIVE,
        jnp.ones((1, 1, 1, 1)),
        unguided=lambda latents, timesteps: 2 * latents,
        guidance_interval=interval,
    )
    expected = int("1" + marks.replace("g", "1").replace("-", "0"), 2)
    assert drawn.item() == expected
    stretches = samplers.stretches(FIVE, interval)
    assert "".join("-g"[g] * (b - a) for a, b, g in stretches) == marks
    guided = marks.count("g")
    assert samplers.network_rows(FIVE, interval) == 3 * guided + (5 - guided)
    assert samplers.network_rows(FIVE, interval, branches=2) == 5 + guided


def conditions(batch=2):
    return {
        "noise": jnp.asarray(normal("noise", batch, 2, 2, 4)),
        "source_moments": jnp.asarray(normal("moments", batch, 2, 2, 8)),
        "text_states": jnp.asarray(normal("states", batch, 3, 5)),
        "null_states": jnp.asarray(normal("null", 3, 5)),
    }


def denoise(latents, timesteps, states):
    """Not linear in anything, of order one."""
    noisy, cond = jnp.split(latents, 2, axis=-1)
    text = states.mean((1, 2))[:, None, None, None]
    return jnp.sin(noisy + 2 * cond * text + 0.1 * timesteps[:, None, None, None])


def draw(denoise=denoise, batch=2, solver=FIVE, **settings):
    settings = {"text_scale": 3.0, "image_scale": 1.5} | settings
    return instruct_pix2pix.draw(
        denoise, **conditions(batch), solver=solver, **settings
    )


def executed_rows(jaxpr, times=1):
    """Rows of the network's batches that a run computes: scans count their length."""
    rows = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sin":
            rows += times * equation.invars[0].aval.shape[0]
        length = equation.params.get("length", 1)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            rows += executed_rows(inner, times * length)
    return rows


@pytest.mark.parametrize("interval", INTERVALS)
def test_skipped_branches_are_not_in_the_program(interval):
    """Counted in what is compiled: nothing is computed and then thrown away."""
    traced = jax.make_jaxpr(lambda: draw(guidance_interval=interval))()
    guided = INTERVALS[interval].count("g")
    assert executed_rows(traced.jaxpr) == 2 * (3 * guided + 5 - guided)


def test_outside_the_interval_both_conditions_still_hold():
    """As guidance with scales of 1 would have it."""
    none = draw(guidance_interval=(0.0, 0.0))
    ones = draw(text_scale=1.0, image_scale=1.0)
    np.testing.assert_allclose(none, ones, atol=1e-5)
    assert np.abs(none - draw()).max() > 0.1


def test_the_whole_interval_is_the_plain_walk():
    whole = draw(guidance_interval=(0.0, 1.0))
    guided = guidance.image_text_guidance(
        denoise,
        text_states=conditions()["text_states"],
        null_states=conditions()["null_states"],
        cond_latents=conditions()["source_moments"][..., :4],
        text_scale=3.0,
        image_scale=1.5,
    )
    latents = conditions()["noise"]
    for timestep in FIVE.timesteps:
        latents = guided(latents, jnp.full(2, timestep))
    np.testing.assert_allclose(whole, latents, atol=1e-5)


def test_scales_of_each_image_are_its_own():
    both = draw(
        text_scale=jnp.array([3.0, 7.0]),
        image_scale=jnp.array([1.5, 0.5]),
    )
    np.testing.assert_allclose(both[0], draw()[0], atol=1e-5)
    other = draw(text_scale=7.0, image_scale=0.5)[1]
    np.testing.assert_allclose(both[1], other, atol=1e-5)
    assert np.abs(other - draw()[1]).max() > 0.1


def test_rescale_brings_the_contrast_of_the_conditional_back():
    guided = jnp.asarray(3 * normal("guided", 4, 2, 3, 4) + 1)
    bare = jnp.asarray(normal("bare", 4, 2, 3, 4))
    np.testing.assert_array_equal(guidance.rescaled(guided, bare, 0.0), guided)
    full = guidance.rescaled(guided, bare, 1.0)
    axes = (1, 2, 3)
    np.testing.assert_allclose(full.std(axes), bare.std(axes), rtol=1e-5)
    half = guidance.rescaled(guided, bare, 0.5)
    np.testing.assert_allclose(half, (full + guided) / 2, atol=1e-5)
    assert np.abs(draw(guidance_rescale=0.7) - draw()).max() > 0.01
    np.testing.assert_array_equal(draw(guidance_rescale=0.0), draw())


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_equals_pytorch(torch, phi):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

    guided, bare = normal("guided", 4, 2, 3, 4), normal("bare", 4, 2, 3, 4)
    theirs = pipeline_stable_diffusion.rescale_noise_cfg(
        torch.from_numpy(guided), torch.from_numpy(bare), phi
    )
    ours = guidance.rescaled(jnp.asarray(guided), jnp.asarray(bare), phi)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_guidance_is_computed_as_precisely_as_the_latents_are():
    """A network in bfloat16 gives 8 bits; the scales would leave fewer of them."""

    def half(*inputs):
        return denoise(*inputs).astype(jnp.bfloat16)

    def rounded(*inputs):
        return half(*inputs).astype(jnp.float32)

    one = Passing(5)
    np.testing.assert_array_equal(draw(half, solver=one), draw(rounded, solver=one))
