"""The report: contents of the page, escaping, and missing inputs."""

import base64
import html.parser
import io
import itertools
import os
import re
import shutil
import subprocess
import sys

import fontTools.fontBuilder
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fontTools.pens.ttGlyphPen import TTGlyphPen
from ml_collections import ConfigDict
from PIL import Image

from mvc_jax import files, pictures, report
from mvc_jax.data import duplicates, gather
from mvc_jax.data.digits import NAMES, Digits
from mvc_jax.mixing.recipes import MODES
from mvc_jax.reporting import accuracy, image_rows, run_images
from mvc_jax.stage import Spec, open_stage

EVIL = "<script>alert(1)</script>"
SIZE = 8


def make_config() -> ConfigDict:
    data = {"source": "digits", "size": SIZE}
    page = {"title": f"Title {EVIL}", "grid_columns": 2, "grid_scale": 32}
    mix = {"deep": {"tokens": 9}}
    return ConfigDict({"seed": 3, "data": data, "mix": mix, "report": page})


def make_recipes(ids: dict[int, list[str]], modes=("coarse", "fine")) -> list[dict]:
    """Two images of each mode and class, all from the class's first training image."""
    recipes = []
    for label, mode, _ in itertools.product(ids, modes, range(2)):
        k = len(recipes)
        taken = {"positions": [], "dims": [], "dim_tokens": [1, 16]}
        chosen = [1 + k % 5, 40 + k]
        taken |= {"positions": chosen} if mode != "fine" else {}
        taken |= {"dims": [chosen]} if mode != "coarse" else {}
        recipe = {"index": k, "source": ids[label][0], "partners": [ids[label][1]]}
        recipes.append(recipe | {"label": NAMES[label], "mode": mode} | taken)
    return recipes


def pixels(set_name: str, index: int) -> np.ndarray:
    """A different image for each set and index, so that a mix-up is noticed."""
    rng = np.random.default_rng([*set_name.encode(), index])
    return rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def write_set(folder, name: str, recipes: list[dict]) -> None:
    rows = []
    for recipe in reversed(recipes):  # the order in the file must not matter
        buffer = io.BytesIO()
        Image.fromarray(pixels(name, recipe["index"])).save(buffer, "png")
        row = {"image": {"bytes": buffer.getvalue(), "path": "x.png"}}
        row |= {key: recipe[key] for key in ("index", "source", "partners")}
        row["mode"] = recipe["mode"] if name == "mixed" else name
        row["label"] = NAMES.index(recipe["label"])
        rows.append(row | {"prompt": f"prompt {recipe['index']} {EVIL}", "seed": 3})
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        path = folder / "data" / f"train-{shard:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path)


def make_metrics() -> dict:
    """Numbers that occur once each, so that they can be found on the page."""

    def row(name: str, title: str, mean: float, difference: dict | None) -> dict:
        return {
            "name": name,
            "title": title,
            "regime": "r",
            "policy": "none",
            "set": "",
            "accuracy": {
                "mean": mean,
                "std": mean / 71,
                "per_seed": [mean - 0.02, mean],
            },
            "difference": difference,
            "real_seen": int(mean * 20000),
            "synthetic_seen": int(mean * 19000),
            "per_class": [0.301 + mean / 30 + 0.011 * k for k in range(10)],
        }

    better = {"against": "real", "mean": 0.0312, "low": 0.0151, "high": 0.0473}
    unsure = {"against": "combined", "mean": -0.0061, "low": -0.0233, "high": 0.0111}
    question = {"run": "combined", "against": "real"} | better
    names = list(NAMES)
    names[3] = f"three {EVIL}"
    return {
        "class_names": names,
        "counts": {"pool": 5, "train": 20, "test": 17},
        "seeds": 2,
        "steps": 4321,
        "batch_size": 37,
        "confidence": 0.9,
        "runs": [
            row("real", "Real only", 0.8123, None),
            row("combined", "Real and synthetic", 0.8434, better),
            row("two_phase", "Two phases", 0.8374, unsure),
        ],
        "questions": [
            question | {"question": "Does it help?", "verdict": "yes"}
            | {"sentence": "Yes: it does."},
            question | {"question": "Does it pay?", "verdict": "unclear"}
            | {"sentence": "No evidence either way."},
        ],
        "sets": {"mixed": {"images": 4070, "diversity": 0.20991, "copies": 6}},
        "notes": [f"A note {EVIL}"],
    }  # fmt: skip


