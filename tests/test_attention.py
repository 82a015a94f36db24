"""Attention by implementation, dtypes, and the fixed blocks, on a small UNet."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_parity import jit_fast

from mvc_jax import devices
from mvc_jax.errors import UserError
from mvc_jax.models import attention, remat
from mvc_jax.training import sharding


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    latents = jnp.asarray(rng.normal(size=(2, 32, 32, 4)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(2, 12, 16)), jnp.float32)
    return latents, jnp.array([3, 700]), states


@pytest.fixture(scope="module")
def deep(tiny):
    """The tiny model with a UNet of two resolutions, to be traced and not run."""
    unet = tiny[0].configs["unet"] | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 32],
    }
    model = dataclasses.replace(tiny[0], configs=tiny[0].configs | {"unet": unet})
    return model, {"unet": model.shapes("unet")}


def denoise(model, params, **changes):
    """The prediction on 1,024 tokens, compiled."""
    model = dataclasses.replace(model, **changes)
    return jit_fast(model.denoise)({"unet": params["unet"]}, *inputs())


def layer(**changes):
    """A layer of Stable Diffusion 1.x on an NVIDIA GPU, but for the changes."""
    of_sd = {"backend": "cuda", "dtype": "bfloat16", "width": 40}
    return attention.Layer(**of_sd | {"queries": 4096, "keys": 4096} | changes)


@pytest.mark.parametrize(
    "choice, layer, chosen",
    [
        ("auto", layer(), "cudnn"),
        ("auto", layer(dtype="float16"), "cudnn"),
        ("auto", layer(width=80, queries=1024, keys=1024), "cudnn"),
        ("auto", layer(keys=77), "cudnn"),
        ("auto", layer(queries=4100), "xla"),
        ("auto", layer(width=36), "xla"),
        ("auto", layer(dtype="float32"), "xla"),
        ("auto", layer(width=160, queries=256, keys=256), "xla"),
        ("auto", layer(backend="hopper", width=160, queries=64, keys=77), "cudnn"),
        ("auto", layer(backend="hopper", width=264), "xla"),
        ("auto", layer(backend="gpu"), "xla"),
        ("auto", layer(backend="tpu"), "pallas"),
        ("auto", layer(backend="tpu", dtype="float32"), "pallas"),
        ("auto", layer(backend="tpu", queries=1024, keys=1024, width=160), "pallas"),
        ("auto", layer(backend="tpu", queries=9216, keys=9216, width=64), "pallas"),
        ("auto", layer(backend="tpu", queries=256, keys=256), "xla"),
        ("auto", layer(backend="tpu", queries=1296, keys=1296), "pallas"),
        ("auto", layer(backend="tpu", keys=77), "xla"),
        ("auto", layer(backend="cpu", dtype="float32"), "mapped"),
        ("auto", layer(backend="cpu"), "mapped"),
        ("auto", layer(backend="cpu", keys=77), "mapped"),
        ("auto", layer(backend="cpu", queries=64, keys=64), "xla"),
        ("cudnn", layer(), "cudnn"),
        ("cudnn", layer(width=160), "xla"),
        ("pallas", layer(backend="tpu"), "pallas"),
        ("pallas", layer(backend="tpu", keys=77), "xla"),
        ("xla", layer(), "xla"),
        ("xla", layer(backend="cpu"), "xla"),
        ("mapped", layer(queries=64), "mapped"),
    ],
)
def test_each_layer_runs_what_its_shape_and_dtype_allow(choice, layer, chosen):
    assert attention.implementation(choice, layer) == chosen


def test_every_rule_names_a_choice_and_its_reason():
    assert {rule.implementation for rule in attention.RULES} < set(attention.CHOICES)
    assert all(rule.reason for rule in attention.RULES)


def test_the_docs_name_every_choice():
    root = pathlib.Path(__file__).resolve().parents[1]
    docs = (root / "docs" / "fine-tuning.md").read_text("utf-8").splitlines()
    [line] = [line for line in docs if line.startswith("| `attention` |")]
    assert {*re.findall(r"\w+", line)} >= {*attention.CHOICES}


@pytest.mark.parametrize(
    "choice, backend, dtype, message",
    [
        ("flash", "cpu", "float32", "one of auto, xla, mapped, cudnn, pallas"),
        ("cudnn", "cpu", "bfloat16", "NVIDIA GPU"),
        ("cudnn", "gpu", "bfloat16", "NVIDIA GPU"),
        ("cudnn", "cuda", "float32", "bfloat16"),
        ("pallas", "cpu", "float32", "a TPU for pallas"),
        ("pallas", "hopper", "bfloat16", "a TPU for pallas"),
    ],
)
def test_unsupported_choices_are_errors_before_compiling(
    choice, backend, dtype, message
):
    field = "config.finetune.attention"
    with pytest.raises(UserError, match=message) as error:
        attention.check(choice, field=field, backend=backend, dtype=dtype)
    assert error.value.name == field
    attention.check("cudnn", field=field, backend="cuda", dtype="bfloat16")
    attention.check("pallas", field=field, backend="tpu", dtype="float32")
    attention.check("auto", field=field, backend=backend, dtype=dtype)


@pytest.mark.parametrize(
    "platform, capability, backend, dtype",
    [
        ("cpu", None, "cpu", "float32"),
        ("tpu", None, "tpu", "bfloat16"),
        ("gpu", "7.5", "gpu", "bfloat16"),
        ("gpu", "gfx942", "gpu", "bfloat16"),
        ("gpu", "8.0", "cuda", "bfloat16"),
        ("gpu", "9.0", "hopper", "bfloat16"),
        ("gpu", "12.0", "cuda", "bfloat16"),
    ],
)
def test_the_backend_and_auto_follow_the_devices(
    monkeypatch, platform, capability, backend, dtype
):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(devices, "_first", lambda mesh: device)
    assert devices.backend() == backend
    assert devices.activations_dtype("auto") == dtype
    assert devices.activations_dtype("float16") == "float16"


def test_a_model_s_options_follow_the_mesh(tiny, monkeypatch):
    """For a mesh of TPUs, though the default devices are CPUs."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    tpu = types.SimpleNamespace(platform="tpu")
    first = devices._first
    monkeypatch.setattr(
        devices, "_first", lambda given: first(given) if given is None else tpu
    )
    model = tiny[0].with_compute_options(mesh=mesh, attention="pallas")
    assert (model.dtype, model.attention, model.mesh) == ("bfloat16", "pallas", mesh)
    with pytest.raises(UserError, match="a TPU"):
        tiny[0].with_compute_options(attention="pallas")


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
    def both(choice):
        attend = functools.partial(attention.attend, choice=choice)
        value, backward = jax.vjp(attend, *inputs)
        return value, *backward(cotangent)

    for mapped, plain in zip(both("mapped"), both("xla"), strict=True):
        np.testing.assert_allclose(mapped, plain, atol=2e-5, rtol=1e-5)


