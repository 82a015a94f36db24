"""All results -> metrics: accuracies, paired differences, properties of the images.

Reads: `classify/results/`, `generate/`, the training images. Writes: `metrics.json`.

Of many processes each computes some of the features and measures some of the sets; the
first puts the numbers together.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mvc_jax import files, processes
from mvc_jax.data import captions, decode, splits
from mvc_jax.metrics import (
    caveats,
    compare,
    distances,
    image_features,
    set_metrics,
    statistics,
)
from mvc_jax.screening import removed, settings
from mvc_jax.stage import Spec, Stage, open_stage, read_manifest
from mvc_jax.training.console import Progress
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    from mvc_jax.checkpoints import diffusers_layout
    from mvc_jax.classification import comparisons, runs
    from mvc_jax.generation import synthetic
    from mvc_jax.metrics import feature_spaces, inception

_FEATURES = "features"  # folder, deleted at the end
_ROW_BYTES = 4096  # of an image's features, as of 1,024 dims


def check(config: ConfigDict) -> None:
    """Checks the files of the feature space; starts no JAX backend.

    Raises:
      UserError: they are missing, or of another network.
    """
    section = config.evaluate
    if section.features == "pixels":
        return
    weights = _weights(config)
    if section.features == "clip" and not weights:
        made = not config.base.path and config.pretrain.image_encoder.steps > 0
        if made or (
            config.base.path and settings.may_have_image_encoder(config.base.path)
        ):
            return
    feature_spaces.check(section.features, weights)


def _weights(config: ConfigDict) -> str:
    """The weights that the config names for the feature space; "": none."""
    section = config.evaluate
    clip = config.generate.clip if section.features == "clip" else ""
    return section.weights or clip


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to describe: every image is compared with every other.

    That of two sets with each other is counted once, and of a set with itself half.
    """
    counts = [sizes.test, *[sizes.recipes] * len(config.generate.sets)]
    pairs = sum(n * n // 2 + n * sizes.images for n in counts) + sizes.images**2 // 2
    side = min(config.data.size, distances.MAX_SIZE)
    return Work(
        {
            "runs": len(config.classify.runs),
            "images": sum(counts[1:]),
            "pairs of images": pairs,
        },
        unit="pairs of images",
        speed={
            "size": config.data.size,
            "features": config.evaluate.features,
            "metrics": sorted(config.evaluate.metrics),
        },
        on_devices=config.evaluate.features != "pixels",
        disk={"features": (sum(counts) + sizes.images) * (3 * side**2 + _ROW_BYTES)},
        leaves=0,
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the metrics depend on."""
    section = config.evaluate.to_dict()
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "evaluate": {k: v for k, v in section.items() if k != "batch_size"},
    }
    made = ("metrics.json", "nearest/*")
    return Spec("evaluate", settings, inputs=("classify",), restores=made)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes every number that the report shows."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if not stage.complete:
        names = _set_names(workdir) if config.generate.sets else []
        measured, tables = _measure_sets(config, workdir, stage, names)

        def write() -> int:
            metrics = _metrics(config, workdir, measured, names)
            files.write_json(stage.folder / "metrics.json", metrics)
            return len(metrics["runs"])

        runs_ = processes.on_first("the metrics", write)
        stage.finish(["metrics.json", *tables], runs=runs_)
    processes.on_first("the features", lambda: _remove_features(stage))


def _set_names(workdir: epath.Path) -> list[str]:
    """The sets that `generate` made."""
    return read_manifest(workdir, "generate")["settings"]["generate"]["sets"]


def _metrics(
    config: ConfigDict,
    workdir: epath.Path,
    measured: dict[str, Any],
    set_names: list[str],
) -> dict[str, Any]:
    """All metrics, of which `measured` are those of the sets."""
    classify = read_manifest(workdir, "classify")["settings"]["classify"]
    results = _read_results(workdir / "classify" / "results", classify["runs"])
    test = splits.read_split(workdir / "caption", "test")
    split_ids = files.read_json(workdir / "caption" / "splits.json")
    confidence = config.evaluate.confidence
    filtered, recipes = {}, {}
    if set_names:
        artifacts = read_manifest(workdir, "generate")["artifacts"]
        filtered = _filters(workdir / "generate", set_names, artifacts)
        recipes = read_manifest(workdir, "mix")["counts"]
    correct = {
        name: _predictions(result) == test.labels for name, result in results.items()
    }
    answers = comparisons.answers(correct, confidence)
    _add_accuracy_scores(measured["images"]["sets"], results)
    return {
        "class_names": list(test.class_names),
        "counts": {name: len(ids) for name, ids in split_ids.items()},
        "seeds": classify["seeds"],
        **_steps(results),
        "batch_size": classify["batch_size"],
        "confidence": confidence,
        "runs": [
            _row(name, result, test.labels, len(test.class_names))
            | comparisons.against_reference(
                name, correct, test.labels, len(test.class_names), confidence
            )
            for name, result in results.items()
        ],
        "headline": comparisons.headline(
            {name: float(each.mean()) for name, each in correct.items()}, answers
        ),
        "questions": _with_remarks(answers, _of_mixing(recipes, measured)),
        **measured,
        "filters": filtered,
        **caveats.describe(
            workdir, classify["seeds"], runs.drawn_once(map(runs.parse, results))
        ),
    }


def _remove_features(stage: Stage) -> None:
    """Removes what only an unfinished stage needs."""
    if (stage.folder / _FEATURES).exists():
        (stage.folder / _FEATURES).rmtree()


def _add_accuracy_scores(sets: dict[str, Any], results: dict[str, dict]) -> None:
    """Adds the accuracy of classifiers trained on a set alone, where there are any.

    The classification accuracy score: Ravuri & Vinyals, arXiv 1905.10887.
    """
    for result in results.values():
        plain = result["policy"] == "none" and not result.get("mix")
        if result["regime"] == "synthetic_only" and plain and result["set"] in sets:
            score = float(_accuracies(result).mean())
            sets[result["set"]]["classification_accuracy_score"] = score


def _read_results(folder: epath.Path, names: list[str]) -> dict[str, dict]:
    """Reads the results of the runs `names`, in this order."""
    slugs = {name: runs.parse(name).slug for name in names}
    return {name: files.read_json(folder / f"{slugs[name]}.json") for name in names}


def _accuracies(result: dict) -> Float[np.ndarray, " S"]:
    return np.asarray([seed["accuracy"] for seed in result["seeds"]])


def _predictions(result: dict) -> Int[np.ndarray, "S T"]:
    return np.asarray([seed["predictions"] for seed in result["seeds"]])


def _steps(results: dict[str, dict]) -> dict[str, int]:
    """Returns the maximum and minimum number of optimiser steps over all fits."""
    steps = [seed["steps"] for result in results.values() for seed in result["seeds"]]
    return {"steps": max(steps), "least_steps": min(steps)}


def _row(
    name: str, result: dict, labels: Int[np.ndarray, " T"], classes: int
) -> dict[str, Any]:
    """Returns the metrics of one run."""
    accuracies, predictions = _accuracies(result), _predictions(result)
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
        "confusion_counts": _counts(confusion),
        "calibration_error": _calibration_error(result, predictions == labels),
        "real_seen": real_seen,
        "synthetic_seen": synthetic_seen,
        "synthetic_per_real": synthetic_seen / real_seen if real_seen else None,
    }


def _counts(confusion: Int[np.ndarray, "K K"]) -> list[dict[str, int]]:
    """Predicted class -> count, of each class, without zeros: most of 1,000 x 1,000."""
    rows = ((row, np.flatnonzero(row).tolist()) for row in confusion)
    return [{str(k): int(row[k]) for k in found} for row, found in rows]


def _calibration_error(result: dict, correct: Bool[np.ndarray, "S T"]) -> float:
    """Returns the mean over seeds."""
    errors = [
        statistics.calibration_error(np.asarray(seed["confidences"]), mine)
        for seed, mine in zip(result["seeds"], correct, strict=True)
    ]
    return float(np.mean(errors))


def _with_remarks(
    answers: list[dict[str, Any]], remarks: Sequence[str]
) -> list[dict[str, Any]]:
    """Adds sentences where mixing is compared with none."""
    return [
        {**each, "sentence": " ".join([each["sentence"], *remarks])}
        if runs.parse(each["against"]).set == "unmixed"
        else each
        for each in answers
    ]


def _of_mixing(recipes: dict[str, int], measured: dict[str, Any]) -> list[str]:
    """What mixing changes: in how many recipes, and how far it moves an image.

    Args:
      recipes: counts of the stage `mix`.
      measured: of the sets.
    """
    found = []
    if unchanged := recipes.get("unchanged", 0):  # not counted by older versions
        found.append(
            f"{unchanged} of the {recipes['recipes']} recipes change nothing: these "
            "images are the same in both sets."
        )
    distance = measured["images"]["sets"].get("mixed", {}).get("unmixed_distance")
    if distance is not None:
        apart = measured["sets"]["mixed"]["diversity"]
        found.append(
            f"Mixing changes an image by {distance:.3f} of the pixels' range on "
            f"average; two images of a class are {apart:.3f} apart."
        )
    return found


def _measure_sets(
    config: ConfigDict, workdir: epath.Path, stage: Stage, names: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Describes the training images and each synthetic set in numbers.

    Args:
      config: of the run.
      workdir: of the run.
      stage: the opened stage.
      names: of the sets.

    Returns:
      the parts `sets` and `images` of the metrics, {} in processes but the first; the
      files written, relative to the stage's folder.
    """
    section, space = config.evaluate, None
    if section.features == "pixels":
        logging.info(
            "evaluate: sets are compared by their pixels, which needs no model; "
            "--help=evaluate lists others"
        )
    else:
        weights = _weights(config)
        if section.features == "clip":
            weights = weights or diffusers_layout.resolved_base(workdir)
        space = feature_spaces.load(section.features, weights, batch=section.batch_size)
    sets = [_real_set(workdir, name) for name in ("train", "test")]
    rows = {id_: i for i, id_ in enumerate(sets[0].names)}
    fit = {name: config.data[name] for name in ("size", "resize", "resample")}
    sets += [_synthetic_set(workdir / "generate" / x, rows, **fit) for x in names]
    total = sum(map(len, sets))
    reading = Progress("evaluate: images", total, unit="image", shared=True)
    found = image_features.extract(
        sets,
        stage.folder / _FEATURES,
        size=config.data.size,
        embed=space and space.embed,
        advance=reading.advance,
    )
    reading.close()
    options = _options(config, splits.class_names(workdir / "caption"), space)
    sizes = [len(images) for images in sets]
    cost = set_metrics.cost(found[0].features, sizes[1:])
    logging.info("evaluate: nearest neighbours among %s", cost)
    blocks = compare.blocks_of(sizes[0], sizes[1:])
    comparing = Progress("evaluate: distances", blocks, unit="block", shared=True)
    measured = set_metrics.SetMetrics(
        found[0], found[1], options, stage.folder, stage.digests, comparing.advance
    )
    described = measured.describe(found[2:])
    comparing.close()
    if not described:
        return {}, measured.written
    about = {"features": section.features, "weights": section.weights}
    if section.features == "inception":
        about["fid"] = space.published  # whether the Fréchet distance is the FID
    described["images"] = {**about, **described["images"]}
    return described, measured.written


def _options(
    config: ConfigDict,
    class_names: Sequence[str],
    space: feature_spaces.FeatureSpace | inception.Inception | None,
) -> set_metrics.Options:
    """What to compute: CMMD and texts where the space is CLIP's."""
    chosen = {*config.evaluate.metrics}
    if config.evaluate.features != "clip":
        chosen -= {"cmmd", "text"}
    options = set_metrics.Options(
        chosen,
        config.evaluate.neighbours,
        class_names,
        confidence=config.evaluate.confidence,
    )
    if space is None or space.text is None or "text" not in chosen:
        return options
    texts = captions.class_texts(class_names, config.data.class_type)
    return dataclasses.replace(
        options, class_texts=space.text.embed(texts), embed_texts=space.text.embed
    )


def _real_set(workdir: epath.Path, name: str) -> image_features.ImageSet:
    split = splits.read_split(workdir / "caption", name)
    prompts: dict[str, str] = {}
    listed = workdir / "encode" / "prompts.jsonl"
    if name == "train" and listed.exists():
        rows = files.read_jsonl(listed)
        prompts = {row["id"]: row["prompt"] for row in rows}
    known = all(id_ in prompts for id_ in split.ids)
    return image_features.ImageSet(
        name,
        split.labels,
        lambda start: (np.asarray(image) for image in split.images[start:]),
        prompts=[prompts[id_] for id_ in split.ids] if known else (),
        names=split.ids,
    )


def _synthetic_set(
    folder: epath.Path, rows: dict[str, int], *, size: int, **fit: str
) -> image_features.ImageSet:
    """A set that `generate` made; `rows` are those of the training images by id."""
    labels, sources, prompts, indices = [], [], [], []
    for row in synthetic.read_rows(folder, ("index", "label", "source", "prompt")):
        labels.append(row["label"])
        sources.append(rows.get(row["source"], -1))
        prompts.append(sys.intern(row["prompt"] or ""))  # many are the same
        indices.append(row["index"])

    def images(start: int) -> Iterator[np.ndarray]:
        for row in synthetic.read_rows(folder, ("image",), start=start):
            yield decode.fit(row["image"], size, **fit)

    return image_features.ImageSet(
        folder.name,
        np.asarray(labels, np.int32),
        images,
        np.asarray(sources, np.int64),
        prompts,
        indices,
    )


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
                for each in [*metrics.get("headline", ()), *metrics["questions"]]
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
