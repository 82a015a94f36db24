"""Attention by implementation, dtypes, and the mended blocks, on a small UNet."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.errors import UserError
from mvc_jax.models import attention, stable_diffusion


@pytest.fixture(scope="module")
def small(tiny):
    """The tiny model, its UNet with two resolutions and 1,024 tokens at the finer."""
    unet = tiny[0].configs["unet"] | {
        "sample_size": 32,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 32],
    }
    model = dataclasses.replace(tiny[0], configs=tiny[0].configs | {"unet": unet})
    rng = np.random.default_rng(0)
    params = stable_diffusion.random_params(model.shapes("unet"), rng)
    latents = jnp.asarray(rng.normal(size=(2, 32, 32, 4)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(2, 12, 16)), jnp.float32)
    return model, {"unet": params}, (latents, jnp.array([3, 700]), states)


def layer(asked="auto", **changes):
    of_sd = {"backend": "cuda", "dtype": "bfloat16", "width": 40}
    return of_sd | {"asked": asked, "q_tokens": 4096, "kv_tokens": 4096} | changes


@pytest.mark.parametrize(
    "given, chosen",
    [
        (layer(), "cudnn"),
        (layer(dtype="float16"), "cudnn"),
        (layer(width=80, q_tokens=1024, kv_tokens=1024), "cudnn"),
        (layer(width=160, q_tokens=256, kv_tokens=256), "xla"),
        (layer(width=36), "xla"),
        (layer(kv_tokens=77), "xla"),
        (layer(dtype="float32"), "xla"),
        (layer(backend="gpu"), "xla"),
        (layer(backend="tpu"), "xla"),
        (layer(backend="cpu", dtype="float32"), "mapped"),
        (layer(backend="cpu"), "mapped"),
        (layer(backend="cpu", kv_tokens=77), "mapped"),
        (layer(backend="cpu", q_tokens=64, kv_tokens=64), "xla"),
        (layer("cudnn"), "cudnn"),
        (layer("cudnn", width=160), "xla"),
        (layer("cudnn", kv_tokens=77), "xla"),
        (layer("xla"), "xla"),
        (layer("xla", backend="cpu"), "xla"),
        (layer("mapped", q_tokens=64), "mapped"),
    ],
)
def test_each_layer_runs_what_its_shape_and_dtype_allow(given, chosen):
    assert attention.implementation(**given) == chosen


@pytest.mark.parametrize(
    "asked, backend, dtype, said",
    [
        ("flash", "cpu", "float32", "one of auto, xla, mapped, cudnn"),
        ("cudnn", "cpu", "bfloat16", "NVIDIA GPU"),
        ("cudnn", "gpu", "bfloat16", "NVIDIA GPU"),
        ("cudnn", "cuda", "float32", "bfloat16"),
    ],
)
def test_what_cannot_run_at_all_is_an_error_before_compiling(
    asked, backend, dtype, said
):
    field = "config.finetune.attention"
    with pytest.raises(UserError, match=said) as error:
        attention.check(asked, field=field, backend=backend, dtype=dtype)
    assert error.value.name == field
    attention.check("cudnn", field=field, backend="cuda", dtype="bfloat16")
    attention.check("auto", field=field, backend=backend, dtype=dtype)


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 8),
        "tokens": st.integers(1, 9),
        "others": st.integers(1, 9),
        "heads": st.integers(1, 3),
        "width": st.sampled_from([1, 4, 5]),
    }
)


@settings(max_examples=6, deadline=None)
@given(shapes, st.integers(0, 99))
def test_mapped_attention_and_its_gradients_are_the_plain_ones(shape, seed):
    def draw(tokens):
        size = (shape["batch"], tokens, shape["heads"], shape["width"])
        return jnp.asarray(2 * rng.normal(size=size), jnp.float32)

    rng = np.random.default_rng(seed)
    inputs = draw(shape["tokens"]), draw(shape["others"]), draw(shape["others"])
    cotangent = draw(shape["tokens"])

    @functools.partial(jax.jit, static_argnums=0)
    def both(asked):
        attend = functools.partial(attention.attend, asked=asked)
        value, backward = jax.vjp(attend, *inputs)
        return value, *backward(cotangent)

    for mapped, plain in zip(both("mapped"), both("xla"), strict=True):
        np.testing.assert_allclose(mapped, plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("asked", ["xla", "mapped"])
def test_the_softmax_is_float32_in_bfloat16(asked):
    """Scores of some hundreds, 1 apart: bfloat16 would round their differences away."""
    query = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
    key = jnp.asarray([256.0, 258.0, 260.0], jnp.bfloat16).reshape(1, 3, 1, 1)
    value = jnp.asarray([0.0, 0.5, 1.0], jnp.bfloat16).reshape(1, 3, 1, 1)
    query = query * jnp.bfloat16(1.0078125)  # the scores are no bfloat16 numbers
    output = attention.attend(query, key, value, asked=asked)
    scores = 1.0078125 * np.array([256.0, 258.0, 260.0])
    weights = np.exp(scores - scores.max())
    expected = weights @ [0.0, 0.5, 1.0] / weights.sum()
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output[0, 0, 0, 0], expected, rtol=2**-8)


@pytest.mark.parametrize("asked", ["xla", "mapped", "auto"])
def test_the_unet_predicts_what_the_library_s_own_attention_does(small, asked):
    model, params, inputs = small
    with attention.exact():
        latents, timesteps, states = inputs
        channels_first = latents.transpose(0, 3, 1, 2)
        library = model.unet.apply(
            params | {"params": params["unet"]}, channels_first, timesteps, states
        )
    ours = dataclasses.replace(model, attention=asked).denoise(params, *inputs)
    np.testing.assert_allclose(ours, library.sample.transpose(0, 2, 3, 1), atol=2e-5)


def captured(model, params, inputs):
    """The dtype of every module's output, by path, while `denoise` runs."""
    seen = {}

    def note(next_call, args, kwargs, context):
        output = next_call(*args, **kwargs)
        for leaf in jax.tree.leaves(output):
            if hasattr(leaf, "dtype"):
                seen[context.module.path] = (type(context.module), leaf.dtype)
        return output

    def run(params):
        with nn.intercept_methods(note):
            return model.denoise(params, *inputs)

    return jax.eval_shape(run, params), seen