def value_and_gradients(attend, inputs, cotangent):
    @jax.jit
    def run(inputs, cotangent):
        value, backward = jax.vjp(attend, *inputs)
        return value, *backward(cotangent)

    return run(inputs, cotangent)


def draw(rows, tokens, others, heads, width, dtype):
    rng = np.random.default_rng(0)
    shapes = [(rows, t, heads, width) for t in (tokens, others, others, tokens)]
    *inputs, cotangent = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return inputs, cotangent


def test_padded_keys_get_no_weight_and_no_gradient():
    """cuDNN's padding, with XLA's attention in its place."""
    inputs, cotangent = draw(2, 8, 77, 2, 8, "float32")
    padded = functools.partial(attention._cudnn, implementation="xla")
    ours = value_and_gradients(padded, inputs, cotangent)
    plain = value_and_gradients(attention._plain, inputs, cotangent)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "rows, tokens, width, dtype, tolerance",
    [
        (8, 256, 40, "float32", 1e-5),  # heads narrower than the lanes of a TPU
        (8, 384, 160, "bfloat16", 2**-5),  # and wider; gradients are sums of 384
        (3, 128, 8, "float32", 1e-5),  # rows that the mesh does not divide
        (8, 200, 8, "float32", 1e-5),  # tokens that are padded to 256
    ],
)
def test_the_kernel_for_tpus_and_its_gradients_are_plain_attention(
    rows, tokens, width, dtype, tolerance
):
    """By Pallas's interpreter, on eight devices with a share of the rows each."""
    mesh = sharding.make_mesh(4, 2)
    inputs, cotangent = draw(rows, tokens, tokens, 2, width, dtype)
    wide = [x.astype(jnp.float32) for x in inputs], cotangent.astype(jnp.float32)
    kernel = functools.partial(attention._pallas, mesh=mesh)
    ours = value_and_gradients(kernel, inputs, cotangent)
    for a, b in zip(ours, value_and_gradients(attention._plain, *wide), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance)


