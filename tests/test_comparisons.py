"""What is said of accuracies: like with like, each question of every run, plainly."""

import numpy as np
import pytest

from mvc_jax.classification import comparisons
from mvc_jax.metrics.differences import Difference


def right(accuracies, images=400):
    """Seeds that are right about these shares of the same images."""
    order = np.random.default_rng(0).permutation(images)
    return np.stack([order < share * images for share in accuracies])


def noisy(accuracy, number, seeds=4, images=400):
    return np.random.default_rng(number).random((seeds, images)) < accuracy


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("combined+flip", "real+flip"),
        ("two_phase:unmixed+flip", "real+flip"),
        ("combined+affine", "real"),
        ("combined+cutmix+flip", "real+flip+cutmix"),
        ("real+flip", "real"),
        ("real", None),
        ("probabilistic+flip", "probabilistic:real+flip"),
        ("probabilistic:unmixed+flip", "probabilistic:real+flip"),
        ("probabilistic", "real"),
        ("combined:unmixed+flip", "real+flip"),
    ],
)
def test_a_run_is_compared_with_real_images_and_the_same_augmentation(name, against):
    names = ["real", "real+flip", "real+flip+cutmix", "probabilistic:real+flip"]
    correct = dict.fromkeys(names, right([0.6, 0.6])) | {name: right([0.65, 0.65])}
    found = comparisons.difference(name, correct, 0.95)
    assert (found or {}).get("against") == against
    if against:
        assert found["mean"] == pytest.approx(0.05)


def test_there_may_be_nothing_to_compare_with():
    assert comparisons.difference("combined", {"combined": right([0.5])}, 0.95) is None


def test_a_class_is_compared_as_the_whole_with_its_own_images():
    correct = {"real": noisy(0.6, 1), "combined": noisy(0.7, 2)}
    labels = np.repeat([0, 2], [100, 300])
    found = comparisons.against_reference("combined", correct, labels, 4, 0.95)
    assert found["difference"] == comparisons.difference("combined", correct, 0.95)
    rows = found["difference_by_class"]
    assert [row["images"] for row in rows] == [100, 0, 300, 0]
    assert rows[1] == {"images": 0, "mean": None, "low": None, "high": None}
    weighted = (100 * rows[0]["mean"] + 300 * rows[2]["mean"]) / 400
    assert weighted == pytest.approx(found["difference"]["mean"])
    for row in (rows[0], rows[2]):
        assert row["low"] < row["mean"] < row["high"]
    alone = comparisons.against_reference("real", correct, labels, 4, 0.95)
    assert alone == {"difference": None, "difference_by_class": None}


def test_every_question_is_asked_of_every_run_that_has_another_side():
    names = ["combined+flip", "real", "combined", "combined:unmixed", "real+flip"]
    names += ["two_phase", "two_phase:pretrained+flip", "replace_any:unmixed"]
    names += ["combined:da_fusion", "combined:diff_mix+flip"]
    correct = {name: noisy(0.6, i) for i, name in enumerate(names)}
    found = comparisons.answers(correct, 0.95)
    assert [(x["run"], x["against"], x["asked"]) for x in found] == [
        ("combined", "real", 3),
        ("two_phase", "real", 3),
        ("combined+flip", "real+flip", 3),
        ("combined", "combined:unmixed", 1),
        ("combined", "combined:da_fusion", 2),
        ("combined+flip", "combined:diff_mix+flip", 2),
    ]
    assert found[4]["question"] == (
        "Is it better than another method? Real + synthetic, over real + synthetic, "
        "DA-Fusion (rival):"
    )
    assert found[2]["question"] == (
        "Do the synthetic images help? Real + synthetic + flips, over real only + "
        "flips:"
    )
    sided = comparisons.difference("combined+flip", correct, 0.95)
    assert {key: found[2][key] for key in sided} == sided


def test_asking_often_takes_more_evidence():
    correct = {"real": noisy(0.6, 0), "combined": noisy(0.68, 1)}
    [alone] = comparisons.answers(correct, 0.95)
    assert (alone["verdict"], alone["p_adjusted"]) == ("yes", alone["p"])
    policies = ("flip", "affine", "cutout", "randaugment", "trivialaugment")
    correct |= {f"real+{policy}": noisy(0.6, 2) for policy in policies}
    for number, policy in enumerate(policies, start=3):
        correct[f"combined+{policy}"] = noisy(0.6, number)
        correct[f"two_phase+{policy}"] = noisy(0.6, 10 * number)
    first = comparisons.answers(correct, 0.95)[0]
    assert (first["run"], first["asked"]) == ("combined", 11)
    assert first["p_adjusted"] == pytest.approx(11 * first["p"])
    assert first["low"] == alone["low"] > 0
    assert first["verdict"] == "unclear"
    assert "; for a question asked 11 times that is no evidence" in first["sentence"]


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict", "words"),
    [
        (0.012, 0.054, 0.01, "yes", "Yes: +3.3 points (95% interval +1.2 to +5.4)."),
        (-0.01, 0.076, 0.2, "unclear", "No evidence either way: +3.3 points"),
        (0.012, 0.054, 0.06, "unclear", "asked 4 times that is no evidence (Holm)."),
    ],
)
def test_a_verdict_needs_an_interval_and_a_corrected_p(low, high, p, verdict, words):
    found = Difference(0.033, low, high, p / 4)
    answer = comparisons.verdict(found, p, 4, 0.95)
    assert answer["verdict"] == verdict
    assert words in answer["sentence"]
    lower = Difference(-0.033, -high, -low, p / 4)
    against = comparisons.verdict(lower, p, 4, 0.95)
    assert against["verdict"] == {"yes": "no"}.get(verdict, verdict)
    if verdict == "yes":
        assert against["sentence"].startswith("No, accuracy is lower: -3.3 points (95%")


