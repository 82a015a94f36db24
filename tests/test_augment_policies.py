"""Policies: shapes and dtypes, what is drawn and how often; MixUp and CutMix."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax import augment
from mvc_jax.augment import (
    autoaugment,
    crops,
    fast_autoaugment,
    magnitudes,
    mixup,
    operations,
    policies,
    randaugment,
)

IMAGES = np.random.default_rng(0).integers(1, 256, (6, 12, 9, 3), dtype=np.uint8)
IMAGE = jnp.asarray(IMAGES[0])
KEYS = jax.random.split(jax.random.key(0), 6)
CHEAP = ("none", "flip", "flip_crop", "affine", "cutout")
COSTLY = ("autoaugment_imagenet", "fast_autoaugment_cifar100", "randaugment")


@functools.cache
def batched(name: str):
    return jax.jit(jax.vmap(augment.policy(name)))


@functools.cache
def augmented(name: str) -> np.ndarray:
    return np.asarray(batched(name)(KEYS, IMAGES))


def test_names_are_those_of_the_policies():
    assert tuple(policies._POLICIES) == augment.NAMES


@pytest.mark.parametrize("name", CHEAP + COSTLY)
def test_a_policy_keeps_shape_and_dtype_and_depends_on_its_key_alone(name):
    results = augmented(name)
    assert results.shape == IMAGES.shape and results.dtype == np.uint8
    assert (results != IMAGES).any() == (name != "none")
    order = np.array([3, 5, 0, 1, 4, 2])  # each image with its key, in another batch
    others = IMAGES[order].copy()
    others[0] = 7
    moved = batched(name)(KEYS[order], others)
    np.testing.assert_array_equal(moved[1:], results[order][1:])
    if name != "none":
        same = np.broadcast_to(IMAGES[0], IMAGES.shape)
        assert len(np.unique(batched(name)(KEYS, same), axis=0)) > 1


def test_float_images_stay_float_and_have_integer_levels():
    policy = jax.jit(jax.vmap(augment.policy("cutout")))
    results = np.asarray(policy(KEYS, IMAGES.astype(np.float32) + 0.25))
    assert results.dtype == np.float32
    np.testing.assert_array_equal(results, augmented("cutout"))


def test_half_are_flipped_and_two_flips_are_the_identity():
    keys = jax.random.split(jax.random.key(1), 1000)
    flip = jax.jit(jax.vmap(crops.flip, in_axes=(0, None)))
    results = np.asarray(flip(keys, IMAGES[0]))
    flipped = (results == IMAGES[0, :, ::-1]).all((1, 2, 3))
    assert ((results == IMAGES[0]).all((1, 2, 3)) ^ flipped).all()
    assert 450 < flipped.sum() < 550
    key = keys[np.argmax(flipped)]
    np.testing.assert_array_equal(crops.flip(key, crops.flip(key, IMAGE)), IMAGE)


def test_crops_of_the_padded_image_are_uniform():
    keys = jax.random.split(jax.random.key(1), 2500)
    crop = jax.vmap(functools.partial(crops.pad_crop, padding=2), in_axes=(0, None))
    padded = np.pad(IMAGES[0], ((2, 2), (2, 2), (0, 0)))
    wanted = {
        padded[y : y + 12, x : x + 9].tobytes(): 0 for y in range(5) for x in range(5)
    }
    found = collections.Counter(
        np.asarray(c).tobytes() for c in jax.jit(crop)(keys, IMAGES[0])
    )
    assert set(found) == set(wanted)
    assert min(found.values()) > 60 and max(found.values()) < 140  # 100 expected


def test_cutout_is_a_square_around_any_pixel():
    keys = jax.random.split(jax.random.key(1), 2000)
    cut = jax.vmap(functools.partial(crops.cutout, side=4, fill=0), in_axes=(0, None))
    holes = (np.asarray(jax.jit(cut)(keys, IMAGES[0])) == 0).all(-1)
    expected = set()
    for y, x in np.ndindex(12, 9):
        hole = np.zeros((12, 9), bool)
        hole[max(y - 2, 0) : y + 2, max(x - 2, 0) : x + 2] = True
        expected.add(hole.tobytes())
    assert {hole.tobytes() for hole in holes} == expected


def test_a_resized_crop_has_the_drawn_fraction_of_the_area():
    def draw(key):
        return crops.draw_crop(key, 64, 64, (0.08, 1.0), (3 / 4, 4 / 3))

    keys = jax.random.split(jax.random.key(1), 2000)
    starts, sizes = map(np.asarray, jax.jit(jax.vmap(draw))(keys))
    assert (starts >= 0).all() and (starts + sizes <= 64).all() and (sizes > 0).all()
    area = sizes.prod(1) / 64**2
    assert 0.07 < area.min() < 0.12 and 0.9 < area.max() <= 1
    shape = sizes[:, 1] / sizes[:, 0]
    assert 0.72 < shape.min() < 0.8 and 1.25 < shape.max() < 1.4


def test_sub_policies_are_uniform_and_steps_have_their_probability():
    count, parsed = 40_000, autoaugment.parse(autoaugment.CIFAR10)
    chances = np.array([[p for _, p, _ in steps] for steps in parsed], np.float32)
    draw = jax.jit(jax.vmap(autoaugment.draw, in_axes=(0, None)))
    rows, where = draw(jax.random.split(jax.random.key(2), count), chances)
    rows = np.asarray(rows)
    for step in range(2):
        applied = rows[:, step][rows[:, step] > 0] - 1
        assert (applied // 2 % 2 == step).all()
        assert abs((applied % 2).mean() - 0.5) < 0.02  # both directions
        frequency = np.bincount(applied // 4, minlength=25) / (count / 25)
        np.testing.assert_allclose(frequency, chances[:, step], atol=0.1)
        assert (frequency[chances[:, step] == 0] == 0).all()
    both = ((rows > 0).all(1)).mean()  # steps are independent
    assert abs(both - chances.prod(1).mean()) < 0.02
    quantiles = np.quantile(np.asarray(where), [0, 0.5, 1], axis=0)
    np.testing.assert_allclose(quantiles[:, 0, 0], [0, 0.5, 1], atol=0.02)


def test_rows_have_the_indices_that_are_drawn():
    table, chances = autoaugment._tables("cifar10", 12, 9, "nearest")
    assert len(table.rows.factor) == 1 + 2 * chances.size
    for i, steps in enumerate(autoaugment.parse(autoaugment.CIFAR10)):
        for j, (name, _, level) in enumerate(steps):
            for k, value in enumerate(autoaugment.RELEASED.values(name, level, 12, 9)):
                row = [column[1 + 2 * (2 * i + j) + k] for column in table.rows]
                expected = operations.row(value, 12, 9, "nearest")
                assert all(map(np.array_equal, row, expected))


def test_operations_are_uniform():
    draw = jax.vmap(functools.partial(randaugment.draw, steps=2, rows=1 + 14 * 2))
    keys = jax.random.split(jax.random.key(2), 14_000)
    rows = np.asarray(jax.jit(draw)(keys))
    counts = np.bincount(rows.ravel(), minlength=29)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:] / rows.size * 28, 1, atol=0.15)
    assert abs(np.corrcoef(rows.T)[0, 1]) < 0.03  # steps are independent


@pytest.mark.parametrize("name", autoaugment.POLICIES)
def test_the_papers_tables_have_25_sub_policies_of_two_steps(name):
    policies = autoaugment.parse(autoaugment.POLICIES[name][0])
    assert len(policies) == 25
    for steps in policies:
        assert len(steps) == 2
        for operation, chance, level in steps:
            assert operation in operations.OPERATIONS
            assert 0 <= chance <= 1 and level in range(10)


def test_fast_autoaugments_sub_policies_are_the_authors():
    """Counts and first and last rows of `fa_reduced_cifar10`."""
    policies = fast_autoaugment.sub_policies()
    assert len(policies) == 493
    counts = collections.Counter(name for steps in policies for name, _, _ in steps)
    assert counts["Cutout"] == 79 and counts["Solarize"] == 48 and len(counts) == 15
    assert policies[0] == (
        ("Contrast", 0.8320659688593578, 0.49884310562180767),
        ("TranslateX", 0.41849883971249136, 0.394023086494538),
    )
    numbers = [n for steps in policies for _, *both in steps for n in both]
    assert min(numbers) >= 0 and max(numbers) <= 1
    assert fast_autoaugment.values("Rotate", 0.75, 32, 32) == (
        ("Rotate", 15.0),
        ("Rotate", -15.0),
    )
    assert fast_autoaugment.values("TranslateX", 1.0, 20, 40)[0] == ("TranslateX", 18.0)


def test_values_of_levels_are_the_papers():
    released = autoaugment.RELEASED.values
    assert released("ShearX", 5, 32, 32) == (("ShearX", 0.15), ("ShearX", -0.15))
    assert released("TranslateY", 9, 32, 32) == (("TranslateY", 9), ("TranslateY", -9))
    assert released("Rotate", 9, 32, 32)[1] == ("Rotate", -27)
    assert released("Solarize", 5, 32, 32)[0] == ("Solarize", 128)
    assert released("Posterize", 7, 32, 32)[0] == ("Posterize", 2)
    assert released("Color", 0, 32, 32) == (("Color", 0.1),) * 2
    assert autoaugment.PAPER.values("Posterize", 8, 224, 224)[0] == ("Posterize", 5)
    wide = randaugment.WIDE.values
    assert wide("TranslateX", 30, 224, 224)[0] == ("TranslateX", 32)
    assert wide("TranslateX", 30, 16, 16)[0] == ("TranslateX", 16)
    assert wide("Posterize", 30, 32, 32)[0] == ("Posterize", 2)
    assert wide("Rotate", 30, 32, 32)[0] == ("Rotate", 135)
    mirrored = magnitudes.Magnitudes(
        levels=30, translate=0.5, factors=(1.0, 1.9), mirrored=True
    )
    up, down = (value for _, value in mirrored.values("Color", 10, 32, 32))
    assert (up, down) == pytest.approx((1.3, 0.7))


def test_magnitude_zero_is_the_identity_for_operations_with_a_magnitude():
    table = randaugment._table(
        dataclasses.replace(randaugment.WIDE, factors=(1.0, 1.9), mirrored=True),
        (0,),
        12,
        9,
        "nearest",
    )
    for row in range(1, len(table.rows.factor)):
        same = [
            np.array_equal(column[row], column[0])
            for field, column in zip(table.rows._fields, table.rows, strict=True)
            if field != "blend"
        ]
        name = randaugment.DRAWN[(row - 1) // 2]
        assert all(same) == (name not in ("AutoContrast", "Equalize")), name


def test_fields_change_a_policy_and_errors_list_the_known_ones():
    assert augment.fields("randaugment")["magnitude"] == 9
    assert "policy" not in augment.fields("autoaugment_svhn")
    identity = augment.policy("cutout", flip=False, crop=0, cutout=0)
    np.testing.assert_array_equal(identity(KEYS[0], IMAGE), IMAGES[0])
    assert augment.policy("flip") is augment.policy("flip")
    for arguments, message in (
        ({"name": "randaugmnet"}, "'randaugmnet'; known: none, flip, .*randaugment"),
        ({"name": "flip", "magnitude": 3}, "no field 'magnitude'; known: flip, crop"),
        ({"name": "flip", "crop": 4}, r"crop: in \[0, 1\], not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            augment.policy(**arguments)
    for values in ({"magnitude": 31}, {"count": 0}, {"resampling": "cubic"}):
        with pytest.raises(ValueError, match="31|at least 1|known: nearest"):
            augment.policy("randaugment", **values)


LABELS = np.eye(6, dtype=np.float32)
WEIGHTS = np.array([1, 0.5, 1, 1, 0, 0], np.float32)


@functools.cache
def mixed(mix, count: int):
    keys = jax.random.split(jax.random.key(3), 40)
    over = jax.vmap(mix, in_axes=(0, None, None, None))
    rows = slice(count)
    images, labels = jax.jit(over)(keys, IMAGES[rows], LABELS[rows], WEIGHTS[rows])
    return np.asarray(images), np.asarray(labels)


@pytest.mark.parametrize("mix", [mixup.mixup, mixup.cutmix])
def test_padding_is_not_mixed_and_has_no_effect(mix):
    images, labels = mixed(mix, 6)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[:, 4:], np.stack([IMAGES[4:]] * 40))
    np.testing.assert_array_equal(labels[:, 4:], np.stack([LABELS[4:]] * 40))
    assert (labels[:, :4, 4:] == 0).all()
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)
    assert (labels[:, :4].max(-1) < 0.9).any()
    fewer_images, fewer_labels = mixed(mix, 4)
    np.testing.assert_array_equal(fewer_images, images[:, :4])
    np.testing.assert_allclose(fewer_labels, labels[:, :4], atol=1e-6)


def test_mixup_mixes_images_and_labels_by_the_same_ratio():
    images, labels = mixed(mixup.mixup, 6)
    expected = np.einsum("nbk,khwc->nbhwc", labels, IMAGES.astype(np.float32))
    assert np.abs(expected - images).max() < 0.51
    ratios = labels[:, np.arange(4), np.arange(4)].min(1)
    assert ratios.min() < 0.2 and ratios.std() > 0.1  # alpha = 1: uniform


def test_cutmix_mixes_labels_by_the_area_of_one_box():
    images, labels = mixed(mixup.cutmix, 6)
    for image, label in zip(images, labels, strict=True):
        for row in range(4):
            partner = np.argmax(np.where(np.arange(6) == row, 0, label[row]))
            if label[row, partner] == 0:  # its own partner
                np.testing.assert_array_equal(image[row], IMAGES[row])
                continue
            own = (image[row] == IMAGES[row]).all(-1)
            other = (image[row] == IMAGES[partner]).all(-1)
            assert (own | other).all()
            assert other.mean() == pytest.approx(label[row, partner], abs=1e-5)


def test_every_real_row_is_a_partner_once():
    partners = jax.jit(mixup.partners)
    weights = jnp.array([0.0, 1.0, 1.0, 0.0, 1.0])
    seen = set()
    for seed in range(50):
        chosen = np.asarray(partners(jax.random.key(seed), weights))
        assert sorted(chosen[[1, 2, 4]]) == [1, 2, 4] and list(chosen[[0, 3]]) == [0, 3]
        seen.add(tuple(chosen))
    assert len(seen) == 6
