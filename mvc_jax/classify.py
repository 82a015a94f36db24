"""Real, synthetic -> classifiers, one per run and seed, at equal optimiser steps.

Reads: the training and test images, the sets of `generate/`. Writes:
`results/<run>.json`, predictions on test, made once at the end of each fit;
`models/<run>/seed-<i>/`, the classifiers; `fits/`, their checkpoints; and `pixels/`,
the images at the size that the classifiers see.

A run is named `<regime>[:<set>][+<policy>]`, e.g. `combined:unmixed+affine`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import classifier, files
from mvc_jax.data import manifest, regimes, training_set
from mvc_jax.errors import require, require_one_of, require_within
from mvc_jax.models import resnet
from mvc_jax.training import memory, optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.console import Progress
from mvc_jax.training.journal import Journal
from mvc_jax.training.loop import fit
from mvc_jax.training.validation import Validation

_CHOICES = {
    "optimizer": optim.OPTIMIZERS,
    "schedule": optim.SCHEDULES,
    "class_weights": ("none", "balanced"),
    "dtype": ("auto", "float32", "bfloat16"),
}
_COUNTS = ("seeds", "steps", "batch_size", "width", "stem_stride", "log_every")
_SWITCHES = ("epochs", "warmup", "patience", "validate_every", "checkpoint_minutes")
_SWITCHES += ("ratio", "memory_gib", "seeds_at_once", "steps_at_once")
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
}
# They change what is kept, what is shown or how fast it goes, but not what is computed.
_NO_RESULT = ("log_every", "checkpoint_minutes", "memory_gib", "steps_at_once")
_WAYS_OUT = (
    "Lower config.classify.batch_size, config.classify.seeds_at_once or "
    "config.classify.size."
)
_PREDICTED = 500  # images at once
_SMALL = 5_000_000  # parameters
_STEPS_AT_ONCE = 50


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the table: how real and synthetic images meet, and what bends them."""

    name: str
    regime: str
    set: str
    policy: str

    @property
    def plain(self) -> str:
        """Its name as a file's name and a TensorBoard tag."""
        return self.name.replace(":", "-").replace("+", "_")


def parse_run(name: str) -> Run:
    """`"two_phase:unmixed+affine"` -> its parts; the set defaults to `mixed`.

    Raises:
      UserError: a part is unknown.
    """
    head, plus, policy = name.partition("+")
    regime, colon, set_ = head.partition(":")
    run_ = Run(
        name, regime, "" if regime == "real" else set_ or "mixed", policy or "none"
    )
    good = run_.regime in regimes.REGIMES and run_.policy in classifier.POLICIES
    good = good and bool(plus) == bool(policy) and bool(colon) == bool(set_)
    require(
        good and not (regime == "real" and set_),
        "config.classify.runs",
        wanted="<regime>[:<set>][+<policy>] with a regime of "
        f"{', '.join(regimes.REGIMES)} (real takes no set) and a policy of "
        f"{', '.join(classifier.POLICIES)}",
        got=repr(name),
        fix="Mend this run's name.",
    )
    return run_


def check(config: ConfigDict) -> None:
    """Checks the section `classify`."""
    section = config.classify
    runs = [parse_run(name) for name in section.runs]
    for run_ in runs:
        require(
            not run_.set or run_.set in config.generate.sets,
            "config.classify.runs",
            wanted=f"a set of config.generate.sets {tuple(config.generate.sets)}",
            got=repr(run_.name),
            fix="Add the set there or take the run out.",
        )
    require(
        len({(r.regime, r.set, r.policy) for r in runs}) == len(runs) > 0,
        "config.classify.runs",
        wanted="at least one run, each once",
        got=tuple(section.runs),
        fix="Mend the list.",
    )
    require(
        section.model in resnet.VARIANTS,
        "config.classify.model",
        wanted=f"one of {', '.join(resnet.VARIANTS)}",
        got=repr(section.model),
        fix="Name one of these.",
    )
    fields = section.to_dict()
    require_within("config.classify", fields, _RANGES)
    require_one_of("config.classify", fields, _CHOICES)
    require(
        0 <= section.size <= config.data.size,
        "config.classify.size",
        wanted=f"at most config.data.size={config.data.size}, or 0 for that",
        got=section.size,
        fix="Lower it.",
    )
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
        not section.ratio or section.ratio <= config.mix.per_image,
        "config.classify.ratio",
        wanted=f"at most the {config.mix.per_image} synthetic images a real one of "
        "config.mix.per_image, or 0 for all of them",
        got=section.ratio,
        fix="Lower it, or raise config.mix.per_image.",
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains and tests every run; results that exist are kept."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    section = config.classify.to_dict()
    shaping = {k: v for k, v in section.items() if k not in _NO_RESULT}
    settings["classify"] = shaping
    stage = manifest.open_stage(workdir, "classify", settings, inputs=("generate",))
    if stage.complete:
        return
    runs = [parse_run(name) for name in section["runs"]]
    data = training_set.read(
        workdir,
        stage.folder / "pixels",
        sets=sorted({run_.set for run_ in runs} - {""}),
        size=section["size"] or config.data.size,
        ratio=section["ratio"],
        validation=section["validation"],
        seed=config.seed,
    )
    trainer = Trainer(config, workdir, stage.folder, data)
    artifacts = []
    for run_ in runs:
        path = stage.folder / "results" / f"{run_.plain}.json"
        artifacts.append(f"results/{path.name}")
        if path.exists():
            trainer.progress.advance(section["seeds"] * trainer.steps)
            continue
        files.write_json(path, dataclasses.asdict(run_) | trainer.results(run_))
    trainer.progress.close()
    stage.finish(artifacts, runs=len(runs), fits=len(runs) * section["seeds"])


