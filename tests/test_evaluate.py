"""Verdicts, references, copies and diversity, and how the table shows them."""

import json
import math

import numpy as np
import pytest
from etils import epath

from mvc_jax import evaluate, files
from mvc_jax.configs import digits
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.metrics import image_features, set_metrics, statistics
from mvc_jax.metrics.image_features import ImageSet


def test_a_claim_about_mixing_says_what_it_changes():
    none = {"images": {"sets": {"test": {}}}, "sets": {}}
    some = {
        "images": {"sets": {"mixed": {"unmixed_distance": 0.0254}}},
        "sets": {"mixed": {"diversity": 0.312}},
    }
    for nothing in ({"recipes": 8}, {"recipes": 8, "unchanged": 0}):
        assert evaluate._of_mixing(nothing, none) == []
    remarks = evaluate._of_mixing({"recipes": 8, "unchanged": 4}, some)
    assert remarks == [
        "4 of the 8 recipes change nothing: these images are the same in both sets.",
        "Mixing changes an image by 0.025 of the pixels' range on average; two images "
        "of a class are 0.312 apart.",
    ]
    others = ("real", "two_phase:unmixed+flip", "combined:pretrained")
    answers = [{"against": name, "sentence": "Yes."} for name in others]
    assert evaluate._with_remarks(answers, []) == answers
    counted = evaluate._with_remarks(answers, ["First.", "Second."])
    assert [x["sentence"] for x in counted] == ["Yes.", "Yes. First. Second.", "Yes."]


def images_of(values):
    """4x4 images of these grey values, with one white pixel each."""
    images = np.empty((len(values), 4, 4, 3), np.uint8)
    images[...] = np.asarray(values, np.uint8)[:, None, None, None]
    images[:, 0, 0] = 255
    return images


def described(tmp_path, train, drawn, drawn_labels=None):
    """Describes a training and a synthetic set, images given by their grey value."""
    folder = epath.Path(tmp_path) / "generate"
    labels = drawn_labels or [0] * len(drawn)
    rows = [
        dict.fromkeys(synthetic.PROVENANCE)
        | {"label": label, "source": "s", "index": k}
        for k, label in enumerate(labels)
    ]
    images = drawn if isinstance(drawn, np.ndarray) else images_of(drawn)
    store = synthetic.Store(
        folder / "mixed",
        Digests(folder, folder.parent / "digests.jsonl"),
        ["a", "b"],
        "",
        1000,
        pictures=False,
    )
    (part,) = store.missing(len(rows))
    store.write(part, list(images), rows)
    sets = [
        real_set("train", images_of(train)),
        real_set("test", images_of([240])),
        evaluate._synthetic_set(folder / "mixed", {}, size=4),
    ]
    return measured(tmp_path, sets)["sets"]


def real_set(name, images, labels=None):
    labels = np.zeros(len(images), np.int32) if labels is None else labels
    names = [f"{name}{i}" for i in range(len(images))]
    return ImageSet(name, labels, lambda start: iter(images[start:]), names=names)


def measured(tmp_path, sets, metrics=("kid",)):
    """Metrics of synthetic sets after train and test, of classes a and b, by pixels."""
    folder = epath.Path(tmp_path) / "evaluate"
    size = next(sets[0].images(0)).shape[0]
    found = image_features.extract(
        sets, folder, size=size, embed=None, advance=lambda n: None
    )
    options = set_metrics.Options(metrics, 2, ("a", "b"))
    digests = Digests(folder, folder.parent / "evaluate.jsonl")
    made = set_metrics.SetMetrics(*found[:2], options, folder, digests, lambda n: None)
    return made.describe(found[2:])


@pytest.mark.parametrize(
    ("drawn", "copies"),
    [
        ([60, 100, 200], 3),  # the training images themselves
        ([58, 62, 120], 3),  # closer than the two closest of those, 40 levels
        ([10, 150], 0),  # 50 levels away
        ([61, 150], 1),
    ],
)
def test_a_copy_is_nearer_than_any_two_different_training_images(
    tmp_path, drawn, copies
):
    found = described(tmp_path, [60, 100, 200], drawn)
    assert found["mixed"]["copies"] == copies


@pytest.mark.parametrize("train", [[60, 60, 100], [60, 61, 100], [60]])
def test_an_exact_copy_always_counts_and_a_new_image_never(tmp_path, train):
    """Also with duplicates among the training images, or with only one."""
    found = described(tmp_path, train, [60, 180])
    assert found["mixed"]["copies"] == 1
    json.dumps(found, allow_nan=False)


def test_distances_and_diversity_are_root_mean_squares(tmp_path):
    found = described(tmp_path, [0, 100], [30, 40, 70, 200], [0, 0, 0, 1])
    scale = math.sqrt(15 / 16) / 255  # one pixel of sixteen is always white
    mean = {"real": 100, "mixed": (30 + 40 + 30 + 100) / 4}
    for name, distance in mean.items():
        assert found[name]["nearest_real"] == pytest.approx(distance * scale, rel=1e-3)
    within = (10 + 40 + 30) / 3  # of class a; class b has one image
    assert found["mixed"]["diversity"] == pytest.approx(within * scale, rel=1e-3)
    assert found["mixed"]["images"] == 4
    assert found["real"]["images"] == 2


