"""Classifiers: published sizes, strides, masked examples, randomness."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax.models import efficientnet, layers
from mvc_jax.models.classifiers import VARIANTS
from mvc_jax.models.efficientnet import EfficientNet
from mvc_jax.models.pyramidnet import PyramidNet
from mvc_jax.models.resnet import ResNet
from mvc_jax.models.shake_shake import ShakeShake
from mvc_jax.models.wide_resnet import WideResNet

# torchvision's counts at 1000 classes; at 10 classes those of the authors' code.
PUBLISHED = {
    ("resnet18", 1000): 11_689_512,
    ("resnet34", 1000): 21_797_672,
    ("resnet50", 1000): 25_557_032,
    ("wide_resnet50_2", 1000): 68_883_240,
    ("efficientnet_b0", 1000): 5_288_548,
    ("efficientnet_b1", 1000): 7_794_184,
    ("efficientnet_b2", 1000): 9_109_994,
    ("efficientnet_b3", 1000): 12_233_232,
    ("efficientnet_lite0", 1000): 4_652_008,  # timm's
    ("wrn16_4", 10): 2_748_890,
    ("wrn40_2", 10): 2_243_546,
    ("wrn28_10", 10): 36_479_194,
}
OPTIONS = {"xla_backend_optimization_level": 0}  # compiles fast; runs slowly


@functools.cache
def shapes(module):
    """Parameters as shapes; an image of two strides leaves 2 x 2 features."""
    side = 2 * module.stride
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    seen = []

    def global_pool(x):
        seen.append(x.shape[1:3])
        return layers.global_pool(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(module).__module__], "global_pool", global_pool)
        params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    assert seen[-1] == (2, 2)
    return params


def made(variant, classes, **fields):
    return shapes(VARIANTS[variant].make(num_classes=classes, **fields))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("variant", "classes"), PUBLISHED)
def test_parameters_are_the_published_ones(variant, classes):
    assert count(made(variant, classes)) == PUBLISHED[variant, classes]


def test_parameters_with_the_cifar_stem():
    small = made("resnet18", 10, stem="cifar")
    assert count(small) == 11_173_962  # as everybody's ResNet-18 for CIFAR-10
    assert small["conv1"]["kernel"].shape == (3, 3, 3, 64)


def test_parameters_in_millions():
    """Papers give no more digits; PyramidNet's count is of kernels alone."""
    assert round(count(made("shake_shake26_2x96d", 10)) / 1e6, 1) == 26.2
    leaves = jax.tree_util.tree_leaves_with_path(made("pyramidnet272", 10))
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    assert round(kernels / 1e6, 1) == 26.0


# He et al.: 0.27 M and 0.85 M, with shortcuts without parameters (their option A).
# Ours project twice, 16 -> 32 -> 64 channels, each with a normalisation.
PROJECTIONS = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize(
    ("variant", "published"), [("resnet20", 269_722), ("resnet56", 853_018)]
)
def test_parameters_are_the_published_ones_plus_two_projections(variant, published):
    assert count(made(variant, 10)) == published + PROJECTIONS


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_strides_of_stems(stem, stem_stride):
    module = ResNet(3, depths=(1, 1), width=4, stem=stem, stem_stride=stem_stride)
    assert module.stride == {"imagenet": 8, "cifar": 2 * stem_stride}[stem]
    assert shapes(module)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_knows_the_smallest_image_and_the_options(variant):
    """A config is checked by the table, without making the network."""
    known = VARIANTS[variant]
    fields = {field.name for field in dataclasses.fields(known.make(3))}
    assert set(known.options) == fields & {"width", "stem", "stem_stride"}
    choices = [("", 1)]
    if known.stem:
        choices += [("cifar", 1), ("cifar", 2), ("imagenet", 1)]
    for stem, stride in choices:
        given = {"stem": stem, "stem_stride": stride} if stem else {}
        assert known.min_size(stem, stride) == known.make(3, **given).stride


def test_every_variant_is_counted():
    counted = {variant for variant, _ in PUBLISHED} | {"resnet20", "resnet56"}
    assert counted | {"resnet8", "shake_shake26_2x96d", "pyramidnet272"} == set(
        VARIANTS
    )


SMALL = {
    "resnet": ResNet(3, depths=(1, 2), width=4, stem="cifar"),
    "wide_resnet": WideResNet(3, depth=10, widen=2),
    "shake_shake": ShakeShake(3, width=4, blocks=1),
    "pyramidnet": PyramidNet(3, depth=11, alpha=6),
    "efficientnet": EfficientNet(
        3,
        0.5,
        drop_path=0.5,
        stages=(efficientnet.STAGES[0], efficientnet.Stage(2, 3, 2, 24, 2)),
    ),
}
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
MASK = np.array([True, True, False, True, False, True])


