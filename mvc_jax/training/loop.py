"""The training loop: one jitted, donated, sharded step; resumable by its number.

Steps are dispatched one by one and run asynchronously; the next batch is read by a
thread meanwhile. A scan over many steps would spare microseconds on an accelerator, and
XLA's CPU backend runs convolutions inside a loop fifteen times slower than outside
(measured on the digits' autoencoder).
"""

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from mvc_jax.errors import UserError
from mvc_jax.training import memory, preemption, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.console import Progress
from mvc_jax.training.metrics import MetricsLog
from mvc_jax.training.optim import ema_update
from mvc_jax.training.throughput import Throughput

Batch = dict[str, Any]
_STATE_IS_SAVED = "The state before them is saved. Lower the learning rate, or clip."


@flax.struct.dataclass
class TrainState:
    """What an optimiser step changes. Randomness and data order follow from `step`.

    `ema_params` is None where no average is kept. `skipped` counts the steps that were
    not taken because something was not finite, `skipped_in_a_row` those at the end.
    """

    step: Any  # int32 []; `Any`, for a state also holds shapes, specs, shardings
    params: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any
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
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, ema_params=ema
        )

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

    Master weights are fp32 whatever the precision of `params`. Optimiser moments and
    averages take the shardings of their parameters.
    """

    def init(params):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        copy = jax.tree.map(jnp.copy, params) if ema else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, zero, copy)

    shapes = jax.eval_shape(init, params)
    shardings = sharding.tree_shardings(shapes, mesh, rules)
    params = jax.device_put(params, shardings.params)
    return jax.jit(init, out_shardings=shardings)(params)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Something to look at: `draw(step, state, log)` every `every` steps."""

    every: int
    draw: Callable[[int, TrainState, MetricsLog], None]


