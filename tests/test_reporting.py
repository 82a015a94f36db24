"""What sections of the report show: numbers, intervals, copies, costs, marks."""

import base64
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from made_runs import NAMES, make_metrics, make_workdir, measured
from PIL import Image

from mvc_jax import files
from mvc_jax.data import shards
from mvc_jax.reporting import (
    accuracy,
    album,
    cost,
    formats,
    interval_axis,
    likeness,
    run_images,
)

ENDS = st.one_of(st.none(), st.floats(-1, 1))


@given(st.lists(st.tuples(ENDS, ENDS, ENDS), max_size=5))
def test_an_axis_holds_every_number_and_zero_with_a_few_labels(rows):
    names = ("mean", "low", "high")
    found = interval_axis.axis(
        [dict(zip(names, x, strict=True)) for x in rows] + [None]
    )
    known = [x for row in rows for x in row if x is not None]
    for value in [0.0, *known, *found.ticks]:
        assert -1e-9 <= float(found.at(value).removesuffix("%")) <= 100
    assert 0 in found.ticks and 2 <= len(found.ticks) + (len(found.ticks) == 1) <= 8
    steps = np.diff(found.ticks)
    assert np.allclose(steps, steps[:1])


@pytest.mark.parametrize(
    ("format_", "value", "text"),
    [
        ("percent", 0.8123, "81.2"),
        ("percent", float("nan"), "–"),
        ("points", -0.0004, "0.0"),
        ("points", -0.0123, "−1.2"),
        ("tick", 0.005, "+0.5"),
        ("tick", -0.1, "−10"),
        ("number", 12345, "12,345"),
        ("number", 0.123456, "0.1235"),
        ("number", None, "–"),
        ("number", True, "yes"),
        ("distance", 0.085817, "0.0858"),
        ("distance", 0.15, "0.150"),
        ("prose", "see `a<b` <i>", "see <code>a&lt;b</code> &lt;i&gt;"),
        ("cell", "a|b\n*c* <i>", r"a\|b \*c\* \<i\>"),
    ],
)
def test_values_are_written_for_people(format_, value, text):
    assert formats.FILTERS[format_](value) == text


@given(
    st.text(max_size=20),
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=4),
)
def test_marks_are_in_the_ranges_and_the_text_is_whole(text, ranges):
    pieces = run_images.marked(text, ranges)
    assert "".join(piece for piece, _ in pieces) == text
    flags = [flag for piece, flag in pieces for _ in piece]
    assert flags == [any(a <= i < b for a, b in ranges) for i in range(len(text))]


def test_a_picture_is_stored_once_and_not_larger_than_it_is_shown():
    stored, rng = album.Album(), np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    large = Image.fromarray(rng.integers(0, 256, (600, 900, 3), np.uint8))
    first, other = stored.add(small), stored.add(large)
    assert stored.add(small.copy()) is first and len(stored.pictures) == 2
    assert (first.width, first.height, first.smooth) == (16, 16, False)
    assert (other.width, other.height, other.smooth) == (384, 256, True)
    content = base64.b64decode(first.uri.partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), small)


def test_the_classes_that_lost_most_are_first_and_of_many_the_middle_is_left_out():
    names = [f"class {k}" for k in range(40)]
    metrics = measured(names, 10)
    (run, other), found = accuracy.by_class(metrics)["runs"], accuracy.by_class(metrics)
    assert (run["against"], other["against"]) == ("real", "combined")
    shown = [row["mean"] for row in run["worst"] + run["best"]]
    every = sorted(row["mean"] for row in metrics["runs"][1]["difference_by_class"])
    assert shown == every[:12] + every[-4:] and run["hidden"] == 24
    assert found["of_many"] and found["plain"]["uri"].startswith("data:image/png")
    counts = accuracy.confusion(metrics)["real"]
    pair = found["plain"]["pairs"][0]
    k, n = names.index(pair["name"]), names.index(pair["other"])
    off = counts * (1 - np.eye(40, dtype=int))
    assert pair["count"] == counts[k, n] == off.max()


def test_older_metrics_have_differences_of_classes_without_intervals():
    runs = accuracy.by_class(make_metrics())["runs"]
    assert [row["low"] for row in runs[0]["worst"]] == [None] * 10
    assert runs[0]["worst"][0]["mean"] == pytest.approx((0.8434 - 0.8123) / 30)
    assert runs[0]["confusion"] is None


def test_the_confusion_of_older_metrics_is_read_as_well():
    """Theirs is a matrix; now it is the counts that are not zero."""
    runs = make_metrics()["runs"]
    runs[1]["confusion_counts"] = [{str(9 - k): 97 + k} for k in range(10)]
    metrics = make_metrics() | {"runs": runs}
    counted = accuracy.confusion(metrics)
    assert counted.keys() == {"combined"}
    np.testing.assert_array_equal(
        counted["combined"][:, ::-1].diagonal(), 97 + np.arange(10)
    )
    del runs[1]["confusion_counts"]
    runs[1]["confusion"] = counted["combined"].tolist()
    np.testing.assert_array_equal(
        accuracy.confusion(metrics)["combined"], counted["combined"]
    )


