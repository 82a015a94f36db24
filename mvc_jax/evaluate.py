"""All results -> metrics: accuracies, paired differences, properties of the images.

Reads: `classify/results/`, `generate/`, the training images. Writes: `metrics.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath, epy
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import decode, splits
from mvc_jax.metrics import distances, statistics
from mvc_jax.screening import removed
from mvc_jax.stage import Spec, open_stage, read_manifest
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    from mvc_jax.classification import runs
    from mvc_jax.generation import synthetic

# (question, run, reference): is `run` more accurate than `reference`? Each is answered
# for every augmentation with which both were run.
QUESTIONS = (
    ("Do the synthetic images help over real images alone?", "combined", "real"),
    ("Does mixing captions help over unmixed ones?", "combined", "combined:unmixed"),
    (
        "Does fine-tuning help over the base model as it is?",
        "combined",
        "combined:pretrained",
    ),
)
_WITH_AUGMENTATION = "Do they help on top of augmentation, {}?"


def check(config: ConfigDict) -> None:
    """Nothing: no field depends on another one, or on a file."""


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to describe: every synthetic image is compared with every real."""
    images = len(config.generate.sets) * sizes.recipes
    return Work(
        {"runs": len(config.classify.runs), "images": images},
        unit="images",
        speed={"size": config.data.size, "real images": sizes.images},
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the metrics depend on."""
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "evaluate": config.evaluate.to_dict(),
    }
    return Spec("evaluate", settings, inputs=("classify",), restores=("metrics.json",))


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes every number that the report shows."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    classify = read_manifest(workdir, "classify")["settings"]["classify"]
    generate = read_manifest(workdir, "generate")
    results = _read_results(workdir / "classify" / "results", classify["runs"])
    train = splits.read_split(workdir / "caption", "train")
    test = splits.read_split(workdir / "caption", "test")
    split_ids = files.read_json(workdir / "caption" / "splits.json")
    confidence = config.evaluate.confidence
    set_names = generate["settings"]["generate"]["sets"]
    metrics = {
        "class_names": list(test.class_names),
        "counts": {name: len(ids) for name, ids in split_ids.items()},
        "seeds": classify["seeds"],
        **_steps(results),
        "batch_size": classify["batch_size"],
        "confidence": confidence,
        "runs": [
            _row(name, results, test.labels, len(test.class_names), confidence)
            for name in results
        ],
        "questions": _answers(results, confidence),
        "sets": _describe_sets(
            workdir / "generate",
            set_names,
            train,
            resize=config.data.resize,
            resample=config.data.resample,
        ),
        "filters": _filters(workdir / "generate", set_names, generate["artifacts"]),
        "notes": _notes(classify["seeds"], workdir / "caption"),
    }
    files.write_json(stage.folder / "metrics.json", metrics)
    stage.finish(["metrics.json"], runs=len(results))


def _read_results(folder: epath.Path, names: list[str]) -> dict[str, dict]:
    """Reads the results of the runs `names`, in this order."""
    slugs = {name: runs.parse(name).slug for name in names}
    return {name: files.read_json(folder / f"{slugs[name]}.json") for name in names}


def _accuracies(result: dict) -> Float[np.ndarray, " S"]:
    return np.asarray([seed["accuracy"] for seed in result["seeds"]])


def _steps(results: dict[str, dict]) -> dict[str, int]:
    """Returns the maximum and minimum number of optimiser steps over all fits."""
    steps = [seed["steps"] for result in results.values() for seed in result["seeds"]]
    return {"steps": max(steps), "least_steps": min(steps)}


def _row(
    name: str,
    results: dict[str, dict],
    labels: Int[np.ndarray, " T"],
    classes: int,
    confidence: float,
) -> dict[str, Any]:
    """Returns the metrics of one run."""
    result = results[name]
    accuracies = _accuracies(result)
    predictions = np.asarray([seed["predictions"] for seed in result["seeds"]])
    confusion = statistics.confusion_matrix(labels, predictions, classes)
    real_seen, synthetic_seen = result["real_seen"], result["synthetic_seen"]
    return {
        "name": name,
        "regime": result["regime"],
        "policy": result["policy"],
        "set": result["set"],
        "title": runs.parse(name).title,
        "accuracy": {
            "mean": float(accuracies.mean()),
            "std": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else 0.0,
            "per_seed": accuracies.tolist(),
        },
        "per_class": (np.diag(confusion) / confusion.sum(axis=1)).tolist(),
        "confusion": confusion.tolist(),
        "calibration_error": _calibration_error(result, predictions == labels),
        "real_seen": real_seen,
        "synthetic_seen": synthetic_seen,
        "synthetic_per_real": synthetic_seen / real_seen if real_seen else None,
        "difference": _difference(name, results, confidence),
    }


def _calibration_error(result: dict, correct: Bool[np.ndarray, "S T"]) -> float:
    """Returns the mean over seeds."""
    errors = [
        statistics.calibration_error(np.asarray(seed["confidences"]), mine)
        for seed, mine in zip(result["seeds"], correct, strict=True)
    ]
    return float(np.mean(errors))


def _difference(
    name: str, results: dict[str, dict], confidence: float
) -> dict[str, Any] | None:
    """Returns the difference to `real`, else to `real` with the same augmentation."""
    reference = "real" if "real" in results else "real" + _augmentation_suffix(name)
    if reference == name or reference not in results:
        return None
    difference = statistics.paired_difference(
        _accuracies(results[name]), _accuracies(results[reference]), confidence
    )
    return {"against": reference, **difference}


def _augmentation_suffix(name: str) -> str:
    """Returns "+affine" of the run "combined:unmixed+affine"."""
    return name[len(name.split("+")[0]) :]


def _answers(results: dict[str, dict], confidence: float) -> list[dict[str, Any]]:
    """Answers the questions whose runs exist, without augmentation first."""
    suffixes = dict.fromkeys(map(_augmentation_suffix, results))
    answers = []
    for suffix in sorted(suffixes, key=bool):
        for question, run_, reference in QUESTIONS:
            ours, theirs = run_ + suffix, reference + suffix
            if ours not in results or theirs not in results:
                continue
            if suffix and reference == "real":
                question = _WITH_AUGMENTATION.format(suffix[1:])
            difference = statistics.paired_difference(
                _accuracies(results[ours]), _accuracies(results[theirs]), confidence
            )
            answers.append(
                {
                    "question": question,
                    "run": ours,
                    "against": theirs,
                    **difference,
                    **_verdict(difference, confidence),
                }
            )
    return answers


def _verdict(difference: dict[str, Any], confidence: float) -> dict[str, str]:
    points = f"{100 * difference['mean']:+.1f} points"
    if difference["low"] is None:
        return {"verdict": "unclear", "sentence": f"Unclear: {points}, one seed only."}
    interval = (
        f"{points} ({confidence:.0%} interval {100 * difference['low']:+.1f} to "
        f"{100 * difference['high']:+.1f})"
    )
    if difference["low"] > 0:
        return {"verdict": "yes", "sentence": f"Yes: {interval}."}
    if difference["high"] < 0:
        return {"verdict": "no", "sentence": f"No, accuracy is lower: {interval}."}
    return {"verdict": "unclear", "sentence": f"No evidence either way: {interval}."}


def _describe_sets(
    generate: epath.Path, names: list[str], train: splits.Split, **fit: str
) -> dict[str, dict[str, float | int]]:
    """Describes the training images and each synthetic set in numbers.

    Args:
      generate: the stage's folder.
      names: of the sets.
      train: the training images.
      **fit: `resize` and `resample` of `decode.fit`.
    """
    size = train.images.shape[1]
    real = distances.pixels(train.images, size)
    described = {"real": _describe(real, train.labels)}
    among = distances.nearest(real, real, skip_self=True)
    copy_distance = distances.copy_distance(among.different)
    if len(real) > 1:
        described["real"]["nearest_real"] = float(among.distance.mean())
    for name in names:
        labels: list[int] = []
        rows = synthetic.read_rows(generate / name, ("image", "label"))
        points = distances.pixels(_images(rows, labels, size, **fit), size)
        nearest = distances.nearest(points, real).distance
        constant = points.levels.max(1) == points.levels.min(1)
        described[name] = {
            **_describe(points, np.asarray(labels, np.int32)),
            "constant": int(constant.sum()),
            "nearest_real": float(nearest.mean()),
            "copies": int((nearest < copy_distance).sum()),
        }
    return described


def _images(
    rows: Iterable[dict[str, Any]], labels: list[int], size: int, **fit: str
) -> Iterator[np.ndarray]:
    """Yields one image after another at one size, and appends its label.

    Not `synthetic.read_images`: 200,000 images of 256 pixels are 39 GB.
    """
    for row in rows:
        labels.append(row["label"])
        yield decode.fit(row["image"], size, **fit)


def _describe(
    points: distances.Points, labels: Int[np.ndarray, " N"]
) -> dict[str, float | int]:
    """Returns the count, and the mean distance of two images of the same class."""
    members = [points[labels == label] for label in np.unique(labels)]
    within = [distances.mean_pairwise(mine) for mine in members if len(mine) > 1]
    diversity = float(np.mean(within)) if within else 0.0
    return {"images": len(points), "diversity": diversity}


def _filters(
    generate: epath.Path, names: list[str], artifacts: dict[str, Any]
) -> dict[str, Any]:
    """Counts what the filters removed from each set; {} if they were off.

    `artifacts` are those of the stage's manifest: the file may be left from a run with
    other settings.
    """
    if removed.FACTS not in artifacts:
        return {}
    counts = {name: removed.count(removed.read(generate / name)) for name in names}
    return {"facts": files.read_json(generate / removed.FACTS), "sets": counts}


def _notes(seeds: int, caption: epath.Path) -> list[str]:
    """Returns caveats about the data and the numbers, as sentences."""
    rows = files.read_jsonl(caption / "duplicates.jsonl")
    copies = sum("pool" not in row for row in rows)
    pool = len(rows) - copies
    kept = files.read_json(caption / "dataset.json")["duplicates"] == "keep"
    bad = len(files.read_jsonl(caption / "bad_images.jsonl"))
    notes = []
    if copies and kept:
        notes.append(
            f"{copies} training images are in test as well: every accuracy is too high "
            "(config.data.duplicates=remove takes them out of train)."
        )
    elif copies:
        notes.append(f"{copies} images that are also in test were removed from train.")
    if pool and kept:
        notes.append(
            f"{pool} images of the base model's pool are in test as well: it has seen "
            "them (config.data.duplicates=remove takes them out of the pool)."
        )
    if bad:
        notes.append(f"{bad} images could not be used and were left out.")
    spread = f"The spread is over {seeds} classifier seeds"
    if seeds == 1:
        spread = "With one classifier seed there is no spread; the result is based"
    return [
        *notes,
        f"{spread} on one split and one generator; another split (--config.seed) "
        "changes every row.",
        "Distances are root mean squared pixel differences of images in [0, 1], at no "
        f"more than {distances.MAX_SIZE} pixels. A copy is nearer to a training image "
        "than any two different training images are to each other.",
    ]


def table(metrics: dict[str, Any]) -> str:
    """Formats the accuracies and the answers for a terminal."""
    rows, seeds = metrics["runs"], metrics["seeds"]
    width = max(len(row["title"]) for row in rows)
    maximum = metrics["steps"]
    minimum = metrics.get("least_steps", maximum)  # older workdirs have none
    steps = f"{maximum} optimiser steps each"
    if minimum < maximum:
        steps = f"{minimum} to {maximum} optimiser steps (early stopping)"
    spread = f"mean and standard deviation over {seeds} seeds"
    references = {(row["difference"] or {}).get("against", "real") for row in rows}
    show_reference = references != {"real"}
    reference = "the run named" if show_reference else "real only"
    return "\n".join(
        [
            f"\ntest accuracy, %: {spread if seeds > 1 else 'one seed'}, {steps}",
            f"{'':{width}}  accuracy       against {reference}",
            *(_table_row(row, width, seeds, show_reference) for row in rows),
            *(
                f"{each['question']} {each['sentence']}"
                for each in metrics["questions"]
            ),
        ]
    )


def _table_row(
    row: dict[str, Any], width: int, seeds: int, show_reference: bool
) -> str:
    accuracy, difference = row["accuracy"], row["difference"]
    spread = f" ± {100 * accuracy['std']:3.1f}" if seeds > 1 else ""
    line = f"{row['title']:{width}}  {100 * accuracy['mean']:5.1f}{spread:6}"
    if difference:
        line += f"    {100 * difference['mean']:+5.1f}"
        if difference["low"] is not None:
            line += (
                f"  [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
            )
        if show_reference:
            line += f"  {difference['against']}"
    return line.rstrip()
