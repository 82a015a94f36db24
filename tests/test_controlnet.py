"""ControlNet: parity with PyTorch, initialisation, and errors."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_families
from sd_families import LATENTS, normal
from sd_parity import assert_equal, jit_fast

from mvc_jax.checkpoints import controlnet_checkpoint, families
from mvc_jax.errors import UserError
from mvc_jax.pretraining import companions

FIELD = "config.generate.controlnet"
TIMESTEPS = np.array([1, 981], np.int32)


@functools.cache
def base():
    """A text-to-image base of two levels, without its autoencoder's weights."""
    model, _ = sd_families.checkpoint("pix2pix")
    unet = model.configs["unet"] | {"in_channels": 4}
    model = dataclasses.replace(model, configs={**model.configs, "unet": unet})
    return model, {"unet": sd_families.random("control.unet", model.shapes("unet"))}


@functools.cache
def network():
    """A random ControlNet for it, whose zero convolutions are small."""
    model, _ = base()
    made = companions.new_controlnet(model)
    params = sd_families.random("controlnet", made.shapes())
    for name in params:
        if name.startswith("controlnet_") and "kernel" in params[name]:
            params[name]["kernel"] = params[name]["kernel"] * np.float32(0.25)
    return made, params


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlnet")
    controlnet_checkpoint.save(folder, *network())
    return folder


def _inputs():
    latents = normal("control latents", 2, *LATENTS, 4)
    pictures = np.abs(sd_families.images("control pictures", 2))
    return latents, TIMESTEPS, normal("control states", 2, 77, 32), pictures


def test_unet_and_controlnet_predict_what_pytorchs_do(folder, torch):
    import diffusers

    model, params = base()
    control, read = controlnet_checkpoint.load(folder, model.configs, field=FIELD)

    @jit_fast
    def both(params, latents, timesteps, states, pictures):
        residuals = control.residuals(
            params["control"], latents, timesteps, states, pictures
        )
        out = model.denoise(params, latents, timesteps, states, residuals)
        return residuals, out

    inputs = _inputs()
    (down, middle), out = both(params | {"control": read}, *inputs)

    unet = diffusers.UNet2DConditionModel.from_config(model.configs["unet"])
    unet.load_state_dict(_state_dict(params["unet"]))
    theirs = diffusers.ControlNetModel.from_pretrained(folder)
    latents, pictures = (
        torch.from_numpy(inputs[i]).permute(0, 3, 1, 2).contiguous() for i in (0, 3)
    )
    steps, states = torch.from_numpy(TIMESTEPS).long(), torch.from_numpy(inputs[2])
    with torch.no_grad():
        theirs_down, theirs_middle = theirs(
            latents, steps, states, controlnet_cond=pictures, return_dict=False
        )
        expected = unet(
            latents,
            steps,
            states,
            down_block_additional_residuals=theirs_down,
            mid_block_additional_residual=theirs_middle,
        ).sample
    ours = {"out": out.transpose(0, 3, 1, 2), "middle": middle.transpose(0, 3, 1, 2)}
    ours |= {f"down {i}": x.transpose(0, 3, 1, 2) for i, x in enumerate(down)}
    reference = {"out": expected.numpy(), "middle": theirs_middle.numpy()}
    reference |= {f"down {i}": x.numpy() for i, x in enumerate(theirs_down)}
    assert_equal("controlnet", ours, reference)


def _state_dict(params):
    """A Flax tree as PyTorch's module takes it, through a file."""
    import tempfile

    import safetensors.torch

    from mvc_jax.checkpoints import weights

    with tempfile.TemporaryDirectory() as local:
        weights.write(f"{local}/unet.safetensors", params)
        return safetensors.torch.load_file(f"{local}/unet.safetensors")


def test_an_untrained_controlnet_changes_nothing(tiny):
    model, params = tiny
    control = companions.new_controlnet(model)
    start = companions.initial_controlnet_params(
        control, params["unet"], np.random.default_rng(0)
    )
    np.testing.assert_array_equal(
        start["conv_in"]["kernel"], params["unet"]["conv_in"]["kernel"]
    )
    inputs = (normal("l", 1, 2, 2, 4), TIMESTEPS[:1], normal("s", 1, 12, 16))
    pictures = normal("p", 1, 8, 8, 3)

    @jit_fast
    def both(params, start):
        residuals = control.residuals(start, *map(jnp.asarray, (*inputs, pictures)))
        arrays = [jnp.asarray(x) for x in inputs]
        return (
            residuals,
            model.denoise(params, *arrays, residuals),
            model.denoise(params, *arrays),
        )

    residuals, controlled, alone = both(params, start)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(residuals))
    np.testing.assert_array_equal(controlled, alone)


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


REFUSED = {
    "another text width": (
        {"cross_attention_dim": 768},
        "cross_attention_dim is 768, not 32",
    ),
    "another width": (
        {"block_out_channels": [32, 128]},
        r"block_out_channels is \[32, 128\], not \[32, 64\]",
    ),
    "another grid": (
        {"conditioning_embedding_out_channels": [16, 32]},
        "not 4 numbers, one for each level",
    ),
    "a UNet": ({"_class_name": "UNet2DConditionModel"}, "'ControlNetModel'"),
    "an option that Flax skips": (
        {"global_pool_conditions": True},
        "global_pool_conditions is True, not False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_controlnet_of_another_base_is_refused_before_a_tensor_is_read(copy, case):
    changes, message = REFUSED[case]
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    configs = base()[0].configs
    with pytest.raises(UserError, match=message):
        controlnet_checkpoint.check(copy, configs, field=FIELD)


def test_a_pickle_is_never_opened(copy):
    (copy / controlnet_checkpoint._WEIGHTS[1]).rename(
        copy / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(UserError, match="never opened"):
        controlnet_checkpoint.check(copy, None, field=FIELD)


def test_tensors_that_do_not_fit_are_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layers_per_block": 1}))
    configs = json.loads(json.dumps(base()[0].configs))
    configs["unet"]["layers_per_block"] = 1
    with pytest.raises(UserError, match=r"\d+ that differ.*controlnet_down_blocks"):
        controlnet_checkpoint.load(copy, configs, field=FIELD)


def test_the_defaults_are_those_of_the_public_controlnets():
    """Stable Diffusion 1.x's own options, left out of an early config.json."""
    config = families.completed("controlnet", {"cross_attention_dim": 768})
    families.check_config("controlnet", config, "config.json")
    base = {
        "unet": families.completed("unet", {"cross_attention_dim": 768}),
        "vae": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]},
    }
    families.check_controlnet(config, base, "config.json")
