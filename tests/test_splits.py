"""Splits are disjoint, complete and stratified; errors name the class or field."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvc_jax.data import splits
from mvc_jax.data.splits import SplitSizes
from mvc_jax.errors import UserError


def labels_of(counts):
    """Labels of classes with these many images, interleaved."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.random.default_rng(0).permutation(labels)


def cut(counts, seed=0, is_test=None, usable=None, copies=None, groups=None, **sizes):
    names = tuple("abcdefgh"[: len(counts)])
    labels = labels_of(counts)
    options = {"seed": seed, "is_test": is_test, "usable": usable}
    options |= {"copies": copies, "groups": groups}
    options["pool_seed"] = sizes.pop("pool_seed", None)
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


@given(counts_of_classes, st.integers(0, 9), st.booleans(), st.booleans())
@example([10, 11, 39, 38, 15], 0, True, False)  # a class needs a group of the pool
@example([8, 10], 0, True, False)
@settings(deadline=None, max_examples=100)
def test_a_pool_with_a_seed_of_its_own_is_the_same_in_all_splits(
    counts, pool_seed, grouped, has_test
):
    total = sum(counts)
    draw = np.random.default_rng(total)
    options = {"groups": np.arange(total) // 2} if grouped else {}
    if has_test:  # an image in eight, and copies of them in pool and train
        options |= {"is_test": np.arange(total) % 8 == 0}
        options |= {"copies": (draw.random(total) < 0.1) & ~options["is_test"]}
    sizes = {"pool": total // 4, "per_class": 1, "pool_seed": pool_seed}
    try:
        first, second = (cut(counts, seed, **options, **sizes) for seed in (0, 1))
    except UserError:  # too few images for the groups or without the copies
        return
    np.testing.assert_array_equal(first["pool"], second["pool"])
    for found in (first, second):
        parts = np.concatenate([found[name] for name in splits.SPLITS])
        assert len({*parts.tolist()}) == len(parts)


def test_a_pool_of_another_seed_is_another_and_so_are_its_splits():
    counts, sizes = [40, 40], {"pool": 20, "per_class": 3, "test": 0.2}
    found = [cut(counts, 0, pool_seed=x, **sizes) for x in (None, 1, 2)]
    pools = [each["pool"].tolist() for each in found]
    assert pools[0] != pools[1] != pools[2] and len({len(x) for x in pools}) == 1
    others = [
        cut(counts, seed, pool_seed=1, **sizes)["train"].tolist() for seed in (0, 1)
    ]
    assert others[0] != others[1]


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


@given(
    counts_of_classes,
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
    st.data(),
)
@settings(deadline=None, max_examples=150)
def test_copies_of_test_are_replaced(counts, few, pool, test, own, data):
    """Test stays; pool and train lose the copies, and get others if there are any."""
    labels, is_test = labels_of(counts), None
    if own:
        is_test = np.arange(len(labels)) % 4 == 0
        for k in range(len(counts)):
            is_test[np.flatnonzero(labels == k)[0]] = True
    sizes = {"per_class": few, "pool": pool, "test": test}
    if not (own or test or few):
        return
    try:
        before = cut(counts, is_test=is_test, **sizes)
    except UserError:  # too few images for these sizes, with copies or without
        return
    both = np.concatenate([before["pool"], before["train"]])
    copies = np.zeros(len(labels), bool)
    copies[data.draw(st.lists(st.sampled_from(both.tolist()), max_size=6))] = True
    try:
        after = cut(counts, is_test=is_test, copies=copies, **sizes)
    except UserError as error:
        assert "config.data.duplicates" in str(error) or "per_class" in str(error)
        return
    if own or test:
        np.testing.assert_array_equal(before["test"], after["test"])
    for part in ("pool", "train"):
        assert not copies[after[part]].any()
        assert set(before[part][~copies[before[part]]]) <= set(after[part])
    assert not {*after["pool"]} & {*after["train"]}
    if few:
        assert (np.bincount(labels[after["train"]]) == few).all()
    elif test or own:
        assert set(after["train"]) == set(before["train"]) - set(np.flatnonzero(copies))


@given(
    counts_of_classes,
    st.integers(0, 2),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.integers(2, 30),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=150)
def test_a_group_is_on_one_side(counts, few, pool, test, size, seed):
    labels = labels_of(counts)
    groups = np.random.default_rng(seed).integers(0, size, len(labels))
    if not (test or few):
        return
    try:
        parts = cut(counts, seed, pool=pool, per_class=few, test=test, groups=groups)
    except UserError as error:
        assert "config.data.group" in str(error) or "config.data.per_cl" in str(error)
        return
    sides = [set(groups[parts[name]]) for name in splits.SPLITS]
    assert sum(map(len, sides)) == len(set.union(*sides))
    for name in ("train", "test"):
        assert np.bincount(labels[parts[name]], minlength=len(counts)).all()
    everything = np.concatenate([parts[name] for name in splits.SPLITS])
    assert len(everything) == len(set(everything))
    if not few:
        assert len(everything) == len(labels)


def test_groups_give_about_the_sizes_that_were_asked_for():
    counts, groups = [300, 500], np.arange(800) // 4
    parts = cut(counts, test=0.2, pool=80, groups=groups)
    assert abs(len(parts["pool"]) - 80) <= 8 and abs(len(parts["test"]) - 144) <= 8
    with pytest.raises(UserError, match="config.data.group: .* class 'a'"):
        cut([20, 20], test=0.2, groups=np.zeros(40, int))


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
