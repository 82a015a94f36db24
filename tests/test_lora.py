"""Adapters: initialised, applied, merged, written."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from sd_parity import jit_fast

from mvc_jax.checkpoints import lora_file
from mvc_jax.errors import UserError
from mvc_jax.models import lora, stable_diffusion
from mvc_jax.training import sharding
from mvc_jax.training.checkpoint import Checkpoints

new_adapters = functools.partial(lora.init, name_of=lora_file.layer_name)


def perturbed(tree, rng):
    def one(leaf):
        return np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    return jax.tree.map(one, tree)


@pytest.fixture(scope="module")
def one_block(tiny):
    """A widened model, its UNet's parameters, and new adapters."""
    model, params = tiny[0].widened(tiny[1])
    rng = np.random.default_rng(4)
    return model, params["unet"], new_adapters(params["unet"], rank=3, rng=rng)


@pytest.fixture(scope="module")
def gradient(one_block):
    """Jitted `(adapters, unet, *inputs) -> energy, its gradient`."""
    return jit_fast(jax.value_and_grad(lambda *args: energy(one_block[0], *args)))


@pytest.fixture(scope="module")
def everywhere(one_block):
    """Adapters of all kinds of layers, with nonzero B."""
    rng = np.random.default_rng(5)
    targets = (*lora.ATTENTION, "proj_in", "proj_out", "conv_shortcut", "net.0.proj")
    targets = (*targets, "time_emb_proj", "linear_1", "conv_out")
    return perturbed(new_adapters(one_block[1], rank=2, targets=targets, rng=rng), rng)


def energy(model, adapters, unet, *inputs):
    return (model.denoise({"unet": unet, "lora": adapters}, *inputs) ** 2).mean()


def inputs(batch=2):
    rng = np.random.default_rng(5)
    latents = jnp.asarray(rng.normal(size=(batch, 4, 4, 8)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(batch, 12, 16)), jnp.float32)
    return latents, 50 + 100 * jnp.arange(batch), states


def assert_close(a, b, *, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_the_shapes_are_those_of_the_layers(one_block):
    _, unet, adapters = one_block
    block = "down_blocks_0/attentions_0/transformer_blocks_0"
    to_k = adapters[f"{block}/attn2/to_k"]
    assert (to_k["a"].shape, to_k["b"].shape) == ((16, 3), (3, 32))
    conv_in = adapters["conv_in"]
    assert (conv_in["a"].shape, conv_in["b"].shape) == ((3, 3, 8, 3), (1, 1, 3, 32))
    # 4 projections of 2 attentions of 4 transformer blocks, and conv_in
    assert len(adapters) == 4 * 2 * 4 + 1
    kinds = {path.split("/")[-1] for path in adapters}
    assert kinds == {"to_q", "to_k", "to_v", "to_out_0", "conv_in"}
    shapes = jax.eval_shape(lambda: unet)
    of_shapes = new_adapters(shapes, rank=3, rng=np.random.default_rng(4))
    jax.tree.map(np.testing.assert_array_equal, of_shapes, adapters)


def test_a_target_may_name_the_layer_s_parents(one_block):
    rng = np.random.default_rng(0)
    adapters = new_adapters(one_block[1], rank=1, targets=("attn2.to_q",), rng=rng)
    assert {path.split("/")[-2:][0] for path in adapters} == {"attn2", "conv_in"}


@pytest.mark.parametrize("target", ["to_p", "o_q", ""])
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_layers(
    one_block, target
):
    rng = np.random.default_rng(0)
    with pytest.raises(UserError) as error:
        new_adapters(one_block[1], rank=2, targets=("to_q", target), rng=rng)
    assert repr(target) in str(error.value)
    for name in ("to_q", "to_out.0", "proj_in", "conv1", "net.2", "linear_1"):
        assert f" {name}," in str(error.value)


def test_a_rank_below_one_is_an_error(one_block):
    with pytest.raises(UserError, match="wanted at least 1, got 0"):
        new_adapters(one_block[1], rank=0, rng=np.random.default_rng(0))


def test_new_adapters_change_nothing_and_every_b_learns(one_block, gradient):
    model, unet, adapters = one_block
    value, grads = gradient(adapters, unet, *inputs())
    base = jit_fast(model.denoise)({"unet": unet}, *inputs())
    np.testing.assert_allclose(value, (base**2).mean(), rtol=1e-6)
    for path, pair in grads.items():
        assert np.abs(pair["b"]).max() > 0, path
        assert not pair["a"].any(), path  # its gradient goes through B, which is zero


def test_adapters_and_merged_weights_give_the_same_output(one_block, everywhere):
    model, unet, _ = one_block
    adapters = everywhere
    denoise = jit_fast(model.denoise)
    merged = lora.merge(unet, adapters)
    with_adapters = denoise({"unet": unet, "lora": adapters}, *inputs())
    with_merged = denoise({"unet": merged}, *inputs())
    np.testing.assert_allclose(with_adapters, with_merged, atol=1e-5)
    assert np.abs(with_merged - denoise({"unet": unet}, *inputs())).max() > 0.01
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(merged),
            jax.tree.leaves(unet),
            strict=True,
        )
        if not np.array_equal(new, old)
    }
    assert changed == {f"{path}/kernel" for path in adapters}


def test_merging_on_the_device_and_on_the_host_is_the_same(one_block):
    _, unet, adapters = one_block
    adapters = perturbed(adapters, np.random.default_rng(6))
    on_host = lora.merge(unet, adapters)
    assert_close(lora.merge(*jax.device_put((unet, adapters))), on_host, atol=1e-6)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(on_host))


