"""Training of a diffusion model: noisy latents, targets, errors, dropped conditions.

Legend: B batch, h w latent grid, c latent channels, T training timesteps.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_CLIP = (-30.0, 20.0)  # of the posterior's log variance, as in latent diffusion


def posterior_mode(moments: Float[Array, "B h w c2"]) -> Float[Array, "B h w c"]:
    """The mean of the VAE's diagonal Gaussian; `moments` = (mean, log variance)."""
    return jnp.split(moments, 2, axis=-1)[0]


def posterior_sample(
    moments: Float[Array, "B h w c2"], noise: Float[Array, "B h w c"]
) -> Float[Array, "B h w c"]:
    """A sample of the VAE's diagonal Gaussian, unscaled."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, *_CLIP)) * noise


def kl_divergence(moments: Float[Array, "B h w c2"]) -> Float[Array, " B"]:
    """KL from the posterior to a standard normal, summed over each example's latent."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, *_CLIP)
    terms = mean**2 + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * terms.sum(axis=(1, 2, 3))


def add_noise(
    latents: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    timesteps: Int[Array, " B"],
    alphas_cumprod: Float[Array | np.ndarray, " T"],
) -> Float[Array, "B h w c"]:
    """q(x_t | x_0): equation (4) of Ho et al., arXiv 2006.11239."""
    signal, sigma = _scales(timesteps, alphas_cumprod)
    return signal * latents + sigma * noise


def prediction_target(
    latents: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    timesteps: Int[Array, " B"],
    alphas_cumprod: Float[Array | np.ndarray, " T"],
    prediction_type: str,
) -> Float[Array, "B h w c"]:
    """The network's target: the noise, or v (arXiv 2202.00512, section 4).

    Raises:
      ValueError: `prediction_type` is neither `epsilon` nor `v_prediction`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, sigma = _scales(timesteps, alphas_cumprod)
        return signal * noise - sigma * latents
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def squared_error(
    prediction: Float[Array, "B h w c"], target: Float[Array, "B h w c"]
) -> Float[Array, " B"]:
    """Mean squared error of each example."""
    return jnp.mean((prediction - target) ** 2, axis=(1, 2, 3))


def loss_weights(
    timesteps: Int[Array, " B"],
    alphas_cumprod: Float[Array | np.ndarray, " T"],
    prediction_type: str,
    gamma: float,
) -> Float[Array, " B"]:
    """Min-SNR-gamma weights of the squared error (arXiv 2303.09556, section 3.4).

    With SNR = alpha / (1 - alpha), alpha being `alphas_cumprod`: min(SNR, gamma) / SNR
    if the network predicts the noise, min(SNR, gamma) / (SNR + 1) if it predicts v.
    Both weight the implied error of x_0 by min(SNR, gamma).

    Args:
      gamma: above 0; the paper's is 5.

    Raises:
      ValueError: `prediction_type` is neither `epsilon` nor `v_prediction`.
    """
    alphas = jnp.asarray(alphas_cumprod)[timesteps]
    clipped = jnp.minimum(alphas, gamma * (1.0 - alphas))  # min(SNR, gamma) (1 - alpha)
    if prediction_type == "epsilon":
        return clipped / alphas
    if prediction_type == "v_prediction":
        return clipped
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def drop_conditions(
    uniform: Float[Array, " B"], rate: float
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Selects the examples whose text, and those whose source image is dropped.

    InstructPix2Pix (arXiv 2211.09800, section 3.2.1): text is dropped if r < 2p, the
    image if p <= r < 3p, so that each alone and both together are dropped with rate p.

    Args:
      uniform: r, uniform in [0, 1).
      rate: p.

    Returns:
      (drop_text, drop_image).
    """
    drop_text = uniform < 2 * rate
    drop_image = (uniform >= rate) & (uniform < 3 * rate)
    return drop_text, drop_image


def _scales(timesteps, alphas_cumprod):
    alphas = jnp.asarray(alphas_cumprod)[timesteps][:, None, None, None]
    return jnp.sqrt(alphas), jnp.sqrt(1.0 - alphas)
