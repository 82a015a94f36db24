"""Who may see which image: nobody sees two parts, nothing is lost, errors name it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import splits
from mvc_jax.errors import UserError


@dataclasses.dataclass
class Fake:
    """A source of flat images whose grey value is their index; classes interleaved."""

    counts: list[int]

    def __post_init__(self):
        self.class_names = tuple("abcdefgh"[: len(self.counts)])
        labels = np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)
        self.labels = np.random.default_rng(0).permutation(labels)
        self.ids = tuple(f"fake/{i}" for i in range(len(labels)))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = np.full((5, 9, 3), index, np.uint8)
        label = int(self.labels[index])
        return {"image": image, "label": label, "id": self.ids[index]}


# Of at least 8 images of a class, 40 % pool, 3 train and 1 test never run out.
counts_of_classes = st.lists(st.integers(8, 40), min_size=1, max_size=6)


@given(counts_of_classes, st.floats(0, 0.4), st.integers(1, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_parts_are_disjoint_whole_and_stratified(counts, share, per_class, seed):
    source, counts = Fake(counts), np.asarray(counts)
    pool = int(share * len(source))
    parts = splits.make_splits(source, pool=pool, per_class=per_class, seed=seed)
    everything = np.concatenate([parts[name] for name in splits.SPLITS])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(source)))

    size = {
        name: np.bincount(source.labels[part], minlength=len(counts))
        for name, part in parts.items()
    }
    assert size["pool"].sum() == pool
    exact = pool * counts / counts.sum()
    up = size["pool"] > exact  # only the largest remainders are rounded up, to the next
    assert (np.abs(size["pool"] - exact) < 1).all()
    assert not up.any() or min(exact[up] % 1) >= max(exact[~up] % 1, default=0)
    assert (size["train"] == per_class).all()
    assert (size["test"] > 0).all()


def test_the_seed_and_nothing_else_chooses_the_parts():
    source = Fake([50, 50])
    first, again, other = (
        splits.make_splits(source, pool=20, per_class=10, seed=seed)
        for seed in (0, 0, 1)
    )
    for name in splits.SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
        assert set(first[name]) != set(other[name])


@pytest.mark.parametrize(
    ("counts", "pool", "per_class", "name", "words"),
    [
        ([9, 5], 0, 5, "config.data.per_class", ["'b'", "per_class=5", "to 4 or less"]),
        ([9, 5], 7, 3, "config.data.per_class", ["'b'", "5 images", "data.pool"]),
        ([9, 5], 99, 1, "config.data.p", ["lower config.data.pool"]),
        ([9, 0, 9], 0, 1, "class 'b'", ["at least one image", "none", "out"]),
    ],
)
def test_too_few_images_is_an_error_with_a_way_out(
    counts, pool, per_class, name, words
):
    with pytest.raises(UserError) as error:
        splits.make_splits(Fake(counts), pool=pool, per_class=per_class, seed=0)
    assert str(error.value).startswith(name)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("counts", "pool"), [([30, 1], 0), ([20, 20], 40)], ids=["lone image", "pool"]
)
def test_the_way_out_is_a_value_that_is_allowed(counts, pool):
    """Some training image is needed: "lower per_class to 0" leads to another error."""
    with pytest.raises(UserError) as error:
        splits.make_splits(Fake(counts), pool=pool, per_class=1, seed=0)
    assert "to 0 or less" not in str(error.value)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(file of a split of a fake source, the source, the parts)"""
    source = Fake([12, 8])
    parts = splits.make_splits(source, pool=6, per_class=2, seed=3)
    parts["train"] = parts["train"][::-1]
    splits.write_splits(tmp_path / "splits.json", source, parts)
    monkeypatch.setattr(splits, "open_source", {"fake": source}.get)
    return tmp_path / "splits.json", source, parts


@pytest.mark.parametrize("name", splits.SPLITS)
def test_a_split_comes_back_in_its_order_with_its_labels(written, name):
    path, source, parts = written
    split = splits.read_split(path, name, source="fake", size=4)
    assert split.ids == tuple(source.ids[i] for i in parts[name])
    np.testing.assert_array_equal(split.labels, source.labels[parts[name]])
    assert split.labels.dtype == np.int32
    assert split.class_names == source.class_names
    flat = np.broadcast_to(
        parts[name][:, None, None, None], (len(parts[name]), 4, 4, 3)
    )
    np.testing.assert_array_equal(split.images, flat)


def test_an_image_that_left_the_source_is_named(written, monkeypatch):
    path, source, parts = written
    gone = source.ids[parts["train"][0]]
    source.ids = tuple("other" if i == gone else i for i in source.ids)
    with pytest.raises(UserError, match=gone):
        splits.read_split(path, "train", source="fake", size=4)


def test_resizing_to_the_same_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(splits.resize(image, 7), image)


def test_resizing_keeps_channels_places_and_averages():
    """A red left half stays red and left, smaller or larger; the mean stays."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8, 0] = 200
    for size in (4, 8, 40):
        small = splits.resize(image, size)
        assert small.shape == (size, size, 3)
        assert small[:, 0, 0].min() > 150
        assert small[:, -1].max() < 50
        assert small[..., 1:].max() == 0
        assert abs(small[..., 0].mean() - 100) < 2
