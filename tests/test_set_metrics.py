"""Metrics of a run's sets: per set and class, copies and leaks, and what is kept."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from many_processes import run_together
from scipy.spatial.distance import cdist
from test_evaluate import images_of, measured, real_set

from mvc_jax import files, processes
from mvc_jax.digests import Digests
from mvc_jax.metrics import (
    distances,
    domain_shift,
    image_features,
    set_metrics,
)

ALL = ("frechet", "kid", "prdc", "vendi", "shift")


def noise(count, *, seed, low=0, high=256):
    drawn = np.random.default_rng(seed).integers(low, high, (count, 8, 8, 3))
    return drawn.astype(np.uint8)


def drawn_set(name, images, labels, sources):
    real = real_set(name, images, np.asarray(labels, np.int32))
    return dataclasses.replace(
        real, sources=np.asarray(sources), names=[*range(len(images))]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, metrics) of a set with a copy of train 3, one of test 1, and noise."""
    folder = tmp_path_factory.mktemp("run")
    train, test = noise(12, seed=0), noise(9, seed=1)
    synthetic = noise(10, seed=2)
    synthetic[4], synthetic[7] = train[3], test[1]
    labels = np.arange(12, dtype=np.int32) % 2
    sets = [
        real_set("train", train, labels),
        real_set("test", test, np.arange(9, dtype=np.int32) % 2),
        drawn_set("mixed", synthetic, [0] * 10, [*range(9), -1]),
    ]
    return folder, measured(folder, sets, (*ALL, "classes"))


def test_copies_and_leaks_are_counted_and_listed(run):
    _, found = run
    train, test = (noise(n, seed=i).reshape(n, -1) for i, n in ((0, 12), (1, 9)))
    drawn = noise(10, seed=2).reshape(10, -1)
    drawn[4], drawn[7] = train[3], test[1]
    among, across = cdist(train, train), cdist(test, train)
    copies = cdist(drawn, train).min(1) < among[among > 0].min()
    leaks = cdist(drawn, test).min(1) < across.min()
    assert copies[4] and leaks[7]
    assert found["sets"]["mixed"]["copies"] == copies.sum()
    assert found["sets"]["mixed"]["leaks"] == leaks.sum()
    mixed = found["images"]["sets"]["mixed"]
    first = mixed["closest"][0]
    assert (first["image"], first["train"], first["distance"]) == (4, "train3", 0)
    assert 0 < first["class_least"] <= first["class_median"]
    apart = [row["distance"] for row in mixed["closest"]]
    assert len(apart) == 10 and apart == sorted(apart)
    json.dumps(found, allow_nan=False)


def test_every_image_has_a_row_of_what_it_is_nearest_to(run):
    folder, found = run
    table = pq.read_table(folder / "evaluate" / "nearest" / "mixed.parquet")
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == [*range(10)]
    assert (rows[4]["train"], rows[4]["train_distance"]) == ("train3", 0)
    assert (rows[7]["test"], rows[7]["test_distance"]) == ("test1", 0)
    assert (rows[3]["source"], rows[9]["source"]) == ("train3", None)
    train, drawn = noise(12, seed=0), noise(10, seed=2)
    apart = [np.sqrt(((drawn[0] / 255 - train[0] / 255) ** 2).mean())]
    np.testing.assert_allclose(rows[0]["source_distance"], apart[0])
    sources = [row["source_distance"] for row in rows[:9]]
    mean = found["images"]["sets"]["mixed"]["source_distance"]
    assert mean == pytest.approx(np.mean(sources))


def test_test_images_are_a_set_and_classes_without_images_have_no_numbers(run):
    _, found = run
    sets = found["images"]["sets"]
    assert [*sets] == ["test", "mixed"]
    assert sets["test"]["near_train"] <= 0.2 and "copies" not in sets["test"]
    a, b = sets["mixed"]["classes"]
    assert (a["images"], a["real_images"], b["images"]) == (10, 6, 0)
    assert a["kid"] is not None and a["within_class"] > 0
    assert b == {
        "name": "b",
        "images": 0,
        "real_images": 6,
        "within_class": None,
    }
    notes = " ".join(found["images"]["notes"])
    assert "mixed has no image of 1 classes (b)" in notes
    assert "Fewer images than the 192 dims of a feature: test (9), mixed (10)" in notes


