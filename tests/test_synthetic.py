"""A set of synthetic images on disk: other tools read what was drawn."""

import json
import os
import pathlib

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sets import IMAGES, NAMES, PARTS, REAL, ROWS, card, write
from PIL import Image

from mvc_jax.checkpoints import dataset_card
from mvc_jax.data.class_folders import class_folders
from mvc_jax.data.sources import open_source
from mvc_jax.generation import synthetic


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def image_folder(root):
    """(path, class index) of every image, and the classes, as torchvision does it."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    samples = []
    for index, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            paths = [pathlib.Path(folder) / file for file in sorted(files)]
            samples += [(path, index) for path in paths if path.suffix == ".png"]
    return samples, classes


@pytest.mark.parametrize(("size", "shards"), [(7, 1), (9, 1), (4, 2), (1, 7)])
def test_pixels_labels_and_sources_come_back_in_order(tmp_path, size, shards):
    folder = write(tmp_path, size=size, pictures=False)
    images, labels, sources = synthetic.read_images(folder)
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == [row["label"] for row in ROWS]
    assert labels.dtype == np.int32
    assert sources == [row["source"] for row in ROWS]
    assert len(list(folder.glob("data/*"))) == shards
    assert not (folder / "train").exists()


def test_the_same_images_make_the_same_bytes(tmp_path):
    first, second = content(write(tmp_path / "a")), content(write(tmp_path / "b"))
    assert first == second
    assert len(first) == 2 + 7 + 3  # shards, pictures, metadata, list, card


def test_the_folder_has_the_images_of_the_shards(tmp_path):
    """In the layout of torchvision, Keras and TFDS: a folder per class."""
    folder = write(tmp_path) / "train"
    samples, classes = image_folder(folder)
    assert sorted(classes) == sorted(NAMES)
    found = {}
    for path, index in samples:
        found[int(path.stem)] = (classes[index], np.asarray(Image.open(path)))
    assert sorted(found) == list(range(7))
    for row, image in zip(ROWS, IMAGES, strict=True):
        name, pixels = found[row["index"]]
        assert name == NAMES[row["label"]]
        np.testing.assert_array_equal(pixels, image)


def test_the_metadata_has_a_row_for_each_picture(tmp_path):
    folder = write(tmp_path) / "train"
    rows = list(map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()))
    assert {folder / row["file_name"] for row in rows} == set(folder.rglob("*.png"))
    for row, expected in zip(rows, ROWS, strict=True):
        assert row.pop("file_name")
        assert row == expected | {"label": NAMES[expected["label"]]}


# Class names that file systems, or other class names, may conflict with.
AWKWARD = (
    "a/b",
    "a_b",
    "a\\b",
    "..",
    ".",
    "__",
    "_",
    "",
    "/",
    "/etc",
    "~",
    "-rf",
    " ",
    "naïve class",
    "nai\u0308ve class",
    "nai_ve class",
    "a\nb",
    "a\0b",
    "数",
    "A.B",
    "A B",
    "metadata.jsonl",
    "x" * 300,
    "é" * 200,
)


@pytest.mark.parametrize("name", AWKWARD, ids=lambda name: ascii(name)[:20])
def test_a_class_folder_stays_inside_and_is_one_level_deep(tmp_path, name):
    png = synthetic.picture_name(name, 3)
    inside = pathlib.PurePosixPath(png)
    assert not inside.is_absolute()
    assert len(inside.parts) == 2
    assert not set(inside.parts) & {"..", "."}
    folder = write(tmp_path / "set", names=(name,), rows=[ROWS[0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    [(path, _)], _ = image_folder(folder / "train")
    np.testing.assert_array_equal(Image.open(path), IMAGES[0])


VALID = (
    "1.a",
    "2.b",
    "c(m)",
    "cR",
    "M2.5 bolt",
    "M20 bolt",
    "3.5 mm",
    "30 mm",
    "cat's",
)


def test_a_class_folder_keeps_its_name_wherever_a_file_system_allows_it():
    assert class_folders(VALID) == VALID
    for name in (
        *VALID,
        "a+b",
        "a, b",
        "हिन्दी",
        "ภาษา",
        "日本",
        "-",
        "x" * 255,
        "é" * 127,
    ):
        assert synthetic.picture_name(name, 1) == f"{name}/00000001.png"
    for name in ("", ".", "..", "a/b", "a\0b", "x" * 256, "é" * 128, "metadata.jsonl"):
        folder = synthetic.class_folder(name)
        assert folder != name and 0 < len(folder.encode()) < 256 and "/" not in folder


names = st.text("ab./_-09 \0é", max_size=4) | st.sampled_from(["x" * 300, "y" * 300])


@given(st.lists(names, unique=True, min_size=1, max_size=7))
@settings(deadline=None, max_examples=300)
def test_class_folders_are_distinct_and_sort_like_the_classes(names):
    folders = class_folders(names)
    assert len(set(folders)) == len(folders)
    assert all(0 < len(f.encode()) < 256 and not {*f} & {*"/\0"} for f in folders)
    of = dict(zip(names, folders, strict=True))
    assert all(
        of[name] == name for name in names if synthetic.class_folder(name) == name
    )
    ordered = [of[name] for name in sorted(names)]
    assert ordered == sorted(ordered)


def test_an_old_dataset_keeps_its_folders(tmp_path):
    """One that was read before the folders were recorded."""
    names = ("brain tumor", "M2.5 bolt")
    earlier = [synthetic.earlier_class_folder(name) for name in names]
    assert earlier == ["brain tumor", "M2_5 bolt-e3d849bd"]


def test_no_two_classes_share_a_folder():
    folder_of = {}
    for name in AWKWARD:
        folder_of.setdefault(synthetic.picture_name(name, 0), []).append(name)
    assert [names for names in folder_of.values() if len(names) > 1] == []


# Hugging Face.


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The library, offline, with its cache in a temporary folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets  # reads both variables at import

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("format", ["png", "jpeg"])
@pytest.mark.parametrize("by", ["shards", "folder of the set"])
def test_hugging_face_reads_the_shards(tmp_path, datasets, by, format):
    folder = write(tmp_path / "set", format=format)
    what = {"path": str(folder)}
    if by == "shards":
        what = {"path": "parquet", "data_files": str(folder / "data" / "*.parquet")}
    dataset = datasets.load_dataset(
        **what, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset.features["image"] == datasets.Image()
    assert dataset.features["label"].names == list(NAMES)
    assert len(dataset) == 7
    for row, expected, image in zip(dataset, ROWS, IMAGES, strict=True):
        pixels = np.asarray(row.pop("image"))
        if format == "png":
            np.testing.assert_array_equal(pixels, image)
        assert pixels.shape == image.shape
        assert row == expected


def test_hugging_face_reads_real_and_synthetic_together_or_separately(
    tmp_path, datasets
):
    """By the configurations in the card."""
    folder = write(tmp_path / "set", real=True)
    for name, modes in (
        ("default", ["both"] * 7 + ["real"] * 3),
        ("synthetic", ["both"] * 7),
        ("real", ["real"] * 3),
    ):
        dataset = datasets.load_dataset(
            str(folder), name, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert dataset["mode"][:] == modes
        assert dataset.features["label"].names == list(NAMES)
    first = dataset[0]
    np.testing.assert_array_equal(first.pop("image"), IMAGES[0])
    assert first == REAL[0]


@pytest.mark.parametrize("inside", ["train", "."])
@pytest.mark.parametrize("real", [False, True])
def test_hugging_face_reads_the_folder(tmp_path, datasets, real, inside):
    folder = write(tmp_path / "set", real=real)
    dataset = datasets.load_dataset(
        "imagefolder",
        data_dir=str(folder / inside),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    rows = {(row["mode"], row["index"]): row for row in dataset}
    expected = [*zip(ROWS, IMAGES, strict=True)]
    expected += zip(REAL, IMAGES[:3], strict=True) if real else ()
    assert len(rows) == len(expected)
    for row, image in expected:
        found = rows[row["mode"], row["index"]]
        np.testing.assert_array_equal(found.pop("image"), image)
        assert found == row | {"label": NAMES[row["label"]]}


# Other readers.


@pytest.mark.parametrize("where", ["folder:{}/train", "folder:{}", "parquet:{}/data/*"])
@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("invalid", "valid"), ()),
        (("test", "train"), ()),
        (("no image", "test", "zebra"), ()),
        (("train",), ()),
        (("test/x", "train/y"), ()),  # no folder can be called so
        (("goldfish", "crane"), ("n01443537", "n02012849")),
        (PARTS, ()),
    ],
    ids=lambda names: names[0] if names else "",
)
def test_our_sources_read_it_whatever_the_classes_are_called(
    tmp_path, names, folders, where
):
    """No class is taken for a part, and labels are as torchvision numbers folders."""
    drawn = [k for k, name in enumerate(names) if name != "no image"]
    rows = [ROWS[0] | {"index": i, "label": drawn[i % len(drawn)]} for i in range(7)]
    folder = write(tmp_path, names=names, rows=rows, class_folders=folders)
    found = open_source(where.format(folder))
    assert found.is_test is None and found.defects == {}
    of_index = {row["index"]: names[row["label"]] for row in rows}
    for id_, label in zip(found.ids, found.labels, strict=True):
        index = int(id_.rpartition("/")[2].removesuffix(".png"))
        assert found.class_names[label] == of_index.pop(index)
    assert of_index == {}
    if where.startswith("folder"):
        _, classes = image_folder(folder / "train")
        folder_of = dict(zip(names, folders or class_folders(names), strict=True))
        assert [folder_of[name] for name in found.class_names] == classes
    else:
        assert found.class_names == names


def test_our_sources_read_both_forms(tmp_path):
    folder = write(tmp_path / "set", real=True)
    for source in (f"parquet:{folder}/data/*.parquet", f"folder:{folder}/train"):
        found = open_source(source)
        assert sorted(found.class_names) == sorted(NAMES)
        images = {id_: found[i]["image"] for i, id_ in enumerate(found.ids)}
        assert len(images) == 10
        for rows, real in ((ROWS, False), (REAL, True)):
            for row, image in zip(rows, IMAGES, strict=False):
                name = NAMES[row["label"]]
                id_ = synthetic.picture_name(name, row["index"], real=real)
                np.testing.assert_array_equal(images[id_], image)


# The card.


def test_the_card_describes_the_set(tmp_path):
    text = (write(tmp_path, real=True) / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license_name"] == "unknown-see-the-base"
    assert front["size_categories"] == ["n<1K"]
    assert "| `naïve class` | 2 | 1 |" in text
    assert "| all | 7 | 3 |" in text
    assert "Drawn again with other noise: 2 (2 NaN)." in text
    assert "Left out: 4 (1 black, 3 copies)." in text
    assert "``beans `and` peas``" in text


def test_the_card_names_what_others_cannot_read():
    """Tried with `datasets` 2.21 to 5.2 and Keras 3.15 (benchmarks/consumers.sh)."""
    text = dataset_card.text(card(names=("a", "b", "c")))
    assert "imagefolder" in text and "cannot read" not in text
    assert "No image was kept" not in text
    names = ("a::b", ".net", "d$", "e\\f", "__init", "plain", "gone")
    text = dataset_card.text(card(names=names, rows=ROWS[:1]))
    assert 'load_dataset("imagefolder"' not in text
    assert "cannot read the folders `a::b`, `d$`, `e\\f`, " in text
    assert "leave out the folders `.net`, `__init`: " in text
    assert (
        "No image was kept of `.net`, `d$`, `e\\f`, `__init`, `plain`, `gone`" in text
    )
