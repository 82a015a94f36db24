"""Removed images are listed, saved as pictures, counted and warned of."""

import io

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mvc_jax import files
from mvc_jax.data import splits
from mvc_jax.screening import removed
from mvc_jax.screening.filters import Finding

REAL = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
TRAIN = splits.Split(
    REAL, np.asarray([0, 0, 1, 1], np.int32), tuple("abcd"), ("cat", "dög"), False
)
LABEL = Finding("label", "looks like dög (0.90)", 0.1, 0.5)
COPY = Finding("copies", "too close to its source", 0.0, 0.05, "a")
FAR = Finding("outliers", "too far from every real cat", 0.9, 0.5, "b")


def save(folder, findings):
    """Saves removed images 10, 11, ... of class cat; returns their rows."""
    found = []
    for index, mine in enumerate(findings, start=10):
        image = np.full((8, 8, 3), index, np.uint8)
        removed.save_picture(epath.Path(folder), index, image)
        recipe = {"index": index, "source": "a", "label": 0}
        found += removed.rows(recipe, mine, TRAIN.class_names)
    return found


def test_the_list_has_a_row_for_each_finding(tmp_path):
    found = save(tmp_path, [[LABEL], [COPY, FAR]])
    names = removed.write(epath.Path(tmp_path), found, TRAIN)
    assert names == ["removed.jsonl", "removed.png"]
    rows = files.read_jsonl(tmp_path / "removed.jsonl")
    assert rows == removed.read(epath.Path(tmp_path)) == found
    assert rows[1] == {
        "index": 11,
        "source": "a",
        "label": "cat",
        "filter": "copies",
        "reason": "too close to its source",
        "score": 0.0,
        "threshold": 0.05,
        "real": "a",
    }
    assert [row["index"] for row in rows] == [10, 11, 11]
    assert removed.count(rows) == {"images": 2, "label": 1, "copies": 1, "outliers": 1}
    assert removed.reasons(rows) == {"label": 1, "copies and outliers": 1}


def test_without_removed_images_only_an_empty_list_is_written(tmp_path):
    assert removed.write(epath.Path(tmp_path), [], TRAIN) == ["removed.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["removed.jsonl"]
    assert removed.count(removed.read(epath.Path(tmp_path))) == {"images": 0}
    assert removed.read(epath.Path(tmp_path) / "nowhere") == []


def test_the_sheet_shows_source_removed_and_nearest(tmp_path):
    found = save(tmp_path, [[LABEL], [COPY], [FAR]])
    removed.write(epath.Path(tmp_path), found, TRAIN)
    sheet = np.asarray(Image.open(tmp_path / "removed.png").convert("RGB"))
    for image in (REAL[0], REAL[1], np.full((8, 8, 3), 10), np.full((8, 8, 3), 12)):
        tile = np.kron(image, np.ones((6, 6, 1))).astype(np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, (1, 48), (0, 1))
        rows = (windows[:, :, :, 0] == tile[24].T).all((2, 3))
        assert rows.any()
    for path in (tmp_path / "removed").iterdir():
        path.unlink()
    assert removed.write(epath.Path(tmp_path), found, TRAIN)[1] == "removed.png"


@pytest.mark.parametrize(
    "numbers", [(100, 5, 0), (3, 2, 1), (40, 40, 40), (0, 0, 90), (1, 0, 0)]
)
def test_every_filter_is_shown_in_the_sheet(numbers):
    rows = []
    for name, number in zip(("label", "copies", "outliers"), numbers, strict=True):
        rows += [{"index": len(rows) + i, "filter": name} for i in range(number)]
    chosen = removed._examples(rows)
    assert len({row["index"] for row in chosen}) == len(chosen)
    assert len(chosen) == min(sum(numbers), 24)
    for name, number in zip(("label", "copies", "outliers"), numbers, strict=True):
        assert sum(row["filter"] == name for row in chosen) >= min(number, 5)


def test_a_filter_that_removes_most_images_is_warned_of(tmp_path):
    found = save(tmp_path, [[LABEL]] * 6 + [[COPY]] * 5)
    facts = {"label": {"real_images": 40, "real_removed": 30}}
    [warning] = removed.warnings(found, 11, facts)
    for words in ("label removed 6 of 11", "0.1", "label_threshold", "label_top"):
        assert words in warning
    assert "30 of 40 real images" in warning
    assert removed.warnings(found, 12, facts) == []
    assert "copies_quantile" in removed.warnings(found, 9, facts)[1]


def test_the_sheet_of_many_stays_small(tmp_path):
    found = save(tmp_path, [[LABEL, FAR]] * 60)
    removed.write(epath.Path(tmp_path), found, TRAIN)
    content = (tmp_path / "removed.png").read_bytes()
    assert len(content) < 400_000
    assert Image.open(io.BytesIO(content)).width < 2000
