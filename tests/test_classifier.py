"""A classifier's step: independent seeds, slots without weight, devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mvc_jax import augment
from mvc_jax.classification import classifier
from mvc_jax.models.layers import Layers, drop
from mvc_jax.models.layers import head as last_layer
from mvc_jax.training import loop, memory, optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.train_logger import TrainLogger

R, B, K, STEPS = 20, 6, 3, 120
DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (R, 8, 8, 3), dtype=np.uint8)
LABELS = DRAW.integers(0, K, R).astype(np.int32)
INDEX = DRAW.integers(0, R, (B, 2)).astype(np.int32)
WEIGHT = np.ones((B, 2), np.float32)


class Tiny(nn.Module):
    """Convolution, batch normalisation, dropout and a head; compiles quickly."""

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
# Everything that a step can have: one program for most of the tests.
SPEC = classifier.ClassifierSpec(
    MODEL,
    policy="flip",
    ema_decay=0.9,
    label_smoothing=0.1,
    class_weights=(1.0, 2.0, 1.0),
)
# Like Adam it counts its steps, but small gradients make small updates.
TX = optax.chain(
    optim.optimizer("sgd", 1.0, momentum=0.9, weight_decay=1e-3),
    optax.scale_by_schedule(lambda count: 1 / (1 + count / 20)),
)
RATES = np.full(STEPS, 0.1, np.float32)


def keys(purpose, seeds=(0, 1)):
    return rng.example_keys(rng.purpose_key(0, purpose), jnp.int32(seeds))


STEP = functools.partial(classifier.train_seeds, spec=SPEC, tx=TX)
step = jax.jit(STEP)


def mesh(devices=1):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def start(seeds=(0, 1), devices=1, pretrained=None):
    return classifier.create_state(
        SPEC,
        TX,
        keys("init", seeds),
        mesh(devices),
        image_shape=(8, 8, 3),
        pretrained=pretrained,
    )


def fixed(seeds=(0, 1)):
    return {
        "images": IMAGES,
        "labels": LABELS,
        "rates": RATES,
        "key": np.asarray(jax.random.key_data(keys("steps", seeds))),
    }


def batch(seeds=(0, 1), index=INDEX, weight=WEIGHT):
    columns = list(seeds)
    return {
        **fixed(seeds),
        "index": index[:, columns],
        "weight": weight[:, columns],
    }


def per_seed(state):
    """Everything that a seed has of its own, on the host."""
    parts = (state.params, state.ema_params, state.batch_stats, state.opt_state)
    parts = (*parts, state.ema_batch_stats)
    return jax.tree.map(np.asarray, parts)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def of_seed(state, seed):
    return jax.tree.map(lambda leaf: leaf[seed], per_seed(state))


@pytest.fixture(scope="module")
def after():
    """Two seeds after two steps."""
    state = start()
    for _ in range(2):
        state, metrics = step(state, batch())
    return state, metrics


def test_seeds_trained_together_equal_seeds_trained_alone(after):
    for seed in (0, 1):
        state = start([seed])
        for _ in range(2):
            state, _ = step(state, batch([seed]))
        assert_close(of_seed(state, 0), of_seed(after[0], seed))
    first, second = (of_seed(after[0], seed)[0] for seed in (0, 1))
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, second)
    assert max(jax.tree.leaves(differences)) > 0.01


def test_soft_labels_of_one_class_are_hard_labels(after):
    soft = {**batch(), "labels": np.eye(K, dtype=np.float32)[LABELS]}
    state = start()
    for _ in range(2):
        state, metrics = step(state, soft)
    assert_close(per_seed(state), per_seed(after[0]))
    np.testing.assert_allclose(metrics["loss"], after[1]["loss"], rtol=1e-5)


def test_an_average_is_of_parameters_and_batch_statistics():
    """As timm's `ModelEmaV3` averages buffers, and what is predicted and exported."""
    state = start()
    expected = jax.tree.map(np.asarray, (state.params, state.batch_stats))
    for count in range(3):
        state, _ = step(state, batch())
        rate = min(SPEC.ema_decay, (1 + count) / (10 + count))
        now = (state.params, state.batch_stats)
        expected = jax.tree.map(
            lambda old, new, rate=rate: rate * old + (1 - rate) * np.asarray(new),
            expected,
            now,
        )
    params, stats = expected
    assert_close(state.ema_params, params)
    assert_close(state.ema_batch_stats, stats)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), stats, now[1])
    assert min(jax.tree.leaves(differences)) > 1e-4
    averages = {"params": state.ema_params, "batch_stats": state.ema_batch_stats}
    for seed, variables in enumerate(classifier.unstack(state)):
        assert_equal(variables, jax.tree.map(lambda x, i=seed: x[i], averages))
    predict = classifier.predictor(SPEC, mesh(), batch_size=4)
    found = predict(state, IMAGES[:4])
    shown = SPEC.normalize(jnp.asarray(IMAGES[:4], jnp.float32))
    logits = jax.vmap(lambda v: MODEL.apply(v, shown))(averages)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-5)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_seed_that_is_not_finite_changes_no_other(after, bad):
    """One of its batches is NaN; the optimiser counts the steps of each seed."""
    good, state = 1 - bad, start()
    weight = WEIGHT.copy()
    weight[0, bad] = np.nan
    state, metrics = step(state, batch(weight=weight))
    assert not np.isfinite(metrics["loss"])
    assert [int(state.skipped), int(state.skipped_in_a_row), int(state.step)] == [1] * 3
    assert_equal(of_seed(state, bad), of_seed(start(), bad))
    state, _ = step(state, batch())
    assert [int(state.skipped), int(state.skipped_in_a_row), int(state.step)] == [
        1,
        0,
        2,
    ]
    assert_equal(of_seed(state, good), of_seed(after[0], good))
    alone = start([bad])
    for rows in (weight, WEIGHT):
        alone, _ = step(alone, batch([bad], weight=rows))
    assert_close(of_seed(state, bad), of_seed(alone, 0))


