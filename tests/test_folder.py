"""Folders of images: each layout is detected, each image is used or reported."""

import errno
import io
import json
import os
import pathlib
import socket
import unicodedata

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvc_jax.data import folder as folder_module
from mvc_jax.data import label_table
from mvc_jax.data.decode import SUFFIXES, BadImage, Decoder
from mvc_jax.data.example import Source
from mvc_jax.data.folder import Folder
from mvc_jax.data.sources import check_class_names, open_source
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.generation.synthetic import class_folder


def png(grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


PNG = png()
E = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
NOT_AN_IMAGE = "not a PNG, JPEG, WebP, TIFF or BMP name"
UNLABELLED = "no label: in no class folder, in no row of metadata"


def write(root: pathlib.Path, *paths: str, **files: str | bytes) -> pathlib.Path:
    """Images at `paths`, whatever their suffix, and files with a content."""
    for path, content in {**dict.fromkeys(paths, PNG), **files}.items():
        content = content if isinstance(content, bytes) else content.encode()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def read(root) -> Folder:
    return Folder(str(root), Decoder())


def labelled(source: Folder) -> dict[str, str]:
    """id -> name of its class"""
    labels = [source.class_names[label] for label in source.labels]
    return dict(zip(source.ids, labels, strict=True))


def test_ids(source: Folder) -> set[str]:
    return {i for i, test in zip(source.ids, source.is_test, strict=True) if test}


test_ids.__test__ = False


def check(source: Folder) -> None:
    """Checks what is true of every source."""
    assert isinstance(source, Source)
    assert len(source) == len(source.ids) == len(set(source.ids)) == len(source.labels)
    assert source.labels.dtype == np.int32
    assert len(set(source.class_names)) == len(source.class_names)
    assert source.is_test is None or source.is_test.dtype == bool
    assert not set(source.ids) & set(source.defects)
    assert list(source.ids) == sorted(source.ids)
    for path in source.defects:
        path.encode()


# --- layouts ---


def test_a_folder_of_classes_has_no_split(tmp_path):
    write(tmp_path, "dog/b.png", "dog/a.png", "cat/1/2/c.png", "cat/c.png")
    source = read(tmp_path)
    check(source)
    assert source.class_names == ("cat", "dog")
    assert source.ids == ("cat/1/2/c.png", "cat/c.png", "dog/a.png", "dog/b.png")
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1])
    assert source.is_test is None
    assert source.defects == {}


def test_one_class_is_enough(tmp_path):
    assert read(write(tmp_path, "cat/a.png")).class_names == ("cat",)


@pytest.mark.parametrize(
    ("parts", "test"),
    [
        (["train"], None),
        (["train", "test"], "test"),
        (["train", "val"], "val"),
        (["train", "valid"], "valid"),
        (["train", "Validation"], "Validation"),
        (["train", "val", "test"], "test"),
        (["Training", "Testing"], "Testing"),  # Brain Tumor MRI
        (["TRAIN", "Test", "VALID"], "Test"),
    ],
)
def test_which_part_is_test(tmp_path, parts, test):
    """All other images are for training, those of val as well if there is a test."""
    for part in parts:
        write(tmp_path, f"{part}/cat/a.png", f"{part}/dog/a.png")
    source = read(tmp_path)
    check(source)
    assert source.class_names == ("cat", "dog")
    assert len(source) == 2 * len(parts)
    assert source.defects == {}
    if test is None:
        assert source.is_test is None
    else:
        assert test_ids(source) == {f"{test}/cat/a.png", f"{test}/dog/a.png"}