def fit(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    state: TrainState,
    *,
    read: Callable[[int], dict[str, np.ndarray]],
    fixed: dict[str, Any],
    mesh: Mesh,
    steps: int,
    log_every: int,
    checkpoints: Checkpoints,
    metrics: Callable[[int], MetricsLog],
    name: str,
    accumulate: int = 1,
    max_skipped: int = 10,
    flops: float = 0.0,
    memory_limit: int = 0,
    ways_out: str = "Lower the batch size.",
    watch: Watch | None = None,
) -> TrainState:
    """Runs `train_step` up to step `steps`, from the newest checkpoint if there is one.

    Args:
      train_step: pure, `(state, batch) -> (state, metrics)`; metrics are scalars.
      state: at step 0; its buffers are donated.
      read: step -> host arrays [B, ...], a function of the step alone. It runs in a
        thread, one step ahead.
      fixed: the part of every batch that is the same: placed once, sharded by the
        default rules.
      mesh: the devices.
      steps: where to stop.
      log_every: steps over which metrics are averaged into one row.
      checkpoints: when and where the state is kept.
      metrics: step to start from -> log of this loop.
      name: for the progress bar.
      accumulate: micro-batches that `train_step` cuts a batch into; B is padded to a
        multiple of it and of the devices.
      max_skipped: so many steps in a row whose metrics are not finite end the run.
      flops: of one example's step, forward and backward; 0: not known.
      memory_limit: bytes of one device; 0: what it says it has.
      ways_out: for the error of a step that does not fit.
      watch: what to draw, and when.

    Raises:
      UserError: the step does not fit the memory, or too many steps were skipped.
      Preempted: the process was told to stop; the state is saved.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step_on = jax.jit(
        lambda state, fixed, batch: _skip_bad(state, *train_step(state, fixed | batch)),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    fixed = jax.device_put(fixed, sharding.tree_shardings(fixed, mesh))

    def batch_of(step):
        return place_batch(read(step), mesh, accumulate)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(checkpoints))
        state = checkpoints.restore(state)
        first = int(state.step)
        if first >= steps:
            return state
        batch = batch_of(first)
        step_on = memory.compile_step(
            step_on, state, fixed, batch, limit=memory_limit, name=name, fix=ways_out
        )
        told_to_stop = stack.enter_context(preemption.deferred())
        log = stack.enter_context(contextlib.closing(metrics(first)))
        progress = stack.enter_context(
            contextlib.closing(Progress(name, steps, done=first))
        )
        reader = stack.enter_context(ThreadPoolExecutor(1))
        rate = Throughput(int(batch["weight"].sum()), flops)
        book = _Book(log, progress, rate, max_skipped)
        for step in range(first, steps):
            ahead = reader.submit(batch_of, step + 1) if step + 1 < steps else None
            state, values = step_on(state, fixed, batch)
            batch = ahead.result() if ahead else None
            done = step + 1
            if step % log_every == 0:  # the device is busy meanwhile
                book.close_row(step)
            book.note(values)
            if watch and (done % watch.every == 0 or done == steps):
                watch.draw(done, state, log)
                rate.restart()
            stop = told_to_stop()
            if done == steps or stop or book.hopeless or checkpoints.due(done):
                book.close_row(done)  # so that what is saved was looked at
                checkpoints.save(done, state, book.last)
                rate.restart()
            if book.hopeless:
                raise book.error(name)
            if stop and done < steps:
                raise preemption.Preempted(f"{name} at step {done} of {steps}")
    return state


def place_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, accumulate: int = 1
) -> dict[str, jax.Array]:
    """Host arrays [B, ...] as sharded arrays [B', ...], B' padded to the mesh.

    `weight` [B] is added if it is not given: 1 for real examples, 0 for padding.
    """
    batch_size = len(next(iter(batch.values())))
    batch = {"weight": np.ones(batch_size, np.float32), **batch}
    multiple = mesh.size * accumulate
    size = -(-batch_size // multiple) * multiple
    padded = {key: sharding.pad_rows(array, size) for key, array in batch.items()}
    return jax.device_put(padded, sharding.batch_sharding(mesh))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` [B] over the examples with weight; padding counts nothing."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-8)


def gradients(
    losses: Callable[[Any, Batch], jax.Array], params: Any, batch: Batch, parts: int
) -> tuple[jax.Array, Any]:
    """Mean loss and its gradient, `parts` micro-batches one after the other.

    Args:
      losses: `(params, batch) -> [B]`.
      params: what to differentiate for.
      batch: arrays [B, ...]; `weight` [B] weighs the mean over the whole batch, so that
        the result does not depend on `parts`.
      parts: a divisor of B.
    """
    total = jnp.maximum(batch["weight"].sum(), 1e-8)

    def share(params, part):
        return (losses(params, part) * part["weight"]).sum() / total

    share_and_gradient = jax.value_and_grad(share)
    if parts == 1:
        return share_and_gradient(params, batch)
    # Part i is every `parts`-th example from i on: each device keeps its own.
    micro = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, share_and_gradient(params, part)), None

    zeros = jax.tree.map(jnp.zeros_like, (total, params))
    # Convolutions' gradients in a loop are slow on a CPU (top of this file).
    unroll = jax.default_backend() == "cpu"
    return jax.lax.scan(add, zeros, micro, unroll=unroll)[0]


def _skip_bad(
    old: TrainState, new: TrainState, metrics: dict
) -> tuple[TrainState, dict]:
    """`new`, or `old` at the next step where a metric is not finite."""
    good = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()
    chosen = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    bad = 1 - good.astype(jnp.int32)
    state = chosen.replace(
        step=new.step,
        skipped=old.skipped + bad,
        skipped_in_a_row=(old.skipped_in_a_row + 1) * bad,
    )
    return state, metrics | {"skipped": state.skipped_in_a_row}


class _Book:
    """Metrics of the steps since the last row, still on the device until it closes."""

    def __init__(self, log: MetricsLog, progress: Progress, rate, max_skipped: int):
        self._log, self._progress, self._rate = log, progress, rate
        self._max_skipped = max_skipped
        self._open: list[dict] = []
        self._in_a_row = 0
        self.last: dict[str, float] = {}

    @property
    def hopeless(self) -> bool:
        return self._in_a_row >= self._max_skipped

    def note(self, values: dict) -> None:
        self._open.append(values)

    def close_row(self, step: int) -> None:
        """Logs at `step` the mean of each metric over the steps since the last row."""
        if not self._open:
            return
        fetched, self._open = jax.device_get(self._open), []
        streaks = [int(values.pop("skipped")) for values in fetched]
        self._in_a_row = streaks[-1]
        skipped = sum(streak > 0 for streak in streaks)
        if skipped:
            logging.warning(
                "%d of the %d steps before step %d were skipped: not finite",
                *(skipped, len(fetched), step),
            )
        good = [v for v, streak in zip(fetched, streaks, strict=True) if streak == 0]
        names = good[0] if good else ()
        means = {key: float(np.mean([v[key] for v in good])) for key in names}
        self.last = means | {"skipped": float(skipped)}
        seen = self.last | self._rate.over(len(fetched)) | memory.in_use()
        self._log.write(step, **seen)
        self._progress.advance(len(fetched), **means)

    def error(self, name: str) -> UserError:
        return UserError(
            name,
            wanted="finite losses and gradients",
            got=f"{self._in_a_row} steps in a row without",
            fix=_STATE_IS_SAVED,
        )
