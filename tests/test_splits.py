"""Splits are disjoint, complete and stratified; errors name the class or field."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import splits
from mvc_jax.data.splits import SplitSizes
from mvc_jax.errors import UserError


def labels_of(counts):
    """Labels of classes with these many images, interleaved."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.random.default_rng(0).permutation(labels)


def cut(counts, seed=0, is_test=None, usable=None, **sizes):
    names = tuple("abcdefgh"[: len(counts)])
    labels = labels_of(counts)
    options = {"seed": seed, "is_test": is_test, "usable": usable}
    return splits.make_splits(labels, names, SplitSizes(**sizes), **options)


# 8 images per class always suffice for 40 % pool, 3 train and 1 test.
counts_of_classes = st.lists(st.integers(8, 40), min_size=1, max_size=6)


@given(counts_of_classes, st.floats(0, 0.4), st.integers(1, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_splits_are_disjoint_complete_and_stratified(
    counts, pool_fraction, per_class, seed
):
    pool, labels = int(pool_fraction * sum(counts)), labels_of(counts)
    parts = cut(counts, seed, pool=pool, per_class=per_class, test=0.0)
    everything = np.concatenate([parts[name] for name in splits.SPLITS])
    np.testing.assert_array_equal(np.sort(everything), np.arange(sum(counts)))

    counts = np.asarray(counts)
    size = {
        name: np.bincount(labels[part], minlength=len(counts))
        for name, part in parts.items()
    }
    assert size["pool"].sum() == pool
    exact = pool * counts / counts.sum()
    up = size["pool"] > exact  # only the largest remainders are rounded up
    assert (np.abs(size["pool"] - exact) < 1).all()
    assert not up.any() or min(exact[up] % 1) >= max(exact[~up] % 1, default=0)
    assert (size["train"] == per_class).all()
    assert (size["test"] > 0).all()


@given(
    counts_of_classes,
    st.floats(0.01, 0.6),
    st.integers(1, 3),
    st.floats(0.01, 1.0),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=100)
def test_the_test_split_does_not_depend_on_the_number_of_training_images(
    counts, test, few, fraction, seed
):
    whole = cut(counts, seed, test=test)
    some = cut(counts, seed, test=test, fraction=fraction)
    shots = cut(counts, seed, test=test, per_class=few)
    np.testing.assert_array_equal(whole["test"], some["test"])
    np.testing.assert_array_equal(whole["test"], shots["test"])
    assert len(whole["train"]) + len(whole["test"]) == sum(counts)
    for part in (some, shots):
        assert set(part["train"]) <= set(whole["train"])
    used = np.bincount(labels_of(counts)[some["train"]], minlength=len(counts))
    full = np.bincount(labels_of(counts)[whole["train"]], minlength=len(counts))
    assert (np.abs(used - fraction * full) <= 0.5).all() or (used >= 1).all()


@given(counts_of_classes, st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=50)
def test_the_source_s_own_test_split_is_used_as_a_whole(counts, few, data):
    labels = labels_of(counts)
    is_test = np.zeros(len(labels), bool)
    for k in range(len(counts)):
        mine = np.flatnonzero(labels == k)
        is_test[mine[: data.draw(st.integers(1, len(mine) - 3))]] = True
    parts = cut(counts, is_test=is_test, per_class=few)
    np.testing.assert_array_equal(parts["test"], np.flatnonzero(is_test))
    assert not is_test[parts["train"]].any()
    if not few:
        assert len(parts["train"]) == (~is_test).sum()


def test_an_unusable_image_is_replaced():
    before = cut([20, 20], per_class=5, test=0.0)
    usable = np.ones(40, bool)
    usable[before["train"][:3]] = False
    after = cut([20, 20], per_class=5, test=0.0, usable=usable)
    assert usable[np.concatenate(list(after.values()))].all()
    assert len(after["train"]) == 10
    assert set(before["train"][3:]) <= set(after["train"])


def test_the_splits_depend_on_the_seed_alone():
    first, again, other = (
        cut([50, 50], seed, pool=20, per_class=10, test=0.3) for seed in (0, 0, 1)
    )
    for name in splits.SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
        assert set(first[name]) != set(other[name])


@pytest.mark.parametrize(
    ("counts", "sizes", "name", "words"),
    [
        ([9, 5], {"per_class": 5}, "config.data.per_class", ["'b'", "4 or less"]),
        ([9, 5], {"pool": 7, "per_class": 3}, "config.data.per_class", ["'b'", "pool"]),
        ([9, 5], {"pool": 99, "per_class": 1}, "class 'a'", ["lower config.data.pool"]),
        (
            [9, 0, 9],
            {"per_class": 1},
            "class 'b'",
            ["at least one image", "none", "data.classes"],
        ),
        ([9, 1], {"test": 0.2}, "class 'b'", ["one for test", "1 images"]),
    ],
)
def test_too_few_images_is_an_error_with_a_fix(counts, sizes, name, words):
    with pytest.raises(UserError) as error:
        cut(counts, **{"test": 0.0} | sizes)
    assert str(error.value).startswith(name)
    for word in words:
        assert word in str(error.value)


def test_a_class_without_test_images_of_its_own_is_an_error():
    is_test = (labels_of([5, 5]) == 0) & (np.arange(10) < 5)
    assert is_test.any()
    with pytest.raises(UserError, match="class 'b': .*own test split"):
        cut([5, 5], is_test=is_test)


def test_a_fraction_of_a_number_per_class_is_refused():
    SplitSizes().check()
    with pytest.raises(UserError, match="config.data.fraction"):
        SplitSizes(fraction=0.5, per_class=3).check()