def test_classes_of_the_parts_are_united(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/a.png", "test/cat/b.png")
    write(tmp_path, "test/eel/a.png")
    assert read(tmp_path).class_names == ("cat", "dog", "eel")


@pytest.mark.parametrize("form", E)
def test_two_forms_of_an_accent_are_one_class(tmp_path, form):
    write(tmp_path, f"train/{E[form]}/é.png", f"test/{E['NFD']}/b.png")
    source = read(tmp_path)
    assert source.class_names == (E["NFC"],)
    assert source[1]["image"].shape == (4, 4, 3)


@pytest.mark.parametrize("parts", [("",), ("train/", "test/")])
def test_classes_are_numbered_as_their_folders_on_disk_sort(tmp_path, parts):
    """As torchvision does it; `é` sorts elsewhere where it is two characters."""
    names = (E["NFD"], "caff")
    write(tmp_path, *(f"{part}{name}/a.png" for part in parts for name in names))
    source = read(tmp_path)
    assert source.class_names == (E["NFC"], "caff")
    assert source.class_folders == names


def test_classes_in_a_table_are_numbered_as_their_folders(tmp_path):
    rows = [("1/a.png", "zebra"), ("2/b.png", "ant")]
    write(tmp_path, *(path for path, _ in rows), **{"metadata.csv": csv_of(rows)})
    source = read(tmp_path)
    assert source.class_names == ("zebra", "ant")
    assert source.class_folders == ("1", "2")


@pytest.mark.parametrize("below", ["", "images/", "unknown/"])
def test_a_test_part_without_labels_is_one_line(tmp_path, below):
    write(tmp_path, "train/cat/a.png", "train/cat/b.png", "val/cat/a.png")
    write(tmp_path, *(f"test/{below}{k}.png" for k in range(12)))
    source = read(tmp_path)
    check(source)
    assert test_ids(source) == {"val/cat/a.png"}
    assert source.class_names == ("cat",)
    assert source.defects == {}
    assert source.remarks == ("test/: 12 images without labels are not used",)


def test_a_folder_beside_the_parts_is_one_line(tmp_path):
    write(tmp_path, "train/cat/a.png", "extra/cat/a.png", "extra/b.png", "logo.png")
    write(tmp_path, "notes/a.txt")
    source = read(tmp_path)
    assert source.ids == ("train/cat/a.png",)
    assert source.defects == {
        "extra/": "2 images without labels are not used",
        "logo.png": UNLABELLED,
    }


def test_a_class_may_be_called_test(tmp_path):
    source = read(write(tmp_path, "test/a.png", "exam/a.png"))
    assert source.class_names == ("exam", "test")
    assert source.is_test is None


WNIDS = ("n01443537", "n01629819", "n02012849", "n03126707", "n03134739")
WORDS = """n01443537\tgoldfish, Carassius auratus
n01629819\tEuropean fire salamander, Salamandra salamandra
n02012849\tcrane
n03126707\tcrane
n03134739\tcroquet ball
n99999999\tnot here
"""


def tiny_imagenet(root, words=WORDS):
    for wnid in WNIDS[:2]:
        write(root, *(f"train/{wnid}/images/{wnid}_{k}.JPEG" for k in range(3)))
        write(root, **{f"train/{wnid}/{wnid}_boxes.txt": f"{wnid}_0.JPEG\t0\t0\t9\t9"})
    write(root, *(f"val/images/val_{k}.JPEG" for k in range(4)))
    rows = [f"val_{k}.JPEG\t{WNIDS[k % 2]}\t0\t0\t62\t62\n" for k in range(4)]
    write(root, **{"val/val_annotations.txt": "".join(rows), "words.txt": words})
    write(root, **{"wnids.txt": "\n".join(WNIDS[:2])})
    return write(root, *(f"test/images/test_{k}.JPEG" for k in range(5)))


def test_tiny_imagenet(tmp_path):
    source = read(tiny_imagenet(tmp_path))
    check(source)
    assert source.class_names == ("goldfish", "European fire salamander")
    assert len(source) == 10
    assert test_ids(source) == {f"val/images/val_{k}.JPEG" for k in range(4)}
    assert labelled(source)["val/images/val_1.JPEG"] == "European fire salamander"
    assert labelled(source)[f"train/{WNIDS[0]}/images/{WNIDS[0]}_2.JPEG"] == "goldfish"
    assert source.defects == {}
    assert source.remarks == ("test/: 5 images without labels are not used",)


def test_annotations_and_images_that_miss_each_other(tmp_path):
    root = tiny_imagenet(tmp_path)
    write(root, "val/images/alone.JPEG")
    with (root / "val/val_annotations.txt").open("a") as file:
        file.write(f"\ngone.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\nval_9.JPEG\n")
    write(root, "val/images/val_9.JPEG")
    source = read(root)
    check(source)
    assert len(source) == 10
    assert source.defects == {
        "val/images/alone.JPEG": UNLABELLED,
        "val/images/gone.JPEG": "listed in val_annotations.txt, no such file",
        "val/images/val_9.JPEG": "no label: val_annotations.txt gives none",
    }


def test_tiny_imagenet_sorted_into_class_folders(tmp_path):
    """As scripts of tutorials do, which keep the file of annotations."""
    root = tiny_imagenet(tmp_path)
    for k in range(4):
        to = root / f"val/{WNIDS[k % 2]}/images/val_{k}.JPEG"
        to.parent.mkdir(parents=True, exist_ok=True)
        (root / f"val/images/val_{k}.JPEG").rename(to)
    (root / "val/images").rmdir()
    source = read(root)
    assert len(test_ids(source)) == 4
    assert source.defects == {} and len(source.remarks) == 1


@pytest.mark.parametrize("layout", ["{}/a.png", "train/{}/a.png", "train/{}/x/a.png"])
def test_wnids_become_words(tmp_path, layout):
    """The first name; all names if that is taken; with the wnid if these are, too."""
    keys = (*WNIDS, "n09999999", "croquet ball, the")
    words = WORDS.replace("croquet ball", "goldfish, gold, fish")
    root = write(tmp_path, *map(layout.format, keys), **{"words.txt": words})
    assert dict(zip(sorted(keys), read(root).class_names, strict=True)) == {
        "croquet ball, the": "croquet ball, the",
        "n01443537": "goldfish, Carassius auratus",
        "n01629819": "European fire salamander",
        "n02012849": "crane (n02012849)",
        "n03126707": "crane (n03126707)",
        "n03134739": "goldfish, gold, fish",
        "n09999999": "n09999999",
    }


# --- metadata ---


def csv_of(rows: list[tuple], columns=("file_name", "label")) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in [columns, *rows])


