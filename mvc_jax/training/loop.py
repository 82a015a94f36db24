"""The training loop: one jitted, donated, sharded step; resumable by its number.

Steps are dispatched one by one and run asynchronously; the next batch is read by a
thread meanwhile. Steps of a millisecond go `stride` at once, as one scan: not on a CPU,
where XLA runs convolutions inside a loop fifteen times slower than outside (measured on
the digits' autoencoder).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mvc_jax.training import memory, preemption, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.optim import ema_update
from mvc_jax.training.train_logger import TrainLogger
from mvc_jax.training.validation import Validation

Batch = dict[str, Any]


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

        state = jax.lax.cond(finite, take, lambda state, grads: state, self, grads)
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

    def cast(params):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def init(params):
        copy = jax.tree.map(jnp.copy, params) if ema else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, None, tx.init(params), zero, zero, copy)

    shapes = jax.eval_shape(cast, params)
    split = sharding.tree_shardings(shapes, mesh, rules)
    half = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))
    params = jax.device_put(params, split)
    if half:
        params = jax.jit(cast, out_shardings=split)(params)
    others = sharding.tree_shardings(jax.eval_shape(init, shapes), mesh, rules)
    # By itself, or the parameters would lie there twice.
    return jax.jit(init, out_shardings=others)(params).replace(params=params)


def fit(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    state: TrainState,
    *,
    read: Callable[[int], dict[str, np.ndarray]],
    fixed: dict[str, Any],
    mesh: Mesh,
    steps: int,
    checkpoints: Checkpoints,
    logger: TrainLogger,
    accumulate: int = 1,
    memory_budget: memory.MemoryBudget = memory.DEVICE,
    stride: int = 1,
    validation: Validation | None = None,
    programs: dict[Any, Callable] | None = None,
) -> TrainState:
    """Runs `train_step` up to step `steps`, from the newest checkpoint if there is one.

    Args:
      train_step: `(state, batch) -> (state, scalars)`, pure, by `TrainState.update`.
      state: at step 0; donated.
      read: step -> host arrays [B, ...]; a thread calls it one step ahead.
      fixed: what all batches share: placed once, sharded by the default rules.
      mesh, checkpoints, logger: of this loop, which stops after `steps` steps.
      accumulate: micro-batches that `train_step` cuts a batch into.
      memory_budget: how much memory the step may take.
      stride: steps of one dispatch; divides `steps` and those between rows and saves.
      validation: may end the loop early.
      programs: of a caller with many fits: each `train_step` is compiled once.

    Raises:
      UserError: a step takes too much memory, or too many were skipped.
      Preempted: SIGTERM came; the state is saved.
    """
    fixed = jax.device_put(fixed, sharding.tree_shardings(fixed, mesh))
    with preemption.deferred() as asked, contextlib.closing(checkpoints):
        state = checkpoints.restore(state)
        logger.resume(int(state.skipped_in_a_row))
        # Saved under another stride, it may lie between two dispatches of this one.
        stride = math.gcd(stride, first := int(state.step))
        place = _reader(read, mesh, accumulate, stride, steps)
        if first >= steps or (validation and validation.ends(first, checkpoints)):
            return state
        placed = state, fixed, (batch := place(first))
        step_on = _compiled(
            train_step, placed, stride, memory_budget, programs, logger.name
        )
        if asked():
            raise preemption.Preempted(f"{logger.name} after step {first}")
        size = int(batch["weight"].sum()) // stride
        opened = logger.opened(first, steps, size, stride)
        kept = functools.partial(_keep, logger, checkpoints, validation)
        with opened, ThreadPoolExecutor(1) as reader:
            for done in range(first + stride, steps + 1, stride):
                ahead = reader.submit(place, done)
                state, values = step_on(state, fixed, batch)
                batch = ahead.result()
                logger.note(done, values)
                stop = asked() or logger.hopeless
                if kept(done, state, stop=stop, last=done == steps):
                    break
        return state


def _keep(
    logger: TrainLogger,
    checkpoints: Checkpoints,
    validation: Validation | None,
    done: int,
    state: TrainState,
    *,
    stop: bool,
    last: bool,
) -> bool:
    """Saves and shows the state where it is time to; whether training ends early."""
    if checkpoints.due(done) or last or stop:
        row = logger.close_row(done)
        with logger.pause():
            # Not at any other step, or a run that was cut might find another best.
            if validation and (done % validation.every == 0 or last):
                row = logger.add(done, validation.measure(state))
            if logger.may_save(state):
                checkpoints.save(done, state, row)
    logger.raise_if_hopeless()
    logger.draw(done, state)  # once it is saved, for it may fail
    if stop and not last:
        raise preemption.Preempted(f"{logger.name} after step {done}")
    return validation is not None and validation.ends(done, checkpoints)


def _reader(read, mesh: Mesh, accumulate: int, stride: int, steps: int) -> Callable:
    """From a step to placed batches of `stride` steps from it, [B, stride, ...].

    Of one step they are [B, ...]; behind the last step they are the last one's.
    """

    def placed(step: int) -> dict[str, jax.Array]:
        step = min(step, steps - stride)
        if stride == 1:
            batch = read(step)
        else:
            batches = [_weighted(read(step + i)) for i in range(stride)]
            batch = {k: np.stack([b[k] for b in batches], axis=1) for k in batches[0]}
        return place_batch(batch, mesh, accumulate)

    return placed


def _weighted(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With a `weight` [B] of 1 for each example, unless it has its own."""
    rows = len(next(iter(batch.values())))
    return {"weight": np.ones(rows, np.float32), **batch}