def finish(workdir, stage: str, artifacts: list[str], **counts: int) -> None:
    open_stage(workdir, Spec(stage, {})).finish(artifacts, **counts)


def make_workdir(
    workdir,
    *,
    made=("mixed", "unmixed", "pretrained"),
    modes=("coarse", "fine"),
    **changes,
):
    """Writes a run finished up to `evaluate`; `changes` replace metrics."""
    source = Digits()
    labels = source.labels
    ids = {
        k: [f"digits/{i:04d}" for i in np.flatnonzero(labels == k)[:4]]
        for k in range(10)
    }
    parts = {"pool": slice(2, 3), "train": slice(0, 2), "test": slice(3, 4)}
    split = {n: [i for k in ids for i in ids[k][part]] for n, part in parts.items()}
    index = {id_: i for i, id_ in enumerate(source.ids)}
    info = gather.ImageInfo(8, 8, "", True, duplicates.Fingerprint(0, np.zeros(0)))
    chosen = {n: np.asarray([index[i] for i in ids]) for n, ids in split.items()}
    order = [i for n in ("pool", "train", "test") for i in chosen[n].tolist()]
    images = np.stack([source[i]["image"] for i in order])
    files.write_array(workdir / "caption" / "images.npy", images)
    gathered = gather.Gathered(chosen, dict.fromkeys(order, info))
    gather.write_rows(workdir / "caption", source, gathered)
    stamp = {"captioner": "attributes", "version": "7"}
    captions = [
        {"id": i, "caption": f"caption {i} {EVIL}"} | stamp for i in split["train"]
    ]
    files.write_jsonl(workdir / "caption" / "captions.jsonl", captions)
    finish(workdir, "caption", ["splits.json", "captions.jsonl"], train=20)
    recipes = make_recipes(ids, modes)
    files.write_jsonl(workdir / "mix" / "recipes.jsonl", recipes)
    finish(workdir, "mix", ["recipes.jsonl"], recipes=len(recipes))
    (workdir / "generate").mkdir()
    for name in made:
        write_set(workdir / "generate" / name, name, recipes)
    finish(workdir, "generate", [], images=len(made) * len(recipes))
    finish(workdir, "classify", [], fits=6)
    files.write_json(workdir / "evaluate" / "metrics.json", make_metrics() | changes)
    finish(workdir, "evaluate", ["metrics.json"])
    losses = [("pretrain/vae", 10.0), ("pretrain/vae", 0.37), ("finetune", 0.25)]
    rows = [{"stage": s, "step": 10 * i, "loss": x} for i, (s, x) in enumerate(losses)]
    for seed, loss in enumerate((0.5, 0.7)):
        rows.append({"stage": f"classify/real/seed-{seed}", "step": 5, "loss": loss})
    files.write_jsonl(workdir / "metrics.jsonl", rows)
    times = {"seconds": 1234.56, "compile_seconds": 65.43, "peak_rss_mib": 2345}
    files.write_json(workdir / "timings.json", {"finetune": times})
    return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its report, which tests only read."""
    workdir = make_workdir(tmp_path_factory.mktemp("run"))
    report.run(make_config(), workdir)
    return workdir


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the text of each table row, and all text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.rows = [" ".join(row.split()) for row in self.rows]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data):
        self.text += data
        if self.rows:
            self.rows[-1] += f"{data} "

    def row(self, start: str) -> str:
        return next(row for row in self.rows if row.startswith(start))

    def images(self, alt: str) -> list[np.ndarray]:
        """Pixels of the images whose alternative text matches, in page order."""
        prefix = "data:image/png;base64,"
        found = []
        for tag, attributes in self.tags:
            if tag == "img" and re.search(alt, attributes["alt"]):
                content = base64.b64decode(attributes["src"].removeprefix(prefix))
                found.append(np.asarray(Image.open(io.BytesIO(content))))
        return found


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished / "report" / "report.html")


def run_page(workdir) -> Page:
    report.run(make_config(), workdir)
    return Page(workdir / "report" / "report.html")


def test_the_page_loads_nothing_from_the_network(page):
    links = {"src", "srcset", "href", "xlink:href", "action", "poster", "data"}
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in links]
    assert len(addresses) > 50
    assert [a for a in addresses if not a.startswith(("data:", "#"))] == []
    assert not re.search(r"https?:|@import|url\((?!#)", page.source)
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'")


def test_untrusted_text_is_escaped(page):
    assert "script" not in {tag for tag, _ in page.tags}
    for text in ("Title", "three", "caption digits/0000", "A note", "prompt 1"):
        assert f"{text} {EVIL}" in page.text
    tooltips = " ".join(attrs.get("title", "") for _, attrs in page.tags)
    assert f"prompt 1 {EVIL}" in tooltips


@pytest.mark.parametrize(
    ("start", "numbers"),
    [
        ("Real only real", "81.2 ± 1.1|reference|16,246|15,433"),
        (
            "Real and synthetic combined",
            "84.3 ± 1.2|+3.1|+1.5 to +4.7|16,868|16,024",
        ),
        (
            "Two phases two_phase",
            "83.7 ± 1.2|−0.6|−2.3 to +1.1|against Real and synthetic|16,748|15,910",
        ),
        ("mixed", "4,070|0.2099|6"),
        ("pool", "5|0"),
        ("train", "20|20"),
        ("test", "17|0"),
        ("finetune", "1,234.6|65.4|2,345"),
    ],
)
def test_every_number_of_a_row_is_there(page, start, numbers):
    row = page.row(start)
    for number in numbers.split("|"):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", row), row


def test_seeds_and_classes_are_there(page):
    tables = [row.split() for row in page.rows if row.startswith("Real and synthetic")]
    assert tables[1][3:] == ["82.3", "84.3"]
    expected = [f"{100 * x:.1f}" for x in make_metrics()["runs"][1]["per_class"]]
    assert tables[2][3:] == expected


def test_the_confusion_of_older_metrics_is_read_as_well(tmp_path):
    """Theirs is a matrix; now it is the counts that are not zero."""
    runs = make_metrics()["runs"]
    runs[1]["confusion_counts"] = [{str(9 - k): 97310 + k} for k in range(10)]
    workdir = make_workdir(tmp_path, runs=runs)
    rows = run_page(workdir).rows
    assert "zero · · · · · · · · · 97,310" in rows
    metrics = make_metrics() | {"runs": runs}
    counted = accuracy.confusion(metrics)
    assert counted.keys() == {"combined"}
    del runs[1]["confusion_counts"]
    runs[1]["confusion"] = counted["combined"]
    assert accuracy.confusion(metrics) == counted
    metrics["class_names"] *= 3
    assert accuracy.confusion(metrics) == {}


def test_the_answer_comes_before_the_table_and_its_settings(page):
    answer = page.text.index("Yes: it does.")
    assert answer < page.text.index("No evidence either way.") < page.text.index("81.2")
    for words in (
        "4321 opt",
        "batches of 37 images so no classifier",
        "over 2 seeds",
        "90% interval",
        "mix.deep.tok",
    ):
        assert words in page.text.replace(",", "")


def test_unequal_steps_are_reported(tmp_path):
    text = run_page(make_workdir(tmp_path, least_steps=321)).text
    assert "321 to 4,321 optimiser steps" in text
    assert "some classifiers have had more updates than others" in text
    assert "no classifier has had more" not in text


def test_only_an_interval_without_zero_is_marked(page):
    marks = [attrs.get("class") for tag, attrs in page.tags if tag == "circle"]
    assert marks == ["clear", None]


def test_a_row_of_the_grid_is_a_source_and_its_images(page):
    first = Digits()[0]["image"]
    np.testing.assert_array_equal(page.images("^zero, real image")[0], first)
    for mode, indices in (("coarse", (0, 1)), ("fine", (2, 3))):
        shown = page.images(f"^zero, {mode} image")[:2]
        for image, index in zip(shown, indices, strict=True):
            np.testing.assert_array_equal(image, pixels("mixed", index))
    tooltips = [attrs.get("title", "") for tag, attrs in page.tags if tag == "img"]
    assert any("token positions 2, 41 from digits/0010" in text for text in tooltips)
    assert any(
        "text dims 3, 42 (tokens 1 to 15) from digits/0010" in text for text in tooltips
    )


def test_the_comparison_keeps_the_index(page):
    """Class zero shows its last coarse image, class one its last fine image."""
    for name, index, mode in (("zero", 1, "coarse"), ("one", 7, "fine")):
        for set_name in ("unmixed", "pretrained"):
            (image,) = page.images(f"^{name}, {set_name} image")
            np.testing.assert_array_equal(image, pixels(set_name, index))
        mixed = page.images(f"^{name}, {mode} image")[2]
        np.testing.assert_array_equal(mixed, pixels("mixed", index))


def test_losses_are_plotted(page):
    assert [tag for tag, _ in page.tags].count(
        "svg"
    ) == 3 + 1 + 3  # table, axis, curves
    assert "0.37 at step 10" in page.text and "0.25 at step 20" in page.text
    assert "0.6, mean of 2 seeds, at step 5" in page.text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 8


def test_the_picture_holds_the_grid(finished):
    path = finished / "report" / "grid.png"
    image = np.asarray(Image.open(path).convert("RGB"))
    tile = Image.fromarray(pixels("mixed", 0)).resize(
        (32, 32), Image.Resampling.NEAREST
    )
    windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
    assert (windows == np.asarray(tile)).all((2, 3, 4)).sum() == 1
    assert path.stat().st_size < 150_000


def test_a_picture_of_noise_is_reduced_to_fit():
    rng = np.random.default_rng(0)
    cell = {"heading": "real", "image": None}
    rows = [{"name": "a", "cells": [dict(cell) for _ in range(5)]} for _ in range(10)]
    for each in itertools.chain.from_iterable(row["cells"] for row in rows):
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        each["image"] = Image.fromarray(noise)
    content = pictures.grid_png(rows, 64, max_bytes=150_000)
    assert 20_000 < len(content) < 150_000


def test_a_data_uri_is_no_larger_than_shown():
    uri = pictures.data_uri(Image.new("RGB", (512, 512)), 32)
    content = base64.b64decode(uri.partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (32, 32)


def test_a_second_run_does_nothing(finished, monkeypatch):
    paths = sorted((finished / "report").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.setattr(run_images, "read", None)  # would raise if called
    report.run(make_config(), finished)
    assert before == [path.stat().st_mtime_ns for path in paths]
    assert [path.name for path in paths] == ["grid.png", "manifest.json", "report.html"]


def test_checks_and_a_finished_stage_import_no_heavy_library(finished):
    """Also of `evaluate`, which meets the room of the filters and the classifiers."""
    code = (
        "import json, sys; from ml_collections import ConfigDict\n"
        "from mvc_jax import evaluate, report\n"
        "from mvc_jax.screening import removed, screener, selection, settings\n"
        "config = ConfigDict(json.loads(sys.argv[1]))\n"
        "report.check(config)\n"
        "evaluate.check(ConfigDict({'evaluate': {'features': 'pixels'}}))\n"
        "settings.check_filters(settings.FilterSettings(), partners=1, clip_path='',"
        " base_path='', pretrain_image_encoder=False)\n"
        "report.run(config, sys.argv[2])\n"
        "print(*sys.modules)"
    )
    config = make_config().to_json()
    command = [sys.executable, "-c", code, config, str(finished)]
    result = subprocess.run(command, capture_output=True, check=True)
    loaded = set(result.stdout.decode().split())
    assert "numpy" in loaded
    assert not loaded & {"jax", "jinja2", "matplotlib", "pyarrow", "scipy", "sklearn"}


def test_the_report_is_a_function_of_its_inputs(finished, tmp_path):
    """In another process and folder, with another hash seed."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "report")
    config = make_config().to_json()
    code = (
        "import json, sys; from ml_collections import ConfigDict\n"
        "from mvc_jax import report\n"
        "report.run(ConfigDict(json.loads(sys.argv[1])), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, config, str(workdir)]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "77"}, check=True)
    for name in ("report.html", "grid.png"):
        ours, theirs = (w / "report" / name for w in (finished, workdir))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_without_a_second_set_nothing_is_compared(tmp_path):
    page = run_page(make_workdir(tmp_path, made=("mixed",)))
    assert "no second set with the noise of the mixed one" in page.text
    assert len(page.images("coarse image")) == 20


def test_without_a_mixed_set_the_real_images_are_shown(tmp_path):
    page = run_page(make_workdir(tmp_path, made=("unmixed",)))
    assert "has no mixed set" in page.text
    assert len(page.images(", real image")) == 10
    assert page.images("coarse image") == []


@pytest.mark.parametrize("modes", [("both",), ("coarse", "both"), MODES])
def test_every_mode_of_mixing_is_shown(tmp_path, modes):
    page = run_page(make_workdir(tmp_path, modes=modes))
    for mode in MODES:
        assert bool(page.images(f"{mode} image")) == (mode in modes), mode


def test_a_mode_that_was_not_used_is_left_out(tmp_path):
    page = run_page(make_workdir(tmp_path, modes=("coarse",)))
    assert page.images("fine image") == []
    assert len(page.images("coarse image")) == 20 + 6  # the grid, the comparison


def test_sets_of_other_names_follow_in_order(tmp_path):
    made = ("mixed", "unmixed", "e", "b", "d", "a", "c")
    page = run_page(make_workdir(tmp_path, made=made))
    alts = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    start = alts.index("zero, source image")
    headings = [alt.split()[1] for alt in alts[start : start + 8]]
    assert headings == ["source", "unmixed", "coarse", *"abcde"]


def test_optional_sections_are_left_out(tmp_path):
    nothing = {"questions": [], "sets": {}, "notes": []}
    workdir = make_workdir(tmp_path, **nothing, runs=make_metrics()["runs"][:1])
    for name in ("metrics.jsonl", "timings.json"):
        (workdir / name).unlink()
    page = run_page(workdir)
    for heading in ("Training loss", "Synthetic sets", "Time and memory", "Notes"):
        assert heading not in page.text
    assert "81.2 ± 1.1" in page.text


@pytest.mark.parametrize("damage", ["cut", "[]", '{"finetune": 3}', "\x00"])
def test_damaged_records_of_a_run_are_left_out_with_a_warning(tmp_path, damage):
    workdir = make_workdir(tmp_path)
    for name in ("metrics.jsonl", "timings.json"):
        path = workdir / name
        path.write_text(path.read_text()[:-9] if damage == "cut" else damage)
    page = run_page(workdir)
    assert "Time and memory" not in page.text
    assert "81.2 ± 1.1" in page.text


def test_images_removed_by_filters_are_a_table(tmp_path):
    assert "Removed by filters" not in run_page(make_workdir(tmp_path / "a")).text
    counts = {"mixed": {"images": 61, "label": 59, "copies": 13}}
    facts = {"label": {"real_images": 1017, "real_removed": 173}, "copies": {}}
    found = {"facts": facts, "sets": counts | {"other": {"images": 0}}}
    page = run_page(make_workdir(tmp_path / "b", filters=found))
    assert {"Set label copies total kept", "mixed 59 13 61 4,070"} <= {*page.rows}
    assert page.row("other").startswith("other 0 0 0 – ")
    assert "173 of 1,017 real training images" in " ".join(page.text.split())


def test_one_seed_has_no_interval(tmp_path):
    runs = make_metrics()["runs"][:2]
    runs[1]["difference"] |= {"low": None, "high": None}
    page = run_page(make_workdir(tmp_path, runs=runs, seeds=1))
    assert "84.3 +3.1" in page.row("Real and synthetic")
    text = " ".join(page.text.split())
    assert "±" not in text and "in percent, of one seed, on" in text
    assert "each row of the table has one classifier." in text
    assert not re.search(r"\b1 (seeds|classifiers)", text)
    assert "None" not in page.text
    assert "circle" not in [tag for tag, _ in page.tags]


def test_losses_that_are_not_finite_are_reported(tmp_path):
    workdir = make_workdir(tmp_path)
    rows = files.read_jsonl(workdir / "metrics.jsonl")
    rows.append({"stage": "finetune", "step": 30, "loss": float("nan")})
    files.write_jsonl(workdir / "metrics.jsonl", rows)
    page = run_page(workdir)
    assert "1 not finite" in page.text
    assert "nan at step 30" in page.text


def test_ids_in_two_splits_are_reported(tmp_path, page):
    assert "No id is in two splits" in page.text
    workdir = make_workdir(tmp_path)
    path = workdir / "caption" / "splits.json"
    split = files.read_json(path)
    files.write_json(path, split | {"test": split["test"] + split["train"][:2]})
    described = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    manifest = files.read_json(workdir / "caption" / "manifest.json")
    manifest["artifacts"]["splits.json"] = described  # as if the stage had written it
    files.write_json(workdir / "caption" / "manifest.json", manifest)
    assert "2 ids are in more than one split" in run_page(workdir).text


def test_only_the_first_of_many_classes_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(image_rows, "MAX_CLASSES", 4)
    page = run_page(make_workdir(tmp_path))
    assert "The first 4 of 10 classes" in page.text
    assert len(page.images(", real image")) == 4


def test_figures_are_shown_if_they_exist(page, tmp_path):
    workdir = make_workdir(tmp_path)
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    files.write_bytes(workdir / "generate" / "levels.png", pictures.png(picture))
    assert len(run_page(workdir).images("Mixing more and more")) == 1
    assert page.images("Mixing more and more") == []


def font_with(path, characters):
    """A font whose glyphs are all squares."""
    pen = TTGlyphPen(None)
    for method, points in (
        (pen.moveTo, [(100, 0)]),
        (pen.lineTo, [(100, 700), (900, 700), (900, 0)]),
    ):
        for point in points:
            method(point)
    pen.closePath()
    names = [".notdef", *(f"u{ord(x):x}" for x in characters)]
    built = fontTools.fontBuilder.FontBuilder(1000)
    built.setupGlyphOrder(names)
    built.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    built.setupGlyf(dict.fromkeys(names, pen.glyph()))
    built.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    built.setupHorizontalHeader(ascent=800, descent=-200)
    built.setupOS2()
    built.setupPost()
    built.save(path)
    return str(path)


@pytest.fixture
def system_fonts(monkeypatch):
    """A function that sets the fonts of the machine."""

    def set_(*paths):
        monkeypatch.setattr(pictures, "_system_fonts", lambda: list(paths))
        pictures._font_file.cache_clear()
        pictures._font.cache_clear()

    yield set_
    pictures._font_file.cache_clear()
    pictures._font.cache_clear()


def grid_of(name, **number):
    cell = {"heading": "real", "image": Image.new("RGB", (8, 8))}
    rows = [{"name": "healthy é", "cells": [cell]}, {"name": name, "cells": [cell]}]
    rows[1] |= number
    return np.asarray(pictures.grid(rows, 64))


def test_a_name_of_several_lines_is_written_in_one(caplog):
    np.testing.assert_array_equal(grid_of("a b\n\tc"), grid_of("a b c"))
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["数字", "हिन्दी", "ภาษา"])
def test_a_name_that_no_font_has_is_its_number_with_a_warning(
    system_fonts, caplog, name
):
    system_fonts()
    numbered = grid_of(name, number=7)
    assert caplog.text.count(name) == 1 and "install one" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(numbered, grid_of("class 7"))
    np.testing.assert_array_equal(grid_of(name), grid_of("row 2"))


