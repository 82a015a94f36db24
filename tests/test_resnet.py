"""ResNets for small images: published sizes, strides, examples that do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax.models import resnet

MODEL = resnet.ResNet8(num_classes=3, width=4)
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
MASK = np.array([True, True, False, True, False, True])


@pytest.fixture(scope="module")
def variables():
    """Random ones of `MODEL`, no bias or statistic at its initial value."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.asarray(IMAGES))
    return jax.tree.map(
        lambda leaf: (
            rng.uniform(0.1, 0.4, leaf.shape).astype(np.float32)
            * (rng.choice([-1, 1], leaf.shape) if len(leaf.shape) > 1 else 1)
        ),
        shapes,
    )


@jax.jit
def evaluate(variables, images):
    return MODEL.apply(variables, images)


@jax.jit
def train(variables, images, mask=None):
    return MODEL.apply(variables, images, train=True, mask=mask, mutable="batch_stats")


def parameters(model, channels=3, size=32):
    shape = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


# He et al.: 0.27 M and 0.85 M, with shortcuts that have no parameters (their option A).
# Ours project twice, 16 -> 32 -> 64 channels, each with a normalisation.
PROJECTIONS = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize(("name", "published"), [("20", 269_722), ("56", 853_018)])
def test_parameters_are_the_published_ones_and_two_projections(name, published):
    model = resnet.VARIANTS[f"resnet{name}"](num_classes=10)
    assert parameters(model) == published + PROJECTIONS


@pytest.mark.parametrize("variant", resnet.VARIANTS)
@pytest.mark.parametrize(("width", "channels", "classes"), [(16, 3, 10), (8, 1, 7)])
def test_parameters_by_hand(variant, width, channels, classes):
    def conv_and_norm(size, inputs, outputs):
        return size**2 * inputs * outputs + 2 * outputs

    blocks = (int(variant.removeprefix("resnet")) - 2) // 6
    w = width
    count = conv_and_norm(3, channels, w) + (4 * w + 1) * classes
    for inputs, outputs in ((w, w), (w, 2 * w), (2 * w, 4 * w)):
        count += conv_and_norm(3, inputs, outputs)
        count += (2 * blocks - 1) * conv_and_norm(3, outputs, outputs)
        count += conv_and_norm(1, inputs, outputs) if inputs != outputs else 0
    model = resnet.VARIANTS[variant](num_classes=classes, width=width)
    assert parameters(model, channels) == count


@pytest.mark.parametrize("size", [32, 17])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_the_stem_and_two_stages_halve_the_image(size, stem_stride):
    model = resnet.ResNet20(num_classes=5, stem_stride=stem_stride)

    def outputs(images):
        variables = model.init(jax.random.key(0), images)
        return model.apply(variables, images, capture_intermediates=True)

    shape = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits, found = jax.eval_shape(outputs, shape)
    assert logits.shape == (2, 5)
    half = -(-size // stem_stride)
    assert found["intermediates"]["stem"]["__call__"][0].shape == (2, half, half, 16)
    for stage in range(3):
        side = -(-half // 2**stage)
        out = found["intermediates"][f"stage{stage}_block2"]["__call__"][0]
        assert out.shape == (2, side, side, 16 * 2**stage)


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(variables):
    together = evaluate(variables, IMAGES)
    np.testing.assert_allclose(evaluate(variables, IMAGES[:1]), together[:1], atol=1e-5)


def test_examples_that_do_not_count_change_nothing(variables):
    others = np.where(MASK[:, None, None, None], IMAGES, 50 * IMAGES[::-1] - 7)
    logits, updated = train(variables, IMAGES, MASK)
    logits_2, updated_2 = train(variables, others, MASK)
    np.testing.assert_array_equal(logits[MASK], logits_2[MASK])
    jax.tree.map(np.testing.assert_array_equal, updated, updated_2)
    assert jnp.abs(logits - logits_2)[~MASK].max() > 1e-3

    alone, updated_alone = train(variables, IMAGES[MASK], np.ones(4, bool))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    close(alone, logits[MASK])
    jax.tree.map(close, updated_alone, updated)

    unmasked, updated_unmasked = train(variables, IMAGES)
    assert jnp.abs(unmasked - logits)[MASK].max() > 1e-3
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), updated, updated_unmasked)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_no_gradient_comes_from_examples_that_do_not_count(variables):
    def loss(images):
        logits, _ = train(variables, images, MASK)
        return (logits**2).sum(1)[MASK].sum()

    gradient = np.abs(jax.jit(jax.grad(loss))(IMAGES)).max((1, 2, 3))
    assert (gradient[~MASK] == 0).all()
    assert (gradient[MASK] > 0).all()


def test_only_training_moves_the_statistics_and_by_a_tenth(variables):
    stats = variables["batch_stats"]["stem_norm"]
    _, updated = train(variables, IMAGES)
    kernel = variables["params"]["stem"]["kernel"]
    stem = jax.lax.conv_general_dilated(
        IMAGES, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = 0.9 * stats["mean"] + 0.1 * stem.mean((0, 1, 2))
    new = updated["batch_stats"]["stem_norm"]["mean"]
    np.testing.assert_allclose(new, expected, atol=1e-5)
    _, unchanged = MODEL.apply(variables, jnp.asarray(IMAGES), mutable="batch_stats")
    jax.tree.map(
        np.testing.assert_array_equal,
        unchanged["batch_stats"],
        variables["batch_stats"],
    )
