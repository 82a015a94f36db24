"""Stable Diffusion equals PyTorch's: against golden files, and live."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_families
import sd_parity

from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.diffusion import loss
from mvc_jax.models import attention

families = pytest.mark.parametrize("family", sd_families.FAMILIES)
comparisons = pytest.mark.parametrize("name", sd_parity.COMPARISONS)


@functools.cache
def ours(family, name):
    return sd_parity.COMPARISONS[name][0](family)


@pytest.fixture(scope="module")
def pytorch(torch, tmp_path_factory):
    """family -> (PyTorch's pipelines, their arrays), computed once."""

    @functools.cache
    def of(family):
        root = tmp_path_factory.mktemp(family)
        sd_parity.write_folders(family, root)
        pipelines = sd_parity.Pipelines(root)
        return pipelines, sd_parity.compute_torch(family, pipelines)

    return of


@families
@comparisons
def test_equals_the_golden_file(family, name):
    golden = sd_parity.read_golden(family, name)
    sd_parity.assert_equal(name, sd_parity.thin(ours(family, name)), golden)


@families
@comparisons
def test_equals_pytorch(family, name, pytorch):
    sd_parity.assert_equal(name, ours(family, name), pytorch(family)[1][name])


@families
@comparisons
def test_the_golden_file_is_up_to_date(family, name, pytorch):
    """Else: python tests/golden/make.py."""
    made = sd_parity.thin(pytorch(family)[1][name])
    sd_parity.assert_equal(name, made, sd_parity.read_golden(family, name))


@families
@comparisons
def test_what_is_compared_is_of_order_one(family, name):
    """Else an absolute tolerance would mean nothing; that of gradients is relative."""
    for key, array in sd_parity.read_golden(family, name).items():
        if array.dtype.kind == "f" and key not in ("kernel", "bias"):
            assert 0.1 < np.abs(array).mean() < 10, key


def test_the_tolerance_detects_gelu_and_epsilon_of_the_library(monkeypatch):
    monkeypatch.setattr(attention, "match_pytorch", contextlib.nullcontext)
    plain = sd_parity.unet("pix2pix")["prediction"]
    expected = sd_parity.read_golden("pix2pix", "unet")["prediction"]
    assert np.abs(plain - expected).max() > 10 * sd_parity.bar("unet", expected)


def test_attention_by_parts_equals_the_golden_file():
    """What `auto` chooses for more tokens than tiny latents have."""
    model, params = sd_families.checkpoint("pix2pix")
    model = dataclasses.replace(model, attention="mapped")
    inputs = sd_parity.unet_inputs(model, "pix2pix")
    prediction = jax.jit(model.denoise)({"unet": params["unet"]}, *inputs)
    made = sd_parity.thin({"prediction": np.asarray(prediction)})
    sd_parity.assert_equal("unet", made, sd_parity.read_golden("pix2pix", "unet"))


@families
def test_a_folder_written_by_pytorch_is_loaded(family, pytorch, tmp_path):
    pytorch(family)[0].fine_tuned.save_pretrained(tmp_path)
    model, params = sd_families.fine_tuned(family)
    read, again = diffusers_layout.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert read.configs["scheduler"] == model.configs["scheduler"]
    assert read.unet == model.unet
    assert read.vae == model.vae
    ids = read.tokenize(sd_families.PROMPTS)
    found = jax.jit(read.conditions)(again, jnp.asarray(ids))
    found = {"ids": ids} | (found if read.pooled_width else {"states": found})
    expected = ours(family, "text")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_widened_unet_equals_the_old_one(family):
    base, params = sd_families.checkpoint(family)
    model, widened = base.widened(params)
    noisy, timesteps, states = sd_parity.unet_inputs(base, family)
    source = sd_families.normal(f"{family} any source", *noisy.shape)
    both = np.concatenate([noisy, source], axis=-1)
    new = jax.jit(model.denoise)({"unet": widened["unet"]}, both, timesteps, states)
    np.testing.assert_allclose(new, ours(family, "unet")["prediction"], atol=1e-6)


def test_an_instruct_pix2pix_checkpoint_is_not_widened():
    model, params = sd_families.checkpoint("pix2pix")
    assert model.widened(params) == (model, params)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_pytorch(torch, prediction_type):
    """As in the training examples of diffusers."""
    import diffusers
    from diffusers.training_utils import compute_snr

    model, _ = sd_families.checkpoint("sd1")
    scheduler = diffusers.DDPMScheduler.from_config(model.configs["scheduler"])
    snr = compute_snr(scheduler, torch.arange(1000))
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
    expected = expected / (snr + 1 if prediction_type == "v_prediction" else snr)
    weights = loss.loss_weights(
        jnp.arange(1000), model.alphas_cumprod, prediction_type, 5.0
    )
    np.testing.assert_allclose(weights, expected.numpy(), rtol=0, atol=1e-5)
