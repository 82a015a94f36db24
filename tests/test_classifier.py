"""A classifier's step: seeds that share nothing, slots that do not count, devices."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mvc_jax.classification import classifier
from mvc_jax.models.layers import Layers, drop
from mvc_jax.models.layers import head as last_layer
from mvc_jax.training import loop, memory, optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.train_logger import TrainLogger

R, B, K, STEPS = 20, 6, 3, 40
DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (R, 8, 8, 3), dtype=np.uint8)
LABELS = DRAW.integers(0, K, R).astype(np.int32)
INDEX = DRAW.integers(0, R, (B, 2)).astype(np.int32)
WEIGHT = np.ones((B, 2), np.float32)


class Tiny(nn.Module):
    """What every classifier has, and compiles in no time."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False, mask=None):
        layers = Layers(train, mask, jnp.float32)
        x = layers.conv(images, 8, 3, 2, name="conv1")
        x = nn.relu(layers.norm(x, name="bn1"))
        if train:
            x = drop(x, x.shape, 0.1, self.make_rng("dropout"))
        return last_layer(x.reshape(len(x), -1), self.num_classes)


MODEL = Tiny(K)
PLAIN = classifier.Recipe(MODEL)
# What a step can have at all: one program for most of the tests.
RECIPE = dataclasses.replace(
    PLAIN, policy="flip", ema_decay=0.9, class_weights=(1.0, 2.0, 1.0)
)
TX = optim.optimizer("sgd", 1.0, momentum=0.9, weight_decay=1e-3)
RATES = np.full(STEPS, 0.1, np.float32)


def keys(purpose, seeds=(0, 1)):
    return rng.example_keys(rng.purpose_key(0, purpose), jnp.int32(seeds))


@functools.cache
def jitted(recipe=RECIPE):
    return jax.jit(functools.partial(classifier.train_step, recipe=recipe, tx=TX))


def mesh(devices=1):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def start(seeds=(0, 1), devices=1, recipe=RECIPE, pretrained=None):
    return classifier.create_state(
        recipe,
        TX,
        keys("init", seeds),
        mesh(devices),
        image_shape=(8, 8, 3),
        pretrained=pretrained,
    )


def fixed(seeds=(0, 1)):
    shared = {"images": IMAGES, "labels": LABELS, "rates": RATES}
    return shared | {"keys": np.asarray(jax.random.key_data(keys("steps", seeds)))}


def batch(seeds=(0, 1), index=INDEX, weight=WEIGHT):
    columns = list(seeds)
    return fixed(seeds) | {"index": index[:, columns], "weight": weight[:, columns]}


def arrays(state):
    return jax.tree.map(np.asarray, (state.params, state.ema_params, state.batch_stats))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.fixture(scope="module")
def after():
    """Two seeds after two steps."""
    state = start()
    for _ in range(2):
        state, metrics = jitted()(state, batch())
    return state, metrics


def test_seeds_side_by_side_are_seeds_alone(after):
    for seed in (0, 1):
        state = start([seed])
        for _ in range(2):
            state, _ = jitted()(state, batch([seed]))
        both = jax.tree.map(lambda leaf, s=seed: leaf[s : s + 1], arrays(after[0]))
        assert_close(arrays(state), both)
    first, second = (classifier.one_seed(after[0], i)["params"] for i in (0, 1))
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, second)
    assert max(jax.tree.leaves(apart)) > 0.01


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_seed_that_is_not_finite_stays_and_the_other_goes_on(after, spoilt):
    state, sound = start(), 1 - spoilt

    def spoil(leaf):
        return leaf.at[(spoilt, *(0,) * (leaf.ndim - 1))].set(jnp.inf)

    state = state.replace(params=jax.tree.map(spoil, state.params))
    before = jax.tree.map(np.asarray, state)
    for _ in range(2):
        state, metrics = jitted()(state, batch())
    assert not np.isfinite(metrics["loss"])
    assert [int(state.skipped), int(state.skipped_in_a_row), int(state.step)] == [2] * 3
    stacked = [
        (s.params, s.ema_params, s.batch_stats, s.opt_state)
        for s in (state, before, after[0])
    ]
    now, old, whole = ([x for x in jax.tree.leaves(t) if x.ndim] for t in stacked)
    for a, b, c in zip(now, old, whole, strict=True):
        assert np.asarray(a[spoilt]).tobytes() == b[spoilt].tobytes()
        np.testing.assert_array_equal(a[sound], c[sound])


def test_a_stream_of_images_trains_as_the_whole_array_does(after):
    state = start()
    read = batch() | {"images": IMAGES[INDEX], "labels": LABELS[INDEX]}
    del read["index"]
    for _ in range(2):
        state, _ = jitted()(state, read)
    assert_equal(arrays(state), arrays(after[0]))


def test_slots_without_weight_change_nothing():
    more = np.concatenate([INDEX, INDEX[::-1]]), np.concatenate([WEIGHT, 0 * WEIGHT])
    other = np.concatenate([INDEX, (INDEX + 7) % R]), more[1]
    states = [jitted()(start(), batch((0, 1), *rows))[0] for rows in (more, other)]
    assert_equal(*map(arrays, states))
    alone, _ = jitted()(start(), batch())
    assert_close(arrays(states[0]), arrays(alone))


def test_eight_devices_train_as_one_does():
    rows = {"index": np.tile(INDEX, (4, 1)), "weight": np.tile(WEIGHT, (4, 1))}
    states = []
    for devices in (1, 8):
        shared = jax.device_put(fixed(), sharding.replicated(mesh(devices)))
        placed = loop.place_batch(rows, mesh(devices))
        state, _ = jitted()(start(devices=devices), shared | placed)
        states.append(arrays(state))
    assert_close(*states)


