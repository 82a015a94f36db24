"""A classifier's step: seeds that share nothing, slots that do not count, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mvc_jax import classifier
from mvc_jax.models import resnet
from mvc_jax.training import optim, rng, sharding

R, B, K = 20, 6, 3
DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (R, 8, 8, 3), dtype=np.uint8)
LABELS = DRAW.integers(0, K, R).astype(np.int32)
INDEX = DRAW.integers(0, R, (B, 2)).astype(np.int32)
WEIGHT = np.ones((B, 2), np.float32)
SEEDS = np.arange(2, dtype=np.int32)
RECIPE = classifier.Recipe(
    resnet.ResNet8(num_classes=K, width=4), policy="affine", ema_decay=0.9
)
TX = optim.sgd(0.1, momentum=0.9, weight_decay=1e-3)
KEY = rng.purpose_key(0, "test")


@functools.cache
def jitted(recipe=RECIPE):
    return jax.jit(
        functools.partial(classifier.train_step, recipe=recipe, tx=TX, key=KEY)
    )


def mesh(devices=1):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def start(seeds=SEEDS, devices=1, recipe=RECIPE):
    return classifier.create_state(
        recipe, TX, seeds, mesh(devices), key=KEY, image_shape=(8, 8, 3)
    )


def batch(seeds=(0, 1), index=INDEX, weight=WEIGHT):
    columns = list(seeds)
    rows = {"index": index[:, columns], "weight": weight[:, columns]}
    return {"images": IMAGES, "labels": LABELS, "seed": np.int32(columns)} | rows


def arrays(state):
    return jax.tree.map(np.asarray, (state.params, state.ema_params, state.batch_stats))


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
        state = start(np.int32([seed]))
        for _ in range(2):
            state, _ = jitted()(state, batch([seed]))
        both = jax.tree.map(lambda leaf, s=seed: leaf[s : s + 1], arrays(after[0]))
        assert_close(arrays(state), both)
    first, second = (classifier.one_seed(after[0], i)["params"] for i in (0, 1))
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, second)
    assert max(jax.tree.leaves(apart)) > 0.01


def test_a_stream_of_images_trains_as_the_whole_array_does(after):
    state = start()
    read = batch() | {"images": IMAGES[INDEX], "labels": LABELS[INDEX]}
    del read["index"]
    for _ in range(2):
        state, _ = jitted()(state, read)
    jax.tree.map(np.testing.assert_array_equal, arrays(state), arrays(after[0]))


def test_slots_without_weight_change_nothing(after):
    del after
    more = np.concatenate([INDEX, INDEX[::-1]]), np.concatenate([WEIGHT, 0 * WEIGHT])
    other = np.concatenate([INDEX, (INDEX + 7) % R]), more[1]
    states = [jitted()(start(), batch(SEEDS, *rows))[0] for rows in (more, other)]
    jax.tree.map(np.testing.assert_array_equal, *map(arrays, states))
    alone, _ = jitted()(start(), batch())
    assert_close(arrays(states[0]), arrays(alone))


def test_eight_devices_train_as_one_does(after):
    from mvc_jax.training.loop import place_batch

    del after
    rows = {"index": np.tile(INDEX, (4, 1)), "weight": np.tile(WEIGHT, (4, 1))}
    states = []
    for devices in (1, 8):
        fixed = jax.device_put(
            {"images": IMAGES, "labels": LABELS, "seed": SEEDS},
            sharding.replicated(mesh(devices)),
        )
        state, _ = jitted()(
            start(devices=devices), fixed | place_batch(rows, mesh(devices))
        )
        states.append(arrays(state))
    assert_close(*states)


def test_class_weights_weigh_the_loss_as_they_weigh_examples():
    """A class of weight 2 counts as if each of its examples were there twice."""
    weights = np.ones(K)
    weights[1] = 2.0
    plain = RECIPE.__class__(RECIPE.model)
    weighted = RECIPE.__class__(RECIPE.model, class_weights=tuple(weights.tolist()))
    one = start(np.int32([0]), recipe=plain)
    _, metrics = jitted(weighted)(one, batch([0]))
    doubled = WEIGHT * np.where(LABELS[INDEX] == 1, 2.0, 1.0).astype(np.float32)
    _, expected = jitted(plain)(one, batch([0], weight=doubled))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    _, unweighted = jitted(plain)(one, batch([0]))
    assert abs(metrics["loss"] - unweighted["loss"]) > 1e-3


def test_label_smoothing_is_the_published_one():
    recipe = RECIPE.__class__(RECIPE.model, label_smoothing=0.1)
    state = start(np.int32([0]), recipe=recipe)
    _, metrics = jitted(recipe)(state, batch([0]))
    variables = jax.tree.map(lambda x: x[0], (state.params, state.batch_stats))
    images = jnp.asarray(IMAGES[INDEX[:, 0]] / 127.5 - 1, jnp.float32)
    logits, _ = recipe.model.apply(
        {"params": variables[0], "batch_stats": variables[1]},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    soft = jax.nn.one_hot(LABELS[INDEX[:, 0]], K) * 0.9 + 0.1 / K
    expected = optax.softmax_cross_entropy(logits, soft).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_predictions_do_not_depend_on_batches_or_devices(after):
    state = after[0]
    found = []
    for devices, size in ((1, 20), (1, 7), (8, 3)):
        moved = jax.device_put(state, sharding.replicated(mesh(devices)))
        predict = classifier.predictor(RECIPE, mesh(devices), batch_size=size)
        found.append(predict(moved, IMAGES))
    assert found[0].shape == (2, R, K)
    np.testing.assert_allclose(found[0].sum(-1), 1, rtol=1e-5)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_it_learns():
    """Its own twenty images, by heart."""
    recipe = RECIPE.__class__(RECIPE.model)
    state = start(np.int32([0]), recipe=recipe)
    for step in range(40):
        rows = np.random.default_rng(step).permutation(R)[:, None].astype(np.int32)
        state, _ = jitted(recipe)(state, batch([0], rows, np.ones((R, 1), np.float32)))
    predict = classifier.predictor(recipe, mesh(), batch_size=R)
    assert (predict(state, IMAGES)[0].argmax(-1) == LABELS).all()