def jsonl_of(rows: list[tuple], columns=("file_name", "label")) -> str:
    lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
    return "".join(line + "\n" for line in lines)


METADATA = {"metadata.csv": csv_of, "metadata.jsonl": jsonl_of}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_in_each_part(tmp_path, name):
    """Its rows take precedence over folders, and may name files in folders."""
    write(tmp_path, "train/a.png", "train/x/b.png", "test/x/y/c.png")
    rows = [("a.png", "dog"), ("x/b.png", "cat")]
    write(tmp_path, **{f"train/{name}": METADATA[name](rows)})
    other = METADATA["metadata.jsonl"]([("./x/y/c.png", "cat")])
    write(tmp_path, **{"test/metadata.jsonl": other})
    source = read(tmp_path)
    check(source)
    assert labelled(source) == {
        "test/x/y/c.png": "cat",
        "train/a.png": "dog",
        "train/x/b.png": "cat",
    }
    assert test_ids(source) == {"test/x/y/c.png"}
    assert source.defects == {}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("third", ["test", "Validation"])
def test_metadata_in_the_root_with_a_split(tmp_path, name, third):
    rows = [("i/1.png", "a", "train"), ("i/2.png", "b", "Train"), ("i/3.png", 7, third)]
    text = METADATA[name](rows, ("file_name", "label", "split"))
    source = read(write(tmp_path, "i/1.png", "i/2.png", "i/3.png", **{name: text}))
    check(source)
    assert labelled(source) == {"i/1.png": "a", "i/2.png": "b", "i/3.png": "7"}
    assert test_ids(source) == {"i/3.png"}


