"""Real and synthetic images -> classifiers, one per run and seed, at equal steps.

Reads the training and test images and the sets of `generate/`. Writes:
`results/<run>.json`, predictions on the test images, made once at the end of each fit;
`models/<run>/seed-<i>/`, the classifiers in timm's layout; `fits/`, their checkpoints;
and `pixels/`, the images at the classifiers' size.

`classification/runs.py` says how a run is named, `classification/fits.py` trains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import augment, files, processes
from mvc_jax.classification import duration, runs
from mvc_jax.data import splits
from mvc_jax.errors import UserError, require_at_most
from mvc_jax.models import classifiers
from mvc_jax.stage import (
    Part,
    Spec,
    Stage,
    differences,
    is_complete,
    open_stage,
    read_manifest,
    same,
    without,
)
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    from mvc_jax import devices
    from mvc_jax.checkpoints import (
        classifier_card,
        classifier_checkpoint,
        classifier_export,
        classifier_weights,
    )
    from mvc_jax.classification import classifier, fits, training_set
    from mvc_jax.training import sharding

# They change what is kept, what is shown or how fast it runs, but no result.
_NO_RESULT = (
    "log_every",
    "checkpoint_minutes",
    "images_gib",
    "memory_gib",
    "steps_at_once",
)


def check(config: ConfigDict) -> None:
    """Checks the section `classify`; starts no JAX backend.

    Raises:
      UserError: a field has a wrong value, or fields contradict each other.
    """
    section = config.classify
    _check_runs(section.runs, config.generate.sets)
    _check_schedule(section, keeps_validation=config.data.validation == "keep")
    if section.ratio > config.mix.per_image:
        raise UserError(
            "config.classify.ratio",
            wanted="at most the synthetic images per real one that are made, "
            f"config.mix.per_image={config.mix.per_image}, or 0 for all of them",
            got=f"{section.ratio}",
            fix="Lower it, or raise config.mix.per_image.",
        )
    if section.size > config.data.size:
        raise UserError(
            "config.classify.size",
            wanted=f"at most config.data.size={config.data.size}, or 0 for that size",
            got=f"{section.size}",
            fix="Lower it.",
        )
    _check_network(section, section.size or config.data.size)


def check_images(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Checks what depends on the training images, once `caption` has written them."""
    if is_complete(workdir, "caption"):
        train = splits.read_split(epath.Path(workdir) / "caption", "train")
        if len(train.class_names) < 2:  # else nothing heavy is imported
            training_set.require_several(train.class_names)
        duration.check_warmup(config.classify.to_dict(), train.labels)


def _check_runs(names: Sequence[str], sets: Sequence[str]) -> None:
    parsed = [runs.parse(name) for name in names]
    for run_ in parsed:
        if run_.set and run_.set not in sets:
            raise UserError(
                "config.classify.runs",
                wanted=f"a set of config.generate.sets {tuple(sets)}",
                got=repr(run_.name),
                fix="Add the set there, or remove the run.",
            )
        if run_.set == "diff_mix" and run_.regime == "replace_same_class":
            raise UserError(
                "config.classify.runs",
                wanted="a regime that takes soft labels: those of diff_mix are of two "
                "classes, and replace_same_class needs one",
                got=repr(run_.name),
                fix="Use e.g. probabilistic:diff_mix or replace_same_source:diff_mix.",
            )
    different = {dataclasses.replace(run_, name="") for run_ in parsed}
    if len(different) < len(parsed):
        raise UserError(
            "config.classify.runs",
            wanted="no run twice",
            got=f"{tuple(names)}",
            fix="Fix the list.",
        )


def _check_schedule(section: ConfigDict, *, keeps_validation: bool) -> None:
    if not section.epochs:  # else the steps depend on the number of images
        require_at_most("config.classify", section.to_dict(), "warmup", "steps")
    if section.patience and not (section.validation or keeps_validation):
        raise UserError(
            "config.classify.patience",
            wanted="0, or images to validate on: config.classify.validation above 0, "
            "or config.data.validation=keep",
            got=f"{section.patience}",
            fix="Set config.classify.validation to e.g. 0.1.",
        )
    if section.patience and not 0 < section.validate_every <= section.patience:
        raise UserError(
            "config.classify.patience",
            wanted="0, or at least as many steps as between two validations, "
            "config.classify.validate_every, which must then be above 0",
            got=f"patience={section.patience}, validate_every={section.validate_every}",
            fix="Set validate_every to e.g. 50, and patience to a few times that.",
        )


