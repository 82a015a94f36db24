"""Images that show another class: predicted labels, how many, and which."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import measured, real_set
from test_set_metrics import drawn_set

from mvc_jax.metrics import compare, distances, other_class, points, statistics


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(points, "_ROWS", 8)
    monkeypatch.setattr(points, "_COLUMNS", 8)
    monkeypatch.setattr(points, "_STRIP", 4)


def searched(train, labels, drawn, own, k, **part):
    search = other_class.LabelSearch(labels, own, k)
    for found in points.visit_blocks(train, drawn, search.visit, **part):
        search.add(found)
    return search


def by_hand(train, labels, drawn, own, k):
    """Label, votes, nearest of that class and nearest of its own, one by one."""
    rows = []
    for point, mine in zip(drawn.astype(int), own, strict=True):
        squared = ((train.astype(int) - point) ** 2).sum(1)
        order = np.argsort(squared, kind="stable")
        near = labels[order[:k]]
        votes = {label: int((near == label).sum()) for label in near}
        label = max(votes, key=votes.get)  # the first: of the nearest
        same = [i for i in order if labels[i] == mine]
        first = next(i for i in order if labels[i] == label)
        rows.append((label, votes[label], first, same[0] if same else -1))
    return np.asarray(rows).T


@pytest.mark.parametrize("k", [1, 3, 5, 40])
def test_labels_are_those_of_the_nearest_neighbours(small_blocks, k):
    rng = np.random.default_rng(0)  # of few levels, so that many distances are equal
    train, drawn = (rng.integers(0, 4, (n, 3)).astype(np.uint8) for n in (29, 23))
    labels, own = rng.integers(0, 4, 29), rng.integers(0, 5, 23)
    a, b = distances.Points(train), distances.Points(drawn)
    found = searched(a, labels, b, own, k).predictions()
    expected = by_hand(train, labels, drawn, own, k)
    for mine, theirs in zip(
        (found.label, found.votes, found.train, found.own), expected, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert (found.own[own == 4] == -1).all()
    parts = [searched(a, labels, b, own, k, part=(i, 2)) for i in (1, 0)]
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].predictions().train, found.train)
    np.testing.assert_array_equal(parts[0].predictions().own, found.own)
    assert isinstance(parts[0], compare.Accumulator)


def test_float_features_have_the_same_labels(small_blocks):
    rng = np.random.default_rng(1)
    train, drawn = (rng.normal(size=(n, 6)).astype(np.float32) for n in (29, 23))
    labels, own = rng.integers(0, 4, 29), rng.integers(0, 4, 23)
    found = searched(
        distances.Points(train), labels, distances.Points(drawn), own, 5
    ).predictions()
    squared = ((drawn[:, None] - train[None]) ** 2).sum(2)
    near = labels[np.argsort(squared, axis=1)[:, :5]]
    votes = (near[:, :, None] == near[:, None]).sum(2)
    np.testing.assert_array_equal(found.label, near[range(23), votes.argmax(1)])
    squared[labels[None] != own[:, None]] = np.inf
    np.testing.assert_array_equal(found.own, squared.argmin(1))


def two_classes(count, *, seed):
    """Dark images (0), then light ones (1), all different."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (2 * count, 8, 8, 3))
    images[count:] += 190
    return images.astype(np.uint8), np.repeat([0, 1], count).astype(np.int32)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """Metrics of 40 images, of which the labels of ten are swapped."""
    folder = tmp_path_factory.mktemp("swapped")
    sets = [
        real_set(name, *two_classes(count, seed=seed))
        for seed, (name, count) in enumerate((("train", 12), ("test", 30)))
    ]
    images, labels = two_classes(20, seed=2)
    labels[[*range(4), *range(20, 26)]] ^= 1
    sets.append(drawn_set("mixed", images, labels, np.arange(40) % 24))
    return folder, measured(folder, sets)


def test_images_of_swapped_labels_are_found_and_listed(swapped):
    _, found = swapped
    images = found["images"]
    json.dumps(found, allow_nan=False)
    mixed = images["sets"]["mixed"]["other_class"]
    rule = mixed["rules"]["nearest"]
    assert (rule["images"], rule["count"], rule["fraction"]) == (40, 10, 0.25)
    assert rule["test"] == {"images": 60, "count": 0, "fraction": 0}
    assert rule["difference"] == 0.25 and 0 < rule["low"] < 0.25 < rule["high"]
    assert [(x["images"], x["nearest"]) for x in mixed["classes"]] == [(22, 6), (18, 4)]
    assert mixed["classes"][1]["test_images"] == 30
    assert mixed["classes"][1]["test_nearest"] == 0
    listed = mixed["most_certain"]
    assert sorted(x["image"] for x in listed) == [*range(4), *range(20, 26)]
    assert all(x["predicted"] == 1 - x["label"] for x in listed)
    assert all(x["votes"] == mixed["neighbours"] == 2 for x in listed)
    ratios = [x["nearest"]["distance"] / x["own"]["distance"] for x in listed]
    assert ratios == pytest.approx([x["ratio"] for x in listed])
    assert ratios == sorted(ratios) and ratios[-1] < 1
    (note,) = (x for x in images["notes"] if x.startswith("mixed: 25.0 %"))
    assert "40 images have nearest training images of another class" in note
    assert "0.0 % of test images: +25.0 points (95 % interval +" in note


