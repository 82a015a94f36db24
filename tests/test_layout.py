"""Parts and classes are separated by structure: what went in comes out, or an error."""

import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import layout
from mvc_jax.data.decode import Decoder
from mvc_jax.data.folder import Folder, FolderOptions
from mvc_jax.data.layout import class_key
from mvc_jax.data.sources import ClassSubset, check_class_names
from mvc_jax.errors import UserError


def write(root: pathlib.Path, *paths: str, **files: str) -> pathlib.Path:
    """Files of their own content at `paths`, whatever their suffix."""
    for path, content in {**{p: p.rpartition("/")[2] for p in paths}, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


def read(root, *, keep_validation=False, **options) -> Folder:
    options = FolderOptions(**options)
    return Folder(str(root), Decoder(), options, keep_validation=keep_validation)


def images(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{k}.png" for folder in folders for k in range(count)]


def parts_of_test(source: Folder) -> set[str]:
    pairs = zip(source.ids, source.is_test, strict=True)
    return {i.split("/")[0] for i, is_test in pairs if is_test}


# --- any tree ---

class_names = st.sampled_from(
    ["cat", "Dog", "hex_nut", "train", "valid", "invalid", "test tube", "1", "日本"]
)
role_words = {
    "train": ["train", "training"],
    "test": ["test", "testing"],
    "val": ["val", "valid", "validation", "dev"],
    "pred": ["pred"],
}
shapes = st.sampled_from(["{}", "seg_{}", "{}_set", "{}-images", "x-ray {}", "{}2017"])
cases = st.sampled_from([str.lower, str.upper, str.title])


@st.composite
def trees(draw):
    """(images, classes): classes, or parts of them, below some folders."""
    classes = draw(
        st.lists(class_names, min_size=1, max_size=5, unique=True).map(sorted)
    )
    if set(classes) <= {"train", "valid", "test tube"}:
        # Alone, `train/images/1.png` may be an image of either folder.
        classes = sorted({*classes, "Dog"})
    depth = draw(st.sampled_from(["", "", "images/", "a/b/"]))
    roles = draw(st.sets(st.sampled_from(["test", "val", "pred"])))
    parts = draw(st.booleans()) or bool(roles)
    paths = []
    if not parts:
        paths = [f"{name}/{depth}{k}.png" for name in classes for k in range(2)]
    else:
        shape, case = draw(shapes), draw(cases)
        for role in sorted({"train"} | roles):
            name = case(shape.format(draw(st.sampled_from(role_words[role]))))
            name = f"{name}/{name}" if draw(st.booleans()) else name
            here = classes
            if role != "train":
                here = draw(st.sets(st.sampled_from(classes), min_size=1))
                here = [draw(cases)(x) for x in sorted(here)]
            if role == "pred" or (role == "test" and draw(st.booleans())):
                paths += [f"{name}/{k}.png" for k in range(3)]
            else:
                paths += [f"{name}/{x}/{depth}{k}.png" for x in here for k in range(2)]
    if len(classes) == 1:  # the same of `archive/cat/1.png`
        return paths, set(classes)
    around = draw(st.sampled_from(["", "", "archive/", "data/archive/", "data/data/"]))
    return [around + path for path in paths], set(classes)


@given(trees())
@settings(deadline=None, max_examples=150)
def test_the_classes_that_were_put_in_or_a_refusal(tmp_path_factory, tree):
    paths, classes = tree
    root = write(tmp_path_factory.mktemp("tree"), *paths)
    try:
        source = read(root)
    except UserError as error:
        assert "wanted" in str(error) and error.details
        return
    assert set(map(class_key, source.class_names)) == set(map(class_key, classes))
    for id_, label in zip(source.ids, source.labels, strict=True):
        key = class_key(source.class_names[label])
        assert key in map(class_key, id_.split("/")[:-1])
    unlabelled = sum("pred" in id_.lower() for id_ in source.ids)
    assert unlabelled == 0


@pytest.mark.parametrize("shape", ["{}", "seg_{}", "{}_set", "X{}", "{}-1", "{} data"])
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("level", ["{0}", "{0}/{0}"])
def test_common_names_of_parts_are_read(tmp_path, shape, case, level):
    """Not refused: what the property above would allow as well."""
    shape = shape.replace("X", "x ")
    for train, test in (("train", "test"), ("training", "testing"), ("train", "val")):
        names = [case(shape.format(word)) for word in (train, test)]
        root = tmp_path / "-".join((train, test))
        for name in names:
            part = level.format(name)
            write(root, *images(f"{part}/cat", f"{part}/dog"))
        source = read(root)
        assert source.class_names == ("cat", "dog")
        assert parts_of_test(source) == {names[1]}


# --- layouts that people have ---


def test_parts_with_a_prefix_and_a_repeated_level(tmp_path):
    classes = ("buildings", "forest", "sea")
    for part in ("seg_train", "seg_test"):
        write(tmp_path, *images(*(f"{part}/{part}/{name}" for name in classes)))
    write(tmp_path, *images("seg_pred/seg_pred", count=5))
    source = read(tmp_path)
    assert source.class_names == classes
    assert parts_of_test(source) == {"seg_test"} and len(source) == 12
    assert source.defects == {}
    assert source.remarks == (
        "seg_pred/seg_pred/: 5 images without labels are not used",
    )


def test_a_training_set_and_a_test_set(tmp_path):
    for part in ("training_set", "test_set"):
        write(tmp_path, *images(f"{part}/{part}/cats", f"{part}/{part}/dogs"))
    source = read(tmp_path)
    assert source.class_names == ("cats", "dogs") and parts_of_test(source) == {
        "test_set"
    }


def test_two_folders_of_images_and_a_csv_are_refused_with_the_field(tmp_path):
    write(tmp_path, *images("train_images", "test_images"))
    write(tmp_path, **{"train.csv": "id,species\n0,cat\n1,dog\n"})
    with pytest.raises(UserError, match="config.data.labels=train.csv:COLUMN") as error:
        read(tmp_path)
    assert "train_images/  2 images" in error.value.details
    source = read(tmp_path, labels="train.csv:species")
    assert source.ids == ("train_images/0.png", "train_images/1.png")
    assert source.class_names == ("cat", "dog") and source.is_test is None
    assert source.remarks == ("test_images/: 2 images without labels are not used",)


def test_classes_beside_a_folder_that_holds_them_again(tmp_path):
    names = ("yes", "no")
    write(tmp_path, *images(*names, *(f"brain_tumor_dataset/{n}" for n in names)))
    source = read(tmp_path)
    assert source.class_names == ("no", "yes") and len(source) == 4
    assert source.remarks == (
        "brain_tumor_dataset/: the same 4 images as beside it are not used",
    )
    (tmp_path / "brain_tumor_dataset/no/0.png").write_text("another")
    with pytest.raises(UserError, match="data.train=brain_tumor_dataset"):
        read(tmp_path)
    assert len(read(tmp_path, train=("brain_tumor_dataset",))) == 4


def test_an_archive_that_holds_itself_again(tmp_path):
    """As one of chest X-rays does."""
    parts = [f"{p}/{c}" for p in ("train", "test", "val") for c in ("NORMAL", "ILL")]
    write(tmp_path, *images(*parts, *(f"chest_xray/{part}" for part in parts)))
    source = read(tmp_path)
    assert source.class_names == ("ILL", "NORMAL") and len(source) == 12
    assert len(source.remarks) == 1 and source.defects == {}


@pytest.mark.parametrize(
    "names",
    [
        ("valid", "invalid"),
        ("train", "car", "bicycle"),
        ("bullet train", "test tube"),
        ("bullet_train", "freight_train"),
        ("dev", "test", "prod"),
        ("pred", "prey"),
    ],
)
def test_classes_may_have_names_of_parts(tmp_path, names):
    source = read(write(tmp_path / "flat", *images(*names)))
    assert set(source.class_names) == set(names) and source.is_test is None
    for part in ("train", "test"):
        write(tmp_path / "parts", *images(*(f"{part}/{name}" for name in names)))
    source = read(tmp_path / "parts")
    assert set(source.class_names) == set(names) and parts_of_test(source) == {"test"}


def test_our_own_folder_of_classes_named_like_parts(tmp_path):
    """Its metadata repeats the folders' names, which are not splits then."""
    rows = [f'{{"file_name": "{n}/0.png", "label": "{n}"}}\n' for n in ("valid", "no")]
    write(
        tmp_path, *images("valid", "no", count=1), **{"metadata.jsonl": "".join(rows)}
    )
    source = read(tmp_path)
    assert source.class_names == ("no", "valid") and source.is_test is None


def test_folders_of_images_that_are_all_named_like_parts(tmp_path):
    write(tmp_path, *images("train", "test"))
    with pytest.raises(UserError, match="are classes, set --config.data.train=. "):
        read(tmp_path)
    assert read(tmp_path, train=(".",)).class_names == ("test", "train")


@pytest.mark.parametrize(
    "folders",
    [
        ("site_a/cat", "site_a/dog", "site_b/cat", "site_b/dog"),
        ("COVID/images", "COVID/masks", "Normal/images", "Normal/masks"),
        ("cat/train", "cat/test", "dog/train", "dog/test"),
        ("outer/cat", "outer/dog"),
        ("train/cat", "train/dog", "masks"),
        ("train/cat", "train/dog", "extra/cat", "extra/dog"),
        ("train", "test", "masks"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_with_the_tree(tmp_path, folders):
    write(tmp_path, *images(*folders))
    with pytest.raises(UserError, match="--config.data.train=") as error:
        read(tmp_path)
    assert any("images" in line for line in error.value.details)
    if folders != ("train", "test", "masks"):
        tops = {folder.split("/")[0] for folder in folders}
        assert set(read(tmp_path, train=(".",)).class_names) == tops


def test_the_fields_settle_it(tmp_path):
    sites = [f"{site}/{name}" for site in ("a", "b", "c") for name in ("cat", "dog")]
    write(tmp_path, *images(*sites))
    source = read(tmp_path, train=("a", "b"), test=("c/",))
    assert source.class_names == ("cat", "dog") and parts_of_test(source) == {"c"}
    assert len(source) == 12 and source.remarks == ()
    source = read(tmp_path, train=("a",))
    assert len(source) == 4 and source.is_test is None
    assert source.remarks == tuple(
        f"{top}/: 4 images without labels are not used" for top in "bc"
    )
    with pytest.raises(UserError, match="config.data.test names, got no 'd'"):
        read(tmp_path, train=("a",), test=("d",))


def test_a_part_for_test_inside_of_the_classes(tmp_path):
    write(tmp_path, *images("cat", "dog", "held out/Cat", "held out/Dog"))
    source = read(tmp_path, test=("held out",))
    assert source.class_names == ("cat", "dog") and parts_of_test(source) == {
        "held out"
    }


# --- names of classes ---


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("NORMAL", "Normal"),
        ("hex_nut", "Hex-Nut"),
        ("hex nut", "HexNut"),
        ("ＡＢＣ", "abc"),
        ("ﬁsh", "FISH"),
        ("Straße", "STRASSE"),
    ],
)
def test_classes_of_the_parts_meet(tmp_path, train, test):
    write(tmp_path, *images(f"train/{train}", "train/b", f"test/{test}", "test/b"))
    source = read(tmp_path)
    assert set(source.class_names) == {train, "b"}
    assert len(parts_of_test(source)) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("3_5", "35"), ("A+", "A-"), ("-1", "1"), ("1-1", "11")]
)
def test_classes_that_differ(one, other):
    assert class_key(one) != class_key(other)
    check_class_names((one, other))


def test_two_classes_that_differ_by_case_alone_are_refused(tmp_path):
    write(tmp_path, *images("Cat", "cat", "dog"))
    source = read(tmp_path)
    with pytest.raises(UserError, match="class 'cat'.*'Cat'"):
        check_class_names(source.class_names)
    check_class_names(ClassSubset(source, ("Cat", "dog")).class_names)
    write(tmp_path / "parts", *images("train/Cat", "train/cat", "test/CAT"))
    with pytest.raises(UserError, match="'CAT'.*'Cat' and 'cat'"):
        read(tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", "train"),
        ("Train_Data", "train"),
        ("trainSet", "train"),
        ("TRAINING", "train"),
        ("val2017", "val"),
        ("train+val", "train"),
        ("train-test", ""),
        ("constraint", ""),
        ("latest", ""),
        ("testament", ""),
        ("invalid", ""),
        ("развитие", ""),
    ],
)
def test_the_role_in_a_name(name, role):
    assert layout.role(name)[0] == role


