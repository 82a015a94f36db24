"""Real, synthetic -> classifiers, one per run and seed, at equal optimiser steps.

Reads: the training and test images, the sets of `generate/`. Writes:
`results/<run>.json`, predictions on test, made once at the end of each fit;
`models/<run>/seed-<i>/`, the classifiers as timm stores its own; `fits/`, their
checkpoints; and `pixels/`, the images at the size that the classifiers see.

`runs.py` says how a run is named, `trainer.py` trains it.
"""

import dataclasses
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import augment, files
from mvc_jax.checkpoints import (
    classifier_checkpoint,
    classifier_export,
    classifier_weights,
    hub,
)
from mvc_jax.classification import classifier, training_set
from mvc_jax.classification.fits import Plan, Trainer
from mvc_jax.classification.runs import Run, parse
from mvc_jax.errors import require, require_one_of, require_within
from mvc_jax.models import classifiers
from mvc_jax.stage import open_stage
from mvc_jax.training import optim, sharding

_CHOICES = {
    "model": tuple(classifiers.VARIANTS),
    "stem": ("", "cifar", "imagenet"),
    "optimizer": optim.OPTIMIZERS,
    "schedule": optim.SCHEDULES,
    "class_weights": ("none", "balanced"),
    "dtype": ("auto", "float32", "bfloat16"),
}
_COUNTS = ("seeds", "steps", "batch_size", "stem_stride", "log_every")
_SWITCHES = ("epochs", "warmup", "patience", "validate_every", "checkpoint_minutes")
_SWITCHES += ("ratio", "images_gib", "memory_gib", "seeds_at_once", "steps_at_once")
_SWITCHES += ("width",)
_SHARES = ("probability", "phase_two", "gamma", "phase_two_rate", "label_smoothing")
_RANGES = {
    **dict.fromkeys(_COUNTS, (1, 1e9, "configs/common.py has values that work.")),
    **dict.fromkeys(_SWITCHES, (0, 1e9, "0 switches it off.")),
    **dict.fromkeys(_SHARES, (0, 1, "It is a share; the paper's probability is 0.8.")),
    "learning_rate": (1e-12, 1e3, "Adam's usual one is 0.001."),
    "weight_decay": (0, 1, "0.0005 is usual with SGD."),
    "momentum": (0, 1 - 1e-9, "0.9 is usual."),
    "ema_decay": (0, 1 - 1e-9, "0.999 is usual; 0 keeps no average."),
    "validation": (0, 0.9, "0.1 to 0.2 are usual; 0 holds nothing out."),
    "alpha": (1e-3, 1e3, "1 is CutMix's, and MixUp's for CIFAR."),
    "randaugment_count": (1, 14, "The paper has 2."),
    "randaugment_magnitude": (0, 30, "9 is usual."),
}
# They change what is kept, what is shown or how fast it goes, but not what is computed.
_NO_RESULT = ("log_every", "checkpoint_minutes", "images_gib", "memory_gib")
_NO_RESULT += ("steps_at_once",)


