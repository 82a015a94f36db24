"""The loop: resumable by step, whatever happens; sharding rules; metrics on disk."""

import json
import logging

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mvc_jax.data import order
from mvc_jax.errors import UserError
from mvc_jax.training import rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.loop import create_state, fit, weighted_mean
from mvc_jax.training.metrics import MetricsLog

TX = optax.adam(0.1)


def noisy_step(state, batch):
    """Linear regression with noise on its inputs, drawn from the step's number."""
    key = jax.random.fold_in(jax.random.key(7), state.step)
    keys = rng.example_keys(key, jnp.arange(len(batch["x"])))
    x = batch["x"] + 0.1 * rng.normal_like(keys, (3,))

    def loss_of(params):
        return weighted_mean((x @ params["w"] - batch["y"]) ** 2, batch["weight"])

    value, grads = jax.value_and_grad(loss_of)(state.params)
    return state.update(grads, TX, ema_decay=0.9), {"loss": value}


def run(folder, steps, *, mesh=None, batch_size=5, step=noisy_step, every=2):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    data = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)

    def rows(number):
        index = order.batch_indices(0, "t", number, batch_size=batch_size, size=11)
        return {"index": index}

    return fit(
        step,
        create_state({"w": np.ones(3, np.float32)}, TX, mesh, ema=True),
        data={"x": data, "y": data.sum(1)},
        gather=lambda data, rows: {
            "x": data["x"][rows["index"]],
            "y": data["y"][rows["index"]],
            "weight": rows["weight"],
        },
        rows=rows,
        mesh=mesh,
        steps=steps,
        log_every=1,
        checkpoints=Checkpoints(folder / "checkpoints", every=every),
        metrics=lambda first: MetricsLog(folder, "toy", from_step=first),
        name="toy",
    )


def leaves(state):
    return jax.device_get(jax.tree.leaves(state))


def test_four_steps_are_two_and_two_more_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    again = run(tmp_path / "cut", 4)
    for a, b in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(again.step) == 4
    read = [
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")
    ]
    assert read[0] == read[1]


def test_rows_that_a_killed_run_wrote_past_its_checkpoint_are_dropped(tmp_path):
    run(tmp_path, 2)
    log = MetricsLog(tmp_path, "toy", from_step=9)
    log.write(3, loss=123.0)
    log.write(1, other=1.0)
    log.close()
    run(tmp_path, 4)
    rows = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert 123.0 not in [row.get("loss") for row in rows]
    assert sorted(row["step"] for row in rows if "loss" in row) == [1, 2, 3, 4]


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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_state(tmp_path):
    def explode(state, batch):
        state, metrics = noisy_step(state, batch)
        return state, {"loss": jnp.where(state.step > 3, jnp.nan, metrics["loss"])}

    with pytest.raises(UserError, match="loss=nan"):
        run(tmp_path, 6, step=explode)
    again = run(tmp_path, 6)
    whole = run(tmp_path / "whole", 6)
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4)])
def test_any_batch_on_any_mesh_gives_the_same_training(tmp_path, data, fsdp):
    """A batch of 5 on 8 devices is padded with examples that weigh nothing."""
    one = run(tmp_path / "one", 4)
    mesh = sharding.make_mesh(data, fsdp)
    eight = run(tmp_path / "eight", 4, mesh=mesh)
    for a, b in zip(leaves(one), leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_rules_decide_and_what_does_not_divide_stays_whole():
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


def test_optimiser_state_is_born_with_its_parameter_s_sharding():
    mesh = sharding.make_mesh(2, 4)
    state = create_state({"kernel": np.zeros((8, 3), np.float32)}, TX, mesh, ema=True)
    for leaf in jax.tree.leaves(
        (state.params, state.opt_state[0].mu, state.ema_params)
    ):
        assert leaf.sharding.spec == P("fsdp")
        assert leaf.addressable_shards[0].data.shape == (2, 3)


@pytest.mark.parametrize("data, fsdp", [(3, 1), (-1, 3), (0, 8), (4, 4)])
def test_a_mesh_that_does_not_fit_is_an_error(data, fsdp):
    with pytest.raises(UserError, match=r"config.mesh.*8 devices"):
        sharding.make_mesh(data, fsdp)


def test_purposes_and_examples_have_keys_of_their_own():
    keys = [rng.purpose_key(s, p) for s in (0, 1) for p in ("a", "b")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4
    one = rng.example_keys(keys[0], jnp.arange(3))
    two = rng.example_keys(keys[0], jnp.array([2, 0]))
    np.testing.assert_array_equal(
        jax.random.key_data(one[jnp.array([2, 0])]), jax.random.key_data(two)
    )
