"""What the accuracies of the runs say: differences, questions, the headline.

A run is compared with the one that differs from it in nothing but what is asked about:
the same test images, seeds and augmentation.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mvc_jax.classification import runs
from mvc_jax.generation.conditionings import RIVALS
from mvc_jax.metrics import differences

Correct = Mapping[str, Bool[np.ndarray, "S T"]]  # of each run: seed s, test image t

# Below these an interval says little.
_FEW_SEEDS, _FEW_IMAGES, _FEW_SPLITS = 3, 200, 3
_CLASS_DRAWS = 2000  # of the bootstrap of one of many classes


def _real(run: runs.Run) -> tuple:
    return ("real", "", run.policy, run.mix)


def _with_set(name: str) -> Callable[[runs.Run], tuple]:
    """The same run on another set; "": on real images in its place."""
    return lambda run: (run.regime, name, run.policy, run.mix)


# What is asked of every run on mixed images that has an answer's other side, and which
# sides those are.
QUESTIONS = {
    "Do the synthetic images help": (_real, _with_set("")),
    "Does mixing captions help": (_with_set("unmixed"),),
    "Does fine-tuning help": (_with_set("pretrained"),),
    "Is it better than another method": tuple(map(_with_set, RIVALS)),
}


def difference(name: str, correct: Correct, confidence: float) -> dict[str, Any] | None:
    """A run against its like on real images: with its augmentation, else plain `real`.

    Returns:
      `against`, the name of the other run, and the fields of `differences.Difference`;
      None if there is no such run, or it is this one.
    """
    made, run = _by_parts(correct), runs.parse(name)
    for parts in (_with_set("")(run), _real(run), ("real", "", "none", "")):
        other = made.get(parts)
        if other not in (None, name):
            found = differences.paired(correct[name], correct[other], confidence)
            return {"against": other, **vars(found)}
    return None


def against_reference(
    name: str,
    correct: Correct,
    labels: Int[np.ndarray, " T"],
    classes: int,
    confidence: float,
) -> dict[str, Any]:
    """A run against its reference, whole and by class.

    Args:
      name: of the run.
      correct: of all runs.
      labels: of the test images.
      classes: K.
      confidence: of the intervals.

    Returns:
      `difference`, see there; and `difference_by_class`, None without a reference, else
      for each class `images`, how many test images it has, and the same fields. The
      intervals are of each class by itself: of many, some exclude zero by chance.
    """
    found = difference(name, correct, confidence)
    if found is None:
        return {"difference": None, "difference_by_class": None}
    ours, theirs = correct[name], correct[found["against"]]
    by_class = []
    for label in range(classes):
        mine = np.flatnonzero(labels == label)
        row = {"images": len(mine), "mean": None, "low": None, "high": None}
        if len(mine):
            pair = ours[:, mine], theirs[:, mine]
            row |= vars(differences.paired(*pair, confidence, draws=_CLASS_DRAWS))
        by_class.append(row)
    return {"difference": found, "difference_by_class": by_class}


def without_synthetic(name: str, names: Collection[str]) -> str | None:
    """Of `names` the run on real images alone that is else like this one, if any is."""
    run, made = runs.parse(name), _by_parts(names)
    if not run.set:
        return None
    return made.get(_with_set("")(run)) or made.get(_real(run))


def answers(correct: Correct, confidence: float) -> list[dict[str, Any]]:
    """Answers every question about every run for which there is another side.

    Whether a difference counts is decided after a correction for how often the same
    question is asked (`differences.holm`); the intervals are of each by itself.

    Returns:
      for each: `question`, `run`, `against`, the fields of `differences.Difference`,
      `asked` (how often), `verdict` ("yes", "no" or "unclear") and `sentence`. Runs
      without augmentation come first.
    """
    made, found = _by_parts(correct), []
    ordered = sorted(map(runs.parse, correct), key=lambda run: "+" in run.name)
    for question, sides in QUESTIONS.items():
        pairs = [
            (run.name, made[side(run)])
            for run in ordered
            for side in sides
            if run.set == "mixed" and side(run) in made
        ]
        answered = compared(
            [(correct[ours], correct[theirs]) for ours, theirs in pairs], confidence
        )
        for (ours, theirs), answer in zip(pairs, answered, strict=True):
            titles = [runs.parse(name).title for name in (ours, theirs)]
            asked = f"{question}? {titles[0]}, over {_lower(titles[1])}:"
            found.append({"question": asked, "run": ours, "against": theirs, **answer})
    return found


def compared(
    pairs: Sequence[tuple[Bool[np.ndarray, "S T"], Bool[np.ndarray, "S2 T"]]],
    confidence: float,
) -> list[dict[str, Any]]:
    """Is the first of each pair more accurate? Corrected for asking that of all pairs.

    Seeds that only one of the two has are left out.

    Returns:
      of each the fields that `answers` describes, from those of
      `differences.Difference` on.
    """
    cut = [tuple(x[: min(map(len, pair))] for x in pair) for pair in pairs]
    found = [differences.paired(*pair, confidence) for pair in cut]
    return _decided(found, confidence, [_words(ours) for ours, _ in cut])


def accuracy(correct: Bool[np.ndarray, "S T"], confidence: float) -> dict[str, Any]:
    """The accuracy of a run, with its interval for other seeds and test images.

    Returns:
      `accuracy`, `low` and `high` in [0, 1], the latter None where they cannot be
      known, and `seeds`.
    """
    found = differences.paired(correct, np.zeros_like(correct), confidence)
    low, high = found.low, found.high
    return {
        "accuracy": found.mean,
        "low": None if low is None else max(low, 0.0),
        "high": None if high is None else min(high, 1.0),
        "seeds": len(correct),
    }


def answers_over_splits(
    answered: Sequence[Sequence[Mapping[str, Any]]], confidence: float
) -> list[dict[str, Any]]:
    """The questions that several splits have answered, with intervals over splits.

    Args:
      answered: `answers` of each split, of the same runs.
      confidence: of the intervals.

    Returns:
      as `answers`.
    """
    by_question: dict[str, list[tuple[dict, differences.Difference]]] = {}
    for same in zip(*answered, strict=True):
        values = np.asarray([each["mean"] for each in same])
        about = {key: same[0][key] for key in ("question", "run", "against")}
        mean = differences.over_splits(values, confidence)
        family = about["question"].split("?")[0]
        by_question.setdefault(family, []).append((about, mean))
    splits = len(answered)
    same = "one split only" if splits == 1 else f"the same on all {splits} splits"
    few = f" {splits} splits can tell little." if splits < _FEW_SPLITS else ""
    return [
        {**about, **answer}
        for pairs in by_question.values()
        for (about, _), answer in zip(
            pairs,
            _decided([x for _, x in pairs], confidence, [(same, few)] * len(pairs)),
            strict=True,
        )
    ]


def _words(correct: Bool[np.ndarray, "S T"]) -> tuple[str, str]:
    """Why there is no interval where there is none; that there is little to go by."""
    seeds, images = correct.shape
    same = "one seed only" if seeds == 1 else f"the same with all {seeds} seeds"
    if seeds >= _FEW_SEEDS and images >= _FEW_IMAGES:
        return same, ""
    return same, f" {seeds} seeds and {images} test images can tell little."


def _decided(
    found: Sequence[differences.Difference],
    confidence: float,
    words: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """The fields of each answer to one question, corrected for asking all of them.

    `words` are the `same` and the `few` of `verdict` for each.
    """
    known = [each.p for each in found if each.p is not None]
    adjusted = iter(differences.holm(known))
    decided = []
    for each, (same, few) in zip(found, words, strict=True):
        p = None if each.p is None else next(adjusted)
        said = verdict(each, p, len(known), confidence, same=same, few=few)
        decided.append({**vars(each), "asked": len(known), "p_adjusted": p, **said})
    return decided


def verdict(
    found: differences.Difference,
    p_adjusted: float | None,
    asked: int,
    confidence: float,
    *,
    same: str = "without spread",
    few: str = "",
) -> dict[str, str]:
    """`verdict` and `sentence` of a difference.

    Args:
      found: the difference.
      p_adjusted: its p-value after the correction; None: it cannot be known.
      asked: how often the question is asked.
      confidence: of the interval.
      same: why there is no interval, where there is none.
      few: a sentence to add.
    """
    points = f"{100 * found.mean:+.1f} points"
    if p_adjusted is None:
        return _sentence("unclear", f"Unclear: {points}, {same}.")
    interval = (
        f"{points} ({confidence:.0%} interval {100 * found.low:+.1f} to "
        f"{100 * found.high:+.1f})"
    )
    significant = p_adjusted < 1 - confidence
    if found.low <= 0 <= found.high:
        return _sentence("unclear", f"No evidence either way: {interval}.{few}")
    if not significant:
        asking = f"for a question asked {asked} times that is no evidence (Holm)"
        return _sentence("unclear", f"Unclear: {interval}; {asking}.{few}")
    if found.low > 0:
        return _sentence("yes", f"Yes: {interval}.{few}")
    return _sentence("no", f"No, accuracy is lower: {interval}.{few}")


def headline(
    means: Mapping[str, float],
    answered: Sequence[Mapping[str, Any]],
    where: str = "on these test images",
) -> list[dict[str, str]]:
    """What to say first: the best run, and what is added to the best policy.

    Args:
      means: the accuracy of each run.
      answered: from `answers` or `answers_over_splits`.
      where: the best run is the most accurate.

    Returns:
      `question` and `sentence` of each.
    """
    best = max(means, key=means.__getitem__)
    said = [
        {
            "question": "Which run is best?",
            "sentence": f"{_percent(best, means)}, the most accurate of {len(means)} "
            f"{where}.",
        }
    ]
    real = [name for name in means if not runs.parse(name).set]
    about = [x for x in answered if x["question"].startswith([*QUESTIONS][0])]
    if not real or not about:
        return said
    policy = max(real, key=means.__getitem__)
    on_top = [each for each in about if each["against"] == policy]
    question = "What do synthetic images add to the best training without them?"
    if on_top:
        added = max(on_top, key=lambda each: means[each["run"]])
        sentence = (
            f"{_percent(added['run'], means)}, against {_percent(policy, means)}. "
        )
        said.append({"question": question, "sentence": sentence + added["sentence"]})
    else:
        nothing = f"Not tried: no run adds any to {_percent(policy, means)}."
        said.append({"question": question, "sentence": nothing})
    plain = [x for x in about if x["against"] == "real" and x["run"] == "combined"]
    if plain and policy != "real":
        question = "And over real images without augmentation?"
        said.append({"question": question, "sentence": plain[0]["sentence"]})
    return said


def _sentence(verdict_: str, sentence: str) -> dict[str, str]:
    return {"verdict": verdict_, "sentence": sentence}


def _by_parts(names: Collection[str]) -> dict[tuple, str]:
    parsed = map(runs.parse, names)
    return {(run.regime, run.set, run.policy, run.mix): run.name for run in parsed}


def _percent(name: str, means: Mapping[str, float]) -> str:
    return f"{runs.parse(name).title} ({100 * means[name]:.1f} %)"


def lower_title(name: str) -> str:
    """The title of a run, within a sentence."""
    return _lower(runs.parse(name).title)


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]
