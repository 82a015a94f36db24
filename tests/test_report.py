"""The report: contents of the page, escaping, and missing inputs."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_runs import (
    EVIL,
    NAMES,
    Page,
    make_config,
    make_metrics,
    make_workdir,
    measured,
    pixels,
    pixels_of,
)
from PIL import Image

from mvc_jax import files, pictures, report
from mvc_jax.data.digits import Digits
from mvc_jax.mixing.recipes import MODES
from mvc_jax.reporting import image_metrics, image_rows, run_images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its report, which tests only read."""
    workdir = make_workdir(tmp_path_factory.mktemp("run"))
    report.run(make_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished / "report" / "report.html")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of a run whose metrics are those of now, and its text."""
    names = [*NAMES[:3], f"three {EVIL} | *x*", *NAMES[4:]]
    workdir = make_workdir(tmp_path_factory.mktemp("full"), **measured(names, 10))
    page = run_page(workdir)
    return page, (workdir / "report" / "report.md").read_text()


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


def test_every_picture_is_whole_and_every_reference_has_its_element(page, full):
    for each in (page, full[0]):
        assert len(each.drawings) > 40
        assert all(pixels_of(uri).size for uri in {uri for _, uri in each.drawings})
        assert all(alt for alt, _ in each.drawings)
        ids = [a["id"] for _, a in each.tags if "id" in a]
        assert len(ids) == len({*ids})
        to = [a[k] for _, a in each.tags for k in ("href", "for") if k in a]
        to += [a["aria-labelledby"] for _, a in each.tags if "aria-labelledby" in a]
        fragments = {x.removeprefix("#") for x in to if not x.startswith("data:")}
        assert fragments <= {*ids}
        stored = [a["href"] for tag, a in each.tags if tag == "image"]
        assert len(stored) == len({*stored}) < len(each.drawings)


def test_every_element_is_closed_and_where_it_may_be(full):
    opened = []
    for closing, tag, rest in re.findall(r"<(/?)([a-z0-9]+)([^>]*)>", full[0].source):
        if closing:
            assert opened.pop() == tag
        elif not rest.endswith("/") and tag not in (
            "meta",
            "link",
            "img",
            "br",
            "input",
        ):
            phrasing = {*opened} & {"p", "span", "small", "b", "h3"}
            assert not (phrasing and tag in ("div", "p", "table", "details", "dl"))
            opened.append(tag)
    assert opened == []


def test_headings_are_in_order_and_sections_are_in_the_contents(full):
    page, _ = full
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    linked = [a["href"][1:] for tag, a in page.tags if tag == "a"]
    assert linked == [a["id"] for tag, a in page.tags if tag == "h2"]
    assert linked[-1] == "settings" and len(linked) == 14


def test_every_plot_has_titles_of_its_axes(full):
    page, _ = full
    axes = page.source.count('<td class="chart axis">')
    assert page.source.count("difference, percentage points</text>") == axes == 4
    plots = [a for _, a in page.tags if "Loss of" in a.get("aria-label", "")]
    assert page.source.count(">optimiser step</text>") == len(plots) == 1
    maps = page.source.count('<table class="map">')
    assert page.source.count(">predicted class</th>") == maps == 3


def test_caveats_are_beside_what_they_limit(full):
    page, _ = full
    found = re.findall(r'<p class="caveat">(.*?)</p>', page.source)
    assert found[0].startswith("Of one split: see <code>mvc-jax repeat</code> &lt;scri")
    before = {
        each: re.findall(r'<h2 id="(\w+)"', page.source[: page.source.index(each)])
        for each in found
    }
    assert before[found[0]] == []  # with the headline
    names = [before[each][-1] for each in found[1:]]
    assert names == ["copies", "metrics", "cost", "data"]


def test_copies_and_images_of_another_class_are_beside_real_ones(full):
    page, _ = full
    text = " ".join(page.text.split())
    assert "nearer than 0.0517 by pixels" in text
    assert text.count("0.0413 apart: a copy") == 2  # in both sets
    assert "0.0613 apart" in text and "0.0613 apart: a copy" not in text
    assert "at least 0.0617, in the median 0.0718" in text
    alts = [alt for alt, _ in page.drawings]
    start = alts.index("zero, image 0 of unmixed")
    assert alts[start : start + 2] == [
        "zero, image 0 of unmixed",
        "zero, training image",
    ]
    np.testing.assert_array_equal(
        pixels_of(page.drawings[start][1]), pixels("unmixed", 0)
    )
    assert "9 of 40 22.5 14.3 +8.2 −3.0 to +20.0" in page.row("mixed 9")
    start = alts.index("zero, image 1 of unmixed")
    assert alts[start + 1 : start + 3] == [
        "one, training image",
        "zero, training image",
    ]


def test_the_text_has_the_facts_of_the_page(full):
    _, text = full
    for said in (
        "**Which is best?** Real only.",
        "| Real and synthetic | `combined` | 84.3 ± 1.2 | +3.1 | −5.0 to +9.0 |",
        "| Does it help? | yes | Yes: it does. |",
        "| mixed | 40 | 3 | 1 | 0, zero | digits/0000 | 0.0413 | pixels | 0.0617 |",
        "| mixed | 9 of 40 | 22.5 | 14.3 | +8.2 | −3.0 to +20.0 |",
        "| KID, pixels | 0.01 | 0.01 | 0.01 |",
        "| finetune | 1,234.6 | 65.4 | 2,345 |",
        "> Two images were left out.",
        "> Of one split: see `mvc-jax repeat`",
        "--config=config.json",
        r"three \<script\>alert(1)\</script\> \| \*x\*",
    ):
        assert said in text, said
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert all(
        a == b
        for a, b, row in zip(columns, columns[1:], rows[1:], strict=False)
        if row.startswith("|--")
    )


def test_untrusted_text_is_escaped(page):
    assert "script" not in {tag for tag, _ in page.tags}
    for text in ("Title", "three", "caption digits/0000", "A note", "prompt 1"):
        assert f"{text} {EVIL}" in page.text


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
    runs = make_metrics()["runs"]
    for k, name in enumerate(("zero", "one", "two")):
        expected = [f"{100 * run['per_class'][k]:.1f}" for run in runs]
        assert " ".join([name, *expected]) in page.rows


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
    assert marks[:2] == ["clear", None]
    assert {*marks[2:]} == {None}  # classes, whose intervals older metrics lack


def test_a_row_of_the_grid_is_a_source_and_its_images(page):
    first = Digits()[0]["image"]
    np.testing.assert_array_equal(page.images("^zero, real image")[0], first)
    for mode, indices in (("coarse", (0, 1)), ("fine", (2, 3))):
        shown = page.images(f"^zero, {mode} image")[:2]
        for image, index in zip(shown, indices, strict=True):
            np.testing.assert_array_equal(image, pixels("mixed", index))
    text = " ".join(page.text.split())
    for said in (
        "token positions 2, 41 from digits/0010",
        "text dims 3, 42 (tokens 1 to 15) from digits/0010",
        f"Partner’s captioncaption digits/0010 {EVIL}",
    ):
        assert said in text


def test_the_comparison_keeps_the_index(page):
    """Class zero shows its last coarse image, class one its last fine image."""
    for name, index, mode in (("zero", 1, "coarse"), ("one", 7, "fine")):
        for set_name in ("unmixed", "pretrained"):
            (image,) = page.images(f"^{name}, {set_name} image")
            np.testing.assert_array_equal(image, pixels(set_name, index))
        mixed = page.images(f"^{name}, {mode} image")[2]
        np.testing.assert_array_equal(mixed, pixels("mixed", index))


def test_losses_are_plotted(page):
    plots = [a for t, a in page.tags if a.get("role") == "img" and t == "div"]
    assert [a["aria-label"].split()[2] for a in plots] == ["pretrain/vae"]
    assert ">optimiser step</text>" in page.source
    assert ">reconstruction error + KL</text>" in page.source
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


def test_a_second_run_does_nothing(finished, monkeypatch):
    paths = sorted((finished / "report").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.setattr(run_images, "read", None)  # would raise if called
    report.run(make_config(), finished)
    assert before == [path.stat().st_mtime_ns for path in paths]
    names = ["grid.png", "manifest.json", "report.html", "report.md"]
    assert [path.name for path in paths] == names


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
    for name in ("report.html", "report.md", "grid.png"):
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
    alts = [alt for alt, _ in page.drawings]
    start = alts.index("zero, source image")
    headings = [alt.split()[1] for alt in alts[start : start + 8]]
    assert headings == ["source", "unmixed", "coarse", *"abcde"]


def test_optional_sections_are_left_out(tmp_path):
    nothing = {"questions": [], "sets": {}, "notes": []}
    workdir = make_workdir(tmp_path, **nothing, runs=make_metrics()["runs"][:1])
    for name in ("metrics.jsonl", "timings.json"):
        (workdir / name).unlink()
    page = run_page(workdir)
    for heading in ("Training loss", "Synthetic sets", "Time and memory", "Questions"):
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


def test_an_accelerator_s_hours_are_told_for_an_image(tmp_path):
    workdir = make_workdir(tmp_path)  # 120 images
    row = {"seconds": 3600.0, "compile_seconds": 600.0, "peak_rss_mib": 1}
    row["devices"] = {"kind": "NVIDIA H200", "count": 2}
    files.write_json(workdir / "timings.json", {"generate": row})
    page = run_page(workdir)
    told = "generate per image made 120 25 30 0.017 2 × NVIDIA H200 Times are of"
    assert page.row("generate per image").startswith(told)
    said = "`generate`: 25 s per image made, 30 s with compiling, 0.017 device hours"
    assert said in (workdir / "report" / "report.md").read_text()


def test_images_removed_by_filters_are_a_table(tmp_path):
    assert "Removed by filters" not in run_page(make_workdir(tmp_path / "a")).text
    counts = {"mixed": {"images": 61, "label": 59, "copies": 13}}
    facts = {"label": {"real_images": 1017, "real_removed": 173}, "copies": {}}
    found = {"facts": facts, "sets": counts | {"other": {"images": 0}}}
    page = run_page(make_workdir(tmp_path / "b", filters=found))
    assert {"Set label copies total kept", "mixed 59 13 61 4,070"} <= {*page.rows}
    assert page.row("other").startswith("other 0 0 0 – ")
    assert "173 of 1,017 real training images" in " ".join(page.text.split())
    found = {"facts": {"copies": {}}, "sets": {"mixed": {"images": 13, "copies": 13}}}
    page = run_page(make_workdir(tmp_path / "c", filters=found))
    assert "Set copies total kept" in page.rows
    assert "The label filter" not in page.text


def test_one_seed_has_no_interval(tmp_path):
    runs = make_metrics()["runs"][:2]
    runs[1]["difference"] |= {"low": None, "high": None}
    page = run_page(make_workdir(tmp_path, runs=runs, seeds=1))
    assert "84.3 +3.1" in page.row("Real and synthetic")
    text = " ".join(page.text.split())
    assert "±" not in text and "in percent, of one seed, on" in text
    assert "each row of the accuracies has one classifier." in text
    assert not re.search(r"\b1 (seeds|classifiers)", text)
    assert "None" not in page.text
    marked = [a for t, a in page.tags if a.get("class") in ("clear", "range")]
    assert marked == []


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
        x for x in page.rows if x.startswith(("Metric", "KID", "Precision", "zero 0."))
    ]
    assert found[0] == "Metric test 2,917 images mixed 4,070 images Meaning"
    assert found[1].startswith("KID, DINOv2 0.0173 – Distance of the distributions")
    assert found[2].startswith("Precision, DINOv2 0.613 0.613 Fraction of its images")
    assert found[3] == "zero 0.371 12 0.371 12"
    assert "Few images." in page.text and "1,999 training images" in page.text


@pytest.mark.parametrize(
    ("images", "title"),
    [
        ({"features": "inception", "fid": True}, "FID"),
        ({"features": "inception", "fid": False}, "Fréchet distance, Inception"),
        ({"features": "resnet50"}, "Fréchet distance, resnet50"),
    ],
)
def test_only_the_published_weights_of_inception_give_an_fid(images, title):
    row = {"images": 9, "frechet_distance": 1.5, "classes": []}
    table = image_metrics.table({**images, "sets": {"test": row}})
    assert [(x["title"], x["values"]) for x in table["rows"]] == [(title, [1.5])]