def _check_network(section: ConfigDict, size: int) -> None:
    """Checks the network's own fields, and a pretrained checkpoint last."""
    found, field = "", "config.classify.pretrained"
    if section.pretrained:
        found = classifier_checkpoint.check(
            section.pretrained, field=field, revision=section.pretrained_revision
        )
    if found:
        checkpoint = classifier_checkpoint.find(found, field=field)
        network = _network(section, 2, checkpoint, dtype="float32")
        _check_size(section.model, size, network.stride)
        _check_batch(section, size, network.stride)
        classifier_weights.check_tensors(checkpoint, network)
        return
    options = {key: section[key] for key in ("width", "stem", "stem_stride")}
    classifiers.check_options(section.model, options)
    variant = classifiers.VARIANTS[section.model]
    stride = variant.min_size(section.stem, section.stem_stride)
    _check_size(section.model, size, stride)
    _check_batch(section, size, stride)


def _check_batch(section: ConfigDict, size: int, stride: int) -> None:
    """Refuses batches that batch normalisation makes constant."""
    if section.batch_size > 1 or size > stride:
        return
    raise UserError(
        "config.classify.batch_size",
        wanted=f"2 or more: {section.model} reduces {size} pixels to one, whose mean "
        "and variance over a batch of one image say nothing",
        got=f"{section.batch_size}",
        fix="Raise it.",
    )


def _check_size(model: str, size: int, smallest: int) -> None:
    if size < smallest:
        raise UserError(
            "config.classify.size",
            wanted=f"at least {smallest} pixels, which {model} reduces to one",
            got=f"{size}",
            fix="Raise it, or choose a network for small images, e.g. wrn28_10 or "
            "resnet20.",
        )


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to train; starts no JAX backend."""
    section = config.classify
    side = section.size or config.data.size
    parsed = [runs.parse(name) for name in section.runs]
    steps = duration.steps(
        sum(n - duration.held_out(n, section.validation) for n in sizes.train),
        epochs=section.epochs,
        steps=section.steps,
        batch_size=section.batch_size,
    )
    count = len(parsed) * section.seeds
    network = _network(section, len(sizes.train), None, dtype="float32")
    weights = 4 * classifier.count_parameters(network, (side, side, 3))
    copies = 2 + (section.optimizer == "adam") + (section.ema_decay > 0)
    stored = len({run_.set for run_ in parsed} - {""}) * sizes.recipes
    if side != config.data.size:
        stored += sizes.images + sizes.test
    pixels = stored * 3 * side**2
    # Rows of a batch, which its schedule and its images have.
    rows = section.batch_size * max(
        2 if run_.regime == "probabilistic" else 1 for run_ in parsed
    )
    together = min(section.seeds_at_once or 1, section.seeds)
    speed = ("model", "width", "stem", "stem_stride", "batch_size", "seeds_at_once")
    return Work(
        {"classifiers": count, "steps": count * steps},
        unit="steps",
        speed={
            **{name: section[name] for name in (*speed, "dtype", "optimizer")},
            "augmentations": sorted({f"{run_.policy}+{run_.mix}" for run_ in parsed}),
            "size": side,
            "mesh": config.mesh.to_dict(),
        },
        on_devices=True,
        disk={
            "classifiers": count * weights,
            "checkpoints": count * copies * weights,
            "pixels": pixels,
        },
        asks=copies * weights,
        leaves=count * weights + (0 if section.ratio else pixels),
        host={"the order of the images": together * steps * rows * 8},
        devices={
            "weights, moments and gradients": together * (copies + 1) * weights,
            "a batch in the network": together * rows * 4 * 4 * 3 * side**2,
        },
        lower=(
            "classify.batch_size",
            "classify.steps",
            "classify.epochs",
            "classify.seeds_at_once",
        ),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the classifiers depend on."""
    section = config.classify.to_dict()
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "classify": {k: v for k, v in section.items() if k not in _NO_RESULT},
    }
    made = ("results/*", "models/*")
    inputs = ("generate",) if config.generate.sets else ("caption",)
    return Spec("classify", settings, inputs, restores=made)


