"""The training loop: resuming, skipped steps, sharding, memory, metrics on disk."""

import functools
import json
import logging
import os
import signal
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tensorboardX import event_file_writer

from mvc_jax.data import order
from mvc_jax.errors import UserError
from mvc_jax.training import loop, memory, optim, preemption, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.loop import (
    create_state,
    fit,
    gradients,
    jit_step,
    weighted_mean,
)
from mvc_jax.training.metrics import MetricsLog, event_pb2
from mvc_jax.training.throughput import count_flops, peak_tflops
from mvc_jax.training.train_logger import DrawHook, TrainLogger
from mvc_jax.training.validation import Validation

TX = optax.adam(0.1)


def noisy_step(state, batch, *, spoil=lambda step, loss, grads: (loss, grads)):
    """Linear regression with noise on its inputs, drawn from the step's number."""
    key = jax.random.fold_in(jax.random.key(7), state.step)
    keys = rng.example_keys(key, jnp.arange(len(batch["x"])))
    x = batch["x"] + 0.1 * rng.normal_like(keys, (3,))

    def loss_of(params):
        return weighted_mean((x @ params["w"] - batch["y"]) ** 2, batch["weight"])

    value, grads = jax.value_and_grad(loss_of)(state.params)
    value, grads = spoil(state.step, value, grads)
    return state.update(grads, TX, {"loss": value}, ema_decay=0.9), {"loss": value}


def run(
    folder,
    steps,
    *,
    mesh=None,
    batch_size=5,
    step=noisy_step,
    every=2,
    accumulate=1,
    memory_budget=memory.WHOLE_DEVICE,
    log_every=1,
    loop=None,
    **logger_options,
):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    data = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)

    def read(number):
        index = order.batch_indices(0, "t", number, batch_size=batch_size, size=11)
        return {"x": data[index], "y": data[index].sum(1)}

    return fit(
        step,
        create_state({"w": np.ones(3, np.float32)}, TX, mesh, ema=True),
        read=read,
        constants={},
        mesh=mesh,
        steps=steps,
        checkpoints=Checkpoints(folder / "checkpoints", every=every, best="error"),
        logger=TrainLogger(folder, "toy", log_every=log_every, **logger_options),
        accumulate=accumulate,
        memory_budget=memory_budget,
        **(loop or {}),
    )