def losses(recipe, images, labels, weight):
    """What `train_step` should say of seed 0 at its start, without any policy."""
    state = start([0], recipe=recipe)
    variables = jax.tree.map(lambda x: x[0], (state.params, state.batch_stats))
    step_key = jax.random.fold_in(keys("steps", [0])[0], 0)
    dropout_key = jax.random.split(step_key, 3)[2]
    logits, _ = MODEL.apply(
        {"params": variables[0], "batch_stats": variables[1]},
        jnp.asarray(images / 127.5 - 1, jnp.float32),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    soft = jax.nn.one_hot(labels, K) * 0.9 + 0.1 / K
    values = optax.softmax_cross_entropy(logits, soft)
    return (values * weight).sum() / weight.sum()


def test_smoothing_and_class_weights_are_the_published_ones():
    """A class of weight 2 counts as if each of its examples were there twice."""
    recipe = dataclasses.replace(
        PLAIN, label_smoothing=0.1, class_weights=(1.0, 2.0, 1.0)
    )
    _, metrics = jitted(recipe)(start([0], recipe=recipe), batch([0]))
    rows = INDEX[:, 0]
    weight = np.where(LABELS[rows] == 1, 2.0, 1.0)
    expected = losses(recipe, IMAGES[rows], LABELS[rows], weight)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    equal = losses(recipe, IMAGES[rows], LABELS[rows], np.ones(B))
    assert abs(metrics["loss"] - equal) > 1e-3


def test_predictions_do_not_depend_on_batches_or_devices(after):
    state = after[0]
    found = []
    for devices, size in ((1, 20), (8, 3)):
        moved = jax.device_put(state, sharding.replicated(mesh(devices)))
        predict = classifier.predictor(RECIPE, mesh(devices), batch_size=size)
        found.append(predict(moved, IMAGES))
    assert found[0].shape == (2, R, K)
    np.testing.assert_allclose(found[0].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("most, level", [(1, 0), (2, None)])
def test_many_kernels_are_drawn_by_a_program_that_compiles_quickly(
    monkeypatch, most, level
):
    """`Tiny` has two kernels. Quickly or not, the weights are the same."""
    given = []

    def spy(function, *, compiler_options, jit=jax.jit):
        given.append(compiler_options)
        return jit(function, compiler_options=compiler_options)

    usual = classifier._initialiser.__wrapped__(MODEL, (8, 8, 3))(keys("init"))
    monkeypatch.setattr(classifier, "_MANY_KERNELS", most)
    monkeypatch.setattr(classifier.jax, "jit", spy)
    init = classifier._initialiser.__wrapped__(MODEL, (8, 8, 3))
    monkeypatch.undo()
    found, (options,) = init(keys("init")), given
    assert (options or {}).get("xla_backend_optimization_level") == level
    assert_close(found, usual, atol=1e-6)


def test_a_pretrained_start_keeps_all_but_the_head():
    given = classifier.one_seed(start([5]), 0)
    state = start(pretrained=given)
    fresh = start()
    for seed in (0, 1):
        found = classifier.one_seed(state, seed)
        head = found["params"].pop("fc")
        body = {name: leaf for name, leaf in given["params"].items() if name != "fc"}
        assert_equal(found, {"params": body, "batch_stats": given["batch_stats"]})
        drawn = classifier.one_seed(fresh, seed)["params"]["fc"]
        assert_equal(head, drawn)
        assert (head["kernel"] != given["params"]["fc"]["kernel"]).any()


def fit(folder, steps, programs, stop_at=None):
    """Six steps of two seeds, with a checkpoint after each second one."""

    def read(step):
        index = np.random.default_rng(step).integers(0, R, (B, 2)).astype(np.int32)
        return {"index": index, "weight": WEIGHT}

    def killed(step):
        if step == stop_at:
            raise KeyboardInterrupt
        return read(step)

    return loop.fit(
        STEP,
        start(),
        read=killed if stop_at else read,
        constants=fixed(),
        mesh=mesh(),
        steps=steps,
        checkpoints=Checkpoints(folder / "fit", every=2),
        logger=TrainLogger(folder, "test", log_every=2),
        memory_budget=memory.DEVICE,
        programs=programs,
    )


STEP = functools.partial(classifier.train_step, recipe=RECIPE, tx=TX)


def test_a_fit_that_was_killed_ends_with_the_same_bits(tmp_path):
    programs = {}
    whole = fit(tmp_path / "whole", 6, programs)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", 6, programs, stop_at=5)
    assert (tmp_path / "cut" / "fit" / "2").exists()
    assert not (tmp_path / "cut" / "fit" / "6").exists()
    resumed = fit(tmp_path / "cut", 6, programs)
    assert int(resumed.step) == 6 and len(programs) == 1
    assert_equal(*(jax.tree.map(np.asarray, state) for state in (whole, resumed)))


def test_it_learns():
    """Its own twenty images, by heart."""
    state = start([0], recipe=PLAIN)
    for step in range(STEPS):
        rows = np.random.default_rng(step).permutation(R)[:, None].astype(np.int32)
        state, _ = jitted(PLAIN)(state, batch([0], rows, np.ones((R, 1), np.float32)))
    predict = classifier.predictor(PLAIN, mesh(), batch_size=R)
    assert (predict(state, IMAGES)[0].argmax(-1) == LABELS).all()