def _compiled(train_step, placed, stride, memory_budget, programs, name) -> Any:
    """What `jitted` gives, compiled for `placed`, or taken from `programs`."""
    leaves, tree = jax.tree.flatten(placed)
    described = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    kind = (train_step, stride, tree, described)
    programs = {} if programs is None else programs
    if kind not in programs:
        step_on = jitted(train_step, placed[0], stride)
        programs[kind] = memory_budget.compile(step_on, *placed, name=name)
    return programs[kind]


def jitted(train_step: Callable, state: TrainState, stride: int = 1) -> Any:
    """`(state, fixed, batch) -> (state, metrics)`: donated, sharded as `state` is.

    `stride` steps go one after the other; their metrics are [stride], of one scalars.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def one(state, batch):
        state, metrics = train_step(state, batch)
        return state, metrics | {"skipped_in_a_row": state.skipped_in_a_row}

    def steps(state, fixed, batch):
        if stride == 1:
            return one(state, fixed | batch)
        batches = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
        return jax.lax.scan(lambda s, b: one(s, fixed | b), state, batches)

    return jax.jit(steps, donate_argnums=0, out_shardings=(shardings, None))


def place_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, accumulate: int = 1
) -> dict[str, jax.Array]:
    """Host arrays [B, ...] as sharded arrays [B', ...], B' padded to the mesh.

    `weight` [B] is added if it is not given: 1 for real examples, 0 for padding.
    """
    batch = _weighted(batch)
    batch_size = len(batch["weight"])
    multiple = mesh.size * accumulate
    size = -(-batch_size // multiple) * multiple
    padded = {key: sharding.pad_rows(array, size) for key, array in batch.items()}
    return jax.device_put(padded, sharding.batch_sharding(mesh))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` [B] over the examples with weight; padding counts nothing."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-8)


def gradients(
    losses: Callable[[Any, Batch], jax.Array],
    params: Any,
    batch: Batch,
    parts: int,
    shardings: Any = None,
) -> tuple[jax.Array, Any]:
    """Mean loss and its gradient, `parts` micro-batches one after the other.

    Args:
      losses: `(params, batch) -> [B]`.
      params: what to differentiate for.
      batch: arrays [B, ...]; `weight` [B] weighs the mean over the whole batch, so that
        the result does not depend on `parts`.
      parts: a divisor of B.
      shardings: of the parameters, where these are split: each device then keeps its
        share of a gradient as soon as it is summed, and never all of them.
    """
    total = jnp.maximum(batch["weight"].sum(), 1e-8)

    def share(params, part):
        return (losses(params, part) * part["weight"]).sum() / total

    share_and_gradient = jax.value_and_grad(share)
    if parts == 1:
        value, grads = share_and_gradient(params, batch)
        return value, _shares(grads, shardings)
    # Part i is every `parts`-th example from i on: each device keeps its own.
    micro = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(sums, part):
        value, grads = share_and_gradient(params, part)
        new = (value, _shares(grads, shardings))
        return jax.tree.map(jnp.add, sums, new), None

    zeros = jax.tree.map(jnp.zeros_like, (total, params))
    # Convolutions' gradients in a loop are slow on a CPU (top of this file).
    unroll = jax.default_backend() == "cpu"
    return jax.lax.scan(add, zeros, micro, unroll=unroll)[0]


def _shares(grads: Any, shardings: Any) -> Any:
    if shardings is None:
        return grads
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    return jax.tree.map(jax.lax.optimization_barrier, grads)  # one by one
