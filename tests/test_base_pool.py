"""A base from elsewhere: its pool, its captions, what it shares with test."""

import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvc_jax import caption, pretrain
from mvc_jax.configs import common
from mvc_jax.data import base_pool, splits
from mvc_jax.errors import UserError
from mvc_jax.reporting import training_pictures
from mvc_jax.stage import differences


class Labelled:
    """A source of which only labels are read."""

    defects, remarks = {}, ()

    def __init__(self, labels, is_test=None):
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple("abcdef")
        self.is_test = is_test
        self.ids = tuple(map(str, range(len(labels))))

    def __getitem__(self, index):
        raise AssertionError("no image is read")

    def __len__(self):
        return len(self.labels)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), data=st.data())
def test_a_pool_is_in_proportion_and_has_no_test_image(labels, data):
    is_test = np.asarray(data.draw(st.lists(st.booleans(), min_size=len(labels),
                                            max_size=len(labels))))  # fmt: skip
    source = Labelled(labels, is_test)
    free = np.flatnonzero(~is_test)
    count = data.draw(st.integers(1, len(labels)))
    if count > len(free):
        with pytest.raises(UserError, match=f"at most the {len(free)} images.*{count}"):
            base_pool.choose(source, count, seed=0)
        return
    chosen = base_pool.choose(source, count, seed=0)
    assert all(not len(chosen[name]) for name in splits.SPLITS if name != "pool")
    pool = chosen["pool"]
    assert len(pool) == len({*pool.tolist()}) == count
    assert {*pool.tolist()} <= {*free.tolist()}
    there = np.bincount(source.labels[free], minlength=6)
    counts = np.bincount(source.labels[pool], minlength=6)
    assert (np.abs(counts - count * there / len(free)) < 1).all()
    again = base_pool.choose(source, count, seed=0)["pool"]
    np.testing.assert_array_equal(again, pool)
    everything = base_pool.choose(source, 0, seed=0)["pool"]
    np.testing.assert_array_equal(everything, free)


def draw(folder, classes, count, seed):
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(count):
            small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((24, 24), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{k}.png")


@pytest.fixture
def folders(tmp_path):
    """Images to classify, and others of other classes."""
    draw(tmp_path / "ours" / "train", ("glioma", "healthy"), 4, 0)
    draw(tmp_path / "ours" / "test", ("glioma", "healthy"), 3, 1)
    draw(tmp_path / "theirs", ("cat", "dog", "owl"), 6, 2)
    return tmp_path


def config_of(folders):
    config = common.get_config()
    config.data.source = f"folder:{folders / 'ours'}"
    config.data.size = 16
    config.data.class_type = "brain MRI"
    config.caption.captioner = "attributes"
    config.caption.attributes = "scan"
    config.pretrain.source = f"folder:{folders / 'theirs'}"
    config.pretrain.pool.images = 12
    config.pretrain.pool.class_type = "animal"
    config.pretrain.pool.captioner = "template"
    return config


def test_a_pool_from_elsewhere_has_its_own_classes_and_captions(folders):
    config, workdir = config_of(folders), epath.Path(folders) / "run"
    caption.check(config)
    pretrain.check(config)  # no config.data.pool is needed
    expected = {k: v.sum() for k, v in caption.count_images(config, None).items()}
    caption.run(config, workdir)
    pool, texts = pretrain._read_pool(workdir / "caption", config.pretrain.source)
    assert pool.class_names == ("cat", "dog", "owl")
    assert np.bincount(pool.labels).tolist() == [4, 4, 4]
    assert {*texts} == {"animal cat", "animal dog", "animal owl"}
    train = splits.read_split(workdir / "caption", "train")
    assert train.class_names == ("glioma", "healthy") and len(train.ids) == 8
    lines = (workdir / "caption" / "captions.jsonl").read_text().splitlines()
    assert all("bright region" in json.loads(line)["caption"] for line in lines)
    found = {k: v.sum() for k, v in caption.count_images(config, workdir).items()}
    assert found == expected == {"pool": 12, "train": 8, "test": 6}
    caption.run(config, workdir)  # complete
    config.pretrain.pool.class_type = "pet"
    with pytest.raises(UserError, match="pretrain.pool.class_type: 'animal' -> 'pet'"):
        caption.run(config, workdir)


def test_the_pool_counts_only_where_there_is_a_source(folders):
    config = config_of(folders)
    with_pool = caption.stage_spec(config).settings
    config.pretrain.source = ""
    without = caption.stage_spec(config).settings
    config.pretrain.pool.class_type = "fish"
    assert caption.stage_spec(config).settings == without
    lines = differences(with_pool, without)
    assert any(line.startswith("pretrain.source") for line in lines)
    config = config_of(folders)
    config.base.path = "some/base"  # then nothing is trained
    assert "pretrain" not in caption.stage_spec(config).settings


def test_images_that_are_also_in_test_are_refused_or_removed(folders):
    for k in (0, 2):  # the same pictures in another format
        image = Image.open(folders / "ours" / "test" / "glioma" / f"{k}.png")
        image.save(folders / "theirs" / "cat" / f"copy-{k}.bmp")
    config, workdir = config_of(folders), epath.Path(folders) / "run"
    config.pretrain.pool.images = 0
    with pytest.raises(UserError) as caught:
        caption.run(config, workdir)
    assert "config.pretrain.source" in str(caught.value)
    assert "2 of 20" in str(caught.value) and "duplicates=remove" in str(caught.value)
    assert len(caught.value.details) == 2
    config.pretrain.pool.duplicates = "remove"  # nothing was kept of the first try
    caption.run(config, workdir)
    pool, _ = pretrain._read_pool(workdir / "caption", config.pretrain.source)
    assert len(pool.ids) == 18 and not any("copy" in id_ for id_ in pool.ids)


def test_too_few_images_elsewhere_are_refused_before_any_is_read(folders):
    config = config_of(folders)
    config.pretrain.pool.images = 19
    with pytest.raises(UserError, match="pretrain.pool.images.*at most the 18.*19"):
        caption.check(config)
    config.pretrain.source = f"folder:{folders / 'none'}"
    with pytest.raises(UserError, match="none"):
        caption.check(config)


def test_a_base_from_elsewhere_is_measured_on_the_images_to_augment(folders):
    config, workdir = config_of(folders), epath.Path(folders) / "run"
    section = config.pretrain
    section.vocab_size = 300
    section.vae.channels, section.unet.channels = (8, 8), (32,)
    section.vae.groups = 4
    section.text.width, section.text.layers = 16, 1
    section.judge.steps = 0
    for name in ("vae", "unet"):
        section[name].steps, section[name].batch_size = 2, 4
    section.unet.warmup = 1
    pretrain.check(config)
    caption.run(config, workdir)
    pretrain.run(config, workdir)
    measured = json.loads((workdir / "pretrain" / "quality.json").read_text())
    assert measured["to_augment"]["images"] == 8
    assert any("8 images to augment are recon" in each for each in measured["words"])
    assert any("8 images to augment have" in each for each in measured["warnings"])
    card = (workdir / "pretrain" / "model" / "README.md").read_text()
    assert "| PSNR of reconstructed images to augment |" in card
    titles = [each["title"] for each in training_pictures.base(workdir)["pictures"]]
    assert "Images to augment, and their reconstructions" in titles