def test_metadata_in_the_root_without_a_split(tmp_path):
    """Then folders named after splits give it, if there are any."""
    for part in ("one", "test"):
        root = tmp_path / part
        rows = [("train/1.png", "a"), (f"{part}/2.png", "a"), ("3.png", "a")]
        write(root, *(row[0] for row in rows), **{"metadata.csv": csv_of(rows)})
        source = read(root)
        check(source)
        assert len(source) == 3
        if part == "one":
            assert source.is_test is None
        else:
            assert test_ids(source) == {"test/2.png"}


@pytest.mark.parametrize("column", label_table.LABEL_COLUMNS)
@pytest.mark.parametrize("file_column", label_table.FILE_COLUMNS)
def test_names_of_columns(tmp_path, column, file_column):
    columns = (f" {file_column.title()}", column.upper())
    text = csv_of([("1.png", "x y")], columns)
    source = read(write(tmp_path, "1.png", **{"metadata.csv": text}))
    assert labelled(source) == {"1.png": "x y"}


def test_a_column_of_names_wins_over_one_of_numbers(tmp_path):
    text = csv_of([("1.png", 0, "cat")], ("file_name", "label", "class_name"))
    assert read(write(tmp_path, "1.png", **{"metadata.csv": text})).class_names == (
        "cat",
    )


def test_a_csv_as_excel_writes_it(tmp_path):
    """A byte order mark, CRLF, quotes, a backslash, a comma and a newline inside."""
    text = '\ufefffile_name,label\r\n"x\\1.png","a, b"\r\n\r\n2.png,"c\r\nd"\r\n'
    source = read(write(tmp_path, "x/1.png", "2.png", **{"metadata.csv": text}))
    assert labelled(source) == {"2.png": "c\r\nd", "x/1.png": "a, b"}
    assert source.defects == {}


@pytest.mark.parametrize(
    "label", ["../up", "a/b", "/etc", "日本", "a: b", "..", "x\\y"]
)
def test_a_label_in_metadata_may_be_any_text(tmp_path, label):
    text = jsonl_of([("1.png", label)])
    assert read(write(tmp_path, "1.png", **{"metadata.jsonl": text})).class_names == (
        label,
    )


def test_a_generated_folder_is_read(tmp_path):
    names = ("brain tumor", "naïve class", "a/b", "..", "z\\b")
    nothing = dict.fromkeys(synthetic.PROVENANCE)
    rows = [nothing | {"index": k, "label": k % 5} for k in range(10)]
    folder = epath.Path(tmp_path)
    store = synthetic.Store(
        folder, Digests(folder, folder / "digests"), names, "0badf00d", 10
    )
    image = np.zeros((4, 4, 3), np.uint8)
    store.write(store.missing(10)[0], [image] * 10, rows)
    store.finish()
    source = read(tmp_path)
    check(source)
    assert source.class_names == tuple(sorted(names))
    assert source.is_test is None
    assert source.defects == {}
    for id_, name in labelled(source).items():
        assert id_.split("/")[1] == class_folder(name)


