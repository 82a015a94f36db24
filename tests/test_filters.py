"""What each filter removes, and that it depends on image, recipe and data alone."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from mvc_jax.configs import common
from mvc_jax.data import digits, splits
from mvc_jax.errors import UserError
from mvc_jax.screening import filters, folds
from mvc_jax.screening.settings import FilterSettings, check_filters

PER_CLASS = 12
OFF = FilterSettings()
LABEL, COPIES = FilterSettings(label="folds"), FilterSettings(copies="any")
OUTLIERS = FilterSettings(outliers=True)
ALL = FilterSettings(label="folds", copies="any", outliers=True)


def split_of(images, labels, names=None):
    names = names or [f"class {k}" for k in range(max(labels) + 1)]
    ids = tuple(f"i{n}" for n in range(len(images)))
    labels = np.asarray(labels, np.int32)
    return splits.Split(np.asarray(images), labels, ids, tuple(names), True)


@pytest.fixture(scope="module")
def data():
    """(training images, others of the same classes), both as splits of digits."""
    source = digits.Digits()
    members = [np.flatnonzero(source.labels == k) for k in range(10)]

    def some(first, count):
        chosen = [i for mine in members for i in mine[first : first + count]]
        images = np.stack([source[int(i)]["image"] for i in chosen])
        return split_of(images, source.labels[chosen].tolist(), digits.NAMES)

    return some(0, PER_CLASS), some(PER_CLASS, 6)


def recipes(train, labels, seed=0):
    """A source and a partner of its class for each label."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in labels:
        members = np.flatnonzero(train.labels == label)
        source, partner = rng.choice(members, 2, replace=False)
        row = {"source": train.ids[source], "partners": [train.ids[partner]]}
        rows.append(row | {"label": int(label)})
    return rows


_FITTED = {}


def fitted(fields, train):
    """Filters without a CLIP, fitted once for the whole file."""
    key = (fields, id(train))
    if key not in _FITTED:
        _FITTED[key] = filters.FittedFilters(fields, train, seed=0)
    return _FITTED[key]


def test_nothing_is_removed_with_the_filters_off(data):
    train, others = data
    rows = recipes(train, others.labels)
    noise = np.random.default_rng(0).integers(0, 256, others.images.shape, np.uint8)
    for images in (others.images, noise, np.resize(train.images, others.images.shape)):
        assert fitted(OFF, train)(images, rows) == [[] for _ in rows]
    assert not OFF.enabled and not OFF.use_embeddings


def test_a_pasted_copy_is_removed_and_named(data):
    train, others = data
    rows = recipes(train, others.labels[:3])
    mine = train.ids.index(rows[0]["source"])
    theirs = (mine + 17) % len(train.ids)
    nearly = train.images[theirs].copy()
    nearly[0, 0] += 3
    images = np.stack([train.images[mine], nearly, others.images[2]])
    source, other, new = fitted(COPIES, train)(images, rows)
    assert new == []
    assert source[0].filter == other[0].filter == "copies"
    assert "its source" in source[0].reason and source[0].real == rows[0]["source"]
    assert train.ids[theirs] in other[0].reason and other[0].real == train.ids[theirs]
    assert source[0].score == 0 < other[0].score < other[0].threshold

    own = fitted(FilterSettings(copies="source"), train)(images, rows)
    assert own == [source, [], []]


def test_a_larger_copies_quantile_removes_more(data):
    train, others = data
    rows = recipes(train, others.labels)
    counts = [
        sum(
            map(
                bool,
                fitted(FilterSettings(copies="any", copies_quantile=q), train)(
                    others.images, rows
                ),
            )
        )
        for q in (0.0, 0.5, 1.0)
    ]
    assert 0 <= counts[0] < counts[1] < counts[2] <= len(rows)


def test_noise_is_an_outlier_and_other_real_images_rarely_are(data):
    train, others = data
    rows = recipes(train, others.labels)
    noise = np.random.default_rng(0).integers(0, 256, others.images.shape, np.uint8)
    found = fitted(OUTLIERS, train)(noise, rows)
    assert all(len(findings) == 1 for findings in found)
    for [finding], row in zip(found, rows, strict=True):
        assert finding.filter == "outliers" and finding.score > finding.threshold
        assert train.class_names[row["label"]] in finding.reason
        assert train.labels[train.ids.index(finding.real)] == row["label"]
    real = fitted(OUTLIERS, train)(others.images, rows)
    assert sum(map(bool, real)) < 0.25 * len(rows)


