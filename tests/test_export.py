"""PyTorch's diffusers loads what we write, in silence, and draws our images."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax.diffusion import guidance, loss, samplers
from mvc_jax.models import diffusers_layout, lora, stable_diffusion

STEPS, TEXT_SCALE, IMAGE_SCALE = 5, 2.0, 1.5
PROMPT = "a bold stroke, a photo of digit one"
FAMILIES = {
    "sd1": {"attention_head_dim": 2},
    "sd2": {"attention_head_dim": [2, 4], "use_linear_projection": True},
}
PREDICTION_TYPES = {"sd1": "epsilon", "sd2": "v_prediction"}
TARGETS = (*lora.ATTENTION, "proj_in", "downsamplers.0.conv", "time_emb_proj")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny):
    """A widened model of two blocks, its parameters, and adapters that do something."""
    model, params = tiny
    rng = np.random.default_rng(3)
    unet = model.configs["unet"] | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 64],
        **FAMILIES[request.param],
    }
    scheduler = model.configs["scheduler"]
    scheduler = {**scheduler, "prediction_type": PREDICTION_TYPES[request.param]}
    configs = {**model.configs, "unet": unet, "scheduler": scheduler}
    model = dataclasses.replace(model, configs=configs)
    drawn = stable_diffusion.random_params(model.shapes("unet"), rng)
    model, params = model.widened({**params, "unet": drawn})
    adapters = lora.init(params["unet"], rank=3, targets=TARGETS, rng=rng)
    adapters = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), adapters
    )
    return model, params, adapters


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """`base`, `lora`, and `merged`, which stands for any fine-tuned model."""
    model, params, adapters = family
    folder = tmp_path_factory.mktemp("exported")
    merged = {**params, "unet": lora.merge(params["unet"], adapters)}
    diffusers_layout.save(folder / "base", model, params)
    diffusers_layout.save(folder / "merged", model, merged)
    lora.write(folder / "lora", adapters)
    return folder


@pytest.fixture
def complaints():
    """What diffusers and transformers say at the level of warnings and above."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


def start():
    """Noise for the latents, and a source image in [0, 1]."""
    rng = np.random.default_rng(9)
    noise = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
    return noise, rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)


def draw(model, params):
    """Our image in [0, 1]."""
    timesteps, step = model.ddim(STEPS)

    @jax.jit
    def run(params, ids, noise, source):
        states = model.text_states(params, ids)
        guided = guidance.image_text_guidance(
            lambda *args: model.denoise(params, *args),
            text_states=states[:1],
            null_states=states[1],
            cond_latents=loss.posterior_mode(model.moments(params, 2 * source - 1)),
            text_scale=TEXT_SCALE,
            image_scale=IMAGE_SCALE,
        )
        latents = samplers.sample(guided, step, timesteps, noise)
        return jnp.clip(model.decode(params, latents) / 2 + 0.5, 0, 1)

    image = run(params, jnp.asarray(model.tokenize([PROMPT, ""])), *start())
    assert np.std(image) > 0.05  # a picture, and not of black and white alone
    assert np.mean((image > 0.01) & (image < 0.99)) > 0.5
    return image


def draw_in_torch(torch, pipe):
    pipe.set_progress_bar_config(disable=True)
    noise, source = (torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in start())
    return pipe(
        PROMPT,
        image=source,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=TEXT_SCALE,
        image_guidance_scale=IMAGE_SCALE,
        output_type="np",
    ).images


def test_an_exported_folder_draws_our_image(folders, torch, complaints):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folders / "merged")
    assert type(pipe) is diffusers.StableDiffusionInstructPix2PixPipeline
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        assert getattr(pipe, name) is None
    theirs = draw_in_torch(torch, pipe)
    assert complaints == []
    ours = draw(*diffusers_layout.load(folders / "merged"))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_adapters_loaded_onto_the_base_draw_our_image(
    family, folders, torch, complaints
):
    import diffusers

    model, params, adapters = family
    ours = draw(model, {**params, "lora": adapters})
    base = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folders / "base"
    )
    assert np.abs(draw_in_torch(torch, base) - ours).max() > 0.01
    base.load_lora_weights(folders / "lora")
    print(complaints)
    np.testing.assert_allclose(draw_in_torch(torch, base), ours, atol=1e-4)
    merged = type(base).from_pretrained(folders / "merged")
    np.testing.assert_allclose(draw_in_torch(torch, merged), ours, atol=1e-4)


def test_the_index_names_classes_of_pytorch(folders):
    index = json.loads((folders / "merged" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    assert index["safety_checker"] == [None, None]
    classes = {name: value[1] for name, value in index.items() if type(value) is list}
    assert classes["unet"] == "UNet2DConditionModel"
    assert not any(str(class_).startswith("Flax") for class_ in classes.values())