ROWS_THAT_FAIL = {
    "no such file": (("gone.png", "a"), "gone.png", "listed in {}, no such file"),
    "up": (("../b.png", "a"), "../b.png", "listed in {}, outside of its folder"),
    "up inside": (("x/../../b.png", "a"), "../b.png", "listed in {}, outside of its"),
    "absolute": (("/etc/a.png", "a"), "/etc/a.png", "listed in {}, outside of its"),
    "hidden": ((".h/2.png", "a"), ".h/2.png", "listed in {}, in a hidden folder"),
    "no label": (("2.png", ""), "2.png", "no label: {} gives none"),
    "blank label": (("2.png", "  "), "2.png", "no label: {} gives none"),
    "two labels": (("1.png", "b"), "1.png", "'a', 'train') and as ('b', 'train')"),
    "no image": (("notes.gif", "a"), "notes.gif", NOT_AN_IMAGE),
    "empty file": (("empty.png", "a"), "empty.png", "empty file"),
    "no file name": (("", "a"), "{}, row 2", "no file name"),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("part", ["", "train/"])
@pytest.mark.parametrize("case", ROWS_THAT_FAIL)
def test_a_row_that_fails_is_a_defect(tmp_path, name, part, case):
    row, path, reason = ROWS_THAT_FAIL[case]
    rows = [("1.png", "a"), row, ("3.png", "a")]
    files = {f"{part}{name}": METADATA[name](rows), f"{part}empty.png": ""}
    write(tmp_path, *(f"{part}{k}.png" for k in (1, 2, 3)), f"{part}notes.gif", **files)
    source = read(tmp_path)
    check(source)
    path, reason = part + path.format(name), reason.format(name)
    assert reason in source.defects[path]
    assert set(source.ids) == {part + "1.png", part + "3.png"} - {path}
    left = {part + "2.png": UNLABELLED, part + "empty.png": "empty file"}
    assert source.defects == left | {path: source.defects[path]}


@pytest.mark.parametrize("label", [None, ["a"], {"a": 1}])
def test_a_label_that_is_not_text(tmp_path, label):
    text = jsonl_of([("1.png", label), ("2.png", "b")])
    source = read(write(tmp_path, "1.png", "2.png", **{"metadata.jsonl": text}))
    assert labelled(source) == {"2.png": "b"}
    assert "no label" in source.defects["1.png"]


def test_repeated_rows_must_agree_on_the_split(tmp_path):
    columns = ("file_name", "label", "split")
    rows = [("1.png", "a", "train")] * 3
    rows += [("2.png", "a", "train"), ("2.png", "a", "test"), ("2.png", "a", "train")]
    rows += [("3.png", "a", "fold 7"), ("4.png", "a", "")]
    images = (f"{k}.png" for k in (1, 2, 3, 4))
    source = read(write(tmp_path, *images, **{"metadata.csv": csv_of(rows, columns)}))
    assert source.ids == ("1.png",)
    assert {path: "train" in why for path, why in source.defects.items()} == {
        "2.png": True,
        "3.png": True,
        "4.png": True,
    }
    assert "'fold 7'" in source.defects["3.png"]


def test_names_in_metadata_may_have_another_unicode_form(tmp_path):
    text = csv_of([(f"{E['NFC']}.png", E["NFD"])])
    source = read(write(tmp_path, f"{E['NFD']}.png", **{"metadata.csv": text}))
    assert labelled(source) == {f"{E['NFD']}.png": E["NFC"]}


# --- defects ---


def broken_link(path):
    path.symlink_to("nowhere.png")


def link_to_itself(path):
    path.symlink_to(path.name)


def pipe(path):
    os.mkfifo(path)


def a_socket(path):
    here = os.open(path.parent, os.O_RDONLY)  # a socket's path has at most 107 bytes
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"/proc/self/fd/{here}/{path.name}")
    server.close()
    os.close(here)


def full_folder(path):
    write(path, "a.png", "b/c.png")


def loop(path):
    path.symlink_to("..")


def outer_loop(path):
    path.symlink_to("../..")


def everything(path):
    path.symlink_to("/")


def text(path):
    path.write_text("x")


BAD_ENTRIES = [
    ("a.png", pathlib.Path.touch, "empty file"),
    ("a.png", full_folder, "a folder, not an image"),
    ("a.png", broken_link, "a broken link"),
    ("a.png", link_to_itself, "a broken link"),
    ("a.png", pipe, "not a regular file"),
    ("a.png", a_socket, "not a regular file"),
    ("log", pipe, "not a regular file"),
    ("again", loop, "a link to one of its parent folders"),
    ("again", outer_loop, "a link to one of its parent folders"),
    ("again", everything, "a link to one of its parent folders"),
    *((name, text, NOT_AN_IMAGE) for name in ("scan.mha", "a.GIF", "b.txt", "raw")),
    ("a.zip", text, NOT_AN_IMAGE),
    ("a.png.bak", text, NOT_AN_IMAGE),
]