def check(config: ConfigDict) -> None:
    """Checks the section `classify`."""
    section = config.classify
    fields = section.to_dict()
    runs = [parse(name) for name in section.runs]
    _check_runs(runs, tuple(section.runs), tuple(config.generate.sets))
    require_one_of("config.classify", fields, _CHOICES)
    require_within("config.classify", fields, _RANGES)
    milestones = tuple(section.milestones)
    require(
        list(milestones) == sorted({m for m in milestones if 0 < m < 1}),
        "config.classify.milestones",
        wanted="shares of the steps in (0, 1), ascending",
        got=milestones,
        fix="Write e.g. 0.5,0.75.",
    )
    require(
        not section.patience or section.validation > 0,
        "config.classify.patience",
        wanted="0, or images to validate on: config.classify.validation above 0",
        got=section.patience,
        fix="Set config.classify.validation to e.g. 0.1.",
    )
    require(
        not section.patience or 0 < section.validate_every <= section.patience,
        "config.classify.patience",
        wanted="0, or no fewer steps than from one look at the held-out images to the "
        "next, config.classify.validate_every, which then is above 0",
        got=f"patience={section.patience}, validate_every={section.validate_every}",
        fix="Set validate_every to e.g. 50 and patience to a few times that.",
    )
    require(
        section.ratio <= config.mix.per_image,
        "config.classify.ratio",
        wanted=f"at most the {config.mix.per_image} synthetic images a real one of "
        "config.mix.per_image, or 0 for all of them",
        got=section.ratio,
        fix="Lower it, or raise config.mix.per_image.",
    )
    checkpoint = None
    if section.pretrained and hub.is_local(section.pretrained):
        checkpoint = _checkpoint(config)
    elif section.pretrained:
        field = f"config.classify.pretrained {section.pretrained!r}"
        revision = section.pretrained_revision
        hub.check_name(section.pretrained, field=field, revision=revision)
    _check_size(config, _model(fields, 2, checkpoint))
    if checkpoint:
        classifier_weights.check(checkpoint, _model(fields, 2, checkpoint))


def _check_runs(runs: list[Run], names: tuple, sets: tuple) -> None:
    for run_ in runs:
        require(
            not run_.set or run_.set in sets,
            "config.classify.runs",
            wanted=f"a set of config.generate.sets {sets}",
            got=repr(run_.name),
            fix="Add the set there or take the run out.",
        )
    different = {dataclasses.replace(run_, name="") for run_ in runs}
    require(
        len(different) == len(runs) > 0,
        "config.classify.runs",
        wanted="at least one run, each once",
        got=names,
        fix="Mend the list.",
    )


