"""GIF-SD's perturbation: a line for each channel, bounded, and of each image alone."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.generation import latent_perturbation
from mvc_jax.training import rng


@given(
    seed=st.integers(0, 99),
    limit=st.sampled_from([0.0, 0.8, 100.0]),
    shape=st.sampled_from([(2, 3, 4), (1, 1, 1)]),
)
@settings(max_examples=20, deadline=None)
def test_a_perturbation_is_of_channels_and_bounded(seed, limit, shape):
    keys = rng.example_keys(jax.random.key(0), jnp.arange(3) + seed)
    latents = 3 * rng.normal_like(keys, shape)
    changed = latent_perturbation.perturbed(keys, latents, limit)
    assert np.abs(changed - latents).max() <= limit * (1 + 1e-5)
    if limit == 100.0:  # one line for each channel of an image: (1 + z) x + b
        x, y = (np.asarray(a).reshape(3, -1, shape[-1]) for a in (latents, changed))
        for image, channel in np.ndindex(3, shape[-1]):
            if x.shape[1] > 1:
                slope, _ = np.polyfit(x[image, :, channel], y[image, :, channel], 1)
                assert 1 - 1e-3 <= slope <= 2 + 1e-3
    again = latent_perturbation.perturbed(keys[1:], latents[1:], limit)
    np.testing.assert_allclose(again, changed[1:], rtol=1e-6)  # whatever else is drawn
