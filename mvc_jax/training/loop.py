"""The training loop: a jitted, donated, sharded step; resumes from a checkpoint.

Steps are dispatched asynchronously, while a thread reads the next batch. Steps that
take about a millisecond are dispatched several at a time, as one `lax.scan`. Not on a
CPU, where XLA runs convolutions inside a loop fifteen times slower than outside one
(measured on the digits' autoencoder).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from mvc_jax import devices, processes
from mvc_jax.training import memory, preemption, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.optim import ema_update
from mvc_jax.training.train_logger import TrainLogger
from mvc_jax.training.validation import Validation

Batch = dict[str, Any]
Read = Callable[..., dict[str, np.ndarray]]  # (step[, rows]) -> arrays [B, ...]


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
        self,
        grads: Any,
        tx: optax.GradientTransformation,
        metrics: dict[str, jax.Array],
        *,
        ema_decay: float = 0.0,
        rate: jax.Array | None = None,
        shardings: Any = None,
        **more: Any,
    ) -> "TrainState":
        """Takes one optimiser step along `grads`.

        If a metric or the norm of `grads` is not finite, the step is skipped: only the
        step number and the counts of skipped steps change. The decision comes before
        the update: XLA would otherwise keep both the old state and the new one.

        Args:
          grads: gradients, in the structure of `params`.
          tx: the optimiser.
          metrics: scalars of this step, by name.
          ema_decay: decay of `ema_params`, if they are kept.
          rate: learning rate, for a `tx` whose own is 1: fits that differ only in their
            schedules then share a compiled program.
          shardings: of the parameters, if these are sharded.
          **more: other fields of the state after the step; unchanged if it is skipped.

        Returns:
          the next state.
        """
        values = (*metrics.values(), optax.tree.norm(grads))
        finite = jnp.stack([jnp.isfinite(value) for value in values]).all()

        def take(state, grads):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            if rate is not None:
                updates = jax.tree.map(lambda update: rate * update, updates)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema_params
            if ema is not None:
                ema = ema_update(ema, params, state.step, ema_decay)
            changed = {"params": params, "opt_state": opt_state, "ema_params": ema}
            return state.replace(**changed, **more)

        state = jax.lax.platform_dependent(
            self,
            grads,
            cpu=functools.partial(take_by_branch, take, finite),
            tpu=functools.partial(take_by_selection, take, finite),
            default=lambda state, grads: take_by_selection(
                take, finite, state, row_major(grads, shardings)
            ),
        )
        skipped = 1 - finite.astype(jnp.int32)
        return state.replace(
            step=self.step + 1,
            skipped=self.skipped + skipped,
            skipped_in_a_row=(self.skipped_in_a_row + 1) * skipped,
        )

    @property
    def averaged(self) -> Any:
        """The averaged parameters where there are any, else the parameters."""
        return self.params if self.ema_params is None else self.ema_params


Take = Callable[[TrainState, Any], TrainState]


def take_by_branch(
    take: Take, finite: jax.Array, state: TrainState, grads: Any
) -> TrainState:
    """`take(state, grads)` where `finite`, else `state`, for a CPU.

    There each new array is a loop of its own. Those of a moment and of its parameter
    both read the old moment: were both selections, XLA would copy it first.
    """
    return jax.lax.cond(finite, take, lambda state, grads: state, state, grads)


def take_by_selection(
    take: Take, finite: jax.Array, state: TrainState, grads: Any
) -> TrainState:
    """`take(state, grads)` where `finite`, else `state`, for accelerators.

    A parameter and its moments are updated in place by one kernel, which selects. On a
    GPU a branch would copy the state into itself and out again.
    """
    new = take(state, grads)
    return jax.tree.map(functools.partial(jnp.where, finite), new, state)


def row_major(grads: Any, shardings: Any = None) -> Any:
    """Lays gradients out in memory as a GPU's parameters are.

    Gradients of convolutions come in a layout of their own, in which XLA would update
    the whole state, with transposes of it before and after. XLA does not divide the
    constraint: each device constrains its own part, or all parts would be gathered.

    Args:
      grads: of the parameters.
      shardings: of the parameters; None: whole on each device.
    """

    def constrain(leaf):
        return with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim))))

    def in_parts(leaf, place):
        if place.is_fully_replicated:
            return constrain(leaf)
        where = {"in_specs": place.spec, "out_specs": place.spec}
        return jax.shard_map(constrain, mesh=place.mesh, check_vma=False, **where)(leaf)

    if shardings is None:
        return jax.tree.map(constrain, grads)
    return jax.tree.map(in_parts, grads, shardings)


def create_state(
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
    rules: sharding.Rules = sharding.DEFAULT_RULES,
) -> TrainState:
    """A sharded state at step 0, from parameters in host memory.

    Master weights are fp32, whatever the dtype of `params`. Optimiser moments and
    averages have the shardings of their parameters.

    Args:
      params: tree of arrays.
      tx: the optimiser.
      mesh: the devices.
      ema: whether to keep an average of the parameters.
      rules: how to shard parameters.
    """

    def cast(params):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def init(params):
        copy = jax.tree.map(jnp.copy, params) if ema else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, None, tx.init(params), zero, zero, copy)

    shapes = jax.eval_shape(cast, params)
    shardings = sharding.tree_shardings(shapes, mesh, rules)
    half = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))
    params = sharding.place(params, shardings)
    if half:
        params = jax.jit(cast, out_shardings=shardings)(params)
    others = sharding.tree_shardings(jax.eval_shape(init, shapes), mesh, rules)
    # `init` does not return the parameters: that would hold two copies of them.
    return jax.jit(init, out_shardings=others)(params).replace(params=params)


def fit(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    state: TrainState,
    *,
    read: Read,
    constants: dict[str, Any],
    mesh: Mesh,
    steps: int,
    checkpoints: Checkpoints,
    logger: TrainLogger,
    accumulate: int = 1,
    memory_budget: memory.MemoryBudget = memory.WHOLE_DEVICE,
    steps_per_dispatch: int = 1,
    validation: Validation | None = None,
    programs: dict[Any, Callable] | None = None,
) -> TrainState:
    """Trains up to step `steps`, starting from the newest checkpoint if there is one.

    Args:
      train_step: `(state, batch) -> (state, metrics)`, pure, built on
        `TrainState.update`; metrics are scalars.
      state: the state at step 0; donated.
      read: step -> host arrays [B, ...]; called by a thread, one step ahead. Of several
        processes each calls it as (step, the rows of the batch that are its own).
      constants: arrays that are part of every batch; put on the devices once, sharded
        by the default rules.
      mesh: the devices.
      steps: the step to train up to.
      checkpoints: where the state is saved; closed at the end.
      logger: receives the metrics.
      accumulate: number of micro-batches into which `train_step` splits a batch.
      memory_budget: the memory that the step may take.
      steps_per_dispatch: steps compiled into one program; a divisor of `steps`, of the
        steps between two rows and of those between two checkpoints.
      validation: measures the state regularly, and may end the training early.
      programs: compiled programs, shared by the calls of a caller that passes the same
        dict to all of them.

    Raises:
      UserError: a step takes too much memory, or training diverged.
      Preempted: SIGTERM was received; the state is saved.
    """
    constants = sharding.place(constants, sharding.tree_shardings(constants, mesh))
    with preemption.deferred() as stop_requested, contextlib.closing(checkpoints):
        state = checkpoints.restore(state)
        logger.resume(int(state.skipped_in_a_row), steps)
        # A checkpoint of another `steps_per_dispatch` may be between two dispatches.
        first = int(state.step)
        stride = math.gcd(steps_per_dispatch, first)
        load = logger.timed(_batch_loader(read, mesh, accumulate, stride, steps))
        if first >= steps or (validation and validation.ends(first, checkpoints)):
            return state
        batch = load(first)
        arguments = state, constants, batch
        step_fn = _compiled(
            train_step, arguments, stride, memory_budget, programs, logger.name
        )
        if stop_requested():
            raise preemption.Preempted(f"{logger.name} after step {first}")
        batch_size = int(batch["weight"].sum()) // stride
        logging_steps = logger.open(first, steps, batch_size, stride)
        end_step = functools.partial(_end_step, logger, checkpoints, validation)
        with logging_steps, ThreadPoolExecutor(1) as executor:
            for step in range(first + stride, steps + 1, stride):
                next_batch = executor.submit(load, step)
                state, metrics = step_fn(state, constants, batch)
                batch = next_batch.result()
                logger.record(step, metrics)
                stop = stop_requested() or logger.diverged
                if end_step(step, state, stop=stop, last=step == steps):
                    break
        return state


def _end_step(
    logger: TrainLogger,
    checkpoints: Checkpoints,
    validation: Validation | None,
    step: int,
    state: TrainState,
    *,
    stop: bool,
    last: bool,
) -> bool:
    """Validates, saves and draws the state where due; whether training ends early."""
    if checkpoints.due(step) or last or stop:
        row = logger.write_row(step)
        with logger.pause():
            # Not at other steps, or an interrupted run might find another best state.
            if validation and (step % validation.every == 0 or last):
                row = logger.add_to_row(step, validation.measure(state))
            if logger.may_save(state):
                logger.flush()
                checkpoints.save(step, state, row)
    logger.raise_if_diverged()
    logger.draw(step, state)  # after the save, as drawing may fail
    if stop and not last:
        raise preemption.Preempted(f"{logger.name} after step {step}")
    return validation is not None and validation.ends(step, checkpoints)


def _batch_loader(
    read: Read,
    mesh: Mesh,
    accumulate: int,
    stride: int,
    steps: int,
) -> Callable[[int], dict[str, jax.Array]]:
    """A function from a step to the device arrays of `stride` steps from it on.

    They are [B, stride, ...], or [B, ...] for a stride of 1. After the last step it
    returns the last batch again. Of several processes each reads its own rows.
    """
    mine = _own_rows(read, mesh, accumulate, steps) if processes.count() > 1 else None

    def load(step: int) -> dict[str, jax.Array]:
        step = min(step, steps - stride)
        rows = () if mine is None else (mine.real,)
        if stride == 1:
            batch = read(step, *rows)
        else:
            batches = [_with_weights(read(step + i, *rows)) for i in range(stride)]
            batch = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *batches)
        if mine is None:
            return place_batch(batch, mesh, accumulate)
        return mine.place(_with_weights(batch), mesh)

    return load


class _OwnRows(NamedTuple):
    """The part of a padded batch that this process has: numbers of its rows.

    Attributes:
      all: with the padding.
      real: without, which are read.
      size: rows of the padded batch.
    """

    all: np.ndarray
    real: np.ndarray
    size: int

    def place(self, batch: Batch, mesh: Mesh) -> Batch:
        """Makes the global arrays of the rows `real`, of which others have the rest."""
        count = len(self.all)
        return jax.tree.map(
            lambda array: sharding.place_rows(
                sharding.pad_rows(array, count), self.all, self.size, mesh
            ),
            batch,
        )


def _own_rows(read: Read, mesh: Mesh, accumulate: int, steps: int) -> _OwnRows:
    """This process's rows of every batch; reads one to know how many it has."""
    batch_size = len(jax.tree.leaves(read(max(steps - 1, 0)))[0])
    size = _padded(batch_size, mesh, accumulate)
    rows = sharding.own_rows(size, mesh)
    return _OwnRows(rows, rows[rows < batch_size], size)