def rows_of(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def leaves(state):
    return jax.device_get(jax.tree.leaves(state))


def test_four_steps_are_two_and_two_more_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    again = run(tmp_path / "cut", 4)
    for a, b in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(again.step) == 4
    losses = [
        [(row["step"], row["loss"]) for row in rows_of(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_several_steps_per_dispatch_equal_single_steps(tmp_path):
    whole = run(tmp_path / "one", 6)
    run(tmp_path / "three", 3, every=3, log_every=3, loop={"steps_per_dispatch": 3})
    again = run(
        tmp_path / "three", 6, every=3, log_every=3, loop={"steps_per_dispatch": 3}
    )
    for a, b in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    losses, thirds = (
        [row["loss"] for row in rows_of(tmp_path / n)] for n in ("one", "three")
    )
    np.testing.assert_allclose(np.reshape(losses, (2, 3)).mean(1), thirds, rtol=1e-5)


def test_a_run_resumed_with_more_steps_per_dispatch_ends_at_its_last_step(tmp_path):
    whole = run(tmp_path / "whole", 12, every=12)
    run(tmp_path / "cut", 4, every=4)
    again = run(
        tmp_path / "cut", 12, every=6, log_every=6, loop={"steps_per_dispatch": 6}
    )
    assert int(again.step) == 12
    for a, b in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_fits_with_equal_shapes_share_a_program(tmp_path):
    programs = {}
    for name in ("a", "b"):
        run(tmp_path / name, 2, loop={"programs": programs})
    assert len(programs) == 1
    run(tmp_path / "c", 2, batch_size=9, loop={"programs": programs})
    assert len(programs) == 2


ERRORS = [5.0, 3.0, 4.0, 4.0, 1.0, 2.0]  # after 1, 2, ... steps


def validation(patience, every=1):
    def measure(state):
        return {"error": ERRORS[int(state.step) - 1]}

    return {"validation": Validation(measure, every, patience)}


@pytest.mark.parametrize(("patience", "last"), [(0, 6), (1, 3), (2, 4), (3, 6)])
def test_training_ends_after_patience_steps_without_improvement(
    tmp_path, patience, last
):
    state = run(tmp_path, 6, every=1, loop=validation(patience))
    assert int(state.step) == last
    again = run(tmp_path, 6, every=1, loop=validation(patience))
    assert int(again.step) == last  # rerunning does not train on
    errors = [row["error"] for row in rows_of(tmp_path) if "error" in row]
    assert errors == ERRORS[:last]


def test_training_ends_only_at_a_validation(tmp_path):
    """Of the losses measured, 3, 4 and 2, the last is the lowest, four steps later."""
    state = run(tmp_path, 6, every=2, log_every=2, loop=validation(3, every=2))
    assert int(state.step) == 6
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=2, best="error")
    assert checkpoints.best_step == 6
    checkpoints.close()


def test_the_best_state_is_restored(tmp_path):
    best = 2
    expected = run(tmp_path / "best", best)
    state = run(tmp_path / "all", 4, every=1, loop=validation(0))
    checkpoints = Checkpoints(tmp_path / "all" / "checkpoints", every=1, best="error")
    assert checkpoints.best_step == best
    found = checkpoints.restore_best(state)
    for a, b in zip(leaves(expected), leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    for file in (tmp_path / "all" / "checkpoints" / f"{best}").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with pytest.raises(
        UserError, match="checkpoints/2: .*damaged.*train this one again"
    ):
        checkpoints.restore_best(found)
    checkpoints.close()


def test_rows_that_a_killed_run_wrote_after_its_checkpoint_are_dropped(tmp_path):
    run(tmp_path, 2)
    log = MetricsLog(tmp_path, "toy", from_step=9)
    log.write(3, loss=123.0)
    log.write(1, other=1.0)
    log.close()
    run(tmp_path, 4)
    rows = rows_of(tmp_path)
    assert 123.0 not in [row.get("loss") for row in rows]
    assert sorted(row["step"] for row in rows if "loss" in row) == [1, 2, 3, 4]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, monkeypatch):
    """Also the step that the run resumed from; by the rule of TensorBoard's loader.

    `benchmarks/consumers.sh` asks TensorBoard itself.
    """
    for second, (first, steps) in enumerate([(0, (20, 40, 60, 80)), (60, (80, 100))]):
        clock = types.SimpleNamespace(time=lambda now=second: 1e9 + now)
        monkeypatch.setattr(event_file_writer, "time", clock)  # it names the file
        log = MetricsLog(tmp_path, "toy", from_step=first)
        for step in steps:
            log.write(step, loss=float(step + second))
        log.close()
    shown = []
    for path in sorted((tmp_path / "tensorboard" / "toy").iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, an event, its checksum
            end = 12 + int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12:end])
            content = content[end + 4 :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [row for row in shown if row[0] < event.step]
            shown += [(event.step, x.simple_value) for x in event.summary.value]
    assert shown == [(20, 20), (40, 40), (60, 60), (80, 81), (100, 101)]
    assert shown == [(row["step"], row["loss"]) for row in rows_of(tmp_path)]


def test_rows_are_on_the_disk_before_the_checkpoint_that_has_them(
    tmp_path, monkeypatch
):
    """So a kill right after the save costs none."""
    save, seen = Checkpoints.save, []

    def checked(self, step, *arguments):
        seen.append([row["step"] for row in rows_of(tmp_path)])
        save(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", checked)
    run(tmp_path, 5, every=2)
    assert seen == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "damage",
    [b'{"stage": "toy", "st', b"[1]", b'{"stage": 3, "step": 1}', b"\xff\x00", b"null"],
)
def test_damaged_rows_are_left_out_with_a_warning(tmp_path, caplog, damage):
    run(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    rows = rows_of(tmp_path)
    path.write_bytes(damage + b"\n" + path.read_bytes() + damage)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 3)
    assert f"{path}: 2 damaged rows are not used" in caplog.text
    assert rows_of(tmp_path)[:2] == rows
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_damaged_newest_checkpoint_falls_back_and_is_named(tmp_path, caplog):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path, 4)
    newest = tmp_path / "checkpoints" / "4"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path, 4)
    assert "checkpoints/4 is damaged" in caplog.text
    for a, b in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def bad_at(steps, what="both", poison=np.inf):
    """`noisy_step` whose loss or gradient is not finite at the given steps."""

    def spoil(step, value, grads):
        added = jnp.where(jnp.isin(step, jnp.array([*steps])), poison, 0.0)
        if what != "loss":
            grads = jax.tree.map(lambda leaf: leaf.at[1].add(added), grads)
        return value + (added if what != "gradient" else 0.0), grads

    return functools.partial(noisy_step, spoil=spoil)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        state = run(tmp_path, 6, step=bad_at([1, 2, 4]))
    assert int(state.step) == 6
    assert int(state.skipped) == 3
    assert int(state.skipped_in_a_row) == 0
    assert "toy: 1 of the 1 steps up to step 2 were skipped" in caplog.text
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 1, 0]
    assert ["loss" in row for row in rows] == [True, False, False, True, False, True]
    count = next(x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32)
    assert int(count) == 3  # the optimiser took only the good steps
    assert np.isfinite(np.concatenate([x.ravel() for x in leaves(state)])).all()


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("poison", [np.nan, -np.inf])
@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 4)])
@pytest.mark.parametrize("taken", [loop.take_by_branch, loop.take_by_selection])
def test_a_bad_step_changes_nothing_but_its_counts(
    what, poison, data, fsdp, taken, monkeypatch
):
    """Bit for bit, including negative zeros, and on every device."""
    monkeypatch.setattr(loop, "take_by_branch", taken)  # a CPU's
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    params = {"kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)}
    tx = optim.adam(0.1, max_norm=1.0)
    state = create_state(params, tx, mesh, ema=True)
    state = jax.tree.map(lambda x: x.at[0, 0].set(-0.0) if x.ndim else x, state)

    @jax.jit
    def step(state, grad, loss):
        return state.update({"kernel": grad}, tx, {"loss": loss}, ema_decay=0.9)

    bad, good = jnp.ones((8, 3)).at[5, 2].set(poison), jnp.ones((8, 3))
    loss, grad = (poison, good) if what == "loss" else (0.0, bad)
    twice = step(step(state, grad, loss), grad, loss)
    counts = {"step": 2, "skipped": 2, "skipped_in_a_row": 2}
    assert {name: int(getattr(twice, name)) for name in counts} == counts
    kept = twice.replace(**{name: getattr(state, name) for name in counts})
    for a, b in zip(leaves(kept), leaves(state), strict=True):
        assert a.tobytes() == b.tobytes()
    moved = step(twice, good, 0.0)
    assert (int(moved.skipped), int(moved.skipped_in_a_row)) == (2, 0)
    trained = [(s.params, s.ema_params, s.opt_state) for s in (moved, state)]
    for a, b in zip(*map(leaves, trained), strict=True):
        assert a.tobytes() != b.tobytes()


def test_gradients_are_laid_out_for_a_gpu_without_a_gather():
    mesh = sharding.make_mesh(2, 4)
    draw = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 8, 16), "bias": (3,)}
    grads = {k: draw.normal(size=v).astype(np.float32) for k, v in shapes.items()}
    places = sharding.tree_shardings(grads, mesh)
    grads = sharding.place(grads, places)
    gathers = {}
    for name, known in (("parts", places), ("whole", None)):
        made = functools.partial(loop.row_major, shardings=known)
        program = jax.jit(made, out_shardings=places).lower(grads).compile()
        gathers[name] = program.as_text().count("all-gather(")
        jax.tree.map(np.testing.assert_array_equal, program(grads), grads)
    assert gathers == {"parts": 0, "whole": 1}