def test_no_block_returns_float32_in_bfloat16(small):
    model, params, inputs = small
    half = dataclasses.replace(model, dtype="bfloat16")
    prediction, seen = captured(half, params, inputs)
    assert len(seen) > 50
    wide = {
        "/".join(path)
        for path, (_, dtype) in seen.items()
        if dtype == jnp.float32 and path != ("time_proj",)
    }
    assert wide == set()
    assert prediction.dtype == jnp.bfloat16
    _, seen = captured(model, params, inputs)
    assert {dtype for _, dtype in seen.values()} == {jnp.dtype("float32")}


def test_statistics_of_group_norm_stay_float32_in_bfloat16():
    """Values around 256 with a spread that bfloat16 cannot sum."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(256 + 4 * rng.normal(size=(1, 16, 16, 32)), jnp.bfloat16)
    norm = nn.GroupNorm(num_groups=2)
    variables = norm.init(jax.random.key(0), values)
    with attention.running("auto"):
        output = norm.apply(variables, values)
    assert output.dtype == jnp.bfloat16
    exact = np.asarray(values, np.float64).reshape(256, 2, 16)
    exact = (exact - exact.mean((0, 2), keepdims=True)) / exact.std(
        (0, 2), keepdims=True
    )
    np.testing.assert_allclose(
        np.asarray(output, np.float64).reshape(256, 2, 16), exact, atol=0.02
    )


def test_bfloat16_predicts_nearly_what_float32_does(small):
    model, params, inputs = small
    half = dataclasses.replace(model, dtype="bfloat16")
    wide = model.denoise(params, *inputs)
    error = half.denoise(params, *inputs).astype(jnp.float32) - wide
    assert jnp.sqrt(jnp.mean(error**2)) < 0.02 * jnp.sqrt(jnp.mean(wide**2))
    assert jnp.abs(error).max() > 0


def test_the_layers_that_qualify_are_lowered_to_cudnn(monkeypatch):
    """By lowering for a GPU that is not here; JAX's look at cuDNN's version is fed."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "backend", lambda: "cuda")

    def calls(width, others):
        size = jnp.zeros((2, 64, 2, width), jnp.bfloat16)
        others = jnp.zeros((2, others, 2, width), jnp.bfloat16)

        def loss(query, key, value):
            return attention.attend(query, key, value).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        lowered = step.trace(size, others, others).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("__cudnn$fmhaSoftmax")

    assert calls(40, 64) == 2  # forward and backward
    assert calls(160, 64) == calls(40, 77) == 0
