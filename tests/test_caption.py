"""The stage `caption` on folders of images: all bad images are listed at once, good
ones are read once, and the table and the contact sheet show the dataset."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from etils import epath
from many_processes import run_together
from PIL import Image

from mvc_jax import processes, train
from mvc_jax.classification import training_set
from mvc_jax.configs import folder
from mvc_jax.data import duplicates, splits
from mvc_jax.digests import Digests
from mvc_jax.training import runtime

CLASSES = ("bolt", "hex_nut", "washer é")


def picture(seed, size=(40, 30)):
    """A smooth random photograph, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def parts(tmp_path):
    """Three classes of ten images each, no split."""
    root = tmp_path / "my, parts=1"
    for k, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(10):
            content = encoded(picture(100 * k + i))
            (root / name / f"{i:02d}.png").write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def no_runtime_setup(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)


@pytest.fixture
def run(tmp_path, parts, capsys):
    """Runs the stage on `parts`; returns (exit code, terminal, its folder)."""

    def run_(*flags, workdir="run"):
        words = [
            "train",
            f"--config=configs/folder.py:path={parts}",
            f"--workdir={tmp_path / workdir}",
            "--config.stages=caption",
            "--config.data.size=16",
            *(f"--config.{flag}" for flag in flags),
        ]
        code = train.main(words)
        captured = capsys.readouterr()
        return code, captured.out + captured.err, tmp_path / workdir / "caption"

    return run_


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_first_look(run, parts):
    code, output, folder = run()
    assert code == 0, output
    assert "3 classes, 24 train, 6 test images" in output
    for name in CLASSES:
        assert re.search(
            rf"{name} +8 +2  40x30\n +hex nut|{name} +8 +2  40x30\n", output
        )
    assert output.count("    hex nut\n") == 3  # captions, by template
    assert "0 bad images" in output and "0 training images are also in test" in output
    sheet = Image.open(io.BytesIO((folder / "contact_sheet.png").read_bytes()))
    assert min(sheet.size) > 200
    parts_ = json.loads((folder / "splits.json").read_text())
    assert {k: len(v) for k, v in parts_.items()} == {"pool": 0, "train": 24, "test": 6}
    captioned = [row["id"] for row in rows(folder / "captions.jsonl")]
    assert captioned == parts_["train"]

    train_ = splits.read_split(folder, "train")
    assert train_.images.shape == (24, 16, 16, 3) and not train_.grey
    for image, id_, label in zip(train_.images, train_.ids, train_.labels, strict=True):
        assert id_.split("/")[0] == train_.class_names[label]
        original = np.asarray(Image.open(parts / id_))
        want = Image.fromarray(original).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.asarray(want))


