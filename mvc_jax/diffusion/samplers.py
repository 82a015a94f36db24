"""Samplers: from noise to latents by S predictions of the network.

Each one integrates the probability-flow ODE of a diffusion model from its noisiest
timestep down, and is a function of `predict`, as in k-diffusion's `sampling.py`. The
timesteps are known before compilation, so each segment of guided or of unguided steps
is a `lax.scan` of its own, and guidance costs nothing outside its interval.

PyTorch's diffusers draws the same from an exported folder with its own scheduler, which
is DDIM, and with two others made `from_config(scheduler.config)`:
`EulerDiscreteScheduler` and `DPMSolverMultistepScheduler`. Another spacing than the
config's is given with it: `from_config(config, timestep_spacing="leading")`.

UniPC (arXiv 2302.04867) is not here: its paper claims most at 5 to 10 steps, fewer than
guidance with large scales leaves room for.

Legend: B batch, h w latent grid, c latent channels, S steps, T training timesteps;
alpha = sqrt(alphas_cumprod) and sigma = sqrt(1 - alphas_cumprod), so that noisy latents
are x_t = alpha x_0 + sigma noise.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mvc_jax.diffusion.guidance_interval import ALWAYS, segments
from mvc_jax.diffusion.timesteps import (
    AUTO,
    first_step,
    named,
    require_noise,
    timesteps_of,
)
from mvc_jax.errors import UserError

Predict = Callable[[Array, Array], Array]  # (latents, timesteps [B]) -> prediction
Sampler = Callable[..., Array]  # what `make` returns


def ddim(
    predict: Predict,
    noise: Float[Array, "B h w c"],
    *,
    alphas_cumprod: Float[np.ndarray, " T"],
    prediction_type: str,
    steps: int,
    spacing: str = AUTO,
    unguided: Predict | None = None,
    guidance_interval: tuple[float, float] = ALWAYS,
    source: Float[Array, "B h w c"] | None = None,
    strength: float = 1.0,
) -> Float[Array, "B h w c"]:
    """DDIM with eta = 0: Song et al., arXiv 2010.02502, equations 12 and 16.

    Ends at the first noise level of training instead of at 0, as Stable Diffusion does
    (diffusers' `set_alpha_to_one=False`). Each step goes down by T // S timesteps, as
    in PyTorch, also where the next one does not begin there.

    Args:
      predict: the network, guidance included.
      noise: standard normal.
      alphas_cumprod: of the noise schedule.
      prediction_type: of the network, `epsilon` or `v_prediction`.
      steps: S, from 1 to T - 1.
      spacing: of the timesteps, as `timesteps_of` takes it.
      unguided: the network without guidance, for the steps outside the interval.
      guidance_interval: as `guidance_interval.segments` takes it.
      source: scaled latents to start from, at a `strength` below 1: SDEdit (Meng et
        al., arXiv 2108.01073, algorithm 1).
      strength: the fraction of the steps that are taken, as diffusers'
        `StableDiffusionImg2ImgPipeline` counts them; 0 returns the source, and 1 starts
        from noise alone, of which theirs is a part.
    """
    trained = len(alphas_cumprod)
    alphas = jnp.asarray(alphas_cumprod)

    def step(predict, latents, t):
        prediction = predict(latents, t)
        next_t = t - trained // steps
        squared = alphas[t]
        next_squared = jnp.where(next_t >= 0, alphas[next_t], alphas[0])
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        x_0, e = _split(latents, prediction, alpha, sigma, prediction_type)
        return next_squared**0.5 * x_0 + (1 - next_squared) ** 0.5 * e

    first = first_step(steps, 1.0 if source is None else strength)
    timesteps = timesteps_of("ddim", steps, spacing, trained)[first:]
    if not len(timesteps):
        return source
    start = noise
    if first:
        squared = alphas_cumprod[timesteps[0]]
        start = _noised(source, noise, np.sqrt(squared), np.sqrt(1 - squared))
    parts = segments(timesteps, trained, guidance_interval)
    return _scan(step, start, (timesteps,), parts, predict, unguided)


def euler(
    predict: Predict,
    noise: Float[Array, "B h w c"],
    *,
    alphas_cumprod: Float[np.ndarray, " T"],
    prediction_type: str,
    steps: int,
    spacing: str = AUTO,
    unguided: Predict | None = None,
    guidance_interval: tuple[float, float] = ALWAYS,
    source: Float[Array, "B h w c"] | None = None,
    strength: float = 1.0,
) -> Float[Array, "B h w c"]:
    """Euler's method: Karras et al., arXiv 2206.00364, algorithm 1.

    Without lines 6 to 8, the second-order correction. Integrates x = x_0 + s noise,
    s = sigma / alpha, from the largest s down to 0; the network sees alpha x. The steps
    equal DDIM's where T is a multiple of S, but the last one ends without noise.
    Starts, as PyTorch does, at x = s noise, and with `leading` spacing, whose largest
    s is smaller, at x = sqrt(1 + s^2) noise.

    The arguments are those of `ddim`.
    """
    trained = len(alphas_cumprod)
    first = first_step(steps, 1.0 if source is None else strength)
    timesteps = timesteps_of("euler", steps, spacing, trained)[first:]
    if not len(timesteps):
        return source
    if named(spacing) == "linspace":  # between timesteps: s is interpolated
        levels = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        squared = 1 / (1 + np.interp(timesteps, np.arange(trained), levels) ** 2)
        squared = squared.astype(np.float32)
    else:
        squared = alphas_cumprod[timesteps]
    alpha, sigma = np.sqrt(squared), np.sqrt(1 - squared)
    ds = np.diff(sigma / alpha, append=np.float32(0))

    def step(predict, x, t, alpha, sigma, ds):
        latents = alpha * x
        _, e = _split(latents, predict(latents, t), alpha, sigma, prediction_type)
        return x + ds * e  # e is dx/ds: line 4's (x - x_0) / s

    coefficients = (timesteps, alpha, sigma, ds)
    parts = segments(timesteps, trained, guidance_interval)
    start = noise / alpha[0] * (1 if named(spacing) == "leading" else sigma[0])
    if first:
        start = source + sigma[0] / alpha[0] * noise
    return _scan(step, start, coefficients, parts, predict, unguided)


def dpmpp_2m(
    predict: Predict,
    noise: Float[Array, "B h w c"],
    *,
    alphas_cumprod: Float[np.ndarray, " T"],
    prediction_type: str,
    steps: int,
    spacing: str = AUTO,
    unguided: Predict | None = None,
    guidance_interval: tuple[float, float] = ALWAYS,
    source: Float[Array, "B h w c"] | None = None,
    strength: float = 1.0,
) -> Float[Array, "B h w c"]:
    """DPM-Solver++(2M): Lu et al., arXiv 2211.01095, algorithm 2.

    With the predicted x_0, m_i at step i, lambda = log(alpha / sigma),
    h_i = lambda_(i+1) - lambda_i and r_i = h_(i-1) / h_i,

        D_i = m_i + (m_i - m_(i-1)) / (2 r_i)
        x_(i+1) = sigma_(i+1) / sigma_i x_i - alpha_(i+1) (exp(-h_i) - 1) D_i

    where the first and the last step take D_i = m_i. The last one ends at sigma = 0.

    The arguments are those of `ddim`.
    """
    trained = len(alphas_cumprod)
    first = first_step(steps, 1.0 if source is None else strength)
    timesteps = timesteps_of("dpmpp_2m", steps, spacing, trained)[first:]
    steps = len(timesteps)
    if not steps:
        return source
    squared = alphas_cumprod[timesteps].astype(np.float64)
    alpha = np.append(np.sqrt(squared), 1.0)
    sigma = np.append(np.sqrt(1.0 - squared), 0.0)
    shrink = sigma[1:] / sigma[:-1]  # alpha_(i+1) / alpha_i exp(-h_i)
    gain = alpha[1:] - alpha[:-1] * shrink
    h = np.diff(np.log(alpha[:-1] / sigma[:-1]))  # of all steps but the last
    weight = np.zeros(steps)  # 1 / (2 r_i)
    weight[1:-1] = h[1:] / (2.0 * h[:-1])
    table = np.stack([alpha[:-1], sigma[:-1], shrink, gain, weight])
    coefficients = (timesteps, *table.astype(np.float32))

    def step(predict, carry, t, alpha, sigma, shrink, gain, weight):
        latents, earlier = carry
        x_0, _ = _split(latents, predict(latents, t), alpha, sigma, prediction_type)
        return shrink * latents + gain * (x_0 + weight * (x_0 - earlier)), x_0

    parts = segments(timesteps, trained, guidance_interval)
    start = noise
    if first:
        start = _noised(source, noise, table[0, 0], table[1, 0])
    start = start, jnp.zeros_like(noise)
    return _scan(step, start, coefficients, parts, predict, unguided)[0]


SAMPLERS = {"ddim": ddim, "euler": euler, "dpmpp_2m": dpmpp_2m}


def make(
    name: str,
    steps: int,
    *,
    alphas_cumprod: Float[np.ndarray, " T"],
    prediction_type: str,
    spacing: str = AUTO,
) -> Sampler:
    """The sampler of a config and a model.

    Args:
      name: one of `SAMPLERS`.
      steps: S.
      alphas_cumprod: of the model's noise schedule.
      prediction_type: of the model.
      spacing: of the timesteps, as `timesteps_of` takes it.

    Returns:
      `(predict, noise, *, unguided=None, guidance_interval=ALWAYS, source=None,
      strength=1.0) -> latents`.

    Raises:
      UserError: no sampler has that name, the model was trained on too few timesteps
        for so many steps, or these would not start in noise.
    """
    if name not in SAMPLERS:
        raise UserError(
            "config.generate.sampler",
            wanted=f"one of {', '.join(SAMPLERS)}",
            got=repr(name),
            fix="Choose one of these.",
        )
    trained = len(alphas_cumprod)
    if not 0 < steps < trained:
        raise UserError(
            "config.generate.steps",
            wanted=f"1 to {trained - 1}; the base was trained on {trained} timesteps",
            got=f"{steps}",
            fix="Typical are 50, or 20 with dpmpp_2m.",
        )
    require_noise(name, steps, spacing, trained)
    return functools.partial(
        SAMPLERS[name],
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        steps=steps,
        spacing=spacing,
    )


def _noised(source: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
    """Latents of a noise level: alpha x_0 + sigma noise."""
    return np.float32(alpha) * source + np.float32(sigma) * noise


def _split(
    latents: Array, prediction: Array, alpha: Array, sigma: Array, prediction_type: str
) -> tuple[Array, Array]:
    """The x_0 and the noise of which `latents` consist, by the network's prediction."""
    if prediction_type == "epsilon":
        return (latents - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":  # arXiv 2202.00512, appendix D
        x_0 = alpha * latents - sigma * prediction
        return x_0, alpha * prediction + sigma * latents
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def _scan(
    step: Callable[..., Any],
    carry: Any,
    coefficients: tuple[np.ndarray, ...],
    parts: list[tuple[int, int, bool]],
    guided: Predict,
    unguided: Predict | None,
) -> Any:
    """Takes every step: `step(predict, carry, *coefficients) -> carry`.

    Args:
      step: of the sampler.
      carry: before the first step.
      coefficients: of the sampler, each [S]; a step gets its own scalars.
      parts: of `guidance_interval.segments`, each a scan.
      guided: predicts in the guided ones.
      unguided: predicts in the others.
    """
    for start, stop, is_guided in parts:
        rows = tuple(values[start:stop] for values in coefficients)
        body = functools.partial(_body, step, guided if is_guided else unguided)
        carry, _ = jax.lax.scan(body, carry, rows)
    return carry


def _body(step: Callable, network: Predict, carry: Any, row: tuple) -> tuple[Any, None]:
    def predict(latents, t):
        return network(latents, jnp.broadcast_to(t, latents.shape[:1]))

    return step(predict, carry, *row), None