def _padded(batch_size: int, mesh: Mesh, accumulate: int) -> int:
    """`batch_size` rounded up to what micro-batches on all devices can share."""
    multiple = mesh.size * accumulate
    return -(-batch_size // multiple) * multiple


def _with_weights(batch: Batch) -> Batch:
    """`batch` with a `weight` [B] of ones, unless it has one."""
    rows = len(jax.tree.leaves(batch)[0])
    return {"weight": np.ones(rows, np.float32), **batch}


def _compiled(
    train_step: Callable,
    arguments: tuple,
    stride: int,
    memory_budget: memory.MemoryBudget,
    programs: dict[Any, Callable] | None,
    name: str,
) -> Callable:
    """`jit_step(train_step)`, compiled for `arguments` or taken from `programs`."""
    leaves, tree = jax.tree.flatten(arguments)
    types = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    key = (train_step, stride, tree, types)
    programs = {} if programs is None else programs
    if key not in programs:
        step_fn = jit_step(train_step, arguments[0], stride)
        programs[key] = memory_budget.compile(step_fn, *arguments, name=name)
    return programs[key]


def jit_step(
    train_step: Callable, state: TrainState, steps_per_dispatch: int = 1
) -> Callable:
    """Jits `(state, constants, batch) -> (state, metrics)` with donation and shardings.

    Metrics are scalars, or arrays [steps_per_dispatch] if that is above 1.

    Args:
      train_step: `(state, batch) -> (state, metrics)`.
      state: has the shardings of the result.
      steps_per_dispatch: steps of one call; if above 1, the batch is
        [B, steps_per_dispatch, ...].
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def one(state, batch):
        state, metrics = train_step(state, batch)
        return state, {**metrics, "skipped_in_a_row": state.skipped_in_a_row}

    def steps(state, constants, batch):
        if steps_per_dispatch == 1:
            return one(state, constants | batch)
        batches = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
        return jax.lax.scan(lambda s, b: one(s, constants | b), state, batches)

    return jax.jit(steps, donate_argnums=0, out_shardings=(shardings, None))


def place_batch(batch: Batch, mesh: Mesh, accumulate: int = 1) -> Batch:
    """Shards host arrays [B, ...], zero-padded to a multiple of the devices.

    Args:
      batch: a tree of arrays; `weight` [B] is added if missing: 1 for examples, 0 for
        padding.
      mesh: the devices.
      accumulate: number of micro-batches, each of which must be a multiple too.
    """
    batch = _with_weights(batch)
    size = _padded(len(batch["weight"]), mesh, accumulate)
    padded = jax.tree.map(lambda array: sharding.pad_rows(array, size), batch)
    return sharding.place(padded, sharding.batch_sharding(mesh))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` [B] weighted by `weights` [B], which are 0 for padding."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-8)


def gradients(
    losses: Callable[[Any, Batch], jax.Array],
    params: Any,
    batch: Batch,
    parts: int,
    shardings: Any = None,
) -> tuple[jax.Array, Any]:
    """Mean loss and its gradient, accumulated over `parts` micro-batches.

    Args:
      losses: `(params, batch) -> [B]`.
      params: the parameters to differentiate with respect to.
      batch: arrays [B, ...]; the mean is weighted by `weight` [B] over the whole batch,
        so that the result does not depend on `parts`.
      parts: a divisor of B.
      shardings: of the parameters, where they are sharded: each device then keeps only
        its shard of a gradient as soon as it is summed.
    """
    total = jnp.maximum(batch["weight"].sum(), 1e-8)

    def partial_mean(params, part):
        return (losses(params, part) * part["weight"]).sum() / total

    value_and_grad = jax.value_and_grad(partial_mean)
    if parts == 1:
        value, grads = value_and_grad(params, batch)
        return value, _constrain(grads, shardings)
    # Part i takes every `parts`-th example, so that each device keeps its own.
    micro_batches = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(sums, part):
        value, grads = value_and_grad(params, part)
        new = (value, _constrain(grads, shardings))
        return jax.tree.map(jnp.add, sums, new), None

    zeros = jax.tree.map(jnp.zeros_like, (total, params))
    # Gradients of convolutions are slow inside a loop on a CPU (see the module's top).
    mesh = next((leaf.mesh for leaf in jax.tree.leaves(shardings)), None)
    unroll = devices.platform(mesh) == "cpu"
    return jax.lax.scan(add, zeros, micro_batches, unroll=unroll)[0]


def _constrain(grads: Any, shardings: Any) -> Any:
    if shardings is None:
        return grads
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    # One barrier for each, or XLA may delay all reductions until the last gradient.
    return jax.tree.map(jax.lax.optimization_barrier, grads)