# --- validation ---


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "valid")])
def test_validation_images_join_train_or_are_kept(tmp_path, parts):
    write(tmp_path, *images(*(f"{p}/{c}" for p in parts for c in ("cat", "dog"))))
    source = read(tmp_path)
    assert source.is_validation is None
    assert parts_of_test(source) == {parts[-1]}
    source = read(tmp_path, keep_validation=True)
    kept = {
        i.split("/")[0]
        for i, k in zip(source.ids, source.is_validation, strict=True)
        if k
    }
    assert kept == {parts[1]}
    assert (source.is_test is None) == ("test" not in parts)


# --- labels in a file ---


@pytest.mark.parametrize(
    "names",
    [("a/1.png", "a/2.png"), ("1.png", "2.png"), ("1", "2"), ("a/1", "a/2")],
)
def test_the_column_of_names_is_found(tmp_path, names):
    rows = "".join(f"{k},{name},x{k}\n" for k, name in enumerate(names))
    write(tmp_path, "a/1.png", "a/2.png", **{"l.csv": f"n,where,kind\n{rows}"})
    source = read(tmp_path, labels="l.csv:kind")
    assert source.class_names == ("x0", "x1") and len(source) == 2


def test_labels_in_a_file_for_two_parts(tmp_path):
    """The same names in both: those of the part that the file is called after."""
    write(tmp_path, *images("train_images", "test_images"))
    write(tmp_path, **{"train.csv": "id,y\n0.png,a\n1.png,b\n9.png,b\n"})
    source = read(tmp_path, labels="train.csv:y")
    assert all(id_.startswith("train_images/") for id_ in source.ids)
    assert source.defects == {"train.csv, row 3": "'9.png', no such image"}
    write(tmp_path, **{"all.csv": "id,y\n0.png,a\n"})
    with pytest.raises(UserError, match="'0.png' in all.csv, which may be"):
        read(tmp_path, labels="all.csv:y")
    source = read(tmp_path, labels="all.csv:y", train=("train_images",))
    assert source.ids == ("train_images/0.png",)
    rows = "p,y,split\ntrain_images/0.png,a,train\ntest_images/0.png,a,test\n"
    write(tmp_path, **{"split.csv": rows})
    assert parts_of_test(read(tmp_path, labels="split.csv:y")) == {"test_images"}