class Trainer:
    """Fits the classifiers of one run after another, on the same images and devices."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        folder: epath.Path,
        data: training_set.TrainingSet,
    ):
        section = config.classify
        self._section, self._seed = section, config.seed
        self._workdir, self._folder, self._data = workdir, folder, data
        self._mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        self._programs: dict = {}
        self._fixed = self._placed(memory.device_bytes(jax.devices()[0]))
        real = len(data.pools[""].real)
        self.steps = math.ceil(section.epochs * real / section.batch_size)
        self.steps = self.steps or section.steps
        total = len(section.runs) * section.seeds * self.steps
        self.progress = Progress("classify", total)

    def results(self, run_: Run) -> dict[str, Any]:
        """Trains every seed of a run; what each says of the test images."""
        found: list[dict] = []
        seen = {}
        for seeds in self._groups():
            rows = [self._rows(run_, seed) for seed in seeds]
            seen = self._data.examples_seen(rows[0])
            state = self._fit(run_, seeds, rows)
            probabilities = self._predict(state, self._data.test)
            found += [_result(row, self._data.test_labels) for row in probabilities]
        return seen | {"seeds": found}

    def _fit(self, run_: Run, seeds: list[int], rows: list[dict]):
        section = self._section
        recipe, tx, step = self._step(run_.policy, run_.regime == "two_phase")
        state = classifier.create_state(
            recipe,
            tx,
            np.asarray(seeds, np.int32),
            self._mesh,
            key=rng.purpose_key(self._seed, "classify"),
            image_shape=self._data.rows.parts[0].shape[1:],
        )
        name = f"{run_.plain}/seed-{'-'.join(map(str, seeds))}"
        folder = self._folder / "fits" / name
        validation = None
        if len(self._data.validation):
            validation = Validation(self._measure, section.patience)
        every = section.validate_every or self.steps
        kept = {"every": every, "minutes": section.checkpoint_minutes}
        kept |= {"keep": 1, "best": "validation_loss" if validation else None}
        state = fit(
            step,
            state,
            read=self._data.reader(rows, pixels=not self._fixed),
            fixed=self._fixed | {"seed": np.asarray(seeds, np.int32)},
            mesh=self._mesh,
            steps=self.steps,
            checkpoints=Checkpoints(folder, **kept),
            journal=Journal(
                self._workdir,
                f"classify/{name}",
                log_every=min(section.log_every, every),
                progress=self.progress,
            ),
            room=memory.Room(int(section.memory_gib * 2**30), _WAYS_OUT),
            stride=self._stride(every),
            validation=validation,
            programs=self._programs,
        )
        if validation:
            with contextlib.closing(Checkpoints(folder, **kept)) as checkpoints:
                state = checkpoints.restore_best(state)
        return state

    @functools.cache  # noqa: B019  one trainer a process
    def _step(self, policy: str, two_phases: bool):
        """The recipe, the optimiser and the step of all runs of one kind."""
        section = self._section
        recipe = dataclasses.replace(self._recipe, policy=policy)
        rate = _learning_rate(section, self.steps, two_phases)
        if section.optimizer == "adam":
            tx = optim.adam(rate, weight_decay=section.weight_decay)
        else:
            decay = {"weight_decay": section.weight_decay}
            tx = optim.sgd(rate, momentum=section.momentum, **decay)
        key = rng.purpose_key(self._seed, "classify/steps")
        step = functools.partial(classifier.train_step, recipe=recipe, tx=tx, key=key)
        return recipe, tx, step

    @functools.cached_property
    def _recipe(self) -> classifier.Recipe:
        section, data = self._section, self._data
        weights: tuple[float, ...] = ()
        if section.class_weights == "balanced":
            counts = np.bincount(data.labels[data.pools[""].real])
            weights = tuple((counts.sum() / (len(counts) * counts)).tolist())
        return classifier.Recipe(
            model=resnet.VARIANTS[section.model](
                num_classes=len(data.class_names),
                width=section.width,
                stem_stride=section.stem_stride,
            ),
            label_smoothing=section.label_smoothing,
            class_weights=weights,
            ema_decay=section.ema_decay,
        )

    @functools.cached_property
    def _predict(self) -> Callable:
        return classifier.predictor(self._recipe, self._mesh, batch_size=_PREDICTED)

    def _measure(self, state: classifier.ClassifierState) -> dict[str, float]:
        """Cross entropy and accuracy on the held-out images."""
        held = self._data.validation
        labels = self._data.labels[held]
        found = self._predict(state, self._data.rows.take(held))[0]
        likelihood = found[np.arange(len(labels)), labels]
        return {
            "validation_loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
            "validation_accuracy": float((found.argmax(-1) == labels).mean()),
        }

    def _groups(self) -> list[list[int]]:
        """Which seeds are trained side by side."""
        section = self._section
        size = section.seeds_at_once or self._usual_group()
        if len(self._data.validation):
            size = 1  # each stops by itself
        seeds = list(range(section.seeds))
        return [seeds[i : i + size] for i in range(0, len(seeds), size)]

    def _usual_group(self) -> int:
        """All, where an accelerator would idle between the steps of one."""
        if jax.default_backend() == "cpu":
            return 1
        shape = jax.ShapeDtypeStruct((1, *self._data.rows.parts[0].shape[1:]), "f4")
        shapes = jax.eval_shape(self._recipe.model.init, jax.random.key(0), shape)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        return self._section.seeds if count < _SMALL else 1

    def _rows(self, run_: Run, seed: int) -> dict[str, np.ndarray]:
        """Every batch of one fit, by the run's regime and the config."""
        section = self._section
        return regimes.schedule(
            run_.regime,
            self._data.pools[run_.set],
            seed=self._seed,
            repeat=seed,
            steps=self.steps,
            batch_size=section.batch_size,
            probability=section.probability,
            phase_two=section.phase_two,
        )

    def _placed(self, room: int) -> dict[str, jax.Array]:
        """All images on every device, where they take less than half of one."""
        rows = self._data.rows
        if rows.nbytes > (self._section.images_gib * 2**30 or room / 2):
            return {}
        whole = {"images": rows.all(), "labels": self._data.labels}
        return jax.device_put(whole, sharding.replicated(self._mesh))

    def _stride(self, every: int) -> int:
        """Steps of one dispatch: many small ones on an accelerator, one on a CPU."""
        most = self._section.steps_at_once or (
            1 if jax.default_backend() == "cpu" else _STEPS_AT_ONCE
        )
        both = math.gcd(self.steps, every, min(self._section.log_every, every))
        return max(n for n in range(1, min(most, both) + 1) if both % n == 0)


def _learning_rate(section: ConfigDict, steps: int, two_phases: bool) -> optax.Schedule:
    """The rate by step; in the second of two phases it starts anew, and lower."""

    def rate(peak: float, steps: int, warmup: int) -> optax.Schedule:
        return optim.schedule(
            section.schedule,
            peak,
            warmup=warmup,
            steps=steps,
            milestones=section.milestones,
            gamma=section.gamma,
        )

    if not two_phases:
        return rate(section.learning_rate, steps, section.warmup)
    turn = regimes.first_phase(steps, section.phase_two)
    lower = section.learning_rate * section.phase_two_rate
    both = (
        rate(section.learning_rate, turn, section.warmup),
        rate(lower, steps - turn, 0),
    )
    return optax.join_schedules(both, [turn])


def _result(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What one classifier says of the test images."""
    predicted = probabilities.argmax(-1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "predictions": predicted.tolist(),
        "confidences": probabilities.max(-1).round(4).tolist(),
    }
