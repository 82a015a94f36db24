"""Same-class pairs: one per image, source and target drawn independently."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax import files, pairs
from mvc_jax.configs import common
from mvc_jax.stage import Spec, open_stage

labels_of_images = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.asarray)


@given(labels_of_images, st.integers(0, 99), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_each_class_has_as_many_pairs_as_images_in_every_draw(labels, seed, round_):
    made = pairs.make_pairs(labels, seed, round_)
    source, target = made.T
    np.testing.assert_array_equal(labels[source], labels[target])
    np.testing.assert_array_equal(np.bincount(labels[source]), np.bincount(labels))
    np.testing.assert_array_equal(made, pairs.make_pairs(labels, seed, round_))


def test_the_only_image_of_a_class_is_paired_with_itself():
    made = pairs.make_pairs(np.array([2, 7, 2]), seed=0, round_=5)
    assert [1, 1] in made.tolist()


def test_seeds_and_rounds_differ():
    labels = np.zeros(50, int)
    made = [pairs.make_pairs(labels, *x).tolist() for x in ((0, 0), (0, 1), (1, 0))]
    assert made[0] != made[1] != made[2] != made[0]


def test_source_and_target_are_independent_and_uniform():
    """All nine pairs of three images are equally frequent, self-pairs included."""
    labels, rounds = np.array([1, 0, 1, 0, 1]), 400
    made = np.concatenate([pairs.make_pairs(labels, 0, r) for r in range(rounds)])
    seen = made[labels[made[:, 0]] == 1]
    members = np.flatnonzero(labels == 1)
    table = [[np.sum((seen == (i, j)).all(1)) for j in members] for i in members]
    expected = rounds * 3 / 9
    assert np.abs(np.asarray(table) - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_stage_writes_its_rounds_in_order(tmp_path, rounds):
    labels = [0, 1, 1, 0, 1]
    encode = open_stage(tmp_path, Spec("encode", {}))
    rows = [{"label": label} for label in labels]
    files.write_jsonl(encode.folder / "prompts.jsonl", rows)
    encode.finish(["prompts.jsonl"])
    config = common.get_config()
    config.pairs.rounds = rounds
    pairs.run(config, tmp_path)
    written = files.read_array(tmp_path / "pairs" / "pairs.npy")
    assert written.dtype == np.int32
    for r, part in enumerate(written.reshape(rounds, len(labels), 2)):
        expected = pairs.make_pairs(np.asarray(labels), config.seed, r)
        np.testing.assert_array_equal(part, expected)