def test_an_image_of_the_wrong_class_is_removed_by_its_label(data):
    train, others = data
    find = fitted(LABEL, train)
    right = find(others.images, recipes(train, others.labels))
    wrong_labels = (others.labels + 3) % 10
    wrong = find(others.images, recipes(train, wrong_labels))
    assert sum(map(bool, right)) < 0.25 * len(right)
    assert sum(map(bool, wrong)) > 0.9 * len(wrong)
    caught = [i for i, findings in enumerate(wrong) if findings and not right[i]]
    [finding] = wrong[caught[0]]
    assert finding.filter == "label" and finding.score < finding.threshold == 0.5
    assert finding.reason.startswith("looks like ")
    facts = find.facts["label"]
    assert facts["real_images"] == len(train.ids)
    assert 0 < facts["real_removed"] < 0.3 * len(train.ids)


def test_threshold_or_rank_is_enough_to_keep_an_image(data):
    train, others = data
    rows = recipes(train, (others.labels + 3) % 10)

    def removed(**fields):
        found = fitted(FilterSettings(label="folds", label_folds=3, **fields), train)(
            others.images, rows
        )
        return {i for i, findings in enumerate(found) if findings}

    assert removed(label_threshold=0.0, label_top=0) == set()
    assert removed(label_threshold=1.0, label_top=10) == set()
    assert removed(label_threshold=1.0, label_top=0) == set(range(len(rows)))
    by_rank = removed(label_threshold=1.0, label_top=3)
    by_threshold = removed(label_threshold=0.05, label_top=0)
    both = removed(label_threshold=0.05, label_top=3)
    assert both == by_rank & by_threshold
    assert by_rank != by_threshold


def test_findings_depend_on_neither_order_nor_batch(data):
    train, others = data
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    images = np.concatenate([others.images[::2], train.images[:4], noise])
    labels = [*others.labels[::2], *train.labels[:4], *range(4)]
    rows = recipes(train, labels)
    found = fitted(ALL, train)(images, rows)
    assert {f.filter for findings in found for f in findings} == {
        "label",
        "copies",
        "outliers",
    }
    again = filters.FittedFilters(ALL, train, seed=0)  # as after an interruption
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = []
    for start in range(0, len(order), 5):
        part = order[start : start + 5]
        shuffled += again(images[part], [rows[i] for i in part])
    assert [shuffled[i] for i in np.argsort(order)] == found
    assert again([], []) == []


@pytest.fixture(scope="module")
def leaky():
    """Dark and bright images, and a mislabelled bright one (3) with a unique mark.

    It has a duplicate (7). Only a classifier trained on one of these predicts "dark".
    """
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12)
    images = rng.integers(0, 60, (24, 8, 8, 3), np.uint8)
    images[labels == 1] += 160
    images[3] = images[20]
    images[3, 2:6, 2:6] = 0
    images[7] = images[3]
    return split_of(images, labels.tolist(), ["dark", "bright"])


def test_an_image_is_classified_without_its_source_partners_and_duplicates(leaky):
    find = fitted(LABEL, leaky)
    fold_of = folds.assign_folds(
        np.where(np.arange(24) == 7, 3, np.arange(24)),
        leaky.labels.astype(np.int64),
        folds=5,
        seed=0,
    )
    assert fold_of[3] == fold_of[7]  # duplicates are in one fold
    elsewhere = [leaky.ids[i] for i in range(12) if fold_of[i] != fold_of[3]]
    image = leaky.images[3:4]

    def kept(source, *partners):
        row = {"source": source, "partners": list(partners), "label": 0}
        return find(image, [row]) == [[]]

    assert kept(elsewhere[0], elsewhere[1])  # by a classifier that has seen it
    for seen in ("i3", "i7"):
        assert not kept(seen, elsewhere[0])
        assert not kept(elsewhere[0], seen)
        assert not kept(elsewhere[0], elsewhere[1], seen)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=20),
    st.integers(2, 6),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=50)
def test_folds_are_stratified_and_keep_duplicates_together(groups, k, seed):
    labels = np.asarray([label for label, size in groups for _ in range(size)])
    copies = np.asarray([i for i, (_, size) in enumerate(groups) for _ in range(size)])
    found = folds.assign_folds(copies, labels, folds=k, seed=seed)
    assert found.min() >= 0 and found.max() < k
    for group in np.unique(copies):
        assert len(set(found[copies == group])) == 1
    firsts = np.unique(copies, return_index=True)[1]
    for label in np.unique(labels):
        counts = np.bincount(found[firsts][labels[firsts] == label], minlength=k)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(found[firsts], minlength=k)
    assert counts.max() - counts.min() <= 1
    again = folds.assign_folds(copies, labels, folds=k, seed=seed)
    np.testing.assert_array_equal(found, again)


