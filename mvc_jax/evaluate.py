"""All results -> metrics: accuracies, paired differences, what the images are like.

Reads: `classify/results/`, `generate/`, the training images. Writes: `metrics.json`.
"""

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.classification import runs
from mvc_jax.data import splits
from mvc_jax.errors import require
from mvc_jax.generation import synthetic
from mvc_jax.screening import distances, removed
from mvc_jax.stage import open_stage, read_manifest

_BINS = 15  # of confidence, as in Guo et al.

# Asked of every table: does `run` beat `against`?
# They are asked for each way to bend images that both runs have.
QUESTIONS = (
    ("Do the synthetic images help over real images alone?", "combined", "real"),
    ("Does mixing captions help over unmixed ones?", "combined", "combined:unmixed"),
    (
        "Does fine-tuning help over the base model as it is?",
        "combined",
        "combined:pretrained",
    ),
)
_ON_TOP = "Do they help on top of augmentation, {}?"


def check(config: ConfigDict) -> None:
    """Checks the section `evaluate`."""
    require(
        0 < config.evaluate.confidence < 1,
        "config.evaluate.confidence",
        wanted="a number between 0 and 1",
        got=config.evaluate.confidence,
        fix="0.95 is usual.",
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes every number that the report shows."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings["evaluate"] = config.evaluate.to_dict()
    stage = open_stage(workdir, "evaluate", settings, inputs=("classify",))
    if stage.complete:
        return
    made = read_manifest(workdir, "classify")["settings"]["classify"]
    folder = workdir / "classify" / "results"
    found = {
        result["name"]: result for result in map(files.read_json, folder.glob("*.json"))
    }
    results = {name: found[name] for name in made["runs"]}
    caption = workdir / "caption"
    test, train = (splits.read_split(caption, name) for name in ("test", "train"))
    confidence = config.evaluate.confidence
    metrics = {
        "class_names": list(test.class_names),
        "counts": {
            k: len(v) for k, v in files.read_json(caption / "splits.json").items()
        },
        "seeds": made["seeds"],
        **_steps(results),
        "batch_size": made["batch_size"],
        "confidence": confidence,
        "runs": [_row(r, results, test.labels, confidence) for r in results.values()],
        "questions": _questions(results, confidence),
        "sets": _sets(
            workdir / "generate",
            train,
            resize=config.data.resize,
            resample=config.data.resample,
        ),
        "filters": _filters(workdir / "generate"),
        "notes": _notes(made["seeds"], caption),
    }
    files.write_json(stage.folder / "metrics.json", metrics)
    stage.finish(["metrics.json"], runs=len(results))


def accuracies(result: dict) -> Float[np.ndarray, " seeds"]:
    return np.asarray([seed["accuracy"] for seed in result["seeds"]])


def _steps(results: dict) -> dict[str, int]:
    """Optimiser steps taken, most and least: `epochs` and `patience` have a say."""
    taken = [seed["steps"] for result in results.values() for seed in result["seeds"]]
    return {"steps": max(taken), "least_steps": min(taken)}


def paired_difference(
    ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"], confidence: float
) -> dict[str, float | None]:
    """Mean of `ours - theirs` over seeds, with Student's t interval.

    Seed i of both started from the same initialisation. With one seed there is no
    interval: `low` and `high` are None.
    """
    from scipy import stats  # takes a second, and a finished stage needs none

    difference = ours - theirs
    mean, count = float(difference.mean()), len(difference)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(
        stats.t.ppf(0.5 + confidence / 2, count - 1)
        * difference.std(ddof=1)
        / np.sqrt(count)
    )
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _row(result: dict, results: dict, labels: np.ndarray, confidence: float) -> dict:
    values = accuracies(result)
    predictions = np.asarray([seed["predictions"] for seed in result["seeds"]])
    right = predictions == labels
    row = {key: result[key] for key in ("name", "regime", "policy", "set")}
    row["title"] = runs.parse(result["name"]).title
    row["accuracy"] = {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "per_seed": values.tolist(),
    }
    row["per_class"] = [
        float(right[:, labels == k].mean()) for k in range(labels.max() + 1)
    ]
    row["confusion"] = confusion(labels, predictions).tolist()
    errors = [
        calibration_error(np.asarray(seed["confidences"]), correct)
        for seed, correct in zip(result["seeds"], right, strict=True)
    ]
    row["calibration_error"] = float(np.mean(errors))
    seen = result["real_seen"], result["synthetic_seen"]
    row |= {"real_seen": seen[0], "synthetic_seen": seen[1]}
    row["synthetic_per_real"] = seen[1] / seen[0] if seen[0] else None
    row["difference"] = _difference(result["name"], results, confidence)
    return row


def _difference(name: str, results: dict, confidence: float) -> dict | None:
    """Against `real`; where there is none, against `real` bent as this run is."""
    against = "real" if "real" in results else "real" + _bend(name)
    if against == name or against not in results:
        return None
    pair = accuracies(results[name]), accuracies(results[against])
    return {"against": against} | paired_difference(*pair, confidence)


def _bend(name: str) -> str:
    """What bends the images of a run: "+affine" of "combined:unmixed+affine"."""
    return name[len(name.split("+")[0]) :]


def confusion(
    labels: Int[np.ndarray, " T"], predictions: Int[np.ndarray, "seeds T"]
) -> Int[np.ndarray, "K K"]:
    """How often images of class i (row) were taken for j (column), over all seeds."""
    classes = int(max(labels.max(), predictions.max())) + 1
    pairs = labels * classes + predictions
    counts = np.bincount(pairs.ravel(), minlength=classes**2)
    return counts.reshape(classes, classes)


def calibration_error(
    confidences: Float[np.ndarray, " T"], correct: Bool[np.ndarray, " T"]
) -> float:
    """Expected calibration error: Guo et al., arXiv 1706.04599, equation 3.

    The mean distance between confidence and accuracy in 15 bins of equal width, weighed
    by the images in them.
    """
    edges = np.linspace(0, 1, _BINS + 1)[1:-1]
    bins = np.digitize(confidences, edges, right=True)
    gaps = np.bincount(bins, weights=confidences - correct, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(correct))


def _questions(results: dict, confidence: float) -> list[dict]:
    bends = dict.fromkeys(map(_bend, results))
    asked = [
        (
            _ON_TOP.format(bend[1:]) if bend and against == "real" else question,
            run_ + bend,
            against + bend,
        )
        for bend in sorted(bends, key=bool)
        for question, run_, against in QUESTIONS
    ]
    answers = []
    for question, run_, against in asked:
        if run_ in results and against in results:
            pair = accuracies(results[run_]), accuracies(results[against])
            difference = paired_difference(*pair, confidence)
            answer = {"question": question, "run": run_, "against": against}
            answers.append(answer | difference | _verdict(difference, confidence))
    return answers


def _verdict(difference: dict, confidence: float) -> dict[str, str]:
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


def _sets(
    folder: epath.Path, train: splits.Split, **fit: str
) -> dict[str, dict[str, float | int]]:
    """Each set, and the training images themselves, in numbers."""
    size = train.images.shape[1]
    real = distances.pixels(train.images, size)
    described = {"real": _describe(real, train.labels)}
    among = distances.nearest(real, real, skip_self=True)
    # Nearer to a training image than any two different ones are to each other: a copy.
    copy_distance = distances.copy_distance(among.different)
    if len(real) > 1:
        described["real"]["nearest_real"] = float(among.distance.mean())
    names = read_manifest(folder.parent, "generate")["settings"]["generate"]
    for name in names["sets"]:
        images, labels, _ = synthetic.read_images(folder / name, size, **fit)
        drawn = distances.pixels(images, size)
        nearest = distances.nearest(drawn, real).distance
        flat = drawn.levels.max(1) == drawn.levels.min(1)
        described[name] = _describe(drawn, labels) | {
            "constant": int(flat.sum()),
            "nearest_real": float(nearest.mean()),
            "copies": int((nearest < copy_distance).sum()),
        }
    return described


def _filters(folder: epath.Path) -> dict[str, dict]:
    """What the filters removed of each set; {} where there were none."""
    made = read_manifest(folder.parent, "generate")
    if removed.FACTS not in made["artifacts"]:
        return {}
    names = made["settings"]["generate"]["sets"]
    counts = {name: removed.count(removed.read(folder / name)) for name in names}
    return {"facts": files.read_json(folder / removed.FACTS), "sets": counts}


def _describe(points: distances.Points, labels: np.ndarray) -> dict[str, float | int]:
    """Count, and diversity: mean distance of two different images of a class."""
    members = [points[labels == label] for label in np.unique(labels)]
    within = [distances.mean_pairwise(some) for some in members if len(some) > 1]
    diversity = float(np.mean(within)) if within else 0.0
    return {"images": len(points), "diversity": diversity}


def _notes(seeds: int, caption: epath.Path) -> list[str]:
    copies = len(files.read_jsonl(caption / "duplicates.jsonl"))
    kept = files.read_json(caption / "dataset.json")["duplicates"] == "keep"
    bad = len(files.read_jsonl(caption / "bad_images.jsonl"))
    notes = []
    if copies and kept:
        notes.append(
            f"{copies} training images are in test as well: every accuracy is too high "
            "(config.data.duplicates=remove takes them out of train)."
        )
    elif copies:
        notes.append(f"{copies} images that test has as well were taken out of train.")
    if bad:
        notes.append(f"{bad} images could not be used and were left out.")
    spread = f"The spread is over {seeds} classifier seeds"
    if seeds == 1:
        spread = "No spread is known of one classifier seed"
    return [
        *notes,
        f"{spread} on one split and one generator; "
        "another split (--config.seed) moves every row.",
        "Distances are root mean squared pixel differences of images in [0, 1], at no "
        f"more than {distances.MAX_SIZE} pixels. A copy "
        "is nearer to a training image than any two training images are to each other.",
    ]


def table(metrics: dict) -> str:
    """The accuracy table and the answers, as lines for a terminal."""
    width = max(len(row["title"]) for row in metrics["runs"])
    most = metrics["steps"]
    least = metrics.get("least_steps", most)  # older folders have none
    steps = f"{most} optimiser steps each"
    if least < most:
        steps = f"{least} to {most} optimiser steps, as validation ended them"
    differences = [row["difference"] or {} for row in metrics["runs"]]
    named = {each.get("against", "real") for each in differences} != {"real"}
    seeds = metrics["seeds"]
    told = (
        f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    )
    lines = [
        f"\ntest accuracy, %: {told}, {steps}",
        f"{'':{width}}  accuracy       "
        f"against {'the run named' if named else 'real only'}",
    ]
    for row in metrics["runs"]:
        accuracy = row["accuracy"]
        line = f"{row['title']:{width}}  "
        spread = f" ± {100 * accuracy['std']:3.1f}" if seeds > 1 else ""
        line += f"{100 * accuracy['mean']:5.1f}{spread:6}"
        difference = row["difference"]
        if difference:
            line += f"    {100 * difference['mean']:+5.1f}"
            if difference["low"] is not None:
                low, high = 100 * difference["low"], 100 * difference["high"]
                line += f"  [{low:+.1f}, {high:+.1f}]"
            if named:
                line += f"  {difference['against']}"
        lines.append(line.rstrip())
    for answer in metrics["questions"]:
        lines.append(f"{answer['question']} {answer['sentence']}")
    return "\n".join(lines)
