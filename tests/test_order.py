"""Batch order is a function of (seed, purpose, step), without state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import order

sizes = st.integers(1, 40)


def stream(size, batch_size, length, seed=0, purpose="t"):
    """The first `length` indices, drawn batch by batch."""
    steps = range(-(-length // batch_size))
    draw = {"batch_size": batch_size, "size": size}
    rows = [order.batch_indices(seed, purpose, step, **draw) for step in steps]
    return np.concatenate(rows)[:length]


@given(sizes, st.integers(1, 100))
@settings(deadline=None, max_examples=50)
def test_each_epoch_has_every_example_once(size, batch_size):
    epochs = stream(size, batch_size, 4 * size).reshape(4, size)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(size), (4, 1)))


@given(sizes, st.integers(1, 100), st.integers(1, 100))
@settings(deadline=None, max_examples=50)
def test_the_stream_does_not_depend_on_the_batch_size(size, one, other):
    length = 3 * size
    expected = stream(size, one, length)
    np.testing.assert_array_equal(stream(size, other, length), expected)


@given(st.permutations(range(8)))
@settings(deadline=None, max_examples=20)
def test_a_batch_depends_on_its_step_alone(steps):
    """Not on the batches drawn before it, nor on what the cache holds of them."""
    in_order = stream(5, 7, 8 * 7).reshape(8, 7)
    for step in steps:
        batch = order.batch_indices(0, "t", step, batch_size=7, size=5)
        np.testing.assert_array_equal(batch, in_order[step])
        batch[:] = -1  # a caller may write into its batch


def test_epochs_seeds_and_purposes_shuffle_differently():
    orders = [
        *stream(1000, 1000, 3000).reshape(3, 1000),
        stream(1000, 1000, 1000, seed=1),
        stream(1000, 1000, 1000, purpose="u"),
    ]
    agreement = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[i + 1 :]]
    assert max(agreement) < 0.01  # two independent orders share one place on average


@pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)])
def test_generators_are_new_and_independent(other):
    ours = order.generator(0, "a", 0).normal(size=4000)
    np.testing.assert_array_equal(ours, order.generator(0, "a").normal(size=4000))
    theirs = order.generator(*other).normal(size=4000)
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.08  # five standard errors