def parts(
    config: ConfigDict, workdir: epath.PathLike, other: epath.PathLike
) -> list[Part]:
    """The runs of another workdir that would have the same results.

    Their images and settings are the same, whatever other runs there are.
    """
    theirs = read_manifest(other, "classify")["settings"]
    if not same("caption", workdir, other):
        return []
    ours, found = stage_spec(config).settings, []
    for run_ in map(runs.parse, config.classify.runs):
        if run_.name not in theirs["classify"]["runs"]:
            continue
        unused = {"runs", *runs.unused_fields(run_)}
        settings = [without(each, "classify", unused) for each in (ours, theirs)]
        if differences(*settings):
            continue
        if not run_.set or _same_set(run_.set, workdir, other):
            paths = (f"results/{run_.slug}.json", f"models/{run_.slug}")
            found.append(Part(run_.slug, paths))
    return found


def _same_set(name: str, workdir: epath.PathLike, other: epath.PathLike) -> bool:
    """Whether a synthetic set has the same images, sources and partners."""
    listed = [read_manifest(x, "generate")["artifacts"] for x in (workdir, other)]
    shards = [
        {file: what for file, what in each.items() if file.startswith(f"{name}/data/")}
        for each in listed
    ]
    return shards[0] == shards[1] and bool(shards[0])


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains and tests the classifiers of every run; keeps results that exist."""
    workdir = epath.Path(workdir)
    section = config.classify.to_dict()
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    parsed = [runs.parse(name) for name in config.classify.runs]

    def read() -> training_set.TrainingSet:
        stage.reload_digests()
        return training_set.read(
            workdir,
            stage.folder / "pixels",
            stage.digests,
            sets=sorted({run_.set for run_ in parsed} - {""}),
            size=config.classify.size or config.data.size,
            data_size=config.data.size,
            resize=config.data.resize,
            resample=config.data.resample,
            ratio=config.classify.ratio,
            validation=config.classify.validation,
            seed=config.seed,
        )

    data = processes.first_then_all("the images", read)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    dtype = devices.activations_dtype(config.classify.dtype, mesh)
    spec, pretrained = _spec(config.classify, data, dtype)
    fields = [field.name for field in dataclasses.fields(fits.FitOptions)]
    trainer = fits.Trainer(
        fits.FitOptions(**{name: section[name] for name in fields}),
        spec,
        data,
        seed=config.seed,
        runs=len(parsed),
        mesh=mesh,
        workdir=workdir,
        folder=stage.folder / "fits",
        policy_fields={
            run_.policy: _policy_fields(config.classify, run_.policy) for run_ in parsed
        },
        pretrained=pretrained,
    )
    artifacts = []
    for run_ in parsed:
        artifacts += _train(
            trainer,
            run_,
            stage,
            spec,
            data,
            seeds=config.classify.seeds,
            variant=config.classify.model,
            fit_options={
                "resize": config.data.resize,
                "resample": config.data.resample,
                "data_size": config.data.size,
            },
        )
    trainer.progress.close()
    stage.finish(artifacts, runs=len(parsed), fits=len(parsed) * config.classify.seeds)


def _train(
    trainer: fits.Trainer,
    run_: runs.Run,
    stage: Stage,
    spec: classifier.ClassifierSpec,
    data: training_set.TrainingSet,
    *,
    seeds: int,
    variant: str,
    fit_options: Mapping[str, Any],
) -> list[str]:
    """Trains, tests and exports all seeds of a run; returns its files in the stage.

    Args:
      fit_options: `resize`, `resample` and `data_size` of the images.
    """
    folder = stage.folder
    result = f"results/{run_.slug}.json"
    models = [f"models/{run_.slug}/seed-{seed}" for seed in range(seeds)]
    weights = [f"{model}/{classifier_checkpoint.WEIGHTS}" for model in models]
    written = [folder / name for name in (result, *weights)]
    if processes.on_first(run_.slug, lambda: all(map(stage.digests.intact, written))):
        trainer.progress.advance(seeds * trainer.steps)
        return [result, *weights]
    found = []
    for group in trainer.seed_groups():
        fit = trainer.fit(run_, group)
        trained = zip(
            group,
            classifier.unstack(fit.state),
            trainer.predict(fit.state, data.test),
            fit.facts,
            strict=True,
        )
        for seed, variables, probabilities, facts in trained:
            found.append({**_result(probabilities, data.test_labels), **facts})
            if not processes.is_first():
                continue
            classifier_export.write(
                folder / models[seed],
                spec.model,
                variables,
                variant=variant,
                class_names=data.class_names,
                preprocessing=classifier_card.Preprocessing(
                    **fit_options,
                    size=data.test.shape[1],
                    mean=spec.mean,
                    std=spec.std,
                ),
            )
    seen = {
        key: round(sum(row[key] for row in found) / len(found))
        for key in ("real_seen", "synthetic_seen")
    }
    if processes.is_first():
        files.write_json(
            folder / result, {**dataclasses.asdict(run_), **seen, "seeds": found}
        )
        stage.digests.add(*written)
    return [result, *weights]


def _result(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """One classifier's accuracy and predictions on the test images."""
    predicted = probabilities.argmax(-1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "predictions": predicted.tolist(),
        "confidences": probabilities.max(-1).astype(float).round(6).tolist(),
    }


