"""Image embeddings as text states, and the edges of images."""

import jax.numpy as jnp
import numpy as np
import pytest
from sd_families import normal

from mvc_jax.data import edges
from mvc_jax.diffusion import conditioning


@pytest.mark.parametrize("tokens", [2, 7])
def test_an_embedding_replaces_the_state_of_every_token_but_bos(tokens):
    states = jnp.asarray(normal("states", 3, tokens, 8))
    embeddings = jnp.asarray(5 * normal("embeddings", 3, 8))
    made = np.asarray(conditioning.embedding_states(embeddings, states))
    np.testing.assert_array_equal(made[:, 0], states[:, 0])
    norms = np.linalg.norm(states[:, 1:], axis=-1).mean(axis=1)
    for i, norm in enumerate(norms):
        for token in made[i, 1:]:
            np.testing.assert_allclose(np.linalg.norm(token), norm, rtol=1e-6)
            cosine = token @ embeddings[i] / norm / np.linalg.norm(embeddings[i])
            np.testing.assert_allclose(cosine, 1.0, rtol=1e-6)


def test_a_difference_is_a_direction():
    states = jnp.asarray(normal("states", 2, 5, 8))
    one, two = (jnp.asarray(normal(name, 2, 8)) for name in ("one", "two"))
    there = conditioning.difference_states(one, two, states)
    back = conditioning.difference_states(two, one, states)
    np.testing.assert_allclose(there[:, 1:], -back[:, 1:], rtol=1e-6)
    expected = conditioning.embedding_states(one - two, states)
    np.testing.assert_array_equal(there, expected)


def test_equal_images_have_a_difference_of_0():
    states = jnp.asarray(normal("states", 2, 5, 8))
    same = jnp.asarray(normal("one", 2, 8))
    made = np.asarray(conditioning.difference_states(same, same, states))
    np.testing.assert_array_equal(made[:, 1:], 0)
    np.testing.assert_array_equal(made[:, 0], states[:, 0])


def test_edges_run_around_a_square_and_nowhere_else():
    images = np.full((2, 32, 32, 3), 30, np.uint8)
    images[1, 8:24, 8:24] = 200
    found = edges.canny(images)
    assert found.shape == images.shape and found.dtype == np.uint8
    assert not found[0].any()
    assert set(np.unique(found[1])) == {0, 255}
    assert not found[1, :6].any() and not found[1, 11:21, 11:21].any()
    for i in range(10, 22):  # a line on each side
        assert found[1, i, 6:10].any() and found[1, 22:26, i].any()


def test_no_images_have_no_edges():
    assert edges.canny(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 8, 8, 3)