def test_a_stream_of_images_trains_as_the_whole_array_does(after):
    state = start()
    read = {**batch(), "images": IMAGES[INDEX], "labels": LABELS[INDEX]}
    del read["index"]
    for _ in range(2):
        state, _ = step(state, read)
    assert_equal(per_seed(state), per_seed(after[0]))


def test_slots_without_weight_change_nothing(after):
    padded = np.concatenate([WEIGHT, 0 * WEIGHT])
    states = []
    for rows in (INDEX[::-1], (INDEX + 7) % R):
        state = start()
        for _ in range(2):
            index = np.concatenate([INDEX, rows])
            state, _ = step(state, batch((0, 1), index, padded))
        states.append(per_seed(state))
    assert_equal(*states)
    assert_close(states[0], per_seed(after[0]))


def test_eight_devices_train_as_one_does():
    rows = {"index": np.tile(INDEX, (4, 1)), "weight": np.tile(WEIGHT, (4, 1))}
    states = []
    for devices in (1, 8):
        shared = jax.device_put(fixed(), sharding.replicated(mesh(devices)))
        placed = loop.place_batch(rows, mesh(devices))
        state, _ = step(start(devices=devices), {**shared, **placed})
        states.append(per_seed(state))
    assert_close(*states)


def loss_of(images, labels, weight):
    """The loss of seed 0 at its start, computed without `train_step`."""
    state = start([0])
    variables = jax.tree.map(lambda x: x[0], (state.params, state.batch_stats))
    step_key = jax.random.fold_in(keys("steps", [0])[0], 0)
    image_key, _, dropout_key = jax.random.split(step_key, 3)
    image_keys = rng.example_keys(image_key, jnp.arange(B))
    images = jax.vmap(augment.policy("flip"))(image_keys, images)
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
    _, metrics = step(start([0]), batch([0]))
    rows = INDEX[:, 0]
    weight = np.where(LABELS[rows] == 1, 2.0, 1.0)
    expected = loss_of(IMAGES[rows], LABELS[rows], weight)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    equal = loss_of(IMAGES[rows], LABELS[rows], np.ones(B))
    assert abs(metrics["loss"] - equal) > 1e-3


def test_predictions_do_not_depend_on_batches_or_devices(after):
    state = after[0]
    found = []
    for devices, size in ((1, 20), (8, 3)):
        moved = jax.device_put(state, sharding.replicated(mesh(devices)))
        predict = classifier.predictor(SPEC, mesh(devices), batch_size=size)
        found.append(predict(moved, IMAGES))
    assert found[0].shape == (2, R, K)
    np.testing.assert_allclose(found[0].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("many, level", [(1, 0), (2, 1)])
def test_initialisation_compiles_quickly_and_draws_the_same_weights(
    monkeypatch, many, level
):
    """`Tiny` has two kernels."""
    given = []

    def spy(function, *, compiler_options, jit=jax.jit):
        given.append(compiler_options)
        return jit(function, compiler_options=compiler_options)

    expected = jax.jit(jax.vmap(lambda key: MODEL.init(key, jnp.zeros((1, 8, 8, 3)))))
    monkeypatch.setattr(classifier, "_MANY_KERNELS", many)
    monkeypatch.setattr(classifier.jax, "jit", spy)
    init = classifier._initializer.__wrapped__(MODEL, TX, (8, 8, 3))
    monkeypatch.undo()
    (options,) = given
    assert options["xla_backend_optimization_level"] == level
    variables, _ = init(keys("init"), None)
    assert_close(variables, expected(keys("init")), atol=1e-6)


def test_a_pretrained_start_keeps_everything_but_the_head(after):
    (given, _), fresh = classifier.unstack(start()), classifier.unstack(start())
    head = given["params"].pop("fc")
    for found, drawn in zip(
        classifier.unstack(start(pretrained=given)), fresh, strict=True
    ):
        assert_equal(found["params"].pop("fc"), drawn["params"]["fc"])
        assert_equal(found, given)
    assert (head["kernel"] != fresh[1]["params"]["fc"]["kernel"]).any()


def fit(folder, steps, programs, stop_at=None):
    """Six steps of two seeds, with a checkpoint after every second one."""

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
        memory_budget=memory.WHOLE_DEVICE,
        programs=programs,
    )


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
    """It memorises its own twenty images."""
    state, weight = start([0]), np.ones((B, 1), np.float32)
    for number in range(STEPS):
        rows = np.random.default_rng(number).permutation(R)[:B, None].astype(np.int32)
        state, _ = step(state, batch([0], rows, weight))
    predict = classifier.predictor(SPEC, mesh(), batch_size=R)
    assert (predict(state, IMAGES)[0].argmax(-1) == LABELS).all()