def test_a_second_look_does_nothing_and_needs_no_source(run, parts):
    _, first, folder = run()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    shutil.rmtree(parts)
    code, output, _ = run()
    assert code == 0 and "nothing to do" in output
    assert "3 classes, 24 train" in output
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def break_some(parts):
    """Every kind of damage once; returns the expected reason of each."""
    bolt = parts / "bolt"
    whole = (bolt / "00.png").read_bytes()
    (bolt / "00.png").write_bytes(whole[: len(whole) // 2])
    (bolt / "01.png").write_bytes(b"")
    (bolt / "02.png").write_text("<html>404</html>")
    (bolt / "03.png").unlink()
    (bolt / "03.png").symlink_to(parts / "nowhere.png")
    (bolt / "x.png").mkdir()
    (parts / "stray.png").write_bytes(whole)
    (parts / "hex_nut" / "bomb.png").write_bytes(encoded(Image.new("1", (9000, 9000))))
    return {
        "bolt/00.png": "damaged",
        "bolt/01.png": "empty",
        "bolt/02.png": "not a PNG",
        "bolt/03.png": "link",
        "bolt/x.png": "folder",
        "stray.png": "no label",
        "hex_nut/bomb.png": "max_pixels",
    }


def test_all_bad_images_are_listed_at_once_before_work_starts(run, parts):
    expected = break_some(parts)
    code, output, folder = run("data.max_pixels=50000000")
    assert code == 2 and "Traceback" not in output
    assert "7 that cannot" in output and "on_bad_image=skip" in output
    listed = {row["image"]: row["reason"] for row in rows(folder / "bad_images.jsonl")}
    assert listed.keys() == expected.keys()
    for image, reason in expected.items():
        assert reason in listed[image]
        assert re.search(rf"{re.escape(image)}: .*{reason}", output)
    assert not (folder / "images.npy").exists()
    assert not (folder / "captions.jsonl").exists()


def test_the_proposed_fix_for_bad_images_works(run, parts):
    break_some(parts)
    assert run()[0] == 2
    assert run("data.on_bad_image=skip")[0] == 0


def test_skipping_continues_without_bad_images_and_lists_them(run, parts):
    break_some(parts)
    flags = ("data.on_bad_image=skip", "data.max_pixels=50000000", "data.per_class=4")
    code, output, folder = run(*flags, "data.test_fraction=0.0")
    assert code == 0, output
    assert "7 bad images, left out" in output
    assert len(rows(folder / "bad_images.jsonl")) == 7
    train_, test = (splits.read_split(folder, name) for name in ("train", "test"))
    assert np.bincount(train_.labels).tolist() == [4, 4, 4]
    assert np.bincount(test.labels).tolist() == [2, 6, 6]
    for part in (train_, test):
        for image, id_ in zip(part.images, part.ids, strict=True):
            want = Image.open(parts / id_).resize((16, 16), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(image, np.asarray(want))


def test_fixing_the_folder_is_enough(run, parts):
    whole = (parts / "bolt" / "00.png").read_bytes()
    (parts / "bolt" / "00.png").write_bytes(b"")
    assert run()[0] == 2
    (parts / "bolt" / "00.png").write_bytes(whole)
    code, output, folder = run()
    assert code == 0 and rows(folder / "bad_images.jsonl") == []


def test_a_class_of_bad_images_is_named_with_its_images(run, parts):
    for path in (parts / "bolt").iterdir():
        path.write_bytes(b"")
    code, output, _ = run()
    assert code == 2 and "bolt" in output and "bolt/05.png: empty file" in output


def test_few_shots_fractions_and_classes(run):
    code, output, folder = run(
        "data.classes=washer é,bolt", "data.fraction=0.5", "data.pool=4"
    )
    assert code == 0, output
    assert splits.read_split(folder, "train").class_names == ("washer é", "bolt")
    counts = {n: len(splits.read_split(folder, n).ids) for n in splits.SPLITS}
    assert counts == {"pool": 4, "train": 6, "test": 4}
    captioned = [row["id"] for row in rows(folder / "captions.jsonl")]
    pool, train_ = (splits.read_split(folder, n).ids for n in ("pool", "train"))
    assert captioned == [*pool, *train_]
    code, output, _ = run("data.classes=bolt,cat", workdir="other")
    assert code == 2 and "'cat'" in output and "hex_nut" in output


def test_duplicates_across_train_and_test_are_found_and_removed(run, parts):
    for path in list(parts.rglob("*.png")):
        split = "test" if path.stem in ("08", "09") else "train"
        target = parts / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for name in CLASSES:
        (parts / name).rmdir()
    here, there = parts / "train" / "bolt", parts / "test" / "bolt"
    shutil.copy(there / "08.png", here / "same.png")
    again = Image.open(there / "09.png")
    again.save(here / "encoded again.jpg", quality=80)
    again.resize((80, 60), Image.Resampling.BICUBIC).save(here / "larger.png")
    code, output, folder = run("data.size=32")
    found = {row["train"]: row["test"] for row in rows(folder / "duplicates.jsonl")}
    assert code == 0 and "3 training images are also in test" in output
    assert found == {
        "train/bolt/same.png": "test/bolt/08.png",
        "train/bolt/encoded again.jpg": "test/bolt/09.png",
        "train/bolt/larger.png": "test/bolt/09.png",
    }
    assert set(found) <= set(splits.read_split(folder, "train").ids)
    code, output, folder = run(
        "data.size=32", "data.duplicates=remove", workdir="without"
    )
    assert code == 0 and "removed" in output
    left = splits.read_split(folder, "train")
    assert not set(found) & set(left.ids) and len(left.ids) == 24
    for image, id_ in zip(left.images, left.ids, strict=True):
        want = Image.open(parts / id_).resize((32, 32), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.asarray(want))


def test_copies_leave_the_pool_and_train_which_are_filled_up_again(run, parts):
    for k, name in enumerate(CLASSES):
        for split, seeds in (("train", range(30)), ("test", range(24, 34))):
            (parts / split / name).mkdir(parents=True)
            for i in seeds:  # 24 to 29 are in both
                content = encoded(picture(1000 * k + i))
                (parts / split / name / f"{i:02d}.png").write_bytes(content)
        shutil.rmtree(parts / name)
    flags = ("data.size=32", "data.per_class=15", "data.pool=27")
    code, output, folder = run(*flags)
    assert code == 0
    assert "7 training images are also in test, and 4 of the pool, kept" in output
    code, output, folder = run(*flags, "data.duplicates=remove", workdir="without")
    assert code == 0 and "removed, and replaced where there are others" in " ".join(
        output.split()
    )
    lines = [x for x in output.splitlines() if x.startswith("images: ")]
    assert re.match(r"images: (1[1-9]\d)/\1 images", lines[-1])  # 102, and others
    assert len(lines) < 6
    counts = {n: len(splits.read_split(folder, n).ids) for n in splits.SPLITS}
    assert counts == {"pool": 27, "train": 45, "test": 30}
    used = (
        splits.read_split(folder, "pool").ids + splits.read_split(folder, "train").ids
    )
    assert all(int(id_[-6:-4]) < 24 for id_ in used) and len(set(used)) == 72
    code, output, _ = run(
        *flags[:1], "data.per_class=25", "data.duplicates=remove", workdir="many"
    )
    assert code == 2 and "at most the 24 training images" in output


def test_one_picture_under_two_labels_is_listed(run, parts):
    shutil.copy(parts / "bolt" / "03.png", parts / "hex_nut" / "same.png")
    again = Image.open(parts / "bolt" / "04.png")
    again.save(parts / "washer é" / "again.jpg", quality=80)
    shutil.copy(parts / "bolt" / "05.png", parts / "bolt" / "copy.png")  # one label
    for k, name in enumerate(CLASSES):
        (parts / "held out" / name).mkdir(parents=True)
        (parts / "held out" / name / "0.png").write_bytes(encoded(picture(1000 + k)))
    code, output, folder = run("data.size=32", "data.test=held out")
    assert code == 0
    found = [tuple(row.values()) for row in rows(folder / "label_conflicts.jsonl")]
    assert found == [
        ("hex_nut/same.png", "hex_nut", "bolt/03.png", "bolt"),
        ("washer é/again.jpg", "washer é", "bolt/04.png", "bolt"),
    ]
    assert "2 training images show a picture that has another label" in output


def test_conflicts_are_those_of_all_pairs():
    """The search by parts of the hash misses none."""
    rng = np.random.default_rng(0)
    thumbnail = np.zeros((16, 16, 3), np.uint8)
    hashes = rng.integers(0, 2**63, 40)
    prints = []
    for k in range(400):
        flips = rng.integers(0, 64, rng.integers(0, 9))
        bits = int(hashes[k % 40])
        for flip in flips:
            bits ^= 1 << int(flip)
        prints.append(duplicates.Fingerprint(bits, thumbnail))
    labels = rng.integers(0, 3, 400)
    wanted = {}
    for i in range(400):
        for j in range(i):
            near = (prints[i].hash ^ prints[j].hash).bit_count() <= 6
            if near and labels[i] != labels[j]:
                wanted.setdefault(i, j)
    assert dict(duplicates.find_conflicts(prints, labels.tolist())) == wanted


def test_a_single_class_is_refused_before_any_work(run, parts):
    flags = ("data.classes=bolt", "stages=all")
    code, output, folder = run(*flags)
    assert code == 2 and "at least two classes" in output and not folder.exists()
    assert run("data.classes=bolt")[0] == 0
    code, output, folder = run(
        "data.classes=bolt", "stages=classify", "classify.size=16"
    )
    assert code == 2 and "at least two classes" in output
    assert not (folder.parent / "classify").exists()


def test_the_folders_of_classes_are_recorded(run, parts):
    (parts / "bolt").rename(parts / "n01443537")
    (parts / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    _, _, folder = run()
    train_ = splits.read_split(folder, "train")
    assert train_.class_names == ("hex_nut", "goldfish", "washer é")
    assert train_.class_folders == ("hex_nut", "n01443537", "washer é")


def test_a_workdir_inside_of_the_images_is_refused_before_they_are_read(run, parts):
    (parts / "a.parquet").write_bytes(b"")
    for source in (
        f"folder:{parts}",
        f"parquet:{parts}",
        f"parquet:{parts}/**/*.parquet",
    ):
        code, output, folder = run(f"data.source={source}", workdir=parts / "x" / "run")
        assert code == 2 and output.startswith(
            "error: --workdir: wanted a folder outside"
        )
        assert not (parts / "x").exists()
    (parts.parent / "link").symlink_to(parts)
    code, output, _ = run(workdir=parts.parent / "link" / "run")
    assert code == 2 and "--workdir" in output


def test_captions_in_metadata_beside_class_folders_can_be_used(run, parts):
    lines = [
        json.dumps({"file_name": f"{name}/{k:02d}.png", "text": f"{name} number {k}"})
        for name in CLASSES
        for k in range(10)
    ]
    (parts / "metadata.jsonl").write_text("\n".join(lines))
    code, output, folder = run()
    assert code == 0 and "metadata.jsonl: captions, not labels" in output
    flags = ("caption.captioner=file", f"caption.file={parts / 'metadata.jsonl'}")
    code, output, folder = run(*flags, workdir="captions")
    assert code == 0
    for row in rows(folder / "captions.jsonl"):
        name, _, number = row["id"].partition("/")
        assert row["caption"] == f"{name} number {int(number[:2])}"


def test_groups_stay_together(run, parts):
    flags = (r"data.group=(\d)\d\.png", "data.test_fraction=0.3")
    for path in parts.rglob("*.png"):
        number = int(path.stem)
        path.rename(path.with_name(f"{number // 2}{number % 2}.png"))
    code, output, folder = run(*flags)
    assert code == 0, output
    found = {n: splits.read_split(folder, n) for n in ("train", "test")}
    groups = {name: set(split.groups) for name, split in found.items()}
    assert groups["train"] | groups["test"] == set("01234")
    assert not groups["train"] & groups["test"]
    held = training_set._hold_out(found["train"], 0.3, 0)
    inside = {found["train"].groups[i] for i in held}
    rest = np.setdiff1d(np.arange(len(found["train"].ids)), held)
    assert inside and inside.isdisjoint(found["train"].groups[i] for i in rest)
    for wrong, words in (("x(", "neither"), ("nope", "no image")):
        code, output, _ = run(f"data.group={wrong}", workdir="wrong")
        assert code == 2 and words in output and "config.data.group" in output


def test_groups_that_straddle_the_given_parts_are_reported(run, parts):
    for path in list(parts.rglob("*.png")):
        split = "test" if int(path.stem) > 6 else "train"
        target = parts / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for name in CLASSES:
        (parts / name).rmdir()
    code, output, _ = run(r"data.group=\d")
    assert code == 0
    assert "1 groups of config.data.group are in both train and test" in " ".join(
        output.split()
    )


def test_similar_images_are_not_duplicates():
    """E.g. neighbouring photographs, and colours of the same brightness."""
    one = np.asarray(picture(1, (64, 64)))
    shifted = np.roll(one, 4, axis=1)
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    others = [shifted, red, 255 - one, one[::-1].copy()]
    prints = [duplicates.fingerprint(image) for image in others]
    assert duplicates.find([duplicates.fingerprint(one)], prints) == []
    assert duplicates.find(prints, prints) == [(i, i) for i in range(4)]
    blue = duplicates.fingerprint(red[..., ::-1].copy())
    assert duplicates.find([blue], prints) == []


def test_edited_captions_are_used(run, tmp_path):
    _, _, folder = run()
    edited = tmp_path / "edited.jsonl"
    lines = rows(folder / "captions.jsonl")
    lines[0]["caption"], lines[1]["caption"] = "  a rusty\tbolt ", ""
    edited.write_text("\n".join(json.dumps(row) for row in lines))
    mine = ("caption.captioner=file", f"caption.file={edited}")
    code, output, again = run(*mine, workdir="again")
    assert code == 0, output
    captions = [row["caption"] for row in rows(again / "captions.jsonl")]
    assert captions[:2] == ["a rusty bolt", ""] and "1 cleaned, 1 empty" in output
    assert {row["captioner"] for row in rows(again / "captions.jsonl")} == {"file"}

    moved = edited.rename(tmp_path / "moved.jsonl")
    code, output, _ = run(mine[0], f"caption.file={moved}", workdir="again")
    assert code == 0 and "warning" not in output
    code, output, _ = run(*mine, workdir="again")
    assert code == 0 and f"{edited} is no longer there" in " ".join(output.split())

    edited.write_text(json.dumps(lines[0] | {"id": "bolt/nope.png"}))
    code, output, _ = run(*mine, workdir="third")
    assert code == 2 and "bolt/nope.png" in output
    edited.write_text("\n".join(json.dumps(row) for row in lines[2:]))
    code, output, _ = run(*mine, workdir="third")
    assert code == 2 and "none for 2" in output and lines[0]["id"] in output
    code, output, _ = run(*mine, workdir="again")
    assert code == 2 and "file_sha256" in output  # the edit changes the settings


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("data.source=folder:/nowhere", "folder:/nowhere"),
        ("data.source=floder:/x", "parquet:PATH"),
        ("data.on_bad_image=ignore", "fail or skip"),
        ("data.duplicates=drop", "keep or remove"),
        ("data.resize=squash", "stretch or crop or pad"),
        ("data.resample=nearest", "lanczos or area"),
        ("data.window=9,3", "config.data.window"),
        ("data.prompt=a photo", "{label}"),
        ("data.prompt={caption:.40}, a {label}", "config.data.prompt"),
        ("data.per_class=9", "config.data.per_class"),
        ("caption.captioner=clip", "blip2 or flax or file or template or attributes"),
        ("caption.template={caption}", "config.caption.template"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_read(run, flag, words):
    code, output, folder = run(flag)
    assert code == 2 and "Traceback" not in output
    assert words in output
    assert not folder.exists()


def test_a_folder_around_the_classes_is_refused_with_a_fix_that_works(run, parts):
    inner = parts / "outer"
    inner.mkdir()
    for name in CLASSES:
        (parts / name).rename(inner / name)
    code, output, _ = run()
    assert code == 2 and "outer/ 30 images" in output
    assert "--config.data.train=outer if the inner folders are the classes" in output
    code, output, folder = run("data.train=outer")
    assert code == 0 and "3 classes, 24 train" in output
    assert rows(folder / "images.jsonl")[0]["id"].startswith("outer/bolt/")
    code, output, _ = run("data.train=.", workdir="one")
    assert code == 0 and "warning: one class only, 'outer'" in " ".join(output.split())


def test_validation_images_are_kept_for_classify(run, parts):
    for path in list(parts.rglob("*.png")):
        split = {"08": "val", "09": "test"}.get(path.stem, "train")
        target = parts / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for name in CLASSES:
        (parts / name).rmdir()
    code, output, folder = run()
    assert code == 0 and "27 train, 3 test images" in output
    flags = ("data.validation=keep", "data.pool=3")
    code, output, folder = run(*flags, workdir="kept")
    assert code == 0 and "3 pool, 21 train, 3 test, 3 validation images" in output
    kept = splits.read_split(folder, splits.VALIDATION)
    assert {id_.split("/")[0] for id_ in kept.ids} == {"val"}
    for image, id_ in zip(kept.images, kept.ids, strict=True):
        want = Image.open(parts / id_).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.asarray(want))
    assert len(rows(folder / "captions.jsonl")) == 24
    fit = {"resize": "stretch", "resample": "lanczos", "ratio": 0.0, "seed": 0}
    sides = {"size": 16, "data_size": 16}
    for held in (0.0, 0.3):  # a fraction would come from train
        data = training_set.read(
            epath.Path(folder.parent),
            epath.Path(folder) / "x",
            Digests(folder / "x", folder / "digests"),
            sets=(),
            validation=held,
            **sides,
            **fit,
        )
        assert data.pools[""].real.tolist() == list(range(21))
        np.testing.assert_array_equal(data.rows.take(data.validation), kept.images)
        np.testing.assert_array_equal(data.labels[data.validation], kept.labels)
    code, output, _ = run("data.validation=keep", "data.train=train", workdir="none")
    assert code == 2 and "config.data.validation: wanted join" in output


def test_classes_with_the_same_words_are_refused(run, parts):
    (parts / "bolt").rename(parts / "hex nut")
    code, output, _ = run()
    assert code == 2 and "'hex nut'" in output and "'hex_nut'" in output
    assert run("data.classes=hex nut,washer é")[0] == 0


def test_changes_by_decoding_are_reported(run, parts):
    deep = np.random.default_rng(0).integers(0, 4096, (20, 20)).astype(np.uint16)
    Image.fromarray(deep).save(parts / "bolt" / "deep.png")
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 40))
    clear.save(parts / "hex_nut" / "clear.png")
    code, output, _ = run()
    assert code == 0
    assert "1 images: more than 8 bits, windowed" in output
    assert "1 images: transparent, put on white" in output


def test_a_kill_between_images_and_captions_costs_no_image(run, parts, monkeypatch):
    from mvc_jax import caption

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caption, "_captions", stop)
        assert run()[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(caption, "gather", lambda *_, **__: pytest.fail("read again"))
        assert run()[0] == 0


def test_captions_of_a_network_resume(run, parts, monkeypatch, tmp_path):
    """A network that dies half way captions only the rest; phrases are cleaned."""
    from mvc_jax import caption

    requested = []

    class Network:
        DTYPES = ("auto",)

        @staticmethod
        def check_model(model):
            assert model == "some/model"

        @staticmethod
        def captions(images, wanted, *, dies, **options):
            requested.append(list(wanted))
            for n, row in enumerate(wanted):
                if dies and n == 10:
                    raise KeyboardInterrupt
                yield row, f"thing {row} thing {row}"

    flags = ("caption.captioner=flax", "caption.model=some/model")
    monkeypatch.setattr(caption, "_SAVE_SECONDS", -1.0)
    for dies, code in ((True, 130), (False, 0)):
        network = type("N", (), vars(Network) | {})
        network.captions = lambda *a, dies=dies, **k: Network.captions(
            *a, dies=dies, **k
        )
        monkeypatch.setattr(caption, "_network", lambda name, n=network: n)
        assert run(*flags)[0] == code
    assert requested == [list(range(24)), list(range(10, 24))]
    folder = tmp_path / "run" / "caption"
    captions = [row["caption"] for row in rows(folder / "captions.jsonl")]
    assert captions == [f"thing {row}" for row in range(24)]
    assert not list((folder / "captions.partial").glob("*"))


def test_many_processes_write_the_captions_of_one(parts, monkeypatch, tmp_path):
    """Of three one is killed; two caption the rest, in the batches of a single one."""
    from mvc_jax import caption

    batches, killed = [], []

    class Network:
        @staticmethod
        def captions(images, wanted, *, batch_size, **options):
            for start in range(0, len(wanted), batch_size):
                batch = tuple(wanted[start : start + batch_size])
                if killed and processes.index() == killed[0]:
                    raise KeyboardInterrupt
                batches.append(batch)
                for row in batch:
                    yield row, f"{images[row].sum()} in {batch}"

    monkeypatch.setattr(caption, "_network", lambda name: Network)
    monkeypatch.setattr(caption, "_SAVE_SECONDS", -1.0)
    config = folder.get_config(f"path={parts}")
    config.data.size, config.stages = 16, "caption"
    config.caption.update(captioner="flax", batch_size=5, model="some/model")

    def contents(workdir):
        caption.run(config, workdir)
        found = [*(workdir / "caption").iterdir()]
        return {path.name: path.read_bytes() for path in found if path.is_file()}

    one, whole = contents(tmp_path / "one"), {*batches}
    batches.clear()
    killed.append(1)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        run_together(monkeypatch, 3, lambda: contents(tmp_path / "many"))
    assert not (tmp_path / "many" / "caption" / "manifest.json").exists()
    killed.clear()
    run_together(monkeypatch, 2, lambda: contents(tmp_path / "many"))
    assert contents(tmp_path / "many") == one
    assert sorted(batches) == sorted(whole)  # each once
