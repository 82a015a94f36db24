"""Parquet files as a source: what was written is read, one row group at a time."""

import concurrent.futures
import io
import json
import os
import pathlib
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from PIL import Image

from mvc_jax.data import parquet
from mvc_jax.data.decode import BadImage, Decoder
from mvc_jax.data.example import Source
from mvc_jax.data.sources import open_source
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def cells(count, paths=False):
    return [
        {"bytes": png(i), "path": f"{i}.png" if paths else None} for i in range(count)
    ]


def write(path, images, labels, *, type_=None, names=None, **options):
    """A Parquet file of structs, or of plain bytes, as its first image is."""
    image_type = pa.binary() if isinstance(images[0], bytes) else STRUCT
    table = pa.table(
        {"image": pa.array(images, image_type), "label": pa.array(labels, type_)}
    )
    if names is not None:
        label = {"names": names, "_type": "ClassLabel"}
        described = {
            "info": {"features": {"image": {"_type": "Image"}, "label": label}}
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def read(pattern, **columns):
    source = open_source(f"parquet:{pattern}", **columns)
    assert isinstance(source, Source)
    assert source.labels.dtype == np.int32
    assert len(source) == len(source.labels) == len(source.ids) == len(set(source.ids))
    assert not set(source.ids) & set(source.defects)
    return source


def values(source):
    """The `i` of every `png(i)`, in order."""
    corners = [source[i]["image"][0, 0].astype(int) for i in range(len(source))]
    return [int(corner[0] + 256 * corner[1]) for corner in corners]


def labelled(source):
    """The class name of each row."""
    return [source.class_names[label] for label in source.labels]


# What was written is read.


def test_synthetic_sets_are_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)
    row = dict.fromkeys(synthetic.PROVENANCE) | {"source": "s", "mode": "fine"}
    row |= {"positions": [1], "dims": [[2, 3]], "seed": 1, "text_scale": 7.5}
    rows = [row | {"index": i, "label": i % 2} for i in range(5)]
    names = ("naïve_class", "b")
    folder = epath.Path(tmp_path)
    store = synthetic.Store(
        folder,
        Digests(folder, folder / "digests"),
        names,
        "0badf00d",
        3,
        pictures=False,
    )
    for part in store.missing(5):
        mine = slice(part.start, part.stop)
        store.write(part, list(images[mine]), rows[mine])
    (tmp_path / "data" / ".tmp-0-train-00002.parquet").write_bytes(b"half")
    source = read(tmp_path)
    assert source.class_names == names
    assert source.labels.tolist() == [0, 1, 0, 1, 0]
    assert source.ids == tuple(
        synthetic.picture_name(names[i % 2], i) for i in range(5)
    )
    assert source.is_test is None
    assert source.defects == {}
    for i, image in enumerate(images):
        example = source[i]
        np.testing.assert_array_equal(example["image"], image)
        assert (example["label"], example["id"]) == (i % 2, source.ids[i])


def test_files_of_hugging_face_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    datasets.disable_progress_bars()
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["x", "y"]),
    }
    data = {"image": cells(4, paths=True), "label": [1, 0, -1, 1]}
    dataset = datasets.Dataset.from_dict(data, datasets.Features(features))
    dataset.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    source = read(tmp_path / "*.parquet")
    assert labelled(source) == ["y", "x", "y"]
    assert values(source) == [0, 1, 3]
    assert source.ids == ("0.png", "1.png", "3.png")
    assert source.defects == {"2.png": "no label"}


@pytest.mark.parametrize("plain", [False, True], ids=["struct", "bytes"])
def test_rows_keep_their_order_over_files_and_row_groups(tmp_path, plain):
    for shard in range(3):
        images = [png(10 * shard + i) for i in range(10)]
        images = images if plain else [{"bytes": x} for x in images]
        write(tmp_path / f"{shard}.parquet", images, [shard] * 10, row_group_size=4)
    source = read(tmp_path)
    assert values(source) == list(range(30))
    assert source.labels.tolist() == sorted([0, 1, 2] * 10)
    assert source.ids[:11] == (*(f"0.parquet#{i}" for i in range(10)), "1.parquet#0")