def test_a_name_is_written_in_a_font_of_the_machine(system_fonts, tmp_path, caplog):
    system_fonts()
    numbered = grid_of("数\u200d字", number=7)
    caplog.clear()
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    some = font_with(tmp_path / "some.ttf", "数")
    system_fonts(str(damaged), some, font_with(tmp_path / "all.ttf", "数字"))
    written = grid_of("数\u200d字", number=7)
    assert caplog.text == ""
    dark = [(picture == 0x22).all(-1).sum() for picture in (numbered, written)]
    assert dark[1] > dark[0] + 100  # two squares
    assert (grid_of("healthy") == grid_of("healthy")).all() and caplog.text == ""


def test_image_metrics_are_a_table_with_counts_and_a_sentence_each(tmp_path):
    """`finished` has none of them, as a run that is older than they."""
    names = ("zero", f"one {EVIL}")
    classes = [
        {"name": x, "images": 12, "kid": k}
        for x, k in zip(names, (0.371, None), strict=True)
    ]
    row = {"images": 4070, "kid": 0.0173, "precision": 0.613, "classes": classes}
    images = {
        "features": "dinov2",
        "dims": 768,
        "train_images": 1999,
        "sets": {"test": row | {"images": 2917}, "mixed": row | {"kid": None}},
        "notes": ["Few images."],
    }
    workdir = make_workdir(tmp_path, images=images)
    page = run_page(workdir)
    found = [
        x for x in page.rows if x.startswith(("Metric", "KID", "Precision", "zero"))
    ]
    assert found[0] == "Metric test 2,917 images mixed 4,070 images Meaning"
    assert found[1].startswith("KID, DINOv2 0.0173 – Distance of the distributions")
    assert found[2].startswith("Precision, DINOv2 0.613 0.613 Fraction of its images")
    assert found[3] == "zero 0.371 12 0.371 12"
    assert "Few images." in page.text and "1,999 training images" in page.text