def test_the_frechet_distance_of_few_images_is_noted_and_of_many_is_not():
    def sets(count):
        return {"mixed": {"images": count, "classes": []}}

    assert "Fewer images than" in set_metrics.notes(sets(50), 50)[0]
    assert "Below 10,000 images" in set_metrics.notes(sets(51), 50)[0]
    assert set_metrics.notes(sets(10_000), 50) == []


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(image_features, "CHUNK", 4)
    images, read, seen = noise(10, seed=0), [], []

    def embed(some):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(some))
        return np.stack([x.reshape(-1)[:5] for x in some]).astype(np.float32)

    def from_start(start):
        for i in range(start, 10):
            read.append(i)
            yield images[i]

    each = dataclasses.replace(real_set("train", images), images=from_start)
    options = {"size": 8, "embed": embed, "advance": lambda n: None}
    with pytest.raises(KeyboardInterrupt):
        image_features.extract([each], epath.Path(tmp_path), **options)
    assert seen == [4, 4]
    seen.clear(), read.clear()
    (found,) = image_features.extract([each], epath.Path(tmp_path), **options)
    assert seen == [2] and read == [8, 9]
    expected = images.reshape(10, -1)
    np.testing.assert_array_equal(found.pixels.rows(slice(None)), expected)
    rows = np.asarray([9, 0, 5, 5])
    np.testing.assert_array_equal(found.features.rows(rows), expected[rows, :5])
    assert found.statistics.images == 10 and found.constant == 0
    levels = np.bincount(images[..., 2].reshape(-1), minlength=256)
    np.testing.assert_array_equal(found.statistics.histograms[2], levels)


def test_a_measured_set_is_not_measured_again(tmp_path, monkeypatch):
    train, test = real_set("train", images_of([0, 90, 40])), images_of([200, 10])
    sets = [train, real_set("test", test)]
    mixed = drawn_set("mixed", images_of([30, 60]), [0, 0], [0, 1])
    first = measured(tmp_path, [*sets, mixed])
    monkeypatch.setattr(set_metrics.SetMetrics, "measure", None)
    assert measured(tmp_path, [*sets, mixed]) == first
    (tmp_path / "evaluate" / "nearest" / "mixed.parquet").write_bytes(b"damaged")
    with pytest.raises(TypeError):
        measured(tmp_path, [*sets, mixed])


def test_many_processes_measure_as_one(tmp_path, monkeypatch):
    """Of three one is killed, two go on: the same files, each made once."""
    monkeypatch.setattr(image_features, "CHUNK", 4)
    sets = [real_set("train", noise(10, seed=0)), real_set("test", noise(7, seed=1))]
    for seed, name in enumerate(("mixed", "unmixed", "noised"), start=2):
        sets.append(drawn_set(name, noise(9, seed=seed), [0, 1] * 4 + [0], range(9)))
    one, found, written = measured(tmp_path / "one", sets, ALL), {}, []
    write = files.write_array

    def mortal(path, array):
        if len(written) > 9 and path.name.startswith("statistics"):
            raise KeyboardInterrupt
        written.append(path)
        write(path, array)

    def together():
        found[processes.index()] = measured(tmp_path / "many", sets, ALL)

    monkeypatch.setattr(files, "write_array", mortal)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        run_together(monkeypatch, 3, together)
    assert not found
    before = {path for path in written if path.name.startswith("statistics")}
    monkeypatch.setattr(files, "write_array", write)
    modified = {path: path.stat().mtime for path in before}
    run_together(monkeypatch, 2, together)
    assert found == {0: one, 1: {}}
    assert modified == {path: path.stat().mtime for path in before}
    contents = [
        {x.relative_to(y): x.read_bytes() for x in y.glob("evaluate/**/*.*")}
        for y in (tmp_path / "one", tmp_path / "many")
    ]
    assert contents[0] == contents[1]


