"""Datasets of TFDS as a source: prepared by TFDS, read without TensorFlow.

TFDS encodes arrays with TensorFlow but stores PIL images without it, so that most tests
here prepare their own datasets without TensorFlow.
"""

import concurrent.futures
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

from mvc_jax.data.decode import BadImage
from mvc_jax.data.example import Source
from mvc_jax.data.sources import open_source
from mvc_jax.errors import UserError

TESTS = pathlib.Path(__file__).resolve().parent
FEATURES = {
    "image": tfds.features.Image(),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
}
KEYS = ("image", "label")
MODULE = "tiny_shapes.tiny_shapes_dataset_builder"


def picture(value):
    return Image.new("RGB", (3, 2), (value, 0, 7))


def examples(*labels):
    """One per label; the red channel is its index."""
    return [{"image": picture(i), "label": label} for i, label in enumerate(labels)]


def prepare(
    folder,
    name,
    splits,
    features=None,
    *,
    keys=KEYS,
    version="1.0.0",
    config="",
    module="pets_builder",
):
    """Prepares a dataset with TFDS, {split: examples}; returns its folder."""
    features = tfds.features.FeaturesDict(features or FEATURES)
    configs = [tfds.core.BuilderConfig(name=config)] if config else []

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=keys
        )

    def generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in splits.items()}

    with registered.skip_registration():
        builder = type(
            "Made",
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": module,
                "name": name,
                "VERSION": tfds.core.Version(version),
                "BUILDER_CONFIGS": configs,
                "_info": info,
                "_split_generators": generators,
                "_generate_examples": lambda self: (),
            },
        )
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / name / config / version


def as_tfrecord(folder):
    """Marks a prepared dataset as TFDS's default format, which needs TensorFlow."""
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def read(folder, name, **columns):
    source = open_source(f"tfds:{name}", data_dir=str(folder), **columns)
    assert isinstance(source, Source)
    assert source.labels.dtype == np.int32
    assert len(source) == len(source.labels) == len(source.ids) == len(set(source.ids))
    return source


def stored(source):
    """{(split, index of the example)}: TFDS shuffles them by the hashes of keys."""
    splits = [id_.split("/")[-2] for id_ in source.ids]
    reds = [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]
    return set(zip(splits, reds, strict=True))


def error_of(folder, name, **columns):
    with pytest.raises(UserError) as error:
        read(folder, name, **columns)
    return str(error.value)


# Prepared datasets are read.


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "caltech101"])
def test_datasets_with_the_features_of_real_ones(tmp_path, name):
    real = tfds.builder_cls(name)(data_dir=tmp_path / "none").info
    names = real.features["label"].names
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(names), 32, 32, 3), np.uint8)

    def example(label):
        known = {"image": Image.fromarray(images[label]), "label": label}
        blank = {"coarse_label": 0, "id": "", "image/file_name": ""}
        return {key: (blank | known)[key] for key in real.features}

    every = [example(label) for label in range(len(names))]
    splits = {"train": every, "test": every[:5]}
    prepare(tmp_path, name, splits, real.features, keys=real.supervised_keys)
    source = read(tmp_path, name)
    assert source.class_names == tuple(names)
    assert source.ids[0] == f"{name}/train/000000"
    assert source.ids[-1] == f"{name}/test/000004"
    assert source.is_test.tolist() == [False] * len(names) + [True] * 5
    assert sorted(source.labels) == sorted([*range(len(names)), *range(5)])
    for i, label in enumerate(source.labels):
        found = source[i]
        assert (found["label"], found["id"]) == (label, source.ids[i])
        np.testing.assert_array_equal(found["image"], images[label])


@pytest.mark.parametrize(
    ("splits", "test"),
    [
        (["train", "test"], "test"),
        (["train", "validation"], "validation"),
        (["test", "validation", "train"], "test"),
        (["train"], None),
        (["test"], None),
        (["extra", "train", "unlabelled"], None),
    ],
)
def test_the_test_split_is_test(tmp_path, splits, test):
    prepare(tmp_path, "pets", {split: examples(0, 1) for split in splits})
    source = read(tmp_path, "pets")
    known = [x for x in ("train", "validation", "test") if x in splits]
    assert stored(source) == {(split, i) for split in known for i in range(2)}
    if test is None:
        assert source.is_test is None
    else:
        expected = [f"/{test}/" in id_ for id_ in source.ids]
        assert source.is_test.dtype == bool
        assert source.is_test.tolist() == expected