def test_an_update_is_in_place():
    """Although a step may be skipped, no copy of the state is made."""
    mesh = sharding.make_mesh(1, 8)
    params = {f"{n}": {"kernel": np.ones((256, 256), np.float32)} for n in range(12)}
    state = create_state(params, TX, mesh, ema=True)
    grads = jax.tree.map(jnp.ones_like, state.params)

    def train_step(state, batch):
        metrics = {"loss": batch["loss"]}
        return state.update(batch["grads"], TX, metrics, ema_decay=0.9), metrics

    batch = {"loss": jnp.zeros(()), "grads": grads}
    analysis = jit_step(train_step, state).lower(state, {}, batch).compile()
    analysis = analysis.memory_analysis()
    shard = 4 * 12 * 256 * 256 / 8  # bytes of the parameters on one device
    assert analysis.alias_size_in_bytes > 4 * shard
    assert analysis.temp_size_in_bytes < 0.2 * shard


def test_too_many_consecutive_bad_steps_end_the_run_with_the_last_good_state(tmp_path):
    with pytest.raises(UserError, match="toy.*finite.*4 consecutive steps"):
        run(tmp_path, 9, step=bad_at([2, 4, 5, 6, 7, 8]), max_skipped=3)
    good = run(tmp_path / "good", 4, step=bad_at([2]))
    kept = Checkpoints(tmp_path / "checkpoints", every=2).restore(
        jax.tree.map(jnp.zeros_like, good)
    )
    assert int(kept.skipped_in_a_row) >= 3
    np.testing.assert_array_equal(kept.params["w"], good.params["w"])