@pytest.mark.parametrize(
    ("labels", "type_", "names", "classes", "expected"),
    [
        ([1, 0, 1], pa.int64(), ["x", "y", "z"], "xyz", "yxy"),
        ([1, 0, 1], pa.uint8(), ["x", "y"], "xy", "yxy"),
        ([-1, 10, 2], pa.int32(), None, ["-1", "2", "10"], ["-1", "10", "2"]),
        (["b", "a", "b"], pa.string(), None, "ab", "bab"),
        (["b", "a", "b"], pa.dictionary(pa.int8(), pa.string()), None, "ab", "bab"),
        (["b", "a", "b"], pa.large_string(), None, "ab", "bab"),
        ([True, False, True], pa.bool_(), None, ["False", "True"], None),
        ([2.0, 1.0, 2.0], pa.float64(), None, "12", "212"),
        ([2.0, 1.0, 2.0], pa.float16(), None, "12", "212"),
    ],
)
def test_labels_of_many_types(tmp_path, labels, type_, names, classes, expected):
    path = write(tmp_path / "a.parquet", cells(3), labels, type_=type_, names=names)
    source = read(path)
    assert source.class_names == tuple(classes)
    assert labelled(source) == list(expected or map(str, labels))


@pytest.mark.parametrize("metadata", ["{", "{}", "[]", '{"info": null}'])
def test_metadata_without_class_names_is_ignored(tmp_path, metadata):
    table = pa.table({"image": [png(0)], "label": [3]})
    table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path).class_names == ("3",)