def test_named_groups_and_duplicates_are_joined():
    copies = np.asarray([0, 1, 1, 3, 4, 5])
    assert folds.joined(copies, None) is copies
    found = folds.joined(copies, ("a", "a", "b", "c", "c", "d"))
    assert len(set(found[:3].tolist())) == 1 and found[3] == found[4]
    assert len(set(found.tolist())) == 3


def mean_colour(images):
    """Replaces CLIP: the mean colour as embedding [N, 3], not of unit length."""
    return np.asarray(images, np.float64).mean((1, 2)) + 1.0


@pytest.fixture(scope="module")
def coloured():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 6)
    images = rng.integers(0, 80, (18, 8, 8, 3), np.uint8)
    images[np.arange(18), ..., labels] += 120
    return split_of(images, labels.tolist(), ["red", "green", "blue"])


@pytest.mark.parametrize("label", ["clip", "folds"])
def test_clip_embeddings_replace_pixels(coloured, label):
    fields = FilterSettings(label=label, outliers=True)
    clip = {
        "embed": mean_colour,
        "zero_shot": lambda e: special.softmax(20 * e, axis=1),
    }
    find = filters.FittedFilters(fields, coloured, seed=0, **clip)
    assert find.facts["features"] == "clip"
    rows = recipes(coloured, [0, 1, 2])
    mixed = coloured.images[[0, 6, 12]][:, ::-1]  # same colours, other pixels
    assert find(mixed, rows) == [[], [], []]
    wrong = find(mixed[[1, 2, 0]], rows)
    for findings in wrong:
        assert [f.filter for f in findings] == ["label", "outliers"]
    by_pixels = dataclasses.replace(fields, features="pixels")
    find = filters.FittedFilters(by_pixels, coloured, seed=0, **clip)
    assert find.facts["features"] == "pixels"


def test_a_class_of_one_image_uses_the_distances_of_all_classes(data, caplog):
    train, others = data
    some = np.flatnonzero((train.labels < 2) | (np.arange(len(train.ids)) == 24))
    small = split_of(train.images[some], train.labels[some].tolist())
    find = filters.FittedFilters(OUTLIERS, small, seed=0)
    thresholds = find.facts["outliers"]["thresholds"]
    assert min(thresholds["class 0"], thresholds["class 1"]) <= thresholds["class 2"]
    assert "class 2" in caplog.text


@pytest.mark.parametrize(
    ("options", "labels", "words"),
    [
        ({"label": "folds"}, [0] * 6, ["filter.label", "two classes", "'class 0'"]),
        (
            {"label": "folds"},
            [0] * 6 + [1] * 4,
            ["filter.label_folds", "5 different", "4 in class 'class 1'", "Lower it"],
        ),
        ({"outliers": True}, [0, 1, 2], ["filter.outliers", "two different images"]),
    ],
)
def test_too_few_images_are_rejected(options, labels, words):
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    with pytest.raises(UserError) as caught:
        filters.FittedFilters(
            FilterSettings(**options), split_of(images, labels), seed=0
        )
    for word in words:
        assert word in str(caught.value)


def test_duplicates_count_once(data):
    train, _ = data
    images = np.stack([train.images[i] for i in (0, 1, 2, 3, 3, 12, 13, 14, 15, 16)])
    with pytest.raises(UserError, match="4 in class 'class 0'"):
        filters.FittedFilters(LABEL, split_of(images, [0] * 5 + [1] * 5), seed=0)


def check(fields):
    """As in a run without a CLIP, with one partner."""
    check_filters(
        fields,
        partners=1,
        clip_path="",
        base_path="",
        pretrain_image_encoder=False,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "folds", "label_folds": 2}, ["label_folds", "at least 3", "got 2"]),
        ({"label": "clip"}, ["filter.label", "config.generate.clip", "image_encoder"]),
        ({"features": "clip"}, ["filter.features", "config.generate.clip"]),
    ],
)
def test_a_wrong_field_is_rejected(options, words):
    with pytest.raises(UserError) as caught:
        check(FilterSettings(**options))
    for word in words:
        assert word in str(caught.value)


def test_more_probable_labels_than_classes_are_rejected():
    top = FilterSettings(label="folds", label_top=3)
    top.require_top(3)
    with pytest.raises(UserError, match="label_top: wanted at most 2, .* got 3"):
        top.require_top(2)
    FilterSettings(label_top=3).require_top(2)  # is not used


def test_valid_settings_pass():
    for valid in (OFF, ALL, FilterSettings(label="folds", label_folds=3)):
        check(valid)
    FilterSettings(label="clip", features="clip").require_clip(available=True)


def test_settings_have_the_fields_and_defaults_of_the_config():
    section = common.get_config().generate.filter.to_dict()
    assert FilterSettings(**section) == OFF
