"""Convolutions are those of `lax`, and on CPUs products where that is faster."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax import devices
from mvc_jax.models import convolution
from mvc_jax.models.convolution import NHWC, convolve, small_images_convolved

OPTIONS = {"xla_backend_optimization_level": 0}  # compiles fast; runs slowly

CONVOLUTIONS = [  # side, window, stride, padding, groups of the 4 channels
    (8, 1, 1, "SAME", 1),
    (7, 1, 2, ((0, 0), (0, 0)), 1),
    (8, 3, 1, ((1, 1), (1, 1)), 1),
    (8, 3, 2, "SAME", 1),
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
    "platform, side, convolutions",
    [
        ("cpu", 2, 0),
        ("cpu", 3, 1),
        ("tpu", 2, 1),
        ("gpu", 2, 1),
    ],
)
def test_small_images_are_products_on_cpus(monkeypatch, platform, side, convolutions):
    monkeypatch.setattr(devices, "platform", lambda mesh: platform)
    layer = nn.Conv(5, (3, 3), padding=1)
    images = np.random.default_rng(0).normal(size=(2, side, side, 4))
    params = layer.init(jax.random.key(0), images)

    def apply(images):
        with small_images_convolved(None):
            return layer.apply(params, images)

    compiled = jax.jit(apply, compiler_options=OPTIONS).lower(images).compile()
    assert compiled.as_text().count(" convolution(") == convolutions
    np.testing.assert_allclose(
        compiled(images), layer.apply(params, images), rtol=1e-5, atol=1e-5
    )