def test_other_columns_can_be_named(tmp_path):
    table = pa.table({"img": [png(0)], "fine label": ["x"], "label": [[1]]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = read(tmp_path, image_column="img", label_column="fine label")
    assert labelled(source) == ["x"]


def test_the_decoder_s_note_is_in_the_example(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, "PNG")
    source = read(write(tmp_path / "a.parquet", [buffer.getvalue()], ["x"]))
    assert source[0]["note"] == "transparent, put on white"


# Names of images.


@pytest.mark.parametrize(
    ("paths", "by_path"),
    [
        ([["a", "b"], ["c", "d"]], True),
        ([["a", "b"], ["a", "d"]], False),
        ([["a", None], ["c", "d"]], False),
        ([["a", ""], ["c", "d"]], False),
    ],
    ids=["one each", "one twice", "one missing", "one empty"],
)
def test_ids_are_paths_if_all_paths_are_distinct(tmp_path, paths, by_path):
    for folder, names in zip("pq", paths, strict=True):
        images = [{"bytes": png(0), "path": name} for name in names]
        write(tmp_path / folder / "0.parquet", images, [0, 1])
    numbers = ("p/0.parquet#0", "p/0.parquet#1", "q/0.parquet#0", "q/0.parquet#1")
    assert read(tmp_path).ids == (tuple("abcd") if by_path else numbers)


# Splits.


@pytest.mark.parametrize(
    ("files", "tests"),
    [
        (["train-00000-of-00001", "test-00000-of-00001"], "01"),
        (["train-00000-of-00001", "validation-00000-of-00001"], "01"),
        (["train", "validation", "test"], "001"),
        (["test/0000", "train/0000", "val/0000"], "100"),
        (["TRAIN", "Test/0", "Dev"], "010"),
        (["set_training", "set_evaluation"], "01"),
        (["test/train-0", "test/eval-0"], "01"),
        (["more", "test"], "01"),
        (["latest", "contest/0"], None),
        (["train-0", "train-1"], None),
        (["a", "b"], None),
        (["test-0", "test-1"], None),
    ],
    ids=lambda value: "+".join(value or "-"),
)
def test_the_split_is_recognised_by_names(tmp_path, files, tests):
    for i, file in enumerate(files):
        write(tmp_path / "test" / f"{file}.parquet", [png(i)], ["x"])
    source = read(tmp_path / "test")
    of_value = dict(zip(values(source), source.is_test, strict=True)) if tests else None
    assert (source.is_test is None) == (tests is None)
    if tests:
        assert source.is_test.dtype == bool
        assert of_value == {i: test == "1" for i, test in enumerate(tests)}


def test_a_test_split_without_labels_is_ignored(tmp_path):
    """Hugging Face gives the rows of a hidden test split the label -1."""
    for name, label in (("train", 0), ("validation", 1), ("test", -1)):
        write(tmp_path / f"{name}.parquet", cells(1), [label], names=["x", "y"])
    source = read(tmp_path)
    assert source.is_test.tolist() == [False, True]
    assert source.defects == {"test.parquet#0": "no label"}


# Defects.


def test_unusable_rows_have_a_name_and_a_reason(tmp_path):
    images = cells(7, paths=True)
    images[4], images[5] = None, {"bytes": None, "path": None}
    labels = [0, None, -1, 2, 0, 0, 1]
    source = read(write(tmp_path / "a.parquet", images, labels, names=["x", "y"]))
    assert source.defects == {
        "1.png": "no label",
        "2.png": "no label",
        "3.png": "no class has the label 2",
        "a.parquet#4": "no image",
        "a.parquet#5": "no image",
    }
    assert source.ids == ("0.png", "6.png")
    assert values(source) == [0, 6]


@pytest.mark.parametrize(
    ("labels", "type_"),
    [
        ([1.0, float("nan"), None], pa.float64()),
        (["x", "  ", None], pa.string()),
        (["x", "", None], pa.dictionary(pa.int32(), pa.string())),
        ([True, None, None], pa.bool_()),
    ],
)
def test_blank_labels_are_missing_labels(tmp_path, labels, type_):
    source = read(write(tmp_path / "a.parquet", cells(3), labels, type_=type_))
    assert source.labels.tolist() == [0]
    assert source.defects == {f"a.parquet#{i}": "no label" for i in (1, 2)}


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("plain", [False, True], ids=["struct", "bytes"])
def test_null_images_are_found_in_any_row_group(tmp_path, plain, statistics):
    images = [png(i) if plain else {"bytes": png(i)} for i in range(12)]
    for row in (2, 8, 9, 10, 11):
        images[row] = None
    path = tmp_path / "a.parquet"
    write(path, images, [0] * 12, row_group_size=4, write_statistics=statistics)
    source = read(path)
    assert values(source) == [0, 1, 3, 4, 5, 6, 7]
    assert set(source.defects.values()) == {"no image"}


def test_a_path_without_bytes_is_relative_to_the_file(tmp_path):
    folder, outside = tmp_path / "set", tmp_path / "outside.png"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "0.png").write_bytes(png(40))
    outside.write_bytes(png(50))
    (folder / "link.png").symlink_to(outside)
    (folder / "loop.png").symlink_to("loop.png")
    paths = ["images/0.png", "none.png", "../outside.png", str(outside), "link.png"]
    paths += ["images", "loop.png", "a\0b", "x" * 5000, "1.png"]
    images = [{"bytes": None, "path": path} for path in paths]
    images[-1]["bytes"] = png(41)
    source = read(write(folder / "a.parquet", images, [0] * len(paths)))
    assert source.ids == ("images/0.png", "1.png")
    assert values(source) == [40, 41]
    assert source.defects["none.png"] == "no such file: none.png"
    assert source.defects["link.png"].startswith("its path leads out")
    assert len(source.defects) == 8


def test_a_struct_may_have_paths_alone(tmp_path):
    (tmp_path / "0.png").write_bytes(png(3))
    images = pa.array([{"path": "0.png"}], pa.struct({"path": pa.string()}))
    pq.write_table(pa.table({"image": images, "label": ["x"]}), tmp_path / "a.parquet")
    assert values(read(tmp_path)) == [3]


def test_bytes_that_are_not_an_image_are_a_bad_image(tmp_path):
    source = read(write(tmp_path / "a.parquet", [png(0), b"", b"GIF89a"], [0, 0, 0]))
    assert len(source) == 3
    for index in (1, 2):
        with pytest.raises(BadImage):
            source[index]


@pytest.mark.parametrize("damage", ["gone", "overwritten"])
def test_a_file_that_breaks_later_is_a_bad_image(tmp_path, damage):
    path = write(tmp_path / "a.parquet", cells(3), [0, 0, 0])
    source = read(path)
    path.unlink()
    if damage == "overwritten":
        path.write_bytes(b"x" * 9999)
    with pytest.raises(BadImage, match="a.parquet cannot be read"):
        source[0]


# Reading.


class Reads:
    """Counts what is read of Parquet files: columns, and (file, row group)."""

    def __init__(self, monkeypatch):
        self.columns, self.groups = [], []
        whole, group = pq.ParquetFile.read, pq.ParquetFile.read_row_group

        def read(file, columns=None, **options):
            self.columns += columns
            return whole(file, columns=columns, **options)

        def read_row_group(file, number, columns=None, **options):
            self.columns += columns
            self.groups.append((file.metadata.num_rows, number))
            return group(file, number, columns=columns, **options)

        monkeypatch.setattr(pq.ParquetFile, "read", read)
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)