@pytest.mark.parametrize("choice", ["xla", "mapped"])
def test_the_softmax_is_float32_in_bfloat16(choice):
    """Scores of some hundreds, 1 apart: bfloat16 would round their differences away."""
    query = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
    key = jnp.asarray([256.0, 258.0, 260.0], jnp.bfloat16).reshape(1, 3, 1, 1)
    value = jnp.asarray([0.0, 0.5, 1.0], jnp.bfloat16).reshape(1, 3, 1, 1)
    query = query * jnp.bfloat16(1.0078125)  # the scores are no bfloat16 numbers
    output = attention.attend(query, key, value, choice=choice)
    scores = 1.0078125 * np.array([256.0, 258.0, 260.0])
    weights = np.exp(scores - scores.max())
    expected = weights @ [0.0, 0.5, 1.0] / weights.sum()
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output[0, 0, 0, 0], expected, rtol=2**-8)


@pytest.fixture(scope="module")
def predicted(tiny):
    return denoise(*tiny, attention="xla")


def test_the_unet_predicts_what_the_library_s_own_attention_does(tiny, predicted):
    model, params = tiny
    latents, timesteps, states = inputs()

    @jit_fast
    def library(params):
        with attention.match_pytorch():
            return model.unet.apply(
                {"params": params}, latents.transpose(0, 3, 1, 2), timesteps, states
            ).sample.transpose(0, 2, 3, 1)

    np.testing.assert_allclose(predicted, library(params["unet"]), atol=2e-5)


@pytest.mark.parametrize("choice", ["mapped", "auto"])
def test_every_implementation_predicts_the_same(tiny, predicted, choice):
    ours = denoise(*tiny, attention=choice)
    np.testing.assert_allclose(ours, predicted, atol=2e-5)


def test_no_block_returns_float32_in_bfloat16(deep):
    def outputs(dtype):
        """(path, dtype) of every array that a module returned, and the prediction's."""
        model = dataclasses.replace(deep[0], dtype=dtype)
        seen = set()

        def note(next_call, args, kwargs, context):
            output = next_call(*args, **kwargs)
            for leaf in jax.tree.leaves(output):
                if isinstance(leaf, jax.Array):
                    seen.add(("/".join(context.module.path), leaf.dtype.name))
            return output

        with nn.intercept_methods(note):
            prediction = jax.eval_shape(model.denoise, deep[1], *inputs())
        return seen, prediction.dtype

    seen, predicted = outputs("bfloat16")
    assert len(seen) > 50
    wide = {path for path, dtype in seen if dtype != "bfloat16"}
    assert wide == {"time_proj"}  # the sines, before any layer
    assert predicted == jnp.bfloat16
    seen, predicted = outputs("float32")
    assert {dtype for _, dtype in seen} == {"float32"}