@functools.cache
def variables(name):
    """Random variables; no bias or statistic has its initial value."""
    rng = np.random.default_rng(1)
    drawn = jax.eval_shape(SMALL[name].init, jax.random.key(0), jnp.asarray(IMAGES))
    return jax.tree.map(
        lambda leaf: (
            rng.uniform(0.1, 0.4, leaf.shape).astype(np.float32)
            * (rng.choice([-1, 1], leaf.shape) if len(leaf.shape) > 1 else 1)
        ),
        drawn,
    )


@functools.cache
def trained(name):
    """A function (images, mask, seed) -> logits, statistics, image gradients."""

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def run(images, mask, key):
        def loss(images):
            logits, updated = SMALL[name].apply(
                variables(name),
                images,
                train=True,
                mask=mask,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            total = jnp.sum(jnp.where(mask[:, None], logits**2, 0))
            return total, (logits, updated["batch_stats"])

        gradient, (logits, updated) = jax.grad(loss, has_aux=True)(images)
        return logits, updated, gradient

    return lambda images, mask, seed=0: jax.device_get(
        run(jnp.asarray(images), jnp.asarray(mask), jax.random.key(seed))
    )


@pytest.mark.parametrize("name", SMALL)
def test_masked_examples_change_nothing(name):
    others = np.where(MASK[:, None, None, None], IMAGES, 50 * IMAGES[::-1] - 7)
    logits, updated, gradient = trained(name)(IMAGES, MASK)
    logits_2, updated_2, gradient_2 = trained(name)(others, MASK)
    np.testing.assert_array_equal(logits[MASK], logits_2[MASK])
    jax.tree.map(np.testing.assert_array_equal, updated, updated_2)
    assert np.abs(logits - logits_2)[~MASK].max() > 1e-3
    assert (gradient[~MASK] == 0).all() and np.abs(gradient[MASK]).max() > 0
    np.testing.assert_array_equal(gradient[MASK], gradient_2[MASK])

    unmasked, updated_unmasked, _ = trained(name)(IMAGES, np.ones(6, bool))
    assert np.abs(unmasked - logits)[MASK].max() > 1e-3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), updated, updated_unmasked)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_padding_equals_a_smaller_batch():
    """Statistics and random draws are those of the unpadded batch."""
    name, real = "shake_shake", np.arange(6) < 4
    padded, updated, gradient = trained(name)(IMAGES, real)
    alone, updated_alone, gradient_alone = trained(name)(IMAGES[:4], np.ones(4, bool))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(padded[:4], alone)
    jax.tree.map(close, updated, updated_alone)
    close(gradient[:4], gradient_alone, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("name", ["shake_shake", "pyramidnet", "efficientnet"])
def test_randomness_depends_on_the_key_alone(name):
    one, again, other = (
        trained(name)(IMAGES, MASK, seed)[0][MASK] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_an_examples_draws_do_not_depend_on_the_batch_size():
    key = jax.random.key(0)
    seven, three = (layers.uniform(key, (n, 2, 3)) for n in (7, 3))
    np.testing.assert_array_equal(seven[:3], three)
    assert len(np.unique(seven)) == seven.size


@pytest.mark.parametrize("shape", [(4000, 1), (4000, 2)])
def test_drop_keeps_the_expectation(shape):
    dropped = np.asarray(
        layers.drop(jnp.ones((4000, 2)), shape, 0.3, jax.random.key(0))
    )
    values, counts = np.unique(dropped, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.7], rtol=1e-6)
    assert abs(counts[0] / dropped.size - 0.3) < 0.03
    assert ((dropped[:, 0] == dropped[:, 1]).all()) == (shape[1] == 1)


def test_evaluation_is_deterministic_and_per_example():
    evaluate = jax.jit(SMALL["pyramidnet"].apply, compiler_options=OPTIONS)
    together = evaluate(variables("pyramidnet"), jnp.asarray(IMAGES))
    alone = evaluate(variables("pyramidnet"), jnp.asarray(IMAGES[:1]))
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_bfloat16_keeps_statistics_and_logits_in_float32(name):
    module = SMALL[name].clone(dtype=jnp.bfloat16)

    def run(variables, images):
        return module.apply(
            variables,
            images,
            True,
            None,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=True,
        )

    (logits, updated) = jax.eval_shape(run, variables(name), jnp.asarray(IMAGES))
    assert logits.dtype == jnp.float32
    stats = jax.tree.leaves(updated["batch_stats"])
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("float32")}
    block = "layer1_0" if name == "resnet" else "blocks_0_0"
    seen = updated["intermediates"][block]["__call__"][0]
    assert seen.dtype == jnp.bfloat16
