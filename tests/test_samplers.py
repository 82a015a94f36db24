"""Samplers against PyTorch's: the same noise and predictions, the same latents."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_families import SCHEDULERS, normal

from mvc_jax.checkpoints.scheduler_config import ddim_config
from mvc_jax.diffusion import instruct_pix2pix, samplers
from mvc_jax.diffusion.timesteps import (
    DEFAULT,
    EARLIER,
    SPACINGS,
    evaluations,
    first_step,
    leading,
    require_noise,
    start_in_words,
    timesteps_of,
)
from mvc_jax.errors import UserError
from mvc_jax.models import noise_schedule
from mvc_jax.training.throughput import count_flops

THEIRS = {  # on the config of an exported folder
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
ALPHAS = noise_schedule.alphas_cumprod(SCHEDULERS["sd1"])
SHAPE = (2, 2, 3, 4)
names = pytest.mark.parametrize("name", samplers.SAMPLERS)
spacings = pytest.mark.parametrize("spacing", SPACINGS)
prediction_types = pytest.mark.parametrize(
    "prediction_type", ["epsilon", "v_prediction"]
)
# PyTorch's schedulers turn tensors into arrays in NumPy's old way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def make(name, steps, prediction_type="epsilon", alphas_cumprod=ALPHAS, **options):
    return samplers.make(
        name,
        steps,
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        **options,
    )


def unchecked(name, steps, prediction_type, spacing):
    """Also where a sample would not start in noise."""
    return functools.partial(
        samplers.SAMPLERS[name],
        alphas_cumprod=ALPHAS,
        prediction_type=prediction_type,
        steps=steps,
        spacing=spacing,
    )


def scheduler(name, steps, prediction_type="epsilon", **fields):
    import diffusers

    config = SCHEDULERS["sd1"] | {"prediction_type": prediction_type}
    made = getattr(diffusers, THEIRS[name]).from_config(ddim_config(config), **fields)
    made.set_timesteps(steps)
    return made


@names
@pytest.mark.parametrize(
    ("prediction_type", "spacing"),
    [
        ("epsilon", "trailing"),
        ("epsilon", "leading"),
        ("epsilon", "linspace"),
        ("v_prediction", "trailing"),
        ("v_prediction", "leading"),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7, 15, 20])
def test_every_step_equals_pytorch(torch, name, spacing, prediction_type, steps):
    """What the network sees at each step, and the latents at the end."""
    theirs = scheduler(name, steps, prediction_type, timestep_spacing=spacing)
    noise = normal(f"{name} start", *SHAPE)
    predictions = normal(f"{name} predictions", steps, *SHAPE)
    seen = []

    def predict(latents, timesteps):
        seen.append((np.asarray(latents), float(timesteps[0])))
        return jnp.asarray(predictions[len(seen) - 1])

    with jax.disable_jit():  # a scan is then a loop in Python
        sampler = unchecked(name, steps, prediction_type, spacing)
        drawn = sampler(predict, jnp.asarray(noise))
    latents = torch.from_numpy(noise) * theirs.init_noise_sigma
    for prediction, (inputs, t), timestep in zip(
        predictions, seen, theirs.timesteps, strict=True
    ):
        assert t == timestep
        expected = theirs.scale_model_input(latents, timestep).numpy()
        scale = scale_of(expected)
        np.testing.assert_allclose(inputs, expected, rtol=0, atol=1e-5 * scale)
        prediction = torch.from_numpy(prediction)
        latents = theirs.step(prediction, timestep, latents).prev_sample
    expected = latents.numpy()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-5 * scale_of(expected))


@names
@prediction_types
def test_a_whole_sample_equals_pytorch(torch, name, prediction_type):
    """Where what is predicted depends on the latents, as a network's does."""
    theirs = scheduler(name, 20, prediction_type)

    def denoise(latents, timesteps):
        return jnp.tanh(1.5 * latents + timesteps[:, None, None, None] / 1000)

    noise = normal(f"{name} start", *SHAPE)
    sampler = make(name, 20, prediction_type)
    drawn = jax.jit(lambda noise: sampler(denoise, noise))(noise)
    latents = torch.from_numpy(noise) * theirs.init_noise_sigma
    for timestep in theirs.timesteps:
        seen = theirs.scale_model_input(latents, timestep)
        prediction = torch.tanh(1.5 * seen + timestep / 1000)
        latents = theirs.step(prediction, timestep, latents).prev_sample
    assert 0.1 < latents.std() < 10
    np.testing.assert_allclose(drawn, latents.numpy(), rtol=0, atol=1e-4)


