"""Guidance: in an interval, rescaled, with a scale for each image, on any devices."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from sd_families import normal

from mvc_jax.diffusion import (
    guidance,
    guidance_interval,
    instruct_pix2pix,
    samplers,
)
from mvc_jax.training import sharding

ALPHAS = np.linspace(0.9, 0.1, 10, dtype=np.float32)  # at the 10 timesteps of training


def make(name):
    """A sampler of five steps: at the timesteps 9, 7, 5, 3 and 1."""
    return samplers.make(name, 5, alphas_cumprod=ALPHAS, prediction_type="epsilon")


FIVE = make("ddim")
INTERVALS = {  # which of them are guided
    (0.0, 1.0): "ggggg",
    (0.2, 0.8): "-ggg-",
    (0.3, 0.7): "-ggg-",  # both ends belong to it
    (0.0, 0.5): "--ggg",
    (0.5, 1.0): "ggg--",
    (0.45, 0.55): "--g--",
    (0.0, 0.0): "-----",
}


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_guidance_acts_where_the_noise_level_is_in_the_interval(name, interval):
    marks = []

    def predict(mark):
        def predicted(latents, timesteps):
            marks.append((mark, int(timesteps[0])))
            return latents

        return predicted

    with jax.disable_jit():  # a scan is then a loop in Python
        make(name)(
            predict("g"),
            jnp.ones((1, 1, 1, 1)),
            unguided=predict("-"),
            guidance_interval=interval,
        )
    expected = zip(INTERVALS[interval], (9, 7, 5, 3, 1), strict=True)
    assert marks == list(expected)


@pytest.mark.parametrize("interval", INTERVALS)
def test_segments_are_as_long_as_they_can_be(interval):
    """Each is a program of its own."""
    timesteps = np.array([9, 7, 5, 3, 1])
    segments = guidance_interval.segments(timesteps, 10, interval)
    marks = "".join("-g"[guided] * (stop - start) for start, stop, guided in segments)
    assert marks == INTERVALS[interval]
    kinds = [guided for _, _, guided in segments]
    assert all(a != b for a, b in zip(kinds[:-1], kinds[1:], strict=True))


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


def draw(denoise=denoise, batch=2, **settings):
    settings = {"text_scale": 3.0, "image_scale": 1.5} | settings
    return instruct_pix2pix.draw(denoise, **conditions(batch), sampler=FIVE, **settings)


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


def guide(denoise, **scales):
    return guidance.image_text_guidance(
        denoise,
        text_states=conditions()["text_states"],
        null_states=conditions()["null_states"],
        cond_latents=conditions()["source_moments"][..., :4],
        **{"text_scale": 3.0, "image_scale": 1.5} | scales,
    )


def test_the_whole_interval_guides_every_step():
    guided = FIVE(guide(denoise), conditions()["noise"])
    np.testing.assert_allclose(draw(guidance_interval=(0.0, 1.0)), guided, atol=1e-5)


def test_a_guided_prediction_is_equation_3():
    """Branch by branch, each with a batch of its own."""
    latents, timesteps = conditions()["noise"], jnp.array([3, 7])
    text, source = conditions()["text_states"], conditions()["source_moments"][..., :4]
    null = jnp.broadcast_to(conditions()["null_states"], text.shape)

    def branch(text, source):
        return denoise(jnp.concatenate([latents, source], -1), timesteps, text)

    none, image, both = (
        branch(null, jnp.zeros_like(source)),
        branch(null, source),
        branch(text, source),
    )
    expected = none + 1.5 * (image - none) + 3.0 * (both - image)
    np.testing.assert_allclose(guide(denoise)(latents, timesteps), expected, atol=1e-6)


COLLECTIVES = "all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"


def test_no_device_needs_the_rows_of_another():
    """Where the batch is split over eight devices, in every branch of guidance."""
    mesh = sharding.make_mesh()
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    given = conditions(16)
    null_states = jax.device_put(given.pop("null_states"), whole)
    given = jax.device_put(given, split)

    @jax.jit
    def sample(given, null_states):
        return instruct_pix2pix.draw(
            denoise,
            **given,
            null_states=null_states,
            sampler=FIVE,
            text_scale=3.0,
            image_scale=jnp.full(16, 1.5),
            guidance_interval=(0.2, 0.8),
            guidance_rescale=0.5,
        )

    compiled = sample.lower(given, null_states).compile()
    assert mesh.size == 8
    assert re.findall(COLLECTIVES, compiled.as_text()) == []
    drawn = sample(given, null_states)
    alone = sample(jax.device_get(given), jax.device_get(null_states))
    np.testing.assert_allclose(drawn, alone, atol=1e-5)


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
    plain = jnp.asarray(normal("plain", 4, 2, 3, 4))
    np.testing.assert_array_equal(guidance.rescaled(guided, plain, 0.0), guided)
    full = guidance.rescaled(guided, plain, 1.0)
    axes = (1, 2, 3)
    np.testing.assert_allclose(full.std(axes), plain.std(axes), rtol=1e-5)
    half = guidance.rescaled(guided, plain, 0.5)
    np.testing.assert_allclose(half, (full + guided) / 2, atol=1e-5)
    assert np.abs(draw(guidance_rescale=0.7) - draw()).max() > 0.01
    np.testing.assert_array_equal(draw(guidance_rescale=0.0), draw())


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_equals_pytorch(torch, phi):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

    guided, plain = normal("guided", 4, 2, 3, 4), normal("plain", 4, 2, 3, 4)
    theirs = pipeline_stable_diffusion.rescale_noise_cfg(
        torch.from_numpy(guided), torch.from_numpy(plain), phi
    )
    ours = guidance.rescaled(jnp.asarray(guided), jnp.asarray(plain), phi)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_guidance_is_computed_as_precisely_as_the_latents_are():
    """A network in bfloat16 gives 8 bits; the scales would leave fewer of them."""

    def half(*inputs):
        return denoise(*inputs).astype(jnp.bfloat16)

    def rounded(*inputs):
        return half(*inputs).astype(jnp.float32)

    latents, timesteps = conditions()["noise"], jnp.array([5, 5])
    np.testing.assert_array_equal(
        guide(half)(latents, timesteps), guide(rounded)(latents, timesteps)
    )
