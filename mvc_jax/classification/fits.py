"""Fits classifiers, one after another or side by side, on the same images and devices.

A part of the stage `classify`: it knows batches, optimisers and checkpoints; results
and exports are the stage's.
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

from mvc_jax.classification import classifier, regimes
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
_PREDICTED_PIXELS = 2_000_000  # at once
_SMALL = 5_000_000  # parameters
_STEPS_AT_ONCE = 50


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plain values of the fields of `config.classify` of the same names."""

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
        """Learning rates; in the second of two phases they start anew, and lower."""

        def phase(peak: float, steps: int, warmup: int) -> optax.Schedule:
            return optim.schedule(
                self.schedule,
                peak,
                warmup=warmup,
                steps=steps,
                milestones=self.milestones,
                gamma=self.gamma,
            )

        turn = regimes.first_phase(steps, self.phase_two) if two_phases else steps
        lower = self.learning_rate * self.phase_two_rate
        phases = [phase(self.learning_rate, turn, self.warmup)]
        phases.append(phase(lower, steps - turn, 0))
        rates = optax.join_schedules(phases, [turn])(np.arange(steps))
        return np.asarray(rates, np.float32)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Classifiers that were trained side by side.

    Attributes:
      state: at the end, or where it was best on the held-out images.
      facts: of each seed, `steps` taken, `best_step` (the state's), `real_seen` and
        `synthetic_seen` examples.
    """

    state: classifier.ClassifierState
    facts: list[dict[str, int]]


class Trainer:
    """Fits and predicts; programs are compiled once for all fits of a kind."""

    def __init__(
        self,
        plan: Plan,
        recipe: classifier.Recipe,
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
          plan: of every fit.
          recipe: of every fit, but for what the run bends.
          data: real and synthetic images.
          seed: of the whole.
          runs: how many there are, for the progress.
          mesh: the devices.
          workdir: for metrics.
          folder: for checkpoints.
          policy_fields: what is not as usual, by policy.
          pretrained: variables to start from; None: at random.
        """
        self._plan, self._recipe, self._data = plan, recipe, data
        self._seed, self._mesh, self._pretrained = seed, mesh, pretrained
        self._policy_fields = policy_fields
        self._workdir, self._folder = workdir, folder
        self._programs: dict = {}
        self._kinds: dict = {}
        self._image_shape = data.rows.parts[0].shape[1:]
        self._fixed = self._placed(memory.device_bytes(jax.devices()[0]))
        real = len(data.pools[""].real)
        self.steps = math.ceil(plan.epochs * real / plan.batch_size) or plan.steps
        self.progress = Progress("classify", runs * plan.seeds * self.steps)

    def groups(self) -> list[list[int]]:
        """Which seeds are trained side by side."""
        size = self._plan.seeds_at_once or self._usual_group()
        if len(self._data.validation):
            size = 1  # each stops by itself
        seeds = list(range(self._plan.seeds))
        return [seeds[i : i + size] for i in range(0, len(seeds), size)]

    def fit(self, run_: Run, seeds: Sequence[int]) -> Fit:
        """Trains a run's classifiers of these seeds, or goes on with them."""
        batches = [self._batches(run_, seed) for seed in seeds]
        recipe, tx, step = self._kind(run_)
        state = classifier.create_state(
            recipe,
            tx,
            self._keys("classify", seeds),
            self._mesh,
            image_shape=self._image_shape,
            pretrained=self._pretrained,
        )
        name = f"{run_.slug}/seed-{'-'.join(map(str, seeds))}"
        every, validation = self._plan.validate_every or self.steps, None
        if len(self._data.validation):
            validation = Validation(self._measure, every, self._plan.patience)
        kept = {"every": every, "minutes": self._plan.checkpoint_minutes, "keep": 1}
        kept["best"] = "validation_loss" if validation else None
        rates = self._plan.rates(self.steps, two_phases=run_.regime == "two_phase")
        keys = jax.random.key_data(self._keys("classify/steps", seeds))
        state = loop.fit(
            step,
            state,
            read=self._data.reader(batches, pixels=not self._fixed),
            constants=self._fixed | {"keys": keys, "rates": rates},
            mesh=self._mesh,
            steps=self.steps,
            checkpoints=Checkpoints(self._folder / name, **kept),
            logger=TrainLogger(
                self._workdir,
                f"classify/{name}",
                log_every=min(self._plan.log_every, every),
                progress=self.progress,
            ),
            memory_budget=memory.MemoryBudget(
                int(self._plan.memory_gib * 2**30), _MEMORY_HINT
            ),
            steps_per_dispatch=self._stride(every),
            validation=validation,
            programs=self._programs,
        )
        taken = int(state.step)
        if validation:
            checkpoints = Checkpoints(self._folder / name, **kept)
            with contextlib.closing(checkpoints):
                state = checkpoints.restore_best(state)
        steps = {"steps": taken, "best_step": int(state.step)}
        seen = [self._data.examples_seen(each, taken) for each in batches]
        return Fit(state, [steps | each for each in seen])

    def predict(
        self, state: classifier.ClassifierState, images: UInt8[np.ndarray, "T H W 3"]
    ) -> np.ndarray:
        """Class probabilities [S, T, K] of images [T, H, W, 3]."""
        return self._predictor(state, images)

    def _keys(self, purpose: str, seeds: Sequence[int]) -> jax.Array:
        key = rng.purpose_key(self._seed, purpose)
        return rng.example_keys(key, jnp.asarray(seeds, jnp.int32))

    def _kind(self, run_: Run):
        """The recipe, the optimiser and the step of all runs of one kind."""
        kind = (run_.policy, run_.mix)
        if kind not in self._kinds:
            recipe = dataclasses.replace(
                self._recipe,
                policy=run_.policy,
                policy_fields=self._policy_fields.get(run_.policy, ()),
                mix=run_.mix,
            )
            tx = optim.optimizer(
                self._plan.optimizer,
                1.0,
                weight_decay=self._plan.weight_decay,
                momentum=self._plan.momentum,
            )
            step = functools.partial(classifier.train_step, recipe=recipe, tx=tx)
            self._kinds[kind] = recipe, tx, step
        return self._kinds[kind]

    def _batches(self, run_: Run, seed: int) -> dict[str, np.ndarray]:
        """Every batch of one fit, by the run's regime."""
        return regimes.schedule(
            run_.regime,
            self._data.pools[run_.set],
            seed=self._seed,
            repeat=seed,
            steps=self.steps,
            batch_size=self._plan.batch_size,
            probability=self._plan.probability,
            phase_two=self._plan.phase_two,
        )

    @functools.cached_property
    def _predictor(self) -> Callable:
        height, width, _ = self._image_shape
        size = min(max(_PREDICTED_PIXELS // (height * width), 1), 500)
        return classifier.predictor(self._recipe, self._mesh, batch_size=size)

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

    def _usual_group(self) -> int:
        """All, where an accelerator would idle between the steps of one."""
        if jax.default_backend() == "cpu":
            return 1
        images = jax.ShapeDtypeStruct((1, *self._image_shape), "float32")
        shapes = jax.eval_shape(self._recipe.model.init, jax.random.key(0), images)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        return self._plan.seeds if count < _SMALL else 1

    def _placed(self, room: int) -> dict[str, jax.Array]:
        """All images on every device, where they take less than half of one."""
        rows = self._data.rows
        if rows.nbytes > (self._plan.images_gib * 2**30 or room / 2):
            return {}
        whole = {"images": rows.all(), "labels": self._data.labels}
        return jax.device_put(whole, sharding.replicated(self._mesh))

    def _stride(self, every: int) -> int:
        """Steps of one dispatch: many small ones on an accelerator, one on a CPU."""
        most = self._plan.steps_at_once or (
            1 if jax.default_backend() == "cpu" else _STEPS_AT_ONCE
        )
        both = math.gcd(self.steps, every, min(self._plan.log_every, every))
        return max(n for n in range(1, min(most, both) + 1) if both % n == 0)