# From a noised source (SDEdit).


@names
@prediction_types
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.95])
def test_a_noised_source_equals_pytorch(torch, name, prediction_type, strength):
    """`StableDiffusionImg2ImgPipeline`'s timesteps, noise and steps."""
    import diffusers

    theirs = scheduler(name, 20, prediction_type)
    pipeline = types.SimpleNamespace(scheduler=theirs)
    get_timesteps = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps
    timesteps, count = get_timesteps(pipeline, 20, strength, "cpu")
    assert count == 20 - first_step(20, strength) == len(timesteps)

    def denoise(latents, timesteps):
        return jnp.tanh(1.5 * latents + timesteps[:, None, None, None] / 1000)

    noise, source = normal(f"{name} start", *SHAPE), normal(f"{name} source", *SHAPE)
    sampler = make(name, 20, prediction_type)
    drawn = jax.jit(
        lambda noise, source: sampler(denoise, noise, source=source, strength=strength)
    )(noise, source)
    first = timesteps[:1].repeat(len(noise))
    latents = theirs.add_noise(*map(torch.from_numpy, (source, noise)), first)
    for timestep in timesteps:
        seen = theirs.scale_model_input(latents, timestep)
        prediction = torch.tanh(1.5 * seen + timestep / 1000)
        latents = theirs.step(prediction, timestep, latents).prev_sample
    np.testing.assert_allclose(drawn, latents.numpy(), rtol=0, atol=1e-4)


def test_a_noised_source_equals_pytorchs_pipeline(torch, tiny, original):
    """`StableDiffusionImg2ImgPipeline` from the folder of a tiny random model."""
    import diffusers

    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(original)
    pipeline.set_progress_bar_config(disable=True)
    model, params = tiny
    source, prompt = normal("source", 1, 2, 2, 4), "a bold stroke"
    expected = pipeline(
        prompt,
        image=torch.from_numpy(source.transpose(0, 3, 1, 2).copy()),
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=1.0,  # none
        generator=torch.manual_seed(0),
        output_type="latent",
    ).images
    noise = torch.randn((1, 4, 2, 2), generator=torch.manual_seed(0))
    states = model.text_states(params, jnp.asarray(model.tokenize([prompt])))
    sampler = make("ddim", 5, alphas_cumprod=model.alphas_cumprod)
    drawn = jax.jit(
        lambda noise, source: sampler(
            lambda x, t: model.denoise(params, x, t, states),
            noise,
            source=source,
            strength=0.6,
        )
    )(noise.numpy().transpose(0, 2, 3, 1), source)
    theirs = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(drawn, theirs, rtol=0, atol=1e-4)


@names
def test_strength_0_is_the_source_and_1_is_noise(name):
    noise = jnp.asarray(normal(f"{name} start", *SHAPE))
    source = jnp.asarray(normal(f"{name} source", *SHAPE))
    calls = []

    def denoise(latents, timesteps):
        calls.append(timesteps)
        return jnp.tanh(latents)

    sampler = make(name, 20)
    unchanged = sampler(denoise, noise, source=source, strength=0.0)
    np.testing.assert_array_equal(unchanged, source)
    assert not calls
    plain = sampler(denoise, noise)
    drawn = sampler(denoise, noise, source=source, strength=1.0)
    np.testing.assert_array_equal(drawn, plain)