def _check_size(config: ConfigDict, model: Any) -> None:
    section = config.classify
    require(
        0 <= section.size <= config.data.size,
        "config.classify.size",
        wanted=f"at most config.data.size={config.data.size}, or 0 for that",
        got=section.size,
        fix="Lower it.",
    )
    size = section.size or config.data.size
    require(
        size >= model.stride,
        "config.classify.size",
        wanted=f"at least {model.stride} pixels, of which {section.model} makes one",
        got=size,
        fix="Raise it, or choose a network for small images, as wrn28_10 or resnet20.",
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains and tests every run; results that exist are kept."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    section = config.classify.to_dict()
    settings["classify"] = {k: v for k, v in section.items() if k not in _NO_RESULT}
    stage = open_stage(workdir, "classify", settings, inputs=("generate",))
    if stage.complete:
        return
    runs = [parse(name) for name in section["runs"]]
    data = training_set.read(
        workdir,
        stage.folder / "pixels",
        sets=sorted({run_.set for run_ in runs} - {""}),
        size=section["size"] or config.data.size,
        stored={k: config.data[k] for k in ("size", "resize", "resample")},
        ratio=section["ratio"],
        validation=section["validation"],
        seed=config.seed,
    )
    recipe, pretrained = _start(config, data)
    trainer = Trainer(
        Plan(**{field.name: section[field.name] for field in dataclasses.fields(Plan)}),
        recipe,
        data,
        seed=config.seed,
        runs=len(runs),
        mesh=sharding.make_mesh(config.mesh.data, config.mesh.fsdp),
        workdir=workdir,
        folder=stage.folder / "fits",
        policy_fields={run_.policy: _fields(section, run_.policy) for run_ in runs},
        pretrained=pretrained,
    )
    artifacts = []
    for run_ in runs:
        artifacts += _train(trainer, run_, stage.folder, recipe, data, section)
    trainer.progress.close()
    stage.finish(artifacts, runs=len(runs), fits=len(runs) * section["seeds"])


def _train(
    trainer: Trainer,
    run_: Run,
    folder: epath.Path,
    recipe: classifier.Recipe,
    data: training_set.TrainingSet,
    section: dict[str, Any],
) -> list[str]:
    """Trains, tests and exports all seeds of a run; which files it left in `folder`."""
    result = f"results/{run_.slug}.json"
    models = [f"models/{run_.slug}/seed-{seed}" for seed in range(section["seeds"])]
    weights = [f"{model}/{classifier_checkpoint.WEIGHTS}" for model in models]
    if all((folder / name).exists() for name in (result, *weights)):
        trainer.progress.advance(section["seeds"] * trainer.steps)
        return [result, *weights]
    found = []
    for seeds in trainer.groups():
        fit = trainer.fit(run_, seeds)
        for i, probabilities in enumerate(trainer.predict(fit.state, data.test)):
            classifier_export.write(
                folder / models[seeds[i]],
                recipe.model,
                classifier.one_seed(fit.state, i),
                variant=section["model"],
                class_names=data.class_names,
                mean=recipe.mean,
                std=recipe.std,
                size=data.test.shape[1],
            )
            found.append(_result(probabilities, data.test_labels) | fit.facts[i])
    seen = {
        key: round(sum(row[key] for row in found) / len(found))
        for key in ("real_seen", "synthetic_seen")
    }
    files.write_json(
        folder / result, dataclasses.asdict(run_) | seen | {"seeds": found}
    )
    return [result, *weights]


def _result(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What one classifier says of the test images."""
    predicted = probabilities.argmax(-1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "predictions": predicted.tolist(),
        "confidences": probabilities.max(-1).astype(float).round(6).tolist(),
    }


def _start(
    config: ConfigDict, data: training_set.TrainingSet
) -> tuple[classifier.Recipe, dict[str, Any] | None]:
    """The recipe of all runs but for what each bends, and pretrained variables."""
    section, classes = config.classify, len(data.class_names)
    checkpoint = _checkpoint(config) if section.pretrained else None
    model = _model(section.to_dict(), classes, checkpoint)
    weights: tuple[float, ...] = ()
    if section.class_weights == "balanced":
        counts = np.bincount(data.labels[data.pools[""].real], minlength=classes)
        weights = tuple((counts.sum() / (classes * counts)).tolist())
    recipe = classifier.Recipe(
        model,
        alpha=section.alpha,
        label_smoothing=section.label_smoothing,
        class_weights=weights,
        ema_decay=section.ema_decay,
    )
    if checkpoint is None:
        return recipe, None
    variables, left = classifier_weights.read(checkpoint, model)
    logging.info(
        "classify: %s without %s; a new head of %d classes",
        checkpoint.name,
        ", ".join(left) or "nothing left over",
        classes,
    )
    normal = {"mean": tuple(checkpoint.mean), "std": tuple(checkpoint.std)}
    return dataclasses.replace(recipe, **normal), variables


def _checkpoint(config: ConfigDict) -> classifier_checkpoint.Checkpoint:
    return classifier_checkpoint.find(
        config.classify.pretrained,
        field="config.classify.pretrained",
        revision=config.classify.pretrained_revision,
    )


def _model(section: dict[str, Any], classes: int, checkpoint: Any) -> Any:
    """The network that the section asks for; a checkpoint knows some of its fields."""
    fields = dict(checkpoint.fields) if checkpoint else {}
    fields |= {key: section[key] for key in ("width", "stem") if section[key]}
    if section["stem_stride"] > 1:
        fields["stem_stride"] = section["stem_stride"]
    return classifiers.make(
        section["model"], num_classes=classes, dtype=section["dtype"], **fields
    )


def _fields(section: dict[str, Any], policy: str) -> classifier.Fields:
    """Of a policy, what the section has otherwise than the policy."""
    usual = augment.fields(policy)
    fields: dict[str, Any] = {}
    if usual["flip"] and not section["flip"]:
        fields["flip"] = False
    if policy == "randaugment":
        fields["count"] = section["randaugment_count"]
        fields["magnitude"] = section["randaugment_magnitude"]
    return tuple(fields.items())
