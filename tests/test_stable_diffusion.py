"""Weights in and out, and the widened UNet, on a random checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sd_parity import jit_fast

from mvc_jax.checkpoints import clip_tokenizer, diffusers_layout, weights
from mvc_jax.errors import UserError
from mvc_jax.pretraining import tokenizer


@pytest.fixture
def saved(tiny, tmp_path):
    diffusers_layout.save(tmp_path / "model", *tiny)
    return tmp_path / "model"


def test_saving_and_loading_is_the_identity(tiny, saved):
    model, params = tiny
    read, again = diffusers_layout.load(saved)
    assert read.configs == model.configs
    jax.tree.map(np.testing.assert_array_equal, again, params)
    text = "a photo of digit one"
    np.testing.assert_array_equal(read.tokenize([text]), model.tokenize([text]))


def test_weights_on_disk_have_the_names_and_layout_of_pytorch(tiny, saved):
    _, params = tiny
    unet = load_file(saved / "unet" / "diffusion_pytorch_model.safetensors")
    flax_kernel = params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(
        unet["conv_in.weight"], flax_kernel.transpose(3, 2, 0, 1)
    )
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for name in ("attn1.to_out.0.weight", "ff.net.0.proj.bias", "norm3.weight"):
        assert f"{block}.{name}" in unet
    assert unet["time_embedding.linear_1.weight"].shape == (128, 32)
    vae = load_file(saved / "vae" / "diffusion_pytorch_model.safetensors")
    assert "encoder.mid_block.attentions.0.to_out.0.weight" in vae
    text = load_file(saved / "text_encoder" / "model.safetensors")
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in text
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_autoencoders_of_older_exports_are_read(tiny, saved):
    """They name attention query, key, value, proj_attn, some as 1x1 convolutions."""
    path = saved / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        for new, was in (
            ("to_q.", "query."),
            ("to_k.", "key."),
            ("to_v.", "value."),
            ("to_out.0.", "proj_attn."),
        ):
            if new in name:
                name = name.replace(new, was)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        old[name] = np.ascontiguousarray(tensor)
    save_file(old, path)
    params = diffusers_layout.load(saved, ("vae",))[1]
    jax.tree.map(np.testing.assert_array_equal, params["vae"], tiny[1]["vae"])


def test_every_wrong_tensor_is_named(tiny, saved):
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].copy()
    tensors["stranger"] = tensors.pop("conv_out.bias")
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        diffusers_layout.load(saved)
    for part in (
        "conv_out.bias is missing",
        "stranger is unexpected",
        "conv_in.weight has shape [3, 3, 3, 32], not [3, 3, 4, 32]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(UserError, match=file.split("/")[-1].replace(".", r"\.")):
        diffusers_layout.load(saved)


def test_a_cut_download_is_an_error_that_names_the_file(saved):
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model"):
        diffusers_layout.load(saved)


def test_the_widened_unet_equals_the_old_one_and_then_sees_the_source(tiny):
    model, params = tiny
    wide, widened = model.widened(params)
    rng = np.random.default_rng(1)
    noisy, source = jnp.asarray(rng.normal(size=(2, 2, 2, 2, 4)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(2, 12, 16)), jnp.float32)
    steps = jnp.array([3, 700])
    old = jit_fast(model.denoise)(params, noisy, steps, states)
    both = jnp.concatenate([noisy, source], axis=-1)
    new = jit_fast(wide.denoise)(widened, both, steps, states)
    np.testing.assert_allclose(new, old, atol=1e-6)
    np.testing.assert_array_equal(
        widened["unet"]["conv_in"]["bias"], params["unet"]["conv_in"]["bias"]
    )
    assert np.abs(params["unet"]["conv_in"]["bias"]).max() > 0

    def of_kernel(kernel):
        conv_in = {**widened["unet"]["conv_in"], "kernel": kernel}
        unet = {**widened["unet"], "conv_in": conv_in}
        return (wide.denoise({"unet": unet}, both, steps, states) ** 2).sum()

    gradient = jit_fast(jax.grad(of_kernel))(
        jnp.asarray(widened["unet"]["conv_in"]["kernel"])
    )
    assert np.abs(gradient[:, :, 4:]).min(axis=(0, 1, 3)).max() > 0
    assert wide.widened(widened) == (wide, widened)


def test_text_states_depend_on_earlier_tokens_only(tiny):
    model, params = tiny
    ids = model.tokenize(["a bold stroke, a photo", "a bold stroke, a digit"])
    differ = np.flatnonzero(ids[0] != ids[1])
    states = jit_fast(model.text_states)(params, jnp.asarray(ids))
    first = int(differ[0])
    np.testing.assert_allclose(states[0, :first], states[1, :first], atol=1e-6)
    assert np.abs(states[0, first] - states[1, first]).max() > 1e-4


@pytest.mark.parametrize(
    "path, name",
    [
        (
            ("up_blocks_1", "upsamplers_0", "conv", "bias"),
            "up_blocks.1.upsamplers.0.conv.bias",
        ),
        (("a", "attn2", "to_out_0", "kernel"), "a.attn2.to_out.0.weight"),
        (("x", "token_embedding", "embedding"), "x.token_embedding.weight"),
    ],
)
def test_torch_names(path, name):
    assert weights.torch_name(path) == name


def test_the_trained_tokenizer_is_clip_s(tmp_path):
    tokenizer.train(
        tmp_path, ["bold slanted strokes"] * 5, vocab_size=600, max_length=8
    )
    read = clip_tokenizer.read(tmp_path)[0]
    assert read.tokenize("Bold strokes") == ["bold</w>", "strokes</w>"]
    ids = read("bold", padding="max_length", max_length=8)["input_ids"]
    assert ids[0] == read.bos_token_id
    assert set(ids[2:]) == {read.eos_token_id}
    unseen = read("naïve 7!")["input_ids"]
    text = read.decode(unseen, skip_special_tokens=True)
    assert text.replace(" ", "") == "naïve7!"
