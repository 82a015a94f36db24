"""Trains classifiers, one seed at a time or several side by side, on shared images.

This file knows batches, optimisers and checkpoints; the stage `classify` knows results
and exports.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from mvc_jax import devices, processes
from mvc_jax.classification import classifier, duration, regimes
from mvc_jax.classification.runs import Run
from mvc_jax.classification.training_set import TrainingSet
from mvc_jax.training import loop, memory, optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.console import Progress
from mvc_jax.training.train_logger import TrainLogger
from mvc_jax.training.validation import Validation

_MEMORY_HINT = (
    "Lower config.classify.batch_size, config.classify.seeds_at_once or "
    "config.classify.size."
)
_PREDICTION_PIXELS = 2_000_000  # per batch
_STEPS_AT_ONCE = 50


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How every classifier is trained: the fields of `config.classify` of these names.

    `configs/common.py` says what each one means, and in which unit.
    """

    seeds: int
    seeds_at_once: int
    steps: int
    epochs: float
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: int
    milestones: tuple[float, ...]
    gamma: float
    momentum: float
    weight_decay: float
    validate_every: int
    patience: int
    probability: float
    phase_two: float
    phase_two_rate: float
    images_gib: float
    memory_gib: float
    steps_at_once: int
    log_every: int
    checkpoint_minutes: float

    def rates(self, steps: int, *, two_phases: bool) -> Float[np.ndarray, " steps"]:
        """Learning rate of each step; a second phase restarts the schedule, lower."""

        def phase(peak: float, steps: int, warmup: int) -> optax.Schedule:
            return optim.schedule(
                self.schedule,
                peak,
                warmup=warmup,
                steps=steps,
                milestones=self.milestones,
                gamma=self.gamma,
            )

        first = regimes.first_phase(steps, self.phase_two) if two_phases else steps
        lower = self.learning_rate * self.phase_two_rate
        phases = [
            phase(self.learning_rate, first, self.warmup),
            phase(lower, steps - first, 0),
        ]
        rates = optax.join_schedules(phases, [first])(np.arange(steps))
        return np.asarray(rates, np.float32)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Classifiers that were trained side by side.

    Attributes:
      state: at the end, or at the best step on the held-out images.
      facts: for each seed `steps` taken, `best_step` (of `state`), and the numbers of
        examples seen, `real_seen` and `synthetic_seen`.
    """

    state: classifier.ClassifierState
    facts: list[dict[str, int]]


class Trainer:
    """Trains the classifiers of all runs, and predicts with them.

    Runs with the same augmentation share one compiled step.
    """

    def __init__(
        self,
        options: FitOptions,
        spec: classifier.ClassifierSpec,
        data: TrainingSet,
        *,
        seed: int,
        runs: int,
        mesh: Mesh,
        workdir: epath.Path,
        folder: epath.Path,
        policy_fields: Mapping[str, classifier.Fields],
        pretrained: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          options: of every fit.
          spec: of every classifier, except for its augmentation, which the run names.
          data: real and synthetic images.
          seed: `config.seed`.
          runs: how many runs will be trained, for the progress bar.
          mesh: the devices.
          workdir: where metrics are written.
          folder: where checkpoints are written.
          policy_fields: for each augmentation policy the fields that override its
            defaults.
          pretrained: variables to start from; None starts at random.
        """
        self._options, self._spec, self._data = options, spec, data
        self._seed, self._mesh, self._pretrained = seed, mesh, pretrained
        self._policy_fields = policy_fields
        self._workdir, self._folder = workdir, folder
        # Its learning rate is 1: rates are data, so that runs share programs.
        self._tx = optim.optimizer(
            options.optimizer,
            1.0,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )
        self._programs: dict = {}
        self._steps: dict = {}
        self._image_shape = data.rows.parts[0].shape[1:]
        room = memory.device_bytes(mesh.local_devices[0])
        # All processes decide alike.
        self._fixed = self._images_on_device(min(processes.gather("memory", room)))
        real = len(data.pools[""].real)
        self.steps = duration.steps(
            real,
            epochs=options.epochs,
            steps=options.steps,
            batch_size=options.batch_size,
        )
        duration.require_warmup(options.warmup, self.steps)
        self.progress = Progress("classify", runs * options.seeds * self.steps)

    def seed_groups(self) -> list[list[int]]:
        """The seeds, in groups that are trained side by side."""
        # Side by side, convolutions become grouped ones, which no device was measured
        # to compute faster than one seed after another.
        size = self._options.seeds_at_once or 1
        if len(self._data.validation):
            size = 1  # each seed has its own early stopping
        seeds = list(range(self._options.seeds))
        return [seeds[i : i + size] for i in range(0, len(seeds), size)]

    def fit(self, run: Run, seeds: Sequence[int]) -> FitResult:
        """Trains a run's classifiers of these seeds, from their newest checkpoint."""
        options = self._options
        schedules = [self._schedule(run, seed) for seed in seeds]
        spec, step = self._step(run)
        state = classifier.create_state(
            spec,
            self._tx,
            self._keys("classify", seeds),
            self._mesh,
            image_shape=self._image_shape,
            pretrained=self._pretrained,
        )
        name = f"{run.slug}/seed-{'-'.join(map(str, seeds))}"
        every, validation = options.validate_every or self.steps, None
        if len(self._data.validation):
            validation = Validation(self._measure, every, options.patience)
        checkpoints = functools.partial(
            Checkpoints,
            self._folder / name,
            every=every,
            minutes=options.checkpoint_minutes,
            keep=1,
            best="validation_loss" if validation else None,
        )
        state = loop.fit(
            step,
            state,
            read=self._data.reader(schedules, pixels=not self._fixed),
            constants={
                **self._fixed,
                "key": jax.random.key_data(self._keys("classify/steps", seeds)),
                "rates": options.rates(
                    self.steps, two_phases=run.regime == "two_phase"
                ),
            },
            mesh=self._mesh,
            steps=self.steps,
            checkpoints=checkpoints(),
            logger=TrainLogger(
                self._workdir,
                f"classify/{name}",
                log_every=min(options.log_every, every),
                progress=self.progress,
            ),
            memory_budget=memory.MemoryBudget(
                int(options.memory_gib * 2**30), _MEMORY_HINT
            ),
            steps_per_dispatch=self._stride(every),
            validation=validation,
            programs=self._programs,
        )
        steps = int(state.step)
        if validation:
            with contextlib.closing(checkpoints()) as saved:
                state = saved.restore_best(state)
        facts = [
            {
                "steps": steps,
                "best_step": int(state.step),
                **self._data.examples_seen(schedule, steps),
            }
            for schedule in schedules
        ]
        return FitResult(state, facts)

    def predict(
        self, state: classifier.ClassifierState, images: UInt8[np.ndarray, "T H W 3"]
    ) -> np.ndarray:
        """Class probabilities [S, T, K] of images [T, H, W, 3]."""
        return self._predictor(state, images)

    def _keys(self, purpose: str, seeds: Sequence[int]) -> jax.Array:
        key = rng.purpose_key(self._seed, purpose)
        return rng.example_keys(key, jnp.asarray(seeds, jnp.int32))

    def _step(self, run: Run) -> tuple[classifier.ClassifierSpec, Callable]:
        """The spec and the training step of all runs with this run's augmentation."""
        augmentation = (run.policy, run.mix)
        if augmentation not in self._steps:
            spec = dataclasses.replace(
                self._spec,
                policy=run.policy,
                policy_fields=self._policy_fields.get(run.policy, ()),
                mix=run.mix,
            )
            step = functools.partial(classifier.train_seeds, spec=spec, tx=self._tx)
            self._steps[augmentation] = spec, step
        return self._steps[augmentation]

    def _schedule(self, run: Run, seed: int) -> dict[str, np.ndarray]:
        """Every batch of one fit, by the run's regime."""
        return regimes.schedule(
            run.regime,
            self._data.pools[run.set],
            seed=self._seed,
            repeat=seed,
            steps=self.steps,
            batch_size=self._options.batch_size,
            probability=self._options.probability,
            phase_two=self._options.phase_two,
        )

    @functools.cached_property
    def _predictor(self) -> Callable:
        height, width, _ = self._image_shape
        size = min(max(_PREDICTION_PIXELS // (height * width), 1), 500)
        return classifier.predictor(self._spec, self._mesh, batch_size=size)

    def _measure(self, state: classifier.ClassifierState) -> dict[str, float]:
        """Cross entropy and accuracy on the held-out images."""
        held = self._data.validation
        labels = self._data.labels[held]
        found = self.predict(state, self._data.rows.take(held))[0]
        likelihood = found[np.arange(len(labels)), labels]
        return {
            "validation_loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
            "validation_accuracy": float((found.argmax(-1) == labels).mean()),
        }

    def _images_on_device(self, limit: int) -> dict[str, jax.Array]:
        """All images on every device if they take at most half of `limit` bytes."""
        rows = self._data.rows
        if rows.nbytes > (self._options.images_gib * 2**30 or limit / 2):
            return {}
        arrays = {"images": rows.all(), "labels": self._data.targets}
        return sharding.place(arrays, sharding.replicated(self._mesh))

    def _stride(self, every: int) -> int:
        """Steps per dispatch: one on a CPU, many small ones on an accelerator."""
        limit = self._options.steps_at_once or (
            1 if devices.platform(self._mesh) == "cpu" else _STEPS_AT_ONCE
        )
        common = math.gcd(self.steps, every, min(self._options.log_every, every))
        return max(n for n in range(1, min(limit, common) + 1) if common % n == 0)