def test_an_unlabelled_test_split_is_ignored(tmp_path):
    splits = {"train": [0, 1], "validation": [1, 0], "test": [-1, -1]}
    prepare(tmp_path, "pets", {x: examples(*labels) for x, labels in splits.items()})
    source = read(tmp_path, "pets")
    assert source.is_test.tolist() == [False, False, True, True]
    assert source.defects == {}


def test_an_image_without_a_label_is_a_defect(tmp_path):
    folder = prepare(tmp_path, "pets", {"train": examples(0, -1, 1, 1)})
    source = read(tmp_path, "pets")
    assert list(source.defects.values()) == ["no label"]
    assert not set(source.ids) & set(source.defects)
    assert set(source.ids) | set(source.defects) == {
        f"pets/train/{i:06d}" for i in range(4)
    }
    assert stored(source) == {("train", 0), ("train", 2), ("train", 3)}
    (folder / "label.labels.txt").write_text("cat\n")
    features = folder / "features.json"
    features.write_text(features.read_text().replace('"2"', '"1"'))
    reasons = read(tmp_path, "pets").defects.values()
    assert sorted(reasons) == ["no class has the label 1"] * 2 + ["no label"]


def test_columns_default_to_the_supervised_keys(tmp_path):
    features = {
        "photo": tfds.features.Image(),
        "thumbnail": tfds.features.Image(),
        "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
        "breed": tfds.features.ClassLabel(names=["pug"]),
    }
    example = {"photo": picture(1), "thumbnail": picture(2), "kind": 1, "breed": 0}
    splits = {"train": [example]}
    prepare(tmp_path, "pets", splits, features, keys=("photo", "kind"))
    source = read(tmp_path, "pets")
    assert stored(source) == {("train", 1)}
    assert source.class_names == ("cat", "dog")
    source = read(tmp_path, "pets", image_column="thumbnail", label_column="breed")
    assert stored(source) == {("train", 2)}
    assert source.class_names == ("pug",)


def test_versions_and_configs(tmp_path):
    for value, version in enumerate(["1.0.0", "10.0.0", "9.0.0"]):
        splits = {"train": [{"image": picture(value), "label": 0}]}
        prepare(tmp_path, "pets", splits, version=version)
        prepare(tmp_path, "zoo", splits, version=version, config="small")
    (tmp_path / "pets" / "incomplete.0_99.0.0").mkdir()
    (tmp_path / "pets" / "99.0.0").mkdir()
    assert stored(read(tmp_path, "pets")) == {("train", 1)}
    assert stored(read(tmp_path, "pets:9.0.0")) == {("train", 2)}
    assert read(tmp_path, "pets:9.0.0").ids == ("pets/train/000000",)
    assert stored(read(tmp_path, "zoo")) == {("train", 1)}
    assert stored(read(tmp_path, "zoo/small:1.0.0")) == {("train", 0)}
    assert read(tmp_path, "zoo/small").ids == ("zoo/small/train/000000",)
    prepare(tmp_path, "zoo", splits, config="large")
    error = error_of(tmp_path, "zoo")
    assert "large, small" in error
    assert "tfds:zoo/large" in error


def test_the_default_data_directory_is_that_of_tfds(tmp_path, monkeypatch):
    prepare(tmp_path, "pets", {"train": examples(0)})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(read("", "pets")) == 1
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tensorflow_datasets").symlink_to(tmp_path)
    assert len(read("", "pets")) == 1
    assert len(read("~", "pets")) == 1


# Images.


def test_images_are_decoded_like_those_of_any_source(tmp_path):
    """TFDS itself returns palette indices, CMYK as RGBA, and alpha unblended."""
    light = Image.new("RGB", (8, 8), (250, 240, 10))
    files = [io.BytesIO() for _ in range(3)]
    light.convert("P", palette=Image.Palette.ADAPTIVE).save(files[0], "PNG")
    light.convert("CMYK").save(files[1], "JPEG", quality=95)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(files[2], "PNG")
    images = [{"image": file.getvalue(), "label": 0} for file in files]
    prepare(tmp_path, "pets", {"train": images})
    source = read(tmp_path, "pets")
    found = [source[i] for i in range(3)]
    clear = [example for example in found if example["note"]]
    assert [example["note"] for example in clear] == ["transparent, put on white"]
    assert clear[0]["image"].min() == 255
    for example in found:
        if not example["note"]:
            difference = example["image"].astype(int) - (250, 240, 10)
            assert np.abs(difference).max() < 8


def test_an_image_is_decoded_on_access(tmp_path):
    prepare(tmp_path, "pets", {"train": [{"image": b"no image", "label": 0}]})
    source = read(tmp_path, "pets")
    with pytest.raises(BadImage, match="not a PNG"):
        source[0]