@given(steps=st.integers(1, 999), strengths=st.tuples(*[st.floats(0, 1)] * 2))
def test_a_larger_strength_takes_no_fewer_steps(steps, strengths):
    low, high = sorted(strengths)
    assert 0 <= first_step(steps, high) <= first_step(steps, low) <= steps
    counted = [
        evaluations("ddim", steps, (0.0, 1.0), strength=strength)
        for strength in (0.0, low, high, 1.0)
    ]
    assert counted == sorted(counted) and counted[0] == 0
    assert counted[-1] == evaluations("ddim", steps, (0.0, 1.0))


def scale_of(array):
    """Random predictions let the latents grow to some tens."""
    return max(1.0, np.abs(array).max())


@names
@spacings
@pytest.mark.parametrize("steps", [3, 26, 50, 61, 333, 501, 998])
def test_timesteps_equal_pytorch_for_any_number_of_steps(torch, name, spacing, steps):
    """At 26 steps diffusers' own Flax DPM-Solver differed.

    With 61 or 998 `trailing` ones, theirs end with a timestep -1, which there is not.
    """
    del torch
    timesteps = timesteps_of(name, steps, spacing)
    theirs = scheduler(name, steps, timestep_spacing=spacing).timesteps.numpy()
    extra = theirs[steps:].tolist()
    assert extra == ([-1] if spacing == "trailing" and steps in (61, 998) else [])
    np.testing.assert_array_equal(timesteps, theirs[:steps])
    assert len(set(timesteps.tolist())) == steps
    assert 0 <= timesteps.min() <= timesteps.max() < 1000


@pytest.mark.parametrize(
    ("name", "steps", "spacing", "words"),
    [
        ("ddim", 1, "leading", "start at timestep 1. Use 7, or"),
        ("ddim", 2, "leading", "start at timestep 501. Use 7, or"),
        ("euler", 334, "leading", "start at timestep 667. Use 333 or 426, or"),
        ("ddim", 501, "leading", "start at timestep 501. Use 500 or 850."),
        ("dpmpp_2m", 501, "leading", "start at timestep 502. Use 499 or 849, or"),
        ("ddim", 501, "trailing", "go down by 1 each, 500 in all, .*. Use 500 or 851."),
        ("ddim", 2, "linspace", "go down by 500 each, 500 in all, .*. Use 7, or"),
    ],
)
def test_steps_that_do_not_start_in_noise_are_refused(name, steps, spacing, words):
    """Of Stable Diffusion's noisy latents at timestep 501, half are the image."""
    with pytest.raises(UserError, match="config.generate.steps") as error:
        make(name, steps, spacing=spacing)
    words = words.replace(". Use", r"\. Use")
    assert re.search(words, str(error.value)), str(error.value)
    for count in map(int, re.findall(r"\d+", str(error.value).split(" Use ")[1])):
        make(name, count, spacing=spacing)
    for name_, other in re.findall(r"(timestep_spacing)=(\w+)", str(error.value)):
        require_noise(name, steps, other)
        assert name_ and other != spacing


@names
def test_samples_start_in_noise_by_default(name):
    for steps in (*range(1, 151), 200, 250, 333, 500, 999):
        if (name, steps) != ("ddim", 200):
            make(name, steps)
        assert timesteps_of(name, steps)[0] == 999
    assert start_in_words(name, 12) == (
        f"samples start at timestep 999 of 0 to 999 ({name}, 12 steps, {DEFAULT})"
    )
    assert EARLIER[name] != DEFAULT


def test_an_export_has_the_spacing_that_we_draw_with():
    assert ddim_config(SCHEDULERS["sd1"])["timestep_spacing"] == DEFAULT