@pytest.mark.parametrize("top", ["", "train/"])
@pytest.mark.parametrize("inner", ["", "deep/"])
@pytest.mark.parametrize(("name", "make", "reason"), BAD_ENTRIES)
def test_a_bad_entry_of_a_class_is_a_defect(tmp_path, top, inner, name, make, reason):
    write(tmp_path, f"{top}cat/{inner}good.png")
    make(tmp_path / f"{top}cat/{inner}{name}")
    source = read(tmp_path)
    check(source)
    assert source.ids == (f"{top}cat/{inner}good.png",)
    assert source.defects == {f"{top}cat/{inner}{name}": reason}


@pytest.mark.parametrize("name", [".DS_Store", "._good.png", "Thumbs.db", ".x/a.png"])
@pytest.mark.parametrize("at", ["", "train/", "train/cat/", "train/cat/deep/"])
def test_system_files_are_ignored(tmp_path, name, at):
    write(tmp_path, "train/cat/good.png", at + name, at + "__MACOSX/cat/good.png")
    source = read(write(tmp_path, at + "desktop.ini"))
    assert source.ids == ("train/cat/good.png",)
    assert source.defects == {}


def test_other_files_outside_of_classes_are_ignored(tmp_path):
    write(tmp_path, "README.txt", "labels.xlsx", "train/LICENSE", "train/cat/a.png")
    assert read(tmp_path).defects == {}


@pytest.mark.parametrize("name", ["a.png", "folder"])
def test_a_name_that_is_not_utf8(tmp_path, name):
    write(tmp_path, "cat/a.png")
    path = os.fsencode(tmp_path / "cat") + b"/\xff" + name.encode()
    os.mkdir(path) if name == "folder" else pathlib.Path(os.fsdecode(path)).touch()
    source = read(tmp_path)
    check(source)
    assert source.ids == ("cat/a.png",)
    assert source.defects == {f"cat/\\udcff{name}": "a name that is not UTF-8"}


def test_a_file_without_permission(tmp_path, monkeypatch):
    """Not by the mode, since root may read every file."""
    write(tmp_path, "cat/a.png", "cat/b.png")
    real = os.access
    monkeypatch.setattr(
        folder_module.os,
        "access",
        lambda path, mode: real(path, mode) and not os.fspath(path).endswith("b.png"),
    )
    source = read(tmp_path)
    assert source.ids == ("cat/a.png",)
    assert source.defects == {"cat/b.png": "cannot be read: Permission denied"}


def test_a_folder_without_permission(tmp_path, monkeypatch):
    write(tmp_path, "cat/a.png", "dog/a.png")
    real = os.scandir

    def scandir(path):
        if path.endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(folder_module.os, "scandir", scandir)
    source = read(tmp_path)
    assert source.class_names == ("cat",)
    assert source.defects == {"dog": "cannot be read: Permission denied"}


def test_folders_without_images(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/docs/a.txt", "train/docs/x/b.txt")
    (tmp_path / "train/dog").mkdir()
    source = read(tmp_path)
    assert source.class_names == ("cat",)
    reason = "a folder without images"
    assert source.defects == {"train/docs/": reason, "train/dog/": reason}


def test_a_class_whose_images_are_all_defects_is_kept(tmp_path):
    """So that the later count of its images is an error that names it."""
    source = read(write(tmp_path, "cat/a.png", **{"dog/a.png": ""}))
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.labels, [0])
    assert source.defects == {"dog/a.png": "empty file"}


def test_links_are_followed(tmp_path):
    write(tmp_path / "store", "x.png", "deep/y.png")
    write(tmp_path / "data", "cat/a.png")
    (tmp_path / "data/dog").symlink_to("../store")
    (tmp_path / "data/cat/b.png").symlink_to("../../store/x.png")
    source = read(tmp_path / "data")
    assert source.ids == ("cat/a.png", "cat/b.png", "dog/deep/y.png", "dog/x.png")
    assert source.defects == {}


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".JPEG", ".Png"])
def test_suffixes_of_images(tmp_path, suffix):
    assert len(read(write(tmp_path, f"cat/a{suffix}"))) == 1


# --- images ---