def test_images_of_floats_are_windowed(tmp_path):
    floats = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4, 1)
    image = Image.fromarray(floats.view(np.uint8))  # as TFDS stores them
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    feature = tfds.features.Image(shape=(3, 4, 1), dtype=np.float32)
    features = FEATURES | {"image": feature}
    feature._image_encoder.encode_image_or_path = lambda content: content
    examples = [{"image": buffer.getvalue(), "label": 0}]
    prepare(tmp_path, "depth", {"train": examples}, features)
    found = read(tmp_path, "depth")[0]
    expected = np.round((floats + 2) / 4 * 255).astype(np.uint8)
    np.testing.assert_array_equal(found["image"], np.repeat(expected, 3, axis=2))
    assert "windowed" in found["note"]


def test_many_threads_read_any_order(tmp_path):
    prepare(tmp_path, "pets", {x: examples(*[0] * 100) for x in ("train", "test")})
    source = read(tmp_path, "pets")
    reds = [source[i]["image"][0, 0, 0] for i in range(200)]

    def check(seed):
        order = np.random.default_rng(seed).permutation(200)
        return all(source[int(i)]["image"][0, 0, 0] == reds[i] for i in order)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(check, range(16)))


# Errors.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "cifar10",
            ["none of this name", 'mvc_jax[prepare]"', 'tfds.builder("cifar10"'],
        ),
        (
            "cifra10",
            ["which TFDS does not know either", "Did you mean cifar10", "MODULE"],
        ),
        ("CIFAR10", ["Did you mean cifar10"]),
        ("qqqqqq", ["which TFDS does not know either", "config.data.dir", "MODULE"]),
        ("pets:2.0.0", ["only pets/1.0.0", "MODULE"]),
        ("pets/small", ["none of this name"]),
        ("my set", ["config.data.source", "tfds:NAME"]),
        ("huggingface:mnist", ["config.data.source", "tfds:NAME"]),
    ],
)
def test_a_dataset_that_is_not_there(tmp_path, name, words):
    prepare(tmp_path, "pets", {"train": examples(0)})
    error = error_of(tmp_path, name)
    for word in words:
        assert word in error


def test_a_format_without_random_access_must_be_prepared_again(tmp_path):
    as_tfrecord(prepare(tmp_path, "pets", {"train": examples(0)}, version="1.2.3"))
    error = error_of(tmp_path, "pets")
    assert error.startswith(f"{tmp_path / 'pets' / '1.2.3'}: wanted")
    for word in (
        "the format tfrecord",
        f"config.data.dir={tmp_path / 'array_record'}",
        f'data_dir="{tmp_path / "array_record"}"',
        f'download_dir="{tmp_path / "downloads"}"',
        "import pets_builder, tensorflow_datasets",
    ):
        assert word in error


@pytest.mark.parametrize("place", ["a b", "a'b", 'a"b', "$(touch x)", "a;b"])
def test_the_command_is_quoted_for_the_shell(tmp_path, place):
    words = shlex.split(error_of(tmp_path / place, "cifar10").partition("pip ")[2])
    assert words[:4] == ["install", "mvc_jax[prepare]", "&&", "python"]
    assert f"data_dir={json.dumps(str(tmp_path / place))}" in words[-1]
    compile(words[-1], "command", "exec")


@pytest.mark.parametrize(
    ("features", "columns", "words"),
    [
        ({"text": tfds.features.Text()}, {}, ["image_column", "text: Text"]),
        (
            FEATURES | {"label": tfds.features.Scalar(np.int64)},
            {},
            ["label_column", "'label'", "ClassLabel", "label: Scalar"],
        ),
        (FEATURES, {"image_column": "label"}, ["image_column", "Image called 'label'"]),
        (FEATURES, {"label_column": "none"}, ["label_column", "'none'"]),
    ],
)
def test_a_dataset_without_images_or_labels_is_refused_with_its_features(
    tmp_path, features, columns, words
):
    values = {"text": "", "image": picture(0), "label": 0}
    example = {key: values[key] for key in features}
    prepare(tmp_path, "pets", {"train": [example]}, features, keys=None)
    error = error_of(tmp_path, "pets", **columns)
    for word in words:
        assert word in error


@pytest.mark.parametrize("splits", [{"extra": (0,)}, {"train": (-1,)}], ids=str)
def test_no_labelled_image_is_an_error(tmp_path, splits):
    prepare(tmp_path, "pets", {x: examples(*labels) for x, labels in splits.items()})
    assert "labelled images in one of the splits train" in error_of(tmp_path, "pets")