@pytest.mark.parametrize("inner", ["", "images/"])
def test_a_table_beside_folders_that_may_be_parts(tmp_path, inner):
    """What they are is asked, unless the table says it, or the user does."""
    names = images(*(f"{inner}{top}" for top in ("train/x", "test/x", "extra/x")))
    table = [f"{name},{'ab'[k % 2]}" for k, name in enumerate(names)]
    labels = "\n".join(["file_name,label", *table])
    root = write(tmp_path / "with", *names, **{"metadata.csv": labels})
    fixes = (
        "give metadata.csv a column split",
        f"--config.data.labels=metadata.csv:label --config.data.train={inner}train",
        "--config.data.train=. if none of them is a part",
    )
    with pytest.raises(UserError, match=f"={inner[:-1] or '[.]'} if all of them are"):
        read(write(tmp_path / "without", *names))
    for fix in fixes:
        with pytest.raises(UserError, match=re.escape(fix)):
            read(root)
    with pytest.raises(UserError, match=f"--config.data.train={inner}train"):
        read(root, labels="metadata.csv:label")
    parts = {"train": (f"{inner}train",), "test": (f"{inner}test",)}
    source = read(root, labels="metadata.csv:label", **parts)
    assert source.class_names == ("a", "b") and len(source) == 4
    assert sum(source.is_test) == 2
    source = read(root, train=(".",))
    assert source.class_names == ("a", "b") and len(source) == 6
    assert source.is_test is None
    rows = [f"{row},{'test' if 'test/' in row else 'train'}" for row in table]
    labels = "\n".join(["file_name,label,split", *rows])
    write(root, **{"metadata.csv": labels})
    for options in ({}, {"labels": "metadata.csv:label"}):
        assert sum(read(root, **options).is_test) == 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("gone.csv:y", "no such file"),
        ("l.csv:z", "the columns id, y"),
        ("l.csv", "the columns id, y"),
        ("other.csv:y", "no name of an image"),
    ],
)
def test_a_wrong_file_of_labels(tmp_path, option, words):
    files = {"l.csv": "id,y\n0,a\n", "other.csv": "id,y\n7,a\n"}
    write(tmp_path, *images("x"), **files)
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, labels=option)
    assert str(error.value).startswith(f"config.data.labels={option}: ")


# --- captions, junk ---


@pytest.mark.parametrize("where", ["", "train/"])
def test_metadata_of_captions_beside_class_folders(tmp_path, where):
    write(tmp_path, *images(f"{where}cat", f"{where}dog"))
    row = '{"file_name": "cat/0.png", "text": "a cat"}\n'
    write(tmp_path, **{f"{where}metadata.jsonl": row})
    source = read(tmp_path)
    assert source.class_names == ("cat", "dog") and source.defects == {}
    assert "captions, not labels" in source.remarks[0]


def test_junk_is_counted(tmp_path):
    write(tmp_path, *images("cat", "dog"), "cat/.DS_Store", "dog/Thumbs.db")
    write(tmp_path, "__MACOSX/cat/._0.png", ".ipynb_checkpoints/a.png", "desktop.ini")
    assert read(tmp_path).remarks == (
        "5 files: hidden files and files of operating systems are not used",
    )
