"""Convolutions and pooling are XLA's, and on CPUs products and sums where faster."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax import devices
from mvc_jax.models import convolution
from mvc_jax.models.convolution import (
    NHWC,
    convolve,
    max_pool,
    small_images_convolved,
)

OPTIONS = {"xla_backend_optimization_level": 0}  # compiles fast; runs slowly

CONVOLUTIONS = [  # side, window, stride, padding, groups of the 4 channels
    (8, 1, 1, "SAME", 1),
    (7, 1, 2, ((0, 0), (0, 0)), 1),
    (8, 3, 1, ((1, 1), (1, 1)), 1),
    (8, 3, 2, "SAME", 1),
    (4, 3, 2, ((1, 1), (1, 1)), 1),
    (3, 1, 1, ((1, 0), (0, 0)), 1),
    (7, 3, 3, ((1, 2), (0, 1)), 1),
    (9, 7, 2, ((3, 3), (3, 3)), 1),
    (1, 3, 1, "SAME", 1),
    (2, 3, 1, ((1, 1), (1, 1)), 1),
    (2, 3, 2, ((0, 1), (1, 0)), 1),
    (4, 5, 3, ((2, 2), (2, 2)), 1),
    (6, 3, 1, "SAME", 4),
    (7, 5, 2, ((1, 2), (2, 2)), 4),
    (2, 5, 1, "SAME", 4),
    (6, 1, 2, "SAME", 4),
    (6, 3, 2, "SAME", 2),
    (2, 3, 1, "SAME", 2),
]


def test_convolutions_and_their_gradients_are_those_of_lax():
    rng = np.random.default_rng(0)

    def gradients(conv, case, images, kernel):
        _, _, stride, padding, groups = case

        def loss(images, kernel):
            out = conv(
                images,
                kernel,
                (stride, stride),
                padding,
                lhs_dilation=(1, 1),
                rhs_dilation=(1, 1),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return jnp.sum(jnp.sin(out))

        return jax.value_and_grad(loss, argnums=(0, 1))(images, kernel)

    inputs = [
        tuple(
            rng.normal(size=shape).astype(np.float32)
            for shape in ((2, side, side + 1, 4), (window, window, 4 // groups, 4))
        )
        for side, window, _, _, groups in CONVOLUTIONS
    ]

    @functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIONS)
    def run(conv, inputs):
        return [
            gradients(conv, case, *pair)
            for case, pair in zip(CONVOLUTIONS, inputs, strict=True)
        ]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        run(convolve, inputs),
        run(jax.lax.conv_general_dilated, inputs),
    )


@pytest.mark.parametrize("patches", [0, 3000], ids=["per position", "patches"])
def test_the_kernels_gradient_of_a_few_examples_at_a_time(monkeypatch, patches):
    """The limits are such that a product takes two examples of six."""
    monkeypatch.setattr(convolution, "_CACHED", 2 * 6 * 6 * 4)
    monkeypatch.setattr(convolution, "_CACHED_PATCHES", patches)
    rng = np.random.default_rng(0)
    images, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((6, 6, 6, 4), (3, 3, 4, 3), (6, 6, 6, 3))
    )
    options = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}

    def gradient(by, **options):
        def loss(kernel):
            return jnp.sum(weights * by(images, kernel, (1, 1), "SAME", **options))

        return jax.jit(jax.grad(loss), compiler_options=OPTIONS)

    ours = gradient(convolve, **options)
    assert ("while" in ours.lower(kernel).as_text()) == (
        devices.platform(None) == "cpu"
    )
    theirs = gradient(jax.lax.conv_general_dilated, dimension_numbers=NHWC)
    np.testing.assert_allclose(ours(kernel), theirs(kernel), rtol=1e-4, atol=1e-4)


def test_depthwise_convolutions_are_sums_on_cpus():
    images, kernel = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 1, 4))
    options = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}
    apply = functools.partial(
        convolve, strides=(1, 1), padding="SAME", feature_group_count=4, **options
    )
    compiled = jax.jit(apply, compiler_options=OPTIONS).lower(images, kernel).compile()
    assert "convolution(" not in compiled.as_text()


@pytest.mark.parametrize(
    "platform, side, stride, convolutions, of_gradient",
    [
        ("cpu", 2, 1, 0, 0),
        ("cpu", 3, 1, 1, 2),
        ("cpu", 4, 2, 1, 0),
        ("cpu", 6, (2, 2), 1, 2),
        ("tpu", 2, 1, 1, 2),
        ("gpu", 4, 2, 1, 2),
    ],
)
def test_small_images_are_products_on_cpus(
    monkeypatch, platform, side, stride, convolutions, of_gradient
):
    monkeypatch.setattr(devices, "platform", lambda mesh: platform)
    layer = nn.Conv(5, (3, 3), stride, padding=1)
    images = np.random.default_rng(0).normal(size=(2, side, side, 4))
    params = layer.init(jax.random.key(0), images)

    def apply(params, images):
        with small_images_convolved(None):
            return layer.apply(params, images)

    def compiled(function):
        lowered = jax.jit(function, compiler_options=OPTIONS).lower(params, images)
        return lowered.compile()

    forward = compiled(apply)
    assert forward.as_text().count(" convolution(") == convolutions
    np.testing.assert_allclose(
        forward(params, images), layer.apply(params, images), rtol=1e-5, atol=1e-5
    )
    backward = compiled(
        lambda *inputs: jax.grad(lambda *x: apply(*x).sum(), argnums=(0, 1))(*inputs)
    )
    assert backward.as_text().count(" convolution(") == of_gradient


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (1, 0))])
def test_max_pooling_and_its_gradient_are_those_of_linen(padding):
    rng = np.random.default_rng(0)
    images = jnp.floor(rng.normal(size=(2, 9, 8, 3)) * 2)  # many are equal

    def gradient(pool, images):
        def loss(images):
            pooled = pool(images, (3, 3), (2, 2), padding)
            return jnp.sum(jnp.arange(pooled.size).reshape(pooled.shape) * pooled)

        return jax.grad(loss)(images)

    for function in (lambda pool, x: pool(x, (3, 3), (2, 2), padding), gradient):
        ours, theirs = (function(pool, images) for pool in (max_pool, nn.max_pool))
        np.testing.assert_array_equal(ours, theirs)
    compiled = jax.jit(lambda x: gradient(max_pool, x)).lower(images).compile()
    scatters = "select-and-scatter" in compiled.as_text()
    assert scatters == (devices.platform(None) != "cpu")