@pytest.mark.parametrize("shape", [(2, 1000), (5, 199), (2, 100), (3, 200)])
def test_few_seeds_or_images_are_said(shape):
    correct = {"real": noisy(0.5, 0, *shape), "combined": noisy(0.9, 1, *shape)}
    [answer] = comparisons.answers(correct, 0.95)
    little = f" {shape[0]} seeds and {shape[1]} test images can tell little."
    assert answer["sentence"].endswith(little) == (shape != (3, 200))


@pytest.mark.parametrize(
    ("seeds", "why"), [(1, "one seed only"), (4, "the same with all 4 seeds")]
)
def test_without_a_spread_there_is_no_verdict(seeds, why):
    correct = {"real": right([0.5] * seeds, 10), "combined": right([1.0] * seeds, 10)}
    correct["real"][:] = False
    [answer] = comparisons.answers(correct, 0.95)
    assert answer["verdict"] == "unclear" and answer["low"] is None
    assert "+100.0 points" in answer["sentence"] and why in answer["sentence"]


def means(correct):
    return {name: each.mean() for name, each in correct.items()}


def test_the_headline_asks_what_is_added_to_the_best_policy():
    correct = {
        "real": noisy(0.55, 0),
        "combined": noisy(0.65, 1),
        "real+affine": noisy(0.75, 2),
        "combined+affine": noisy(0.70, 3),
        "two_phase+affine": noisy(0.74, 4),
    }
    answered = comparisons.answers(correct, 0.95)
    best, added, plain = comparisons.headline(means(correct), answered)
    mean = 100 * correct["real+affine"].mean()
    assert best["sentence"].startswith(
        f"Real only + affine augmentation ({mean:.1f} %), the most accurate of 5 on"
    )
    sentences = {x["run"]: x["sentence"] for x in answered}
    assert added["sentence"].startswith("Two-phase + affine augmentation (")
    assert added["sentence"].endswith(sentences["two_phase+affine"])
    assert plain["sentence"] == sentences["combined"]
    assert plain["sentence"].startswith("Yes: ")


def test_larger_batches_of_real_images_are_a_training_without_synthetic_ones():
    correct = {
        "real+affine": noisy(0.7, 0),
        "probabilistic:real+affine": noisy(0.8, 1),
        "probabilistic+affine": noisy(0.75, 2),
    }
    answered = comparisons.answers(correct, 0.95)
    assert [(x["run"], x["against"]) for x in answered] == [
        ("probabilistic+affine", "real+affine"),
        ("probabilistic+affine", "probabilistic:real+affine"),
    ]
    _, added = comparisons.headline(means(correct), answered)
    assert "against Probabilistic, real images added (control)" in added["sentence"]
    assert added["sentence"].endswith(answered[1]["sentence"])


def test_the_headline_says_what_was_not_tried():
    correct = {"real": noisy(0.6, 0), "real+flip": noisy(0.7, 1)}
    correct["combined"] = noisy(0.65, 2)
    said = comparisons.headline(means(correct), comparisons.answers(correct, 0.95))
    assert said[1]["sentence"].startswith(
        "Not tried: no run adds any to Real only + fl"
    )
    alone = {"combined": noisy(0.6, 0)}
    assert (
        len(comparisons.headline(means(alone), comparisons.answers(alone, 0.95))) == 1
    )


def test_an_interval_over_splits_is_that_of_their_means():
    """Of Student, with two degrees of freedom: computed by hand."""

    def answered(mean):
        question = "Do the synthetic images help? Real + synthetic, over real only:"
        row = {"question": question, "run": "combined", "against": "real"}
        return [row | {"mean": mean, "low": 0.01, "high": 0.02, "verdict": "yes"}]

    def over_splits(*means):
        [answer] = comparisons.answers_over_splits([*map(answered, means)], 0.95)
        return answer

    answer = over_splits(0.03, 0.004, 0.034)
    assert answer["mean"] == pytest.approx(0.02267, abs=1e-5)
    assert answer["low"] == pytest.approx(-0.01780, abs=1e-5)
    assert answer["high"] == pytest.approx(0.06313, abs=1e-5)
    assert answer["sentence"].startswith("No evidence either way: +2.3 points")
    assert over_splits(0.03, 0.04)["sentence"].endswith(" 2 splits can tell little.")
    for same in ([0.03], [0.03] * 3):
        answer = over_splits(*same)
        assert answer["verdict"] == "unclear" and answer["low"] is None