@names
@prediction_types
def test_a_perfect_denoiser_returns_the_latents(name, prediction_type):
    """Whatever is predicted: the noise that is there, or v."""
    alphas = jnp.asarray(ALPHAS)
    target = jnp.asarray(normal("target", *SHAPE))

    def denoise(latents, timesteps):
        alpha = alphas[timesteps][:, None, None, None]
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        noise = (latents - signal * target) / sigma
        v = signal * noise - sigma * target
        return noise if prediction_type == "epsilon" else v

    sampler = make(name, 20, prediction_type)
    drawn = jax.jit(lambda noise: sampler(denoise, noise))(normal("start", *SHAPE))
    left = np.sqrt(1 - ALPHAS[0]) if name == "ddim" else 0.0  # DDIM ends with noise
    np.testing.assert_allclose(drawn, target, atol=4 * left + 1e-4)


def test_each_converges_and_the_second_order_is_better_than_the_first():
    """On an ODE with a known solution: of data with a standard deviation of 0.5."""
    alphas = jnp.asarray(ALPHAS)
    noise = jnp.asarray(normal("start", *SHAPE))

    def denoise(latents, timesteps):
        alpha = alphas[timesteps][:, None, None, None]
        spread = 0.25 * alpha + 1 - alpha
        return jnp.sqrt(1 - alpha) * latents / spread

    def error(name, steps):
        """Of x_t / spread_t, which the exact flow keeps."""
        sampler = make(name, steps)
        drawn = jax.jit(lambda noise: sampler(denoise, noise))(noise)
        first = ALPHAS[timesteps_of(name, steps)[0]]
        start = noise / np.sqrt(0.25 * first + 1 - first)
        return float(np.abs(drawn / 0.5 - start).mean())

    few, many = ({name: error(name, n) for name in samplers.SAMPLERS} for n in (10, 40))
    assert all(many[name] < 0.4 * few[name] for name in few)
    assert many["dpmpp_2m"] < 0.8 * min(many["ddim"], many["euler"])


@names
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.99, 0.995)])
def test_evaluations_are_counted_as_they_are_drawn(name, interval):
    """A denoiser of one product is called for each row of each branch."""
    weights = np.ones((8, 4), np.float32)

    def draw(noise, moments, states):
        return instruct_pix2pix.draw(
            lambda latents, timesteps, texts: latents @ weights,
            noise,
            moments,
            states,
            states[0],
            sampler=make(name, 12),
            text_scale=2.0,
            image_scale=1.5,
            guidance_interval=interval,
        )

    shapes = [
        jax.ShapeDtypeStruct(shape, np.float32)
        for shape in ((1, 1, 1, 4), (1, 1, 1, 8), (1, 3, 2))
    ]
    counted = evaluations(name, 12, interval)
    assert count_flops(draw, *shapes) == counted * 2 * weights.size
    assert 12 <= counted <= 36


def test_ddim_ends_at_the_first_noise_level_of_training():
    """Where no noise is predicted, latents are only rescaled from level to level."""
    timesteps = leading(1000, 8)
    assert timesteps.tolist() == [876, 751, 626, 501, 376, 251, 126, 1]
    noise = jnp.asarray(normal("start", *SHAPE))
    sampler = make("ddim", 8, spacing="leading")
    drawn = sampler(lambda latents, _: jnp.zeros_like(latents), noise)
    expected = noise * np.sqrt(ALPHAS[0] / ALPHAS[876])
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="ddim, euler, dpmpp_2m, got 'pndm'"):
        make("pndm", 5)


@names
@pytest.mark.parametrize("trained", [20, 1000])
def test_steps_are_fewer_than_the_timesteps_of_training(name, trained):
    alphas = ALPHAS[:trained]
    make(name, trained - 1, alphas_cumprod=alphas)
    for steps in (0, -1, trained):
        with pytest.raises(UserError, match=f"1 to {trained - 1}; .* got {steps}"):
            make(name, steps, alphas_cumprod=alphas)
    most = timesteps_of(name, trained - 1, num_train_timesteps=trained)
    assert most.max() <= trained - 1


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="sample"):
        make("ddim", 5, "sample")(lambda latents, _: latents, jnp.ones(SHAPE))