def test_statistics_of_group_norm_stay_float32_in_bfloat16():
    """Values around 256 with a spread that bfloat16 cannot sum."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(256 + 4 * rng.normal(size=(1, 16, 16, 32)), jnp.bfloat16)
    norm = nn.GroupNorm(num_groups=2)
    variables = norm.init(jax.random.key(0), values)
    with attention.implemented_by("auto"):
        output = norm.apply(variables, values)
    assert output.dtype == jnp.bfloat16
    exact = np.asarray(values, np.float64).reshape(256, 2, 16)
    exact = (exact - exact.mean((0, 2), keepdims=True)) / exact.std(
        (0, 2), keepdims=True
    )
    np.testing.assert_allclose(
        np.asarray(output, np.float64).reshape(256, 2, 16), exact, atol=0.02
    )


def test_bfloat16_predicts_nearly_what_float32_does(tiny, predicted):
    half = denoise(*tiny, attention="xla", dtype="bfloat16").astype(jnp.float32)
    error = jnp.sqrt(jnp.mean((half - predicted) ** 2))
    assert 0 < error < 0.02 * jnp.sqrt(jnp.mean(predicted**2))


def test_the_layers_that_qualify_are_lowered_to_cudnn(monkeypatch):
    """By lowering for a GPU that is not here; JAX's look at cuDNN's version is fed."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda least: hopper)

    def calls(backend, width, others):
        monkeypatch.setattr(devices, "backend", lambda mesh: backend)
        size = jnp.zeros((2, 64, 2, width), jnp.bfloat16)
        others = jnp.zeros((2, others, 2, width), jnp.bfloat16)

        def loss(query, key, value):
            return attention.attend(query, key, value).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        lowered = step.trace(size, others, others).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("__cudnn$fmhaSoftmax")

    hopper = False
    assert calls("cuda", 40, 64) == calls("cuda", 40, 77) == 2  # forward and backward
    assert calls("cuda", 160, 64) == 0
    hopper = True
    assert calls("hopper", 160, 64) == calls("hopper", 160, 77) == 2


def gradient(tiny, **changes):
    """Of the mean square of the prediction on 1,024 tokens, for the UNet."""
    model = dataclasses.replace(tiny[0], **changes)

    def loss(params):
        return (model.denoise({"unet": params}, *inputs()) ** 2).mean()

    return jit_fast(jax.grad(loss))(tiny[1]["unet"])


@pytest.fixture(scope="module")
def expected(tiny):
    return gradient(tiny)


def assert_same(found, expected):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
        found,
        expected,
    )


@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_remat_changes_no_gradient(tiny, expected, mode):
    assert_same(gradient(tiny, remat=mode), expected)


def test_the_kernel_for_tpus_gives_the_same_gradient_with_remat(
    tiny, expected, monkeypatch
):
    """By Pallas's interpreter, on two devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(devices, "backend", lambda mesh: "tpu")
    assert_same(gradient(tiny, mesh=mesh, remat="blocks"), expected)


MEMORY = """
import dataclasses, jax, sys
from mvc_jax.models import remat
from mvc_jax.models.stable_diffusion import StableDiffusion
from mvc_jax.pretraining.small import SCHEDULER
from mvc_jax.training import runtime

runtime.set_up(sys.argv[1])
unet = {
    "sample_size": 32,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [32],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
configs = {"unet": unet, "scheduler": SCHEDULER}
model = StableDiffusion(configs, tokenizer=None, attention="xla")
shapes = (2, 32, 32, 4), (2,), (2, 12, 16)
inputs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
for mode in remat.MODES:
    def loss(params, *inputs):
        chosen = dataclasses.replace(model, remat=mode)
        return (chosen.denoise({"unet": params}, *inputs) ** 2).mean()

    step = jax.jit(jax.grad(loss)).lower(model.shapes("unet"), *inputs)
    # Buffers are assigned before LLVM optimises the code, which takes longest.
    compiled = step.compile({"xla_backend_optimization_level": 0})
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


def test_remat_lowers_the_memory_of_the_compiled_step():
    """With the scheduler that `runtime.set_up` chooses, which this process cannot."""
    compiled = jax.config.jax_compilation_cache_dir
    environment = {key: os.environ[key] for key in os.environ if key != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(compiled)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    none, blocks, full = map(int, run.stdout.split())
    assert blocks < 0.75 * none
    assert full < 0.75 * none


def test_each_mode_recomputes_its_modules(deep):
    def counted(mode):
        model = dataclasses.replace(deep[0], remat=mode)
        run = jax.make_jaxpr(model.denoise)(deep[1], *inputs())
        return str(run).count("remat2[")

    blocks = (2 + 1) + 3 + (2 + 4)  # resnets and transformers: down, middle, up
    assert [counted(mode) for mode in remat.MODES] == [0, blocks, blocks + 5]