def _spec(
    section: ConfigDict, data: training_set.TrainingSet, dtype: str
) -> tuple[classifier.ClassifierSpec, dict[str, Any] | None]:
    """The spec of every run, except for its augmentation, and pretrained variables."""
    classes = len(data.class_names)
    checkpoint = _checkpoint(section) if section.pretrained else None
    network = _network(section, classes, checkpoint, dtype=dtype)
    weights: tuple[float, ...] = ()
    if section.class_weights == "balanced":
        counts = np.bincount(data.labels[data.pools[""].real], minlength=classes)
        weights = tuple((counts.sum() / (classes * counts)).tolist())
    spec = classifier.ClassifierSpec(
        network,
        alpha=section.alpha,
        label_smoothing=section.label_smoothing,
        class_weights=weights,
        ema_decay=section.ema_decay,
    )
    if checkpoint is None:
        return spec, None
    variables, unused = classifier_weights.read(checkpoint, network)
    logging.info(
        "classify: read %s; unused tensors: %s; a new head of %d classes",
        checkpoint.name,
        ", ".join(unused) or "none",
        classes,
    )
    mean, std = tuple(checkpoint.mean), tuple(checkpoint.std)
    return dataclasses.replace(spec, mean=mean, std=std), variables


def _checkpoint(section: ConfigDict) -> classifier_checkpoint.Checkpoint:
    return classifier_checkpoint.find(
        section.pretrained,
        field="config.classify.pretrained",
        revision=section.pretrained_revision,
    )


def _network(
    section: ConfigDict,
    classes: int,
    checkpoint: classifier_checkpoint.Checkpoint | None,
    *,
    dtype: str,
) -> Any:
    """Makes the configured network; a checkpoint knows some of its fields."""
    fields = dict(checkpoint.fields) if checkpoint else {}
    for name, default in (("width", 0), ("stem", ""), ("stem_stride", 1)):
        if section[name] != default:
            fields[name] = section[name]
    return classifiers.make(section.model, num_classes=classes, dtype=dtype, **fields)


def _policy_fields(section: ConfigDict, policy: str) -> tuple[tuple[str, Any], ...]:
    """The fields in which the section overrides a policy's defaults."""
    fields: dict[str, Any] = {}
    if augment.fields(policy)["flip"] and not section.flip:
        fields["flip"] = False
    if policy == "randaugment":
        fields["count"] = section.randaugment_count
        fields["magnitude"] = section.randaugment_magnitude
    return tuple(fields.items())