class Net(nn.Module):
    """One convolution and one linear layer."""

    window: tuple = (3, 3)
    strides: int = 1
    padding: str | tuple = "SAME"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = {"strides": self.strides, "padding": self.padding}
        x = nn.Conv(6, self.window, **options, dtype=self.dtype, name="conv_in")(x)
        return nn.Dense(5, dtype=self.dtype, name="dense")(nn.gelu(x))


def net_of(**fields):
    """A `Net`, its parameters, adapters, and images."""
    rng, net = np.random.default_rng(7), Net(**fields)
    images = jnp.asarray(rng.normal(size=(2, 5, 7, 4)), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
    params = perturbed(stable_diffusion.random_params(shapes, rng), rng)
    adapters = new_adapters(params, rank=2, targets=("dense",), rng=rng)
    return net, params, perturbed(adapters, rng), images


def apply_adapted(net, params, adapters, images):
    with lora.adapted(adapters):
        return net.apply({"params": params}, images)


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 1), (0, 1))])
def test_a_convolution_of_any_kind(window, strides, padding):
    net, params, adapters, images = net_of(
        window=window, strides=strides, padding=padding
    )
    merged = net.apply({"params": lora.merge(params, adapters)}, images)
    adapted = apply_adapted(net, params, adapters, images)
    np.testing.assert_allclose(adapted, merged, atol=1e-5)


def test_gradients_are_those_through_the_merged_weights_also_rematerialised():
    net, params, adapters, images = net_of()

    def through_merged(adapters):
        merged = lora.merge(params, adapters)
        return (net.apply({"params": merged}, images) ** 2).sum()

    @jax.checkpoint
    def through_adapted(adapters):
        return (apply_adapted(net, params, adapters, images) ** 2).sum()

    wanted = jax.grad(through_merged)(adapters)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))
    assert_close(jax.jit(jax.grad(through_adapted))(adapters), wanted, atol=1e-4)


def test_activations_keep_their_dtype():
    net, params, adapters, images = net_of(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(apply_adapted, static_argnums=0)(
        net, params, adapters, images
    )
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    products = ("dot_general", "conv_general_dilated")
    dtypes = [
        eqn.outvars[0].aval.dtype
        for eqn in jaxpr.eqns
        if eqn.primitive.name in products
    ]
    assert dtypes == [jnp.bfloat16] * 6  # W x, A x and B A x, twice


def test_no_intermediate_has_the_size_of_an_adapted_weight(one_block):
    """Those of to_k and to_v on the text are [16, 32], unlike any activation."""
    model, unet, adapters = one_block

    def count(function):
        jaxpr = jax.make_jaxpr(jax.grad(function))(adapters, unet, *inputs())
        shapes = [var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars]
        return shapes.count((16, 32)) + shapes.count((32, 16))

    def through_merged(adapters, unet, *inputs):
        return energy(model, {}, lora.merge(unet, adapters), *inputs)

    assert count(through_merged) > 0
    assert count(lambda *args: energy(model, *args)) == 0


def test_an_adapter_whose_layer_is_not_called_is_an_error(one_block):
    model, unet, adapters = one_block
    params = {"unet": unet, "lora": {**adapters, "lost/to_q": adapters["conv_in"]}}
    with pytest.raises(ValueError, match="not called: .'lost/to_q'"):
        jax.eval_shape(model.denoise, params, *inputs())


def test_eight_devices_give_the_gradients_of_one(one_block, gradient):
    _, unet, adapters = one_block
    adapters = perturbed(adapters, np.random.default_rng(8))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    trees = adapters, unet
    placed = jax.device_put(trees, sharding.tree_shardings(trees, mesh))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed[0]))
    assert not placed[1]["conv_in"]["kernel"].sharding.is_fully_replicated
    batch = jax.device_put(inputs(8), sharding.batch_sharding(mesh))
    one = gradient(adapters, unet, *inputs(8))
    assert_close(gradient(*placed, *batch), one, atol=1e-5)


def test_adapters_survive_a_checkpoint(one_block, tmp_path):
    adapters = jax.device_put(one_block[2])
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(1, adapters)
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, adapters))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, adapters)


def test_the_file_has_the_names_and_layout_of_peft(everywhere, tmp_path):
    assert lora_file.write(tmp_path, everywhere) == [lora_file.FILE]
    tensors = load_file(tmp_path / lora_file.FILE)
    block = "mid_block.attentions.0.transformer_blocks.0"
    pair = everywhere["mid_block/attentions_0/transformer_blocks_0/attn1/to_out_0"]
    name = f"unet.{block}.attn1.to_out.0"
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], pair["a"].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], pair["b"].T)
    for module, a, b in (
        (f"{block}.ff.net.0.proj", (2, 32), (256, 2)),
        ("conv_in", (2, 8, 3, 3), (32, 2, 1, 1)),
        ("mid_block.attentions.0.proj_in", (2, 32, 1, 1), (32, 2, 1, 1)),
        ("time_embedding.linear_1", (2, 32), (128, 2)),
    ):
        assert tensors[f"unet.{module}.lora_A.weight"].shape == a
        assert tensors[f"unet.{module}.lora_B.weight"].shape == b
    assert len(tensors) == 2 * len(everywhere)
    with safe_open(tmp_path / lora_file.FILE, "np") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert len(config["unet.target_modules"]) == len(everywhere)


def test_adapters_that_are_not_finite_are_not_exported(everywhere, tmp_path):
    spoiled = jax.tree.map(np.array, everywhere)
    spoiled["conv_in"]["b"][..., 0] = np.inf
    with pytest.raises(UserError, match=r"conv_in.lora_B.weight: .* Nothing is export"):
        lora_file.write(tmp_path, spoiled)
    assert not list(tmp_path.iterdir())