def test_an_image_is_decoded_on_access(tmp_path):
    write(tmp_path, **{"a/1.png": png(7), "b/2.png": png(9), "b/3.png": b"broken"})
    source = read(tmp_path)
    example = source[1]
    assert example["id"] == "b/2.png"
    assert example["label"] == 1
    assert example["note"] == ""
    np.testing.assert_array_equal(example["image"], np.full((4, 4, 3), 9, np.uint8))
    with pytest.raises(BadImage, match="not a PNG"):
        source[2]


def test_the_decoder_s_note_is_in_the_example(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4)).save(deep, "png")
    source = read(write(tmp_path, **{"a/1.png": deep.getvalue()}))
    assert source[0]["note"] == "more than 8 bits, windowed"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_image_that_cannot_be_read_later(tmp_path, monkeypatch, code):
    source = read(write(tmp_path, "a/1.png"))

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(BadImage, match=f"^cannot be read: {os.strerror(code)}$"):
        source[0]


def test_an_image_that_was_deleted_later(tmp_path):
    source = read(write(tmp_path, "a/1.png"))
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(BadImage, match="^cannot be read: No such file or directory$"):
        source[0]


# --- errors ---


def refusal(root) -> str:
    with pytest.raises(UserError) as error:
        read(root)
    assert str(error.value).startswith(f"config.data.source=folder:{root}: wanted ")
    return str(error.value)


def test_no_such_path(tmp_path):
    assert "No such file" in refusal(tmp_path / "nowhere")


def test_a_path_of_a_file(tmp_path):
    assert "Not a directory" in refusal(write(tmp_path, "a.png") / "a.png")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, "data/cat/a.png")))
    assert open_source("folder:~/data").ids == ("cat/a.png",)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a b.zip", "unzip '{}/a b.zip' -d '{}'"),
        ("a.tar", "tar -xf {}/a.tar -C {}"),
        ("a.tar.gz", "tar -xf {}/a.tar.gz -C {}"),
        ("a.TGZ", "tar -xf {}/a.TGZ -C {}"),
        ("a.7z", "7z x {}/a.7z -o{}"),
        ("a.rar", "unrar x {}/a.rar {}/"),
    ],
)
def test_the_command_to_unpack_an_archive_is_shown(tmp_path, name, command):
    root = write(tmp_path, **{name: "x"})
    stem = str(root / name.split(".")[0])
    assert command.format(root, stem) in refusal(root / name)
    inside = command.replace("'{}'", "{}").format(root, root)
    assert inside in refusal(root)
    write(root, "cat/a.png")
    assert read(root).ids == ("cat/a.png",)


def test_no_images(tmp_path):
    write(tmp_path, "a/1.txt", "a/2.txt", "b/3.mha", "raw")
    for words in ("0 images", "2 .txt files", "1 .mha", "1 other", "2 folders"):
        assert words in refusal(tmp_path)


def test_an_empty_folder(tmp_path):
    assert "0 images, 0 folders" in refusal(tmp_path)


@pytest.mark.parametrize(
    "paths",
    [
        ["1.png", "2.png"],
        ["train/1.png", "train/2.png"],
        ["test/cat/1.png", "val/cat/1.png"],
        ["train/1.png", "test/cat/2.png"],
    ],
)
def test_no_labelled_training_images(tmp_path, paths):
    assert "labelled training images" in refusal(write(tmp_path, *paths))
    assert "2 images" in refusal(tmp_path)