@pytest.mark.parametrize("damage", ["info", "features", "shard", "cut", "zeros"])
def test_a_damaged_dataset_is_named(tmp_path, damage):
    folder = prepare(tmp_path, "pets", {"train": examples(*[0, 1] * 50)})
    shard = next(folder.glob("*.array_record-*"))
    if damage == "info":
        (folder / "dataset_info.json").write_text("{")
    elif damage == "features":
        (folder / "features.json").write_text("{}")
    elif damage == "shard":
        shard.unlink()
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[:100] if damage == "cut" else b"\0" * len(content))
    error = error_of(tmp_path, "pets")
    assert error.startswith(str(folder))
    assert "Delete this folder" in error


# Reading without TensorFlow, and preparing with it.

# Not `sys.modules["tensorflow"] = None`, which TFDS takes for an imported TensorFlow.
OPEN_WITHOUT_TENSORFLOW = """
import importlib.machinery, json, sys

class Blocked:
    tried = []

    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        self.tried.append(spec.name)
        raise ImportError("TensorFlow is imported")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Blocked())
from mvc_jax.data.sources import open_source
for folder in sys.argv[2:]:
    source = open_source(sys.argv[1], data_dir=folder)
    rows = [source[i] for i in range(len(source))]
    found = [(row["id"], row["label"], row["image"].tolist()) for row in rows]
    print(json.dumps([source.class_names, source.is_test.tolist(), found]))
assert not Blocked.tried and "tensorflow" not in sys.modules
"""


def run(code, *args, cwd=TESTS):
    """Runs Python; returns what it printed."""
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_tiny_shapes(*folders):
    """Opens them in a process without TensorFlow, and compares each image."""
    sys.path.insert(0, str(TESTS))
    try:
        from tiny_shapes.tiny_shapes_dataset_builder import draw
    finally:
        sys.path.remove(str(TESTS))
    printed = run(OPEN_WITHOUT_TENSORFLOW, "tfds:tiny_shapes", *folders).splitlines()
    assert len(printed) == len(folders)
    for class_names, is_test, found in map(json.loads, printed):
        assert class_names == ["disc", "square"]
        assert is_test == [False] * 8 + [True] * 4
        assert [id_ for id_, _, _ in found] == [
            *(f"tiny_shapes/train/{i:06d}" for i in range(8)),
            *(f"tiny_shapes/test/{i:06d}" for i in range(4)),
        ]
        for part, indices in ((found[:8], range(8)), (found[8:], range(8, 12))):
            expected = sorted((i % 2, draw(i).tolist()) for i in indices)
            assert sorted((label, image) for _, label, image in part) == expected


def command_of(error):
    """The Python code in the command of an error."""
    return shlex.split(re.search(r"python -c .*", error)[0])[-1]


def test_tensorflow_is_never_imported(tmp_path):
    prepare(tmp_path, "pets", {x: examples(0, 1) for x in ("train", "test")})
    class_names, *_ = json.loads(run(OPEN_WITHOUT_TENSORFLOW, "tfds:pets", tmp_path))
    assert class_names == ["cat", "dog"]


def test_datasets_are_prepared_as_the_errors_say(tmp_path, tensorflow_is_there):
    """A dataset that is missing, and one in a format without random access."""
    folder, old = tmp_path / "a folder", tmp_path / "old"
    missing = command_of(error_of(folder, "tiny_shapes"))
    missing = missing.replace("MODULE", MODULE)
    as_tfrecord(prepare(old, "tiny_shapes", {"train": examples(0)}, module=MODULE))
    error = error_of(old, "tiny_shapes")
    run(f"{missing}; {command_of(error)}")  # both, since TensorFlow takes 6 s to import
    check_tiny_shapes(folder, re.search(r"config\.data\.dir=(\S+)", error)[1])


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("caltech101", 102)]
)
def test_datasets_that_only_tfds_finds_are_read(name, classes):
    """E.g. those of `mock_data`, with random images and labels."""
    with tfds.testing.mock_data(num_examples=7):
        source = open_source(f"tfds:{name}")
        assert len(source) == 14 and source.is_test.sum() == 7
        assert len(source.class_names) == classes
        for i in range(len(source)):
            example = source[i]
            assert example["image"].dtype == np.uint8
            assert example["image"].ndim == 3 and example["image"].shape[2] == 3
            assert example["id"] == source.ids[i]
            assert example["label"] == source.labels[i]
