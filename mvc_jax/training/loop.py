"""The training loop: one jitted, donated, sharded step; resumable by its number.

Steps are dispatched one by one and run asynchronously. A scan over many would spare
microseconds on an accelerator, and XLA's CPU backend runs convolutions inside a loop
fifteen times slower than outside (measured on the digits' autoencoder).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from mvc_jax.errors import UserError
from mvc_jax.training import preemption, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.console import Progress
from mvc_jax.training.metrics import MetricsLog
from mvc_jax.training.optim import ema_update

Batch = Any
Rows = dict[str, np.ndarray]


@flax.struct.dataclass
class TrainState:
    """What an optimiser step changes. Randomness and data order follow from `step`.

    `ema_params` is None where no average is kept.
    """

    step: Any  # int32 []; `Any`, for a state also holds shapes, specs, shardings
    params: Any
    opt_state: Any
    ema_params: Any = None

    def update(
        self, grads: Any, tx: optax.GradientTransformation, *, ema_decay: float = 0.0
    ) -> "TrainState":
        """The state after one optimiser step along `grads`."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema_params
        if ema is not None:
            ema = ema_update(ema, params, self.step, ema_decay)
        return TrainState(self.step + 1, params, opt_state, ema)

    @property
    def averaged(self) -> Any:
        """The averaged parameters where there are any, else the parameters."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
    rules: sharding.Rules = sharding.DEFAULT_RULES,
) -> TrainState:
    """A state born sharded, from host parameters (read from a file, or initialised).

    Optimiser moments and averages take the shardings of their parameters.
    """

    def init(params):
        copy = jax.tree.map(jax.numpy.copy, params) if ema else None
        step = jax.numpy.zeros((), jax.numpy.int32)
        return TrainState(step, params, tx.init(params), copy)

    shapes = jax.eval_shape(init, params)
    shardings = sharding.tree_shardings(shapes, mesh, rules)
    params = jax.device_put(params, shardings.params)
    return jax.jit(init, out_shardings=shardings)(params)


def fit(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    state: TrainState,
    *,
    data: Any,
    gather: Callable[[Any, dict], Batch],
    rows: Callable[[int], Rows],
    mesh: Mesh,
    steps: int,
    log_every: int,
    checkpoints: Checkpoints,
    metrics: Callable[[int], MetricsLog],
    name: str,
) -> TrainState:
    """Runs `train_step` up to step `steps`, from the newest checkpoint if there is one.

    Args:
      train_step: pure, `(state, batch) -> (state, metrics)`; metrics are scalars.
      state: at step 0; its buffers are donated.
      data: arrays that stay on the device, whole on each.
      gather: `(data, rows) -> batch`, inside jit; rows are those of `place_rows`.
      rows: step -> host arrays [B], a function of the step alone.
      mesh: the devices.
      steps: where to stop.
      log_every: steps over which metrics are averaged into one row.
      checkpoints: where the state is kept.
      metrics: step to start from -> log of this loop.
      name: for the progress bar.

    Raises:
      UserError: a metric is not finite.
      Preempted: SIGTERM came; the state is saved.
    """
    step_on = _jitted(train_step, gather, state)
    data = jax.device_put(data, sharding.replicated(mesh))
    with preemption.deferred() as asked, contextlib.closing(checkpoints):
        state = checkpoints.restore(state)
        first = int(state.step)
        with (
            contextlib.closing(metrics(first)) as log,
            contextlib.closing(Progress(name, steps, done=first)) as progress,
        ):
            pending: list[dict] = []
            stop = asked()
            for step in range(first, steps):
                if stop:
                    raise preemption.Preempted(f"{name} after step {step}")
                state, values = step_on(state, data, place_rows(rows(step), mesh))
                done = step + 1
                if pending and step % log_every == 0:  # the device is busy meanwhile
                    _record(step, pending, log, progress)
                    pending = []
                pending.append(values)
                stop = asked()
                if checkpoints.due(done) or done == steps or stop:
                    means = _record(done, pending, log, progress)  # or raises: a bad
                    pending = []  # state is never saved
                    checkpoints.save(done, state, means)
    return state


def place_rows(rows: Rows, mesh: Mesh) -> dict[str, jax.Array]:
    """Host rows [B] as sharded arrays [B'], B' padded to the mesh.

    `weight` is added if it is not given: 1 for real examples, 0 for padding.
    """
    batch_size = len(next(iter(rows.values())))
    rows = {"weight": np.ones(batch_size, np.float32), **rows}
    size = sharding.padded_size(batch_size, mesh)
    padded = {key: sharding.pad_rows(array, size) for key, array in rows.items()}
    return jax.device_put(padded, sharding.batch_sharding(mesh))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` [B] over the examples with weight; padding counts nothing."""
    return (values * weights).sum() / jax.numpy.maximum(weights.sum(), 1e-8)


def _jitted(train_step: Callable, gather: Callable, state: TrainState) -> Callable:
    """`(state, data, rows) -> (state, metrics)`: donated, sharded as `state` is."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        lambda state, data, rows: train_step(state, gather(data, rows)),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )


def _record(
    step: int, values: list[dict], log: MetricsLog, progress: Progress
) -> dict[str, float]:
    """Logs at `step`, and returns, the mean of each metric since the last row."""
    fetched = jax.device_get(values)
    means = {key: float(np.mean([v[key] for v in fetched])) for key in fetched[0]}
    bad = [f"{key}={value}" for key, value in means.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"training before step {step}",
            wanted="finite metrics",
            got=", ".join(bad),
            fix="Lower the learning rate; the last good checkpoint is kept.",
        )
    log.write(step, **means)
    progress.advance(len(values), **means)
    return means
