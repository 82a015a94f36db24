"""The stage before its first step: which images it trains on, and what it starts from.

`test_pipeline.py` runs it whole, `test_classifier.py` holds its step.
"""

import jax
import numpy as np
import pytest
from etils import epath

from mvc_jax import classify
from mvc_jax.checkpoints import classifier_export, classifier_weights
from mvc_jax.classification import runs, training_set
from mvc_jax.configs import digits, folder
from mvc_jax.data import splits
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.models import classifiers

SIZE, PER_CLASS, NAMES = 16, 5, ("one", "two", "three")


def split(name, counts, names=NAMES):
    """Images whose pixels say what they are: label, then number."""
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
        rows = list(synthetic_rows(both["train"]))
        monkeypatch.setattr(splits, "read_split", lambda folder, name: both[name])
        monkeypatch.setattr(synthetic, "read_rows", lambda folder, columns: iter(rows))
        options = {"ratio": 0.0, "validation": 0.0} | options
        data = training_set.read(
            epath.Path(tmp_path),
            epath.Path(tmp_path) / "pixels",
            sets=["mixed"],
            size=SIZE // 2,
            stored={"size": SIZE, "resize": "stretch", "resample": "lanczos"},
            seed=0,
            **options,
        )
        return data, rows

    return read


def test_what_is_held_out_is_of_train_and_nothing_of_it_is_trained_on(read):
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


def test_of_a_ratio_too_nothing_is_trained_on_that_is_held_out(read):
    data, rows = read(validation=0.2, ratio=0.6)
    names = {f"train-{row}" for row in data.validation}
    used = [rows[row - 3 * PER_CLASS] for row in data.pools["mixed"].synthetic]
    assert {row["label"] for row in used} == {0, 1, 2}
    for row in used:
        assert names.isdisjoint({row["source"], *row["partners"]})


def test_images_are_the_same_in_memory_and_from_the_disk(read):
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
def test_images_that_cannot_do_are_refused(read, options, start, word):
    with pytest.raises(UserError, match=word) as caught:
        read(**options)
    assert str(caught.value).startswith(start)


def test_a_run_may_name_what_bends_it_in_any_order():
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
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        size=32,
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
    recipe, found = classify._start(config, read()[0])
    assert recipe.model.num_classes == 3 and recipe.model.width == 4
    assert (recipe.mean, recipe.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for kind in ("params", "batch_stats"):
        for name, leaves in variables[kind].items():
            if name != "fc":
                jax.tree.map(np.testing.assert_array_equal, found[kind][name], leaves)
    assert found["params"]["fc"]["kernel"].shape == (16, 3)


def test_a_checkpoint_of_another_network_is_refused(pretrained):
    with pytest.raises(UserError, match="looks like"):
        classify.check(config_with(pretrained[0], model="resnet20"))


def test_a_name_that_the_hub_has_not_is_refused_before_any_work(monkeypatch):
    def check_name(name, *, field, revision):
        raise UserError(field, wanted="a model", got=f"none, at {revision}", fix=".")

    monkeypatch.setattr(classify.hub, "check_name", check_name)
    config = config_with("nobody/nothing", model="resnet8")
    config.classify.pretrained_revision = "v1"
    with pytest.raises(UserError, match="pretrained 'nobody/nothing'.*none, at v1"):
        classify.check(config)


@pytest.mark.parametrize(
    ("every", "patience", "good"),
    [(0, 5, False), (20, 5, False), (20, 20, True), (0, 0, True)],
)
def test_a_patience_that_sees_no_second_look_is_refused(every, patience, good):
    config = digits.get_config()
    config.classify.validation, config.classify.patience = 0.2, patience
    config.classify.validate_every = every
    if good:
        classify.check(config)
        return
    with pytest.raises(UserError, match=f"validate_every={every}"):
        classify.check(config)


@pytest.mark.parametrize(
    ("fields", "way_out"),
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
def test_what_a_network_has_not_is_refused_with_a_way_out(fields, way_out):
    config = folder.get_config("path=a")
    for name, value in fields.items():
        config.classify[name] = value
    if not way_out:
        classify.check(config)
        return
    with pytest.raises(UserError) as caught:
        classify.check(config)
    assert way_out in str(caught.value)