@pytest.mark.parametrize("plain", [False, True], ids=["struct", "bytes"])
def test_opening_reads_no_image(tmp_path, monkeypatch, plain):
    images = [png(0)] * 6 if plain else cells(6, paths=True)
    path = write(tmp_path / "a.parquet", images, [0] * 6, row_group_size=2)
    reads = Reads(monkeypatch)
    read(path)
    assert reads.columns == (["label"] if plain else ["label", "image.path"])
    assert reads.groups == []


@pytest.mark.parametrize("threads", [1, 16])
def test_in_order_each_row_group_is_read_once(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 0)
    count = 400
    path = write(tmp_path / "a.parquet", cells(count), [0] * count, row_group_size=50)
    source, reads = read(path), Reads(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, 16):  # threads differ by at most 16 rows
            list(pool.map(source.__getitem__, range(start, start + 16)))
    assert reads.groups == [(count, number) for number in range(8)]


def test_any_order_from_many_threads(tmp_path, monkeypatch):
    """With a cache of two row groups, and 16 threads in different places."""
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 0)
    for shard in range(2):
        images = [png(100 * shard + i) for i in range(100)]
        write(tmp_path / f"{shard}.parquet", images, [0] * 100, row_group_size=7)
    source = read(tmp_path)
    barrier, wrong = threading.Barrier(16), []

    def work(seed):
        barrier.wait()
        for i in np.random.default_rng(seed).permutation(200)[:60]:
            if source[int(i)]["image"][0, 0, 0] != i:
                wrong.append(i)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert wrong == []
    assert source._read_group.cache_info().currsize == 2