def test_the_error_lists_defects(tmp_path):
    root = write(tmp_path, **{"cat/a.png": ""})
    with pytest.raises(UserError) as error:
        read(root)
    assert "1 defects" in str(error.value)
    assert error.value.details == ("cat/a.png: empty file",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("csv", 'file_name,label\n1.png,a\n2.png,"b\n', "line 3: unexpected end"),
        ("csv", "file_name,label\n1.png,a,b\n", "line 2: more fields than columns"),
        ("csv", b"file_name,label\n1.png,\xff\n", "line 2: 'utf-8' codec"),
        ("csv", "image,species\n1.png,a\n", "columns image, species"),
        ("csv", "file_name,species\n1.png,a\n", "columns file_name, species"),
        ("csv", "file_name;label\n1.png;a\n", "columns file_name;label"),
        ("csv", "", "(no rows)"),
        ("jsonl", '{"file_name": "1.png"}\n', "columns file_name"),
        ("jsonl", '{"file_name": "1.png"\n', "line 1: Expecting"),
        ("jsonl", '\n\n["1.png", "a"]\n', "line 3: not a JSON object"),
        ("jsonl", "[" * 100_000, "line 1: "),
    ],
)
@pytest.mark.parametrize("part", ["", "train/"])
def test_metadata_that_cannot_be_read(tmp_path, part, name, content, words):
    path = f"{part}metadata.{name}"
    message = refusal(write(tmp_path, part + "1.png", **{path: content}))
    assert path in message
    assert words in message


@pytest.mark.parametrize("part", ["", "train/"])
def test_two_files_of_metadata(tmp_path, part):
    names = [f"{part}{name}" for name in METADATA]
    root = write(tmp_path, part + "1.png", **dict.fromkeys(names, "x"))
    assert " and ".join(names) in refusal(root)


@pytest.mark.parametrize("names", [("brain_tumor", "brain tumor"), ("cat", "cat ")])
def test_two_classes_with_the_same_words(tmp_path, names):
    write(tmp_path, *(f"{name}/a.png" for name in names))
    with pytest.raises(UserError) as error:
        check_class_names(read(tmp_path).class_names)
    for name in names:
        assert repr(name) in str(error.value)


def test_a_class_without_words(tmp_path):
    with pytest.raises(UserError, match="'__'"):
        check_class_names(read(write(tmp_path, "cat/a.png", "__/a.png")).class_names)


# --- any folder ---

names = st.sampled_from(["a", "b", "1.png", "2.JPG", "x.txt", ".h", "train", "Test"])
paths = st.lists(names, min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(paths, st.sampled_from([b"", PNG]), max_size=12))
@settings(deadline=None, max_examples=100)
def test_every_image_is_an_id_or_a_defect(tmp_path_factory, contents):
    """Whatever the layout, each image is used or reported, and not both."""
    root = tmp_path_factory.mktemp("any")
    for path, content in contents.items():
        try:
            write(root, **{path: content})
        except OSError:  # a file where this path has a folder, or vice versa
            continue
    try:
        source = read(root)
    except UserError:
        return
    check(source)
    assert source.ids == read(root).ids
    remarks = (line.partition(": ")[0] for line in source.remarks)
    reported = {*source.defects, *remarks}
    for path in root.rglob("*"):
        id_ = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in id_.split("/"))
        if path.name.lower().endswith(SUFFIXES) and not hidden:
            above = [f"{parent}" for parent in pathlib.PurePosixPath(id_).parents]
            places = {id_, *above, *(f"{parent}/" for parent in above)}
            assert (id_ in source.ids) != bool(places & reported), id_


def test_the_file_system_s_order_does_not_matter(tmp_path, monkeypatch):
    write(tmp_path, *(f"train/{c}/{k}.png" for c in "cab" for k in range(5)), "x.png")
    first = read(tmp_path)
    add = folder_module._add_entries
    monkeypatch.setattr(
        folder_module, "_add_entries", lambda t, p, e: add(t, p, list(e)[::-1])[::-1]
    )
    again = read(tmp_path)
    assert first.ids == again.ids
    assert first.class_names == again.class_names
    assert list(first.defects.items()) == list(again.defects.items())


def test_listing_opens_no_image_and_each_folder_once(tmp_path, monkeypatch):
    write(tmp_path, *(f"cat/{k}.png" for k in range(50)), "dog/deep/good.png")
    listed, scandir = [], os.scandir
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(
        folder_module.os, "scandir", lambda path: listed.append(path) or scandir(path)
    )
    assert len(read(tmp_path)) == 51
    assert len(listed) == len(set(listed)) == 4