def test_constant_images_are_counted(tmp_path):
    images = images_of([10, 20, 30])
    images[1] = 77
    assert described(tmp_path, [0, 100], images, [0, 0, 0])["mixed"]["constant"] == 1


def test_images_removed_by_filters_are_counted(tmp_path):
    folder, names = epath.Path(tmp_path), ["mixed", "unmixed"]
    files.write_json(folder / "filters.json", {"copies": {"threshold": 0.1}})
    rows = [{"index": i, "filter": name} for i, name in ((3, "a"), (3, "b"), (5, "a"))]
    files.write_jsonl(folder / "mixed" / "removed.jsonl", rows)
    left_from_another_run = evaluate._filters(folder, names, artifacts={})
    assert left_from_another_run == {}
    assert evaluate._filters(folder, names, artifacts={"filters.json": {}}) == {
        "facts": {"copies": {"threshold": 0.1}},
        "sets": {"mixed": {"images": 2, "a": 2, "b": 1}, "unmixed": {"images": 0}},
    }


def with_features(name, **changes):
    config = digits.get_config()
    config.evaluate.features = name
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def test_a_feature_model_that_is_not_there_is_refused_before_any_work():
    evaluate.check(digits.get_config())  # pixels need none
    for name in ("clip", "dinov2", "efficientnet_lite0"):
        with pytest.raises(UserError, match=f"feature space {name}"):
            evaluate.check(with_features(name))
    with pytest.raises(UserError, match="no folder"):
        evaluate.check(with_features("clip", **{"generate.clip": "/no/such"}))
    evaluate.check(with_features("clip", **{"pretrain.image_encoder.steps": 5}))


def test_the_accuracy_of_training_on_a_set_alone_is_a_metric_of_it():
    def result(regime, **more):
        seeds = [{"accuracy": 0.5}, {"accuracy": 0.7}]
        row = {"regime": regime, "policy": "none", "mix": "", "set": "mixed"}
        return row | {"seeds": seeds} | more

    sets: dict[str, dict] = {"test": {}, "mixed": {}, "unmixed": {}}
    found = {
        "synthetic_only": result("synthetic_only"),
        "combined:unmixed": result("combined", set="unmixed"),
        "synthetic_only:unmixed+flip": result(
            "synthetic_only", set="unmixed", policy="flip"
        ),
    }
    evaluate._add_accuracy_scores(sets, found)
    score = {"classification_accuracy_score": pytest.approx(0.6)}
    assert sets == {"test": {}, "mixed": score, "unmixed": {}}


def test_maximum_and_minimum_of_the_steps_are_reported():
    found = {
        "real": {"seeds": [{"steps": 700}, {"steps": 300}]},
        "combined": {"seeds": [{"steps": 500}, {"steps": 78200}]},
    }
    assert evaluate._steps(found) == {"steps": 78200, "least_steps": 300}


def metrics_with(**changes):
    """What `table` reads, of two runs."""
    accuracy = {"mean": 0.164, "std": 0.013}
    difference = {"against": "real", "mean": 0.021, "low": None, "high": None}
    rows = [
        {"name": "real", "title": "Real", "accuracy": accuracy, "difference": None},
        {"name": "two", "title": "Two", "accuracy": accuracy, "difference": difference},
    ]
    default = {"seeds": 3, "steps": 250, "least_steps": 250, "runs": rows}
    return {**default, "questions": [], **changes}


@pytest.mark.parametrize(
    ("least", "words"),
    [(250, "seeds, 250 optimiser steps each"), (90, "seeds, 90 to 250 optimiser")],
)
def test_the_table_shows_unequal_steps(least, words):
    assert words in evaluate.table(metrics_with(least_steps=least))


@pytest.mark.parametrize(
    ("seeds", "heading", "row"),
    [
        (1, "test accuracy, %: one seed, 250", "Two    16.4           +2.1"),
        (3, "standard deviation over 3 seeds, 250", "Two    16.4 ± 1.3     +2.1"),
    ],
)
def test_the_table_of_one_seed_has_no_spread(seeds, heading, row):
    lines = evaluate.table(metrics_with(seeds=seeds)).splitlines()
    assert heading in lines[1]
    assert lines[-1] == row


def test_the_table_names_references_other_than_real():
    metrics = metrics_with()
    lines = evaluate.table(metrics).splitlines()
    assert lines[2].endswith("against real only") and lines[-1].endswith("+2.1")
    metrics["runs"][1]["difference"] = metrics["runs"][1]["difference"] | {
        "against": "real+flip"
    }
    text = evaluate.table(metrics)
    assert "real only" not in text
    assert "against the run named" in text and "+2.1  real+flip" in text


def test_the_confusion_of_many_classes_is_small_and_has_all_counts():
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(1000), 10)
    predictions = draw.integers(0, 1000, (3, len(labels)))
    predictions[:, ::2] = labels[::2]
    wanted = statistics.confusion_matrix(labels, predictions, 1000)
    rows = evaluate._counts(wanted)
    found = np.zeros_like(wanted)
    for label, row in enumerate(rows):
        for predicted, count in row.items():
            found[label, int(predicted)] = count
    np.testing.assert_array_equal(found, wanted)
    assert len(json.dumps(rows, indent=1)) < 300_000  # 15 million as a matrix