def test_what_mixing_changes_is_measured_by_recipe(tmp_path):
    """Images are matched by their indices: the sets are filtered each by itself."""
    sets = [real_set(x, noise(6, seed=i)) for i, x in enumerate(("train", "test"))]
    pictures = {x: noise(6, seed=2 + i) for i, x in enumerate(("mixed", "unmixed"))}
    kept = {"mixed": [5, 0, 2], "unmixed": [1, 2, 3, 5]}
    for name, rows in kept.items():
        drawn = drawn_set(name, pictures[name][rows], [0] * len(rows), rows)
        sets.append(dataclasses.replace(drawn, names=rows))
    apart = [
        np.sqrt(np.mean((x[k] / 255.0 - y[k] / 255.0) ** 2))
        for x, y in [pictures.values()]
        for k in (5, 2)  # which both sets have
    ]
    found = measured(tmp_path / "both", sets)["images"]["sets"]
    assert found["mixed"]["unmixed_distance"] == pytest.approx(np.mean(apart))
    assert not {*found["unmixed"], *found["test"]} & {"unmixed_distance"}
    alone = measured(tmp_path / "alone", sets[:3])["images"]["sets"]
    assert "unmixed_distance" not in alone["mixed"]


def test_identical_sets_are_all_copies(tmp_path):
    train = noise(8, seed=0)
    sets = [real_set("train", train), real_set("test", noise(5, seed=1))]
    copied = drawn_set("mixed", train, [0] * 8, range(8))
    images = measured(tmp_path, [*sets, copied], ALL)["images"]
    assert "mixed: every image is a copy of a training image" in images["notes"][0]
    found = images["sets"]["mixed"]
    assert found["copies"] == 8 and found["source_distance"] == 0
    assert found["near_train"] == 1
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert found["histogram_shift"] == found["spectrum_shift"] == 0


def test_a_network_s_space_has_distances_beside_those_of_pixels(tmp_path):
    folder = epath.Path(tmp_path)
    train, drawn = noise(6, seed=0), noise(4, seed=1)

    def embed(images):  # an image's features are its first two pixels, negated
        return np.stack([-x.reshape(-1)[:6].astype(np.float32) for x in images])

    sets = image_features.extract(
        [
            real_set("train", train),
            real_set("test", noise(3, seed=2)),
            drawn_set("mixed", drawn, [0] * 4, [1, 2, 3, 4]),
        ],
        folder,
        size=8,
        embed=embed,
        advance=lambda n: None,
    )
    options = set_metrics.Options(("kid",), 2, ("a",))
    digests = Digests(folder, folder / "digests.jsonl")
    metrics = set_metrics.SetMetrics(
        *sets[:2], options, folder, digests, lambda n: None
    )
    row, columns = metrics.measure(sets[2])
    for key, space in (("closest", ""), ("closest_by_features", "_by_features")):
        order = np.argsort(columns[f"train_distance{space}"])
        assert [x["image"] for x in row[key]] == order.tolist()
        assert row[key][0]["distance"] == columns[f"train_distance{space}"].min()
        near = columns[f"train{space}"][order[0]]
        assert row[key][0]["train"] == sets[0].images.names[near]
    apart = [np.linalg.norm(embed(train) - embed(train)[i], axis=1) for i in range(6)]
    own = [np.sort(x)[1] for x in apart]
    first = row["closest_by_features"][0]
    assert first["class_least"] == pytest.approx(min(own), rel=1e-6)
    assert first["class_median"] == pytest.approx(np.median(own), rel=1e-6)
    features = [distances.Points(embed(x)) for x in (drawn, train)]
    expected = distances.nearest(*features)
    np.testing.assert_array_equal(columns["train_by_features"], expected.index)
    apart = np.linalg.norm(embed(drawn) - embed(train[1:5]), axis=1)
    np.testing.assert_allclose(columns["source_distance_by_features"], apart, rtol=1e-6)
    assert not np.allclose(columns["source_distance"], apart)


def test_texts_are_compared_with_images():
    eye = np.eye(3, dtype=np.float32)
    images = real_set("mixed", images_of([1, 2, 3, 4]), np.asarray([0, 1, 2, 0]))
    images = dataclasses.replace(images, prompts=["x", "y", "x", "z"])
    features = distances.Points(eye[[0, 1, 1, 2]])
    found = image_features.ImageFeatures(
        images, features, features, domain_shift.ImageStatistics(4), 0
    )

    def embed_texts(texts):
        assert texts == ["x", "y", "z"]
        return np.stack([eye[0], (eye[0] + eye[1]) / np.sqrt(2), -eye[2]])

    options = set_metrics.Options((), 2, ("a", "b", "c"), eye, embed_texts)
    scores, zero_shot = set_metrics._texts(found, options)
    assert scores["label_agreement"] == 0.5 and zero_shot.tolist() == [0, 1, 1, 2]
    assert scores["clip_score"] == pytest.approx(100 * (1 + np.sqrt(0.5)) / 4)
