"""Solvers against PyTorch's: the same noise and predictions, the same latents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sd_families import SCHEDULERS, normal

from mvc_jax.checkpoints.scheduler_config import ddim_config
from mvc_jax.diffusion.samplers import Solver, sample
from mvc_jax.errors import UserError
from mvc_jax.models import solvers

THEIRS = {  # on the config of an exported folder
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    "euler": ("EulerDiscreteScheduler", {}),
}
SHAPE = (2, 2, 3, 4)
names = pytest.mark.parametrize("name", solvers.SOLVERS)
# PyTorch's schedulers turn tensors into arrays in NumPy's old way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def config_of(prediction_type="epsilon", **noise):
    return ddim_config(SCHEDULERS["sd1"] | {"prediction_type": prediction_type} | noise)


def scheduler(name, config, steps):
    import diffusers

    class_, fields = THEIRS[name]
    made = getattr(diffusers, class_).from_config(config, **fields)
    made.set_timesteps(steps)
    return made


@functools.cache
def stepping(name, prediction_type, steps):
    """The solver with its inputs and its step compiled together."""
    solver = solvers.make(name, config_of(prediction_type), steps)

    @jax.jit
    def both(carry, prediction, i):
        return solver.inputs(carry, i), solver.step(carry, prediction, i)

    return solver, both


@names
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 7, 15, 20])
def test_a_walk_equals_pytorch(torch, name, prediction_type, steps):
    """What the network sees at each step, and the latents at the end."""
    config = config_of(prediction_type)
    theirs = scheduler(name, config, steps)
    solver, both = stepping(name, prediction_type, steps)
    np.testing.assert_array_equal(solver.timesteps, theirs.timesteps.numpy())
    noise = normal(f"{name} start", *SHAPE)
    predictions = normal(f"{name} predictions", steps, *SHAPE)
    carry = solver.start(jnp.asarray(noise))
    latents = torch.from_numpy(noise) * theirs.init_noise_sigma
    for i, prediction in enumerate(predictions):
        seen = theirs.scale_model_input(latents, theirs.timesteps[i]).numpy()
        inputs, carry = both(carry, prediction, jnp.int32(i))
        np.testing.assert_allclose(inputs, seen, rtol=0, atol=1e-5 * scale_of(seen))
        latents = theirs.step(
            torch.from_numpy(prediction), theirs.timesteps[i], latents
        ).prev_sample
    drawn, expected = solver.latents(carry), latents.numpy()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-5 * scale_of(expected))


@names
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_whole_sample_equals_pytorch(torch, name, prediction_type):
    """Where what is predicted depends on the latents, as a network's does."""
    steps, config = 20, config_of(prediction_type)
    theirs, solver = scheduler(name, config, steps), stepping(name, prediction_type, 20)

    def denoise(latents, timesteps):
        return jnp.tanh(1.5 * latents + timesteps[:, None, None, None] / 1000)

    noise = normal(f"{name} start", *SHAPE)
    drawn = jax.jit(lambda noise: sample(denoise, solver[0], noise))(noise)
    latents = torch.from_numpy(noise) * theirs.init_noise_sigma
    for timestep in theirs.timesteps:
        seen = theirs.scale_model_input(latents, timestep)
        prediction = torch.tanh(1.5 * seen + timestep / 1000)
        latents = theirs.step(prediction, timestep, latents).prev_sample
    assert 0.1 < latents.std() < 10
    np.testing.assert_allclose(drawn, latents.numpy(), rtol=0, atol=1e-4)


def scale_of(array):
    """Random predictions let the latents grow to some tens."""
    return max(1.0, np.abs(array).max())


@names
def test_timesteps_equal_pytorch_whatever_their_number(torch, name):
    del torch
    config = config_of()
    for steps in (3, 26, 50, 333, 501, 999):  # at 26 the library's DPM-Solver differs
        solver = solvers.make(name, config, steps)
        expected = scheduler(name, config, steps).timesteps.numpy()
        np.testing.assert_array_equal(solver.timesteps, expected, err_msg=f"{steps}")
        assert len(set(solver.timesteps.tolist())) == steps
        assert 0 <= solver.timesteps.min() <= solver.timesteps.max() < 1000


@names
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_returns_the_latents(name, prediction_type):
    """Whatever is predicted: the noise that is there, or v."""
    config = config_of(prediction_type)
    alphas = jnp.asarray(solvers.alphas_cumprod(config))
    target = jnp.asarray(normal("target", *SHAPE))

    def denoise(latents, timesteps):
        alpha = alphas[timesteps.astype(jnp.int32)][:, None, None, None]
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        noise = (latents - signal * target) / sigma
        return (
            noise if prediction_type == "epsilon" else signal * noise - sigma * target
        )

    solver = solvers.make(name, config, 20)
    assert isinstance(solver, Solver)
    drawn = jax.jit(lambda noise: sample(denoise, solver, noise))(
        normal("start", *SHAPE)
    )
    left = float(jnp.sqrt(1 - alphas[0])) if name == "ddim" else 0.0  # by its config
    np.testing.assert_allclose(drawn, target, atol=4 * left + 1e-4)


def test_each_converges_and_two_orders_are_better_than_one():
    """On an ODE with a known solution: of data with a standard deviation of 0.5."""
    config = config_of()
    alphas = jnp.asarray(solvers.alphas_cumprod(config), jnp.float32)
    noise = jnp.asarray(normal("start", *SHAPE))

    def denoise(latents, timesteps):
        alpha = alphas[timesteps.astype(jnp.int32)][:, None, None, None]
        spread = 0.25 * alpha + 1 - alpha
        return jnp.sqrt(1 - alpha) * latents / spread

    def error(name, steps):
        """Of x_t / spread_t, which the exact flow keeps."""
        solver = solvers.make(name, config, steps)
        drawn = jax.jit(lambda noise: sample(denoise, solver, noise))(noise)
        first = alphas[int(solver.timesteps[0])]
        start = noise / jnp.sqrt(0.25 * first + 1 - first)
        return float(jnp.abs(drawn / 0.5 - start).mean())

    few, many = ({name: error(name, n) for name in solvers.SOLVERS} for n in (10, 40))
    assert all(many[name] < 0.4 * few[name] for name in few)
    assert many["dpmpp_2m"] < 0.8 * min(many["ddim"], many["euler"])


def test_an_unknown_solver_is_told_the_known_ones():
    with pytest.raises(UserError, match="ddim, dpmpp_2m, euler, got 'pndm'"):
        solvers.make("pndm", config_of(), 5)


@names
@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_steps_are_fewer_than_the_timesteps_of_training(name, steps):
    with pytest.raises(UserError, match="1 to 999"):
        solvers.make(name, config_of(), steps)


def test_a_short_schedule_bounds_the_steps():
    config = config_of(num_train_timesteps=20)
    for name in solvers.SOLVERS:
        assert solvers.make(name, config, 19).timesteps.max() <= 19
        with pytest.raises(UserError, match="1 to 19"):
            solvers.make(name, config, 20)
