"""Solvers of the diffusion ODE: from the noise schedule and a number of steps.

Each has what `diffusion/samplers.py` scans over. DDIM and Euler are the library's Flax
classes, where they equal PyTorch's. Its Flax DPM-Solver++ does not: it cannot end
without noise (PyTorch's `final_sigmas_type="zero"`, the default there), and rounds some
timesteps the other way (at 26, 30, 46 and 52 steps, by one); so that one is ours.

PyTorch draws the same from an exported folder with `DDIMScheduler`, with
`DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="linspace")`
and with `EulerDiscreteScheduler.from_config(scheduler.config)`.

UniPC (arXiv 2302.04867) is not here: the library has no Flax version, and its paper
claims most at 5 to 10 steps, fewer than guidance with large scales leaves room for.

Legend: B batch, h w latent grid, c latent channels, S steps, T training timesteps.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from diffusers.schedulers.scheduling_ddim_flax import FlaxDDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete_flax import (
    FlaxEulerDiscreteScheduler,
)
from jaxtyping import Array, Float, Int

from mvc_jax.checkpoints.scheduler_config import NOISE, SOLVER
from mvc_jax.errors import require

Index = int | Int[Array, ""]


class _OfLibrary:
    """A scheduler of the library as a solver; the carry is its latents."""

    def __init__(self, scheduler: Any, config: Mapping[str, Any], steps: int):
        self._scheduler = scheduler
        with jax.ensure_compile_time_eval():  # it may be made inside a jit
            state = scheduler.create_state()
            self._state = scheduler.set_timesteps(state, steps)
        self.timesteps = np.asarray(self._state.timesteps)
        self.num_train_timesteps: int = config["num_train_timesteps"]

    def start(self, noise: Float[Array, "B h w c"]) -> Array:
        return noise

    def inputs(self, carry: Array, i: Index) -> Array:
        return carry

    def step(self, carry: Array, prediction: Array, i: Index) -> Array:
        timestep = jnp.asarray(self.timesteps)[i]
        return self._scheduler.step(
            self._state, prediction, timestep, carry, return_dict=False
        )[0]

    def latents(self, carry: Array) -> Array:
        return carry


class DDIM(_OfLibrary):
    """DDIM without noise of its own (eta = 0): Song et al., arXiv 2010.02502.

    Equations (12) and (16).
    """

    def __init__(self, config: Mapping[str, Any], steps: int):
        own = {field: config[field] for field in SOLVER if field != "timestep_spacing"}
        super().__init__(FlaxDDIMScheduler(**_noise(config), **own), config, steps)


class Euler(_OfLibrary):
    """Euler's method on dx/dsigma: Karras et al., arXiv 2206.00364, algorithm 1.

    Its line 4, without the second-order correction. The carry is x of the
    variance-exploding form, x_0 + sigma * noise; the last sigma is 0.
    """

    def __init__(self, config: Mapping[str, Any], steps: int):
        spacing = config["timestep_spacing"]
        scheduler = FlaxEulerDiscreteScheduler(
            **_noise(config), timestep_spacing=spacing
        )
        super().__init__(scheduler, config, steps)

    def start(self, noise: Float[Array, "B h w c"]) -> Array:
        return noise * self._state.init_noise_sigma

    def inputs(self, carry: Array, i: Index) -> Array:
        timestep = jnp.asarray(self.timesteps)[i]
        return self._scheduler.scale_model_input(self._state, carry, timestep)


class DPMSolverPP2M:
    """DPM-Solver++(2M): Lu et al., arXiv 2211.01095, algorithm 2.

    With x_0's prediction m_i at step i, h_i = lambda_(i+1) - lambda_i,
    lambda = log(alpha / sigma) and r_i = h_(i-1) / h_i,

        D_i = m_i + (m_i - m_(i-1)) / (2 r_i)
        x_(i+1) = sigma_(i+1) / sigma_i x_i - alpha_(i+1) (exp(-h_i) - 1) D_i

    where the first and the last step take D_i = m_i. The timesteps are evenly spaced
    from T - 1 down, the last step ends at sigma = 0. The carry is (x_i, m_(i-1)).
    """

    def __init__(self, config: Mapping[str, Any], steps: int):
        trained: int = config["num_train_timesteps"]
        timesteps = np.linspace(0, trained - 1, steps + 1).round()[:0:-1]
        self.timesteps = timesteps.astype(np.int32)
        self.num_train_timesteps = trained
        self._of_v = config["prediction_type"] == "v_prediction"
        squared = alphas_cumprod(config)[self.timesteps].astype(np.float64)
        alpha = np.append(np.sqrt(squared), 1.0)
        sigma = np.append(np.sqrt(1.0 - squared), 0.0)
        shrink = sigma[1:] / sigma[:-1]  # alpha_i / alpha_(i+1) exp(-h_i)
        gain = alpha[1:] - alpha[:-1] * shrink
        step = np.diff(np.log(alpha[:-1] / sigma[:-1]))  # h_i, of all but the last
        ahead = np.zeros(steps)  # 1 / (2 r_i)
        ahead[1:-1] = step[1:] / (2.0 * step[:-1])
        table = np.stack([alpha[:-1], sigma[:-1], shrink, gain, ahead])
        self._table = table.astype(np.float32)

    def start(self, noise: Float[Array, "B h w c"]) -> tuple[Array, Array]:
        return noise, jnp.zeros_like(noise)

    def inputs(self, carry: tuple[Array, Array], i: Index) -> Array:
        return carry[0]

    def step(
        self, carry: tuple[Array, Array], prediction: Array, i: Index
    ) -> tuple[Array, Array]:
        latents, before = carry
        alpha, sigma, shrink, gain, ahead = jnp.asarray(self._table)[:, i]
        if self._of_v:
            clean = alpha * latents - sigma * prediction
        else:
            clean = (latents - sigma * prediction) / alpha
        direction = clean + ahead * (clean - before)
        return shrink * latents + gain * direction, clean

    def latents(self, carry: tuple[Array, Array]) -> Array:
        return carry[0]


SOLVERS = {"ddim": DDIM, "dpmpp_2m": DPMSolverPP2M, "euler": Euler}
Solver = DDIM | DPMSolverPP2M | Euler


def make(name: str, config: Mapping[str, Any], steps: int) -> Solver:
    """A solver by its name, one of `SOLVERS`.

    Args:
      name: of the solver.
      config: of the scheduler, as `ddim.ddim_config` returns it.
      steps: S.

    Raises:
      UserError: no solver has that name, or there are not enough training timesteps
        for as many steps.
    """
    require(
        name in SOLVERS,
        "config.generate.sampler",
        wanted=f"one of {', '.join(SOLVERS)}",
        got=repr(name),
        fix="Name one of these.",
    )
    trained = config["num_train_timesteps"]
    require(
        0 < steps < trained,
        "config.generate.steps",
        wanted=f"1 to {trained - 1}; the base was trained on {trained} timesteps",
        got=steps,
        fix="50 are usual, 20 with dpmpp_2m.",
    )
    return SOLVERS[name](config, steps)


def alphas_cumprod(config: Mapping[str, Any]) -> Float[np.ndarray, " T"]:
    """The noise schedule: the product of 1 - beta up to each training timestep."""
    scheduler = FlaxDDIMScheduler(**_noise(config))
    with jax.ensure_compile_time_eval():  # it may first be read inside a jit
        return np.asarray(scheduler.create_state().common.alphas_cumprod)


def _noise(config: Mapping[str, Any]) -> dict[str, Any]:
    return {field: config[field] for field in NOISE}