def test_small_row_groups_are_cached(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", cells(40), [0] * 40, row_group_size=1)
    source, reads = read(path), Reads(monkeypatch)
    for order in (range(40), reversed(range(40))):
        for i in order:
            source[i]
    assert len(reads.groups) == 40


# Finding files.


def test_files_are_found_by_glob_folder_and_name(tmp_path, monkeypatch):
    folder = tmp_path / "a set [1]"
    for i, name in enumerate(["0.parquet", "deep/er/1.parquet", "2.pq", ".3.parquet"]):
        write(folder / name, [png(i)], ["x"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        folder: [0, 1],
        f"{folder}/": [0, 1],
        folder / "2.pq": [2],
        tmp_path / "a set*" / "**" / "*.p*": [0, 2, 1],
        "~/a set*/*.parquet": [0],
        "a set*/**/*.parquet": [0, 1],
        "a set [1]": [0, 1],
    }.items():
        assert values(read(pattern)) == expected, pattern


def broken(folder, name):
    """Fills a folder with one kind of mistake; returns the pattern to read it."""
    good = {"images": [png(0), png(1)], "labels": ["x", "y"]}
    if name in ("text", "empty", "cut", "folder"):
        content = write(folder / "a.parquet", **good).read_bytes()
        pieces = {"text": b"hello" * 9, "empty": b"", "cut": content[:-20]}
        (folder / "a.parquet").unlink()
        if name == "folder":
            (folder / "a.parquet").mkdir()
        else:
            (folder / "a.parquet").write_bytes(pieces[name])
    elif name == "broken link":
        (folder / "a.parquet").symlink_to("nowhere")
    elif name == "broken label":
        path = write(folder / "a.parquet", **good, compression="none")
        start = pq.read_metadata(path).row_group(0).column(1).dictionary_page_offset
        content = path.read_bytes()
        path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
    elif name == "other kind":
        write(folder / "a.parquet", **good)
        write(folder / "b.parquet", [png(0)], [3])
    elif name == "other names":
        write(folder / "a.parquet", [png(0)], [0], names=["x", "y"])
        write(folder / "b.parquet", [png(0)], [0], names=["y", "x"])
    else:
        tables = {
            "no image": {"img": [b""], "label": [0]},
            "no label": {"image": [b""], "labels": [0]},
            "image type": {"image": ["0.png"], "label": [0]},
            "struct type": {"image": [{"bytes": "text"}], "label": [0]},
            "label type": {"image": [b""], "label": [[0]]},
            "fraction": {"image": [b""], "label": [0.5]},
            "no rows": {
                "image": pa.array([], pa.binary()),
                "label": pa.array([], "i8"),
            },
            "no use": {"image": pa.array([None], pa.binary()), "label": [0]},
        }
        pq.write_table(pa.table(tables[name]), folder / "a.parquet")
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", ["a.parquet: wanted a Parquet file", "exclude it"]),
        ("empty", ["a.parquet: wanted a Parquet file"]),
        ("cut", ["a.parquet: wanted a Parquet file"]),
        ("folder", ["config.data.source", "matches no file"]),
        ("broken link", ["a.parquet: wanted a Parquet file"]),
        ("broken label", ["a.parquet: wanted labels that can be read"]),
        ("other kind", ["b.parquet", "int64", "as in", "a.parquet"]),
        ("other names", ["b.parquet", "('y', 'x')", "('x', 'y')"]),
        ("no image", ["'image'", "img: binary; label", "config.data.image_column"]),
        ("no label", ["'label'", "labels: int64", "config.data.label_column"]),
        ("image type", ["image: string", "config.data.image_column"]),
        ("struct type", ["struct<bytes: string>", "config.data.image_column"]),
        ("label type", ["list<", "config.data.label_column"]),
        ("fraction", ["a.parquet: wanted labels that can be read", "0.5"]),
        ("no rows", ["config.data.source", "among 0"]),
        ("no use", ["config.data.source", "among 1"]),
    ],
)
def test_errors_name_the_file_or_field_and_the_fix(tmp_path, name, words):
    with pytest.raises(UserError) as error:
        open_source(f"parquet:{broken(tmp_path, name)}")
    for word in words:
        assert word in str(error.value)


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.source.*none-\*\.parquet"):
        parquet.Parquet(os.fspath(tmp_path / "none-*.parquet"), Decoder())


def test_class_names_must_differ(tmp_path):
    path = write(tmp_path / "a.parquet", cells(1), [0], names=["x", "x"])
    with pytest.raises(UserError, match="distinct class names.*'huggingface'"):
        open_source(f"parquet:{pathlib.Path(path)}")


def test_a_path_is_checked_whatever_the_footer_says(tmp_path, monkeypatch):
    """One byte changed makes the footer deny that image bytes are null."""
    (tmp_path / "secret.png").write_bytes(png(1))
    rows = [
        {"bytes": png(0), "path": "a.png"},
        {"bytes": None, "path": "../secret.png"},
    ]
    path = write(tmp_path / "data" / "x.parquet", rows, [0, 1])
    assert read(path).defects  # as it is
    monkeypatch.setattr(
        parquet._Shard, "_has_no_bytes", lambda shard, file: np.zeros(2, bool)
    )
    with pytest.raises(BadImage, match="leads out of the dataset's folder"):
        read(path)[1]


def test_a_missing_part_is_refused_by_name(tmp_path):
    for k in (0, 2):
        write(tmp_path / f"train-0000{k}-of-00003.parquet", cells(2), [0, 1])
    write(tmp_path / "test-00000-of-00001.parquet", cells(2), [0, 1])
    for pattern in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(
            UserError, match="train-00001-of-00003.parquet, got no such"
        ):
            read(pattern)
    assert len(read(tmp_path / "train-00002-of-00003.parquet")) == 2  # by its name
    write(tmp_path / "train-00001-of-00003.parquet", cells(2), [0, 1])
    assert len(read(tmp_path)) == 8


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "0.parquet"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"
    )
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        read(path)