def test_a_heat_map_is_stronger_where_more_is_confused():
    counts = np.full((25, 25), 1)
    counts[3, 7], counts[np.arange(25), np.arange(25)] = 50, 20
    found = accuracy.shown_confusion(counts, [str(k) for k in range(25)])
    content = base64.b64decode(found["uri"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert pixels.shape == (25, 25, 4)
    assert pixels[3, 7, 3] > pixels[5, 5, 3] > pixels[5, 6, 3] > 0
    assert (pixels[5, 5, :3] != pixels[5, 6, :3]).all()
    assert (found["pairs"][0]["name"], found["pairs"][0]["other"]) == ("3", "7")


@pytest.mark.parametrize("kind", ["", "cpu", "NVIDIA H200"])
def test_the_cost_of_an_image_has_device_hours_where_there_was_an_accelerator(
    tmp_path, kind
):
    row = {"seconds": 7200.0, "compile_seconds": 3600.0, "peak_rss_mib": 1}
    row |= {"devices": {"kind": kind, "count": 4}} if kind else {}
    tmp_path = epath.Path(tmp_path)
    files.write_json(tmp_path / "timings.json", {"generate": row, "finetune": row})
    settings = {"finetune": {"batch_size": 50}}
    manifests = {
        "generate": {"counts": {"images": 7200}},
        "finetune": {"counts": {"steps": 144}, "settings": settings},
    }
    found = cost.table(tmp_path, manifests)
    for image in found["images"]:
        assert (image["images"], image["seconds"]) == (7200, 0.5)
        assert image["with_compiling"] == 1.0
        if kind == "NVIDIA H200":
            assert image["device_hours"] == pytest.approx(4 * 2 / 7200)
        else:
            assert image["devices"] is None and image["device_hours"] is None


def test_pairs_and_images_of_another_class_are_found_by_their_ids(tmp_path):
    metrics = measured(list(NAMES), 10)
    workdir = make_workdir(epath.Path(tmp_path), made=("mixed",), **metrics)
    images = run_images.read(workdir, metrics["class_names"])
    copies = likeness.copies(metrics, images)
    (mixed,) = copies["sets"]
    assert (mixed["name"], mixed["copies"], copies["threshold"]) == ("mixed", 3, 0.0517)
    first = mixed["lists"][0]["pairs"][0]
    assert (first["drawn"]["set"], first["drawn"]["index"]) == ("mixed", 0)
    np.testing.assert_array_equal(
        np.asarray(first["real"]["image"]), images.real.images[0]
    )
    found = likeness.other_class(metrics, images)
    row = found["sets"][0]["rows"][0]
    assert (row["name"], row["predicted_name"]) == ("zero", "one")
    assert [cell["heading"] for cell in row["cells"]] == [
        "image 1", "real one", "real zero"
    ]  # fmt: skip
    del metrics["images"]["sets"]["mixed"]["other_class"]
    assert likeness.other_class(metrics, images) is None
    del metrics["images"]
    assert likeness.copies(metrics, images) is None


def test_an_image_of_another_class_is_flagged_and_mixed_words_are_marked(tmp_path):
    workdir = make_workdir(epath.Path(tmp_path), made=("mixed", "unmixed"))
    images = run_images.read(workdir, list(NAMES))
    recipe = images.recipes[0] | {"noise_seed": 77, "donors": [0, 0], "dim_donors": []}
    recipe["positions"] = [1, 3]
    images.recipes[0] = recipe
    rows = [
        {"id": id_, "prompt": prompt, "state": state}
        for id_, prompt, state in (
            (recipe["source"], "thin stroke, zero", 1),
            (recipe["partners"][0], "bold line, zero", 2),
        )
    ]
    files.write_jsonl(workdir / "encode" / "prompts.jsonl", rows)
    offsets = ([], [0, 4, 5, 11, 11, 12, 13, 17], [0, 4, 5, 9, 9, 10, 11, 15])
    offsets = [{"offsets": each} for each in offsets]
    files.write_jsonl(workdir / "encode" / "offsets.jsonl", offsets)
    states = workdir / "encode" / "text_states"
    shards.Writer(states, rows=3, row_shape=(16, 64), dtype="float32")
    cells = [
        images.cell(name, images.sets[name][index], "coarse")
        for name, index in (("mixed", 0), ("mixed", 1), ("unmixed", 0))
    ]
    images.read_words(cells)
    assert cells[0]["words"] == [
        {
            "of": "Source’s prompt",
            "pieces": [("thin", True), (" stroke", False), (",", True)]
            + [(" zero", False)],
        },
        {
            "of": "Partner’s prompt",
            "pieces": [("bold", True), (" line", False), (",", True), (" zero", False)],
        },
    ]
    facts = dict(cells[0]["facts"])
    assert facts["In words"].startswith("Replaced: 2 tokens of words")
    assert facts["Source"] == recipe["source"] and "from" in facts["Mixed in"]
    assert [flag for x in cells[1]["words"] for _, flag in x["pieces"]] == [False] * 2
    assert cells[2]["words"] == []
    table = pa.table({"name": [0, 1, 2], "label": [0, 0, 0], "predicted": [6, 0, 6]})
    (workdir / "evaluate" / "nearest").mkdir()
    pq.write_table(table, workdir / "evaluate" / "nearest" / "mixed.parquet")
    likeness.flag(cells, workdir / "evaluate", images)
    assert [cell.get("flag") for cell in cells] == ["six", None, None]
