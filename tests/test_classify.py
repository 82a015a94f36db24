"""The stage before its first step: its checks, images and pretrained networks.

`test_pipeline.py` runs the whole stage, `test_classifier.py` tests its step.
"""

import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from mvc_jax import caption, classify
from mvc_jax.checkpoints import (
    classifier_card,
    classifier_export,
    classifier_weights,
    hub,
)
from mvc_jax.classification import classifier, runs, training_set
from mvc_jax.configs import digits, folder
from mvc_jax.data import splits
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.models import classifiers

SIZE, PER_CLASS, NAMES = 16, 5, ("one", "two", "three")


def split(name, counts, names=NAMES):
    """Images whose pixels are their number in the split; test images are 100 more."""
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    ids = [f"{name}-{i}" for i in range(len(labels))]
    grey = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(grey + 100 * (name == "test"), (len(ids), SIZE, SIZE, 3))
    return splits.Split(images, labels, tuple(ids), names, grey=False)


def synthetic_rows(train):
    """Two images of each training image, the second with the next one as partner."""
    count = len(train.labels)
    for k in range(2 * count):
        source, partner = k % count, (k + k // count) % count
        yield {
            "label": int(train.labels[source]),
            "source": train.ids[source],
            "partners": [train.ids[partner]],
            "image": np.full((2 * SIZE, 2 * SIZE, 3), 50 + k, np.uint8),
        }


@pytest.fixture
def read(monkeypatch, tmp_path):
    def read(train=(PER_CLASS,) * 3, test=(2, 2, 2), names=NAMES, **options):
        both = {"train": split("train", train, names)}
        both["test"] = split("test", test, names)
        both[splits.VALIDATION] = split("validation", ())
        rows = list(synthetic_rows(both["train"]))
        monkeypatch.setattr(splits, "read_split", lambda folder, name: both[name])
        monkeypatch.setattr(synthetic, "read_rows", lambda folder, columns: iter(rows))
        options = {"ratio": 0.0, "validation": 0.0} | options
        data = training_set.read(
            epath.Path(tmp_path),
            epath.Path(tmp_path) / "pixels",
            Digests(tmp_path, tmp_path / "digests.jsonl"),
            sets=["mixed"],
            size=SIZE // 2,
            data_size=SIZE,
            resize="stretch",
            resample="lanczos",
            seed=0,
            **options,
        )
        return data, rows

    return read


def test_nothing_made_from_a_held_out_image_is_trained_on(read):
    data, rows = read(validation=0.2)
    held = set(data.validation.tolist())
    assert np.bincount(data.labels[data.validation]).tolist() == [1, 1, 1]
    assert (data.rows.take(data.validation).max() < 100) and (data.test >= 100).all()
    for pool in data.pools.values():
        assert held.isdisjoint(pool.real.tolist())
        assert len(pool.real) == 3 * PER_CLASS - 3
    mixed = data.pools["mixed"]
    used = {int(row) - 3 * PER_CLASS for row in mixed.synthetic}
    names = {f"train-{row}" for row in held}
    for k, row in enumerate(rows):
        assert (k in used) == names.isdisjoint({row["source"], *row["partners"]})
    assert 0 < len(used) < len(rows)


def test_nothing_held_out_is_trained_on_with_a_ratio(read):
    data, rows = read(validation=0.2, ratio=0.6)
    names = {f"train-{row}" for row in data.validation}
    used = [rows[row - 3 * PER_CLASS] for row in data.pools["mixed"].synthetic]
    assert {row["label"] for row in used} == {0, 1, 2}
    for row in used:
        assert names.isdisjoint({row["source"], *row["partners"]})


def test_batches_from_memory_and_from_the_disk_are_equal(read):
    data, _ = read()
    draw = np.random.default_rng(0)
    index = draw.integers(0, len(data.rows), (7, 4)).astype(np.int32)
    batches = [{"index": index, "weight": np.ones((7, 4), np.float32)}] * 2
    memory, disk = (data.reader(batches, pixels=pixels) for pixels in (False, True))
    whole = data.rows.all()
    assert whole.shape == (9 * PER_CLASS, SIZE // 2, SIZE // 2, 3)
    for step in (0, 1, 2, 5, 6):  # as after a restart
        ours, theirs = memory(step), disk(step)
        assert ours["index"].shape == (4, 2)
        np.testing.assert_array_equal(whole[ours["index"]], theirs["images"])
        np.testing.assert_array_equal(data.labels[ours["index"]], theirs["labels"])
        np.testing.assert_array_equal(ours["weight"], theirs["weight"])


@pytest.mark.parametrize(
    ("options", "start", "word"),
    [
        ({"names": ("one",), "train": (3,), "test": (2,)}, "classify", "two classes"),
        ({"train": (3, 0, 3)}, "class 'two'", "training"),
        ({"test": (2, 2, 0)}, "class 'three'", "test"),
        ({"ratio": 2.5}, "config.classify.ratio", "at most 2"),
    ],
    ids=["one class", "not in train", "not in test", "ratio"],
)
def test_unsuitable_images_are_refused(read, options, start, word):
    with pytest.raises(UserError, match=word) as caught:
        read(**options)
    assert str(caught.value).startswith(start)


def test_soft_labels_are_those_of_their_rows(read, monkeypatch):
    assert read()[0].targets.dtype == np.int32
    soft = np.random.default_rng(0).dirichlet([1, 1, 1], 6 * PER_CLASS)
    soft = soft.astype(np.float32)
    monkeypatch.setattr(synthetic, "read_soft_labels", lambda folder, classes: soft)
    data, _ = read()
    np.testing.assert_array_equal(data.targets[3 * PER_CLASS :], soft)
    hard = np.eye(3)[data.labels[: 3 * PER_CLASS]]
    np.testing.assert_array_equal(data.targets[: 3 * PER_CLASS], hard)


def test_a_regime_that_needs_one_class_refuses_soft_labels():
    config = digits.get_config()
    config.generate.sets = ("diff_mix",)
    config.classify.runs = ("real", "replace_same_class:diff_mix")
    with pytest.raises(UserError, match="soft labels.*replace_same_class:diff_mix"):
        classify.check(config)


def test_policy_and_mix_may_come_in_any_order():
    first, second = (
        runs.parse("combined+cutmix+flip"),
        runs.parse("combined+flip+cutmix"),
    )
    assert (
        (first.policy, first.mix) == (second.policy, second.mix) == ("flip", "cutmix")
    )
    assert first.title == second.title == "Real + synthetic + flips + CutMix"
    assert runs.parse("real").set == "" and runs.parse("two_phase").set == "mixed"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A classifier of seven classes, as the stage writes its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = classifiers.make("resnet8", num_classes=7, width=4)
    shapes = classifier_weights.variable_shapes(model)
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: draw.random(leaf.shape, np.float32), shapes)
    classifier_export.write(
        folder,
        model,
        variables,
        variant="resnet8",
        class_names=list("abcdefg"),
        preprocessing=classifier_card.Preprocessing(
            "stretch", "lanczos", 32, 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        ),
    )
    return folder, variables


def config_with(folder, **fields):
    config = digits.get_config()
    config.classify.pretrained, config.classify.width = str(folder), 0
    config.classify.stem_stride = 1
    for name, value in fields.items():
        config.classify[name] = value
    return config


def test_a_pretrained_network_brings_its_weights_and_its_normalisation(
    read, pretrained, caplog
):
    folder, variables = pretrained
    config = config_with(folder)
    classify.check(config)
    spec, found = classify._spec(config.classify, read()[0], "float32")
    assert spec.model.num_classes == 3 and spec.model.width == 4
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for kind in ("params", "batch_stats"):
        for name, leaves in variables[kind].items():
            if name != "fc":
                jax.tree.map(np.testing.assert_array_equal, found[kind][name], leaves)
    assert "fc" not in found["params"]


def test_a_checkpoint_of_another_network_is_refused(pretrained):
    with pytest.raises(UserError, match="looks like"):
        classify.check(config_with(pretrained[0], model="resnet20"))


@pytest.mark.parametrize(
    ("validation", "most"),
    [(0.0, 6), (0.2, 4), (0.5, 2)],  # steps of 2 epochs of batches of 10
)
def test_a_warmup_above_the_steps_of_its_epochs_is_refused_before_any_work(
    tmp_path, validation, most
):
    """Three images of each digit; once they are known, by both stages."""
    config = digits.get_config()
    config.data.per_class, config.data.pool = 3, 0
    config.classify.epochs, config.classify.batch_size = 2, 10
    config.classify.validation = validation
    config.classify.warmup = most
    caption.check(config)
    caption.run(config, tmp_path)
    classify.check_images(config, tmp_path)
    config.classify.warmup = most + 1
    for check in (
        caption.check,
        lambda config: classify.check_images(config, tmp_path),
    ):
        with pytest.raises(UserError, match=f"at most the {most} steps") as error:
            check(config)
        assert error.value.name == "config.classify.warmup"
    classify.check_images(config, tmp_path / "another")
    config.classify.epochs = 0
    caption.check(config)


def test_an_unknown_hub_name_is_refused_before_any_work(monkeypatch):
    def check_name(name, patterns, *, field, revision):
        raise UserError(field, wanted="a model", got=f"none, at {revision}", fix=".")

    monkeypatch.setattr(hub, "check_name", check_name)
    config = config_with("nobody/nothing", model="resnet8")
    config.classify.pretrained_revision = "v1"
    with pytest.raises(UserError, match="pretrained 'nobody/nothing'.*none, at v1"):
        classify.check(config)


@pytest.mark.parametrize(
    ("every", "patience", "good"),
    [(0, 5, False), (20, 5, False), (20, 20, True), (0, 0, True)],
)
def test_a_patience_shorter_than_two_validations_is_refused(every, patience, good):
    config = digits.get_config()
    config.classify.validation, config.classify.patience = 0.2, patience
    config.classify.validate_every = every
    if good:
        classify.check(config)
        return
    with pytest.raises(UserError, match=f"validate_every={every}"):
        classify.check(config)


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"model": "wrn28_10"}, "classify.stem_stride=1, or choose a ResNet"),
        ({"model": "resnet18"}, "classify.stem_stride=1, or --config.classify.stem=c"),
        ({"model": "wrn28_10", "width": 8, "stem_stride": 1}, "classify.width=0, or"),
        (
            {"model": "wrn28_10", "stem": "cifar", "stem_stride": 1},
            "classify.stem=, or",
        ),
        ({"model": "resnet18", "stem": "cifar"}, ""),
        ({"model": "resnet18", "stem_stride": 1}, ""),
        ({"model": "wrn28_10", "stem_stride": 1}, ""),
    ],
)
def test_options_that_a_network_does_not_have_are_refused(fields, hint):
    config = folder.get_config("path=a")
    for name, value in fields.items():
        config.classify[name] = value
    if not hint:
        classify.check(config)
        return
    with pytest.raises(UserError) as caught:
        classify.check(config)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("size", "batch", "good"), [(8, 1, False), (8, 2, True), (16, 1, True)]
)
def test_a_batch_of_one_pixel_of_one_image_is_refused(size, batch, good):
    """Batch normalisation would make a constant of it."""
    config = digits.get_config()  # its network reduces 8 pixels to one
    config.classify.update({"size": size, "batch_size": batch})
    if good:
        classify.check(config)
        return
    with pytest.raises(UserError, match="batch_size: wanted 2 or more.*got 1. Raise"):
        classify.check(config)


def test_choices_are_those_of_the_parts():
    assert set(runs.MIXES) == set(classifier._MIXES)


LIGHT = """
import sys
from mvc_jax import classify
from mvc_jax.configs import digits
config = digits.get_config()
classify.check(config)
heavy = {"jax", "flax", "optax", "orbax", "scipy", "sklearn", "grain", "transformers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
config.classify.pretrained, config.classify.width = sys.argv[1], 0
config.classify.stem_stride = 1
classify.check(config)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""


def test_a_check_imports_no_jax_and_one_of_a_checkpoint_starts_no_backend(pretrained):
    subprocess.run([sys.executable, "-c", LIGHT, str(pretrained[0])], check=True)
