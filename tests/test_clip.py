"""CLIP: parity with PyTorch, files, and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_families
import transformers
from base_folders import answer

from mvc_jax.checkpoints import clip_checkpoint, weights
from mvc_jax.errors import UserError
from mvc_jax.models import clip, stable_diffusion
from mvc_jax.pretraining import tokenizer

FIELD = "config.generate.clip"
TEXTS = ("a photo of the digit one", "Bold strokes!", "")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny CLIPModel, laid out as openai/clip-vit-large-patch14; no file by torch."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer.train(folder, [sd_families.WORDS] * 5, vocab_size=560, max_length=20)
    read = transformers.CLIPTokenizerFast.from_pretrained(folder)
    ids = {"bos_token_id": read.bos_token_id, "eos_token_id": read.eos_token_id}
    text = TEXT | {"vocab_size": len(read), "hidden_act": "gelu"} | ids
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION, projection_dim=12
    )
    config.save_pretrained(folder)
    clip.image_processor(16).save_pretrained(folder)
    config.vision_config.projection_dim = config.text_config.projection_dim = 12
    model = clip.Clip(
        config.vision_config, clip.image_processor(16), config.text_config
    )
    drawn = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + drawn.normal(0, 0.1, leaf.shape).astype(np.float32),
        stable_diffusion.random_params(model.shapes(), drawn),
    )
    params["logit_scale"] = np.float32(2.0)
    weights.write(folder / "model.safetensors", params)
    return folder


@pytest.fixture(scope="session")
def pictures():
    """[2, 30, 40, 3]: neither square nor of the tower's size."""
    noise = sd_families.normal("clip pictures", 2, 6, 8, 3).repeat(5, 1).repeat(5, 2)
    return np.clip(127 + 60 * noise, 0, 255).astype(np.uint8)


def test_a_whole_clip_embeds_images_and_texts_as_pytorch_does(folder, pictures, torch):
    model, params = clip_checkpoint.load(folder, field=FIELD, text=True)
    images = jax.jit(model.image_embeddings)(params, model.preprocess(pictures))
    ids = model.tokenize(TEXTS)
    texts = jax.jit(model.text_embeddings)(params, jnp.asarray(ids))
    shares = jax.jit(clip.zero_shot)(images, texts, params["logit_scale"])

    theirs = transformers.CLIPModel.from_pretrained(folder)
    process = transformers.CLIPProcessor.from_pretrained(folder, use_fast=False)
    inputs = process(
        text=list(TEXTS),
        images=list(pictures),
        padding="max_length",
        max_length=20,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = theirs(**inputs)
        embedded = theirs.get_image_features(inputs["pixel_values"])
        read = theirs.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_array_equal(ids, inputs["input_ids"].numpy())
    np.testing.assert_allclose(images, embedded.numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(texts, read.numpy(), atol=1e-5, rtol=0)
    theirs = output.logits_per_image.softmax(dim=1).numpy()
    np.testing.assert_allclose(shares, theirs, atol=1e-5, rtol=0)


def test_an_image_tower_in_the_layout_of_diffusers(folder, pictures, torch, tmp_path):
    """Written by `save`, read by PyTorch and again by `load`: equal to the whole."""
    model, params = clip_checkpoint.load(folder, field=FIELD)
    assert clip_checkpoint.check(folder, field=FIELD).width == model.width == 12
    assert set(params) == {"vision_model", "visual_projection"}
    clip_checkpoint.save(tmp_path, model, params)
    (tmp_path / "model_index.json").write_text("{}")
    again, read = clip_checkpoint.load(tmp_path, field=FIELD)
    jax.tree.map(np.testing.assert_array_equal, params, read)
    pixels = again.preprocess(pictures)
    np.testing.assert_array_equal(pixels, model.preprocess(pictures))
    ours = jax.jit(again.image_embeddings)(read, pixels)

    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "image_encoder"
    )
    process = transformers.CLIPImageProcessor.from_pretrained(
        tmp_path / "feature_extractor"
    )
    with torch.no_grad():
        inputs = process(list(pictures), return_tensors="pt")
        expected = theirs(**inputs).image_embeds.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "another model": (
        lambda x: _edit(x / "config.json", model_type="siglip"),
        "model_type 'clip' or 'clip_vision_model'.*'siglip'",
    ),
    "an odd activation": (
        lambda x: _edit(x / "config.json", vision_config={"hidden_act": "tan"}),
        "hidden_act is 'tan'",
    ),
    "another size": (
        lambda x: clip.image_processor(8).save_pretrained(x),
        "makes images of 16 pixels.*8 x 8",
    ),
    "another processor": (
        lambda x: _edit(x / "preprocessor_config.json", image_processor_type="Vit"),
        "a Vit that makes",
    ),
    "a pickle": (
        lambda x: (x / "model.safetensors").rename(x / "pytorch_model.bin"),
        "Pickles are never opened.*CLIPModel",
    ),
    "a cut file": (
        lambda x: (x / "model.safetensors").write_bytes(b"123"),
        "a whole safetensors file",
    ),
    "no config": (lambda x: (x / "config.json").unlink(), "its config.json.*none at"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_an_error_before_a_tensor_is_read(copy, case):
    damage, message = REFUSED[case]
    damage(copy)
    with pytest.raises(UserError, match=f"(?s){message}"):
        clip_checkpoint.check(copy, field=FIELD)


def test_tensors_that_do_not_fit_are_named(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vision_model.encoder.layers.2.*is missing"):
        clip_checkpoint.load(copy, field=FIELD)


def test_an_image_tower_has_no_texts(folder, tmp_path):
    clip_checkpoint.save(tmp_path, *clip_checkpoint.load(folder, field=FIELD))
    with pytest.raises(UserError, match="an image tower alone"):
        clip_checkpoint.check(tmp_path / "image_encoder", field=FIELD, text=True)


def test_the_check_of_a_hub_name_downloads_nothing(monkeypatch, tmp_path):
    answer(monkeypatch, ["config.json", "model.safetensors"], cache=tmp_path)
    assert clip_checkpoint.check("openai/clip-vit-large-patch14", field=FIELD) is None