def test_a_diverged_run_stays_diverged_when_it_is_repeated(tmp_path):
    for _ in range(3):
        with pytest.raises(UserError, match="4 consecutive steps") as error:
            run(tmp_path, 4, step=bad_at([0, 1, 2, 3]), max_skipped=3)
        assert "a new --workdir or add --redo=toy: " in str(error.value)


def test_a_run_without_a_single_good_step_diverged_whatever_it_tolerates(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="toy.*finite.*4 consecutive steps"):
            run(tmp_path, 4, step=bad_at([0, 1, 2, 3]), max_skipped=100)
    assert int(run(tmp_path / "one", 4, step=bad_at([0, 1, 2])).skipped) == 3


@pytest.mark.parametrize("steps, every", [(40, 100), (20, 100), (40, 5), (40, 20)])
def test_a_streak_that_ended_before_its_row_was_written_counts(tmp_path, steps, every):
    """Also when the run is repeated, from a checkpoint saved before the streak."""
    settings = {"step": bad_at(range(1, 19)), "log_every": 20, "every": every}
    for _ in range(3):
        with pytest.raises(UserError, match=r"toy.* 1\d consecutive steps"):
            run(tmp_path, steps, max_skipped=10, **settings)
    state = run(tmp_path / "more", steps, max_skipped=19, **settings)
    assert int(state.skipped) == 18


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4)])
def test_any_batch_on_any_mesh_gives_the_same_training(tmp_path, data, fsdp):
    """A batch of 5 is padded to 8 with examples of weight 0."""
    one = run(tmp_path / "one", 4)
    mesh = sharding.make_mesh(data, fsdp)
    eight = run(tmp_path / "eight", 4, mesh=mesh)
    for a, b in zip(leaves(one), leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_first_rule_is_used_and_an_indivisible_leaf_is_replicated():
    mesh = sharding.make_mesh(2, 4)
    tree = {
        "a": {"kernel": np.zeros((3, 8, 12)), "bias": np.zeros(12)},
        "b": {"kernel": np.zeros((3, 5))},
    }
    flat = flax.traverse_util.flatten_dict(sharding.tree_shardings(tree, mesh))
    assert flat["a", "kernel"].spec == P(None, None, "fsdp")
    assert flat["a", "bias"].spec == P()
    assert flat["b", "kernel"].spec == P()
    first = sharding.tree_shardings(
        tree, mesh, [("a/kernel", "replicate"), ("", "fsdp")]
    )
    assert first["a"]["kernel"].spec == P()
    assert first["a"]["bias"].spec == P("fsdp")


def test_optimiser_state_has_the_sharding_of_its_parameter():
    mesh = sharding.make_mesh(2, 4)
    state = create_state({"kernel": np.zeros((8, 3), np.float32)}, TX, mesh, ema=True)
    for leaf in jax.tree.leaves(
        (state.params, state.opt_state[0].mu, state.ema_params)
    ):
        assert leaf.sharding.spec == P("fsdp")
        assert leaf.addressable_shards[0].data.shape == (2, 3)


def squared_errors(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_have_the_gradient_of_the_whole_batch_with_or_without_padding(
    parts,
):
    draw = np.random.default_rng(1)
    batch = {
        "x": draw.normal(size=(6, 3)).astype(np.float32),
        "y": draw.normal(size=6).astype(np.float32),
        "weight": np.array([1, 1, 1, 1, 0, 0], np.float32),
    }
    params = {"w": draw.normal(size=3).astype(np.float32)}
    whole = gradients(squared_errors, params, batch, 1)
    real = {key: array[:4] for key, array in batch.items()}
    for other in (
        gradients(squared_errors, params, batch, parts),
        gradients(squared_errors, params, real, 1),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, other
        )


def test_micro_batches_are_sharded_over_the_devices(tmp_path):
    def step(state, batch):
        assert batch["x"].shape[0] == 24  # 8 devices x 3 parts
        value, grads = gradients(squared_errors, state.params, batch, 3)
        return state.update(grads, TX, {"loss": value}, ema_decay=0.9), {"loss": value}

    one = run(tmp_path / "a", 2, step=step, mesh=sharding.make_mesh(), accumulate=3)

    def plain(state, batch):
        value, grads = gradients(squared_errors, state.params, batch, 1)
        return state.update(grads, TX, {"loss": value}, ema_decay=0.9), {"loss": value}

    two = run(tmp_path / "b", 2, step=plain)
    np.testing.assert_allclose(one.params["w"], two.params["w"], rtol=1e-5)


def test_master_weights_are_fp32_whatever_the_file_had():
    mesh = sharding.make_mesh()
    half = {"kernel": np.arange(8, dtype=np.float16)}
    state = create_state(half, TX, mesh, ema=True)
    for tree in (state.params, state.ema_params, state.opt_state[0].mu):
        assert tree["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(state.params["kernel"], np.arange(8))


def test_a_step_over_the_memory_budget_is_refused_with_numbers_and_a_hint(tmp_path):
    with pytest.raises(UserError) as error:
        run(tmp_path, 2, memory_budget=memory.MemoryBudget(40, "Do less."))
    assert "0.00 GiB of cpu" in str(error.value)
    assert "for activations and gradients. Do less." in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()
    run(tmp_path, 2, memory_budget=memory.MemoryBudget(1 << 30, ""))


def test_a_step_that_a_tpu_s_compiler_refuses_has_the_same_numbers():
    """As libtpu 0.0.42.1 words it; the arguments are part of its sum."""

    class Refused:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
                "required for HLO temporaries (17.91G) exceeds available HBM (15.75G)."
            )

    def estimate(held, new, size):
        return f"{held}, {held + new >> 20}, {size}"

    budget = memory.MemoryBudget(1 << 34, "Do less.", estimate)
    with pytest.raises(UserError, match="got 17.91 GiB: 0.00 .* Do less. 12, 18339, "):
        budget.compile(Refused(), jnp.ones(3), name="a step")


def test_rows_have_rates_and_memory_and_the_draw_hook_is_called(tmp_path):
    seen = []

    def draw(step, state, log):
        seen.append((step, int(state.step)))
        log.picture(step, "grid", np.zeros((4, 4, 3), np.uint8))

    run(tmp_path, 5, flops=1e6, draw_hook=DrawHook(2, draw))
    assert seen == [(2, 2), (4, 4), (5, 5)]
    for row in rows_of(tmp_path):
        assert row["examples_per_s"] > 0
        assert row["tflops"] == pytest.approx(row["examples_per_s"] * 1e-6)
        assert 0.01 < row["memory_gib"] < 1000
        assert "mfu" not in row  # the peak of a CPU is unknown


def test_a_draw_hook_that_fails_costs_no_checkpoint(tmp_path):
    def draw(step, state, log):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, 8, every=4, draw_hook=DrawHook(4, draw))
    assert (tmp_path / "checkpoints" / "4").exists()


def test_a_stopped_run_saves_before_it_draws(tmp_path):
    seen = []

    def draw(step, state, log):
        saved = [path.name[:1] for path in (tmp_path / "checkpoints").glob("[0-9]*")]
        seen.append((step, saved))
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with preemption.handled(), pytest.raises(preemption.Preempted, match="step 3"):
        run(tmp_path, 8, every=100, draw_hook=DrawHook(1, draw))
    assert seen == [(1, []), (2, []), (3, ["3"])]
    run(tmp_path, 8, every=100, draw_hook=DrawHook(1, draw))
    assert [step for step, _ in seen] == [*range(1, 9)]


def test_flops_are_those_of_products_and_convolutions():
    def function(x, kernel):
        y = jax.lax.conv(x, kernel, (1, 1), "SAME")
        y, _ = jax.lax.scan(lambda c, _: (jax.nn.relu(c @ c), None), y, length=5)
        return jax.jit(jnp.tanh)(y)

    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 3, 8, 8), (3, 3, 5, 5))
    ]
    conv = 2 * 64 * 3 * 3 * 25
    assert count_flops(function, *shapes) == conv + 5 * 3 * 2 * 8**3

    def by_platform(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=jnp.sin)

    for platform, products in {"tpu": 3, "cpu": 0, "gpu": 0}.items():
        counted = count_flops(jax.vmap(by_platform), shapes[0], platform=platform)
        assert counted == products * 2 * 8**3


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("cpu", None),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_peak_tflops(kind, peak):
    assert peak_tflops(kind) == peak


@pytest.mark.parametrize("data, fsdp", [(3, 1), (-1, 3), (0, 8), (4, 4)])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(data, fsdp):
    with pytest.raises(UserError, match=r"config.mesh.*8 devices"):
        sharding.make_mesh(data, fsdp)


def test_each_purpose_and_each_example_has_its_own_key():
    keys = [rng.purpose_key(s, p) for s in (0, 1) for p in ("a", "b")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4
    one = rng.example_keys(keys[0], jnp.arange(3))
    two = rng.example_keys(keys[0], jnp.array([2, 0]))
    np.testing.assert_array_equal(
        jax.random.key_data(one[jnp.array([2, 0])]), jax.random.key_data(two)
    )