def test_the_table_of_nearest_images_has_predicted_labels(swapped):
    import pyarrow.parquet as pq

    folder, _ = swapped
    rows = pq.read_table(folder / "evaluate" / "nearest" / "mixed.parquet").to_pylist()
    assert (rows[0]["label"], rows[0]["predicted"], rows[0]["votes"]) == (1, 0, 2)
    assert int(rows[0]["train_of_predicted"].removeprefix("train")) < 12
    assert int(rows[0]["train_of_own"].removeprefix("train")) >= 12


def test_a_set_as_good_as_the_test_images_is_not_remarked_on(tmp_path):
    sets = [
        real_set(name, *two_classes(8, seed=seed))
        for seed, name in enumerate(("train", "test"))
    ]
    images, labels = two_classes(8, seed=2)
    mixed = drawn_set("mixed", images, labels, [0] * 16)
    found = measured(tmp_path, [*sets, mixed])["images"]
    assert found["sets"]["mixed"]["other_class"]["most_certain"] == []
    assert not any("another class" in note for note in found["notes"])


def test_one_class_has_no_other(tmp_path):
    images = two_classes(4, seed=0)[0]
    sets = [real_set("train", images), real_set("test", images[:3])]
    sets.append(drawn_set("mixed", images, [0] * 8, [0] * 8))
    found = measured(tmp_path, sets)["images"]["sets"]
    assert found["mixed"]["other_class"] is found["test"]["other_class"] is None


def predictions(label, zero_shot=None):
    label = np.asarray(label)
    rows = np.arange(len(label))
    zero_shot = None if zero_shot is None else np.asarray(zero_shot)
    return other_class.Predictions(label, rows, rows, rows, zero_shot)


def test_both_rules_are_counted_and_test_classes_weigh_as_in_the_set():
    labels = np.asarray([0, 0, 0, 1])
    mine = other_class.describe(
        predictions([0, 1, 1, 1], [0, 0, 0, 0]), labels, np.zeros(4, int), 3
    )
    test = other_class.describe(
        predictions([0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 0]),
        np.asarray([0, 0, 1, 1, 1, 2]),
        None,
        3,
    )
    found = other_class.with_baseline(mine, test, 0.95)
    nearest, zero_shot = (found["rules"][x] for x in other_class.RULES)
    assert nearest["fraction"] == 0.5 and zero_shot["fraction"] == 0.25
    assert nearest["test"] == {"images": 6, "count": 1, "fraction": 0.75 * 0.5}
    assert zero_shot["test"]["count"] == 2
    assert found["classes"][0] == {
        "images": 3,
        "nearest": 2,
        "zero_shot": 0,
        "test_images": 2,
        "test_nearest": 1,
        "test_zero_shot": 1,
    }
    empty = other_class.describe(predictions([2], [2]), np.asarray([2]), None, 3)
    no_class = other_class.with_baseline(mine, empty, 0.95)
    assert no_class["rules"]["nearest"]["low"] is None
    assert other_class.notes("mixed", no_class, 0.95) == []


def test_the_interval_of_two_fractions_is_the_published_one():
    """Newcombe 1998, table II, method 10: 56/70 - 48/80."""
    ours, theirs = (56 / 70, 70.0), (48 / 80, 80.0)
    found = statistics.difference_of_fractions(ours, theirs, 0.95)
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_interval_covers_the_difference_where_images_share_sources():
    """Six images of each of 60 sources, whose flags are correlated, and 300 others."""
    rng, draws = np.random.default_rng(0), 400
    groups, covered, above = np.repeat(np.arange(60), 6), 0, 0
    for _ in range(draws):
        of_source = rng.beta(0.15 * 3, 0.85 * 3, 60)  # a correlation of 1/4
        flags = rng.random(360) < of_source[groups]
        other = float((rng.random(300) < 0.15).mean())
        effective = statistics.effective_count(flags, groups)
        ours = float(flags.mean()), effective
        low, high = statistics.difference_of_fractions(ours, (other, 300.0), 0.95)
        covered, above = covered + (low <= 0 <= high), above + (low > 0)
    assert 0.92 <= covered / draws <= 0.98 and above / draws < 0.05


@given(st.data())
@settings(max_examples=30)
def test_images_of_one_source_are_no_more_than_independent_ones(data):
    flags = np.asarray(data.draw(st.lists(st.booleans(), min_size=2, max_size=20)))
    rows = np.arange(len(flags))
    alone = statistics.effective_count(flags, rows)
    assert alone == pytest.approx(len(flags))
    groups = np.asarray(data.draw(st.lists(st.integers(0, 3), min_size=20)))
    assert statistics.effective_count(flags, groups[: len(flags)]) <= len(flags) + 1e-9
    twice = statistics.effective_count(np.repeat(flags, 3), np.repeat(rows, 3))
    assert twice == pytest.approx(alone, rel=1e-9)
