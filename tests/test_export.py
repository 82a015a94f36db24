"""PyTorch's diffusers loads our exports without a warning and draws our images."""

import ast
import dataclasses
import json
import logging
import re

import huggingface_hub
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import texts
import yaml
from base_folders import to_variant
from hypothesis import strategies as st
from PIL import Image

from mvc_jax.checkpoints import diffusers_layout, lora_file, model_card
from mvc_jax.diffusion import guidance, loss, samplers
from mvc_jax.models import lora, stable_diffusion

STEPS, TEXT_SCALE, IMAGE_SCALE = 5, 2.0, 1.5
PROMPT = "a bold stroke, a photo of digit one"
FAMILIES = {
    "sd1": {"attention_head_dim": 2},
    "sd2": {"attention_head_dim": [2, 4], "use_linear_projection": True},
}
PREDICTION_TYPES = {"sd1": "epsilon", "sd2": "v_prediction"}
TARGETS = (*lora.ATTENTION, "proj_in", "downsamplers.0.conv", "time_emb_proj")


@pytest.fixture(scope="module")
def torch(torch):
    """On one thread: several spin while they wait, which a busy machine pays for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny):
    """A widened model of two blocks, its parameters, and adapters that are not zero."""
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
    return model, params, new_adapters(params["unet"], rng, TARGETS)


def new_adapters(unet, rng, targets=lora.ATTENTION):
    """Of rank 3; B is not zero."""
    adapters = lora.init(
        unet, rank=3, targets=targets, name_of=lora_file.layer_name, rng=rng
    )
    return jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), adapters
    )


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """`base`, `lora`, and `merged`, an example of a fine-tuned model."""
    model, params, adapters = family
    folder = tmp_path_factory.mktemp("exported")
    merged = {**params, "unet": lora.merge(params["unet"], adapters)}
    diffusers_layout.save(folder / "base", model, params)
    diffusers_layout.save(folder / "merged", model, merged)
    lora_file.write(folder / "lora", adapters)
    return folder


@pytest.fixture
def logged_warnings():
    """Log messages of diffusers and transformers, of level warning and above."""
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
    sampler = samplers.make(
        "ddim",
        STEPS,
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
    )

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
        latents = sampler(guided, noise)
        return jnp.clip(model.decode(params, latents) / 2 + 0.5, 0, 1)

    image = run(params, jnp.asarray(model.tokenize([PROMPT, ""])), *start())
    assert np.std(image) > 0.05  # not a constant image, nor only black and white
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


def test_an_exported_folder_draws_our_image(folders, torch, logged_warnings):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folders / "merged")
    assert type(pipe) is diffusers.StableDiffusionInstructPix2PixPipeline
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        assert getattr(pipe, name) is None
    theirs = draw_in_torch(torch, pipe)
    assert logged_warnings == []
    ours = draw(*diffusers_layout.load(folders / "merged"))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize("length", [..., None, 1e30])
def test_a_tokenizer_without_a_length_gets_the_text_encoders(
    tiny, torch, tmp_path, length
):
    """PyTorch would pad the prompt to it, beyond the text encoder's positions."""
    import diffusers

    model, params = tiny
    base = tmp_path / "base"
    diffusers_layout.save(base, *model.widened(params))
    file = base / "tokenizer" / "tokenizer_config.json"
    options = json.loads(file.read_text())
    del options["model_max_length"]
    file.write_text(
        json.dumps(options if length is ... else options | {"model_max_length": length})
    )
    diffusers_layout.check_base(base)
    diffusers_layout.save(tmp_path / "model", *diffusers_layout.load(base))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe.tokenizer.model_max_length == 12
    pipe.set_progress_bar_config(disable=True)
    image = np.zeros((1, 8, 8, 3), np.float32)
    drawn = pipe(PROMPT, image=image, num_inference_steps=1, output_type="np").images
    assert np.isfinite(drawn).all()


def test_an_unknown_field_or_tensor_would_cause_a_warning(
    tiny, torch, logged_warnings, tmp_path
):
    import diffusers

    model, params = tiny
    configs = {**model.configs, "vae": {**model.configs["vae"], "stray_field": 1}}
    params = {**params, "vae": {**params["vae"], "stray": {"kernel": np.ones((2, 2))}}}
    model = dataclasses.replace(model, configs=configs)
    diffusers_layout.save(tmp_path, model, params)
    diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    for stray in ("stray_field", "stray.weight"):
        assert any(stray in warning for warning in logged_warnings)


def test_adapters_loaded_onto_the_base_draw_our_image(
    family, folders, torch, logged_warnings
):
    import diffusers

    model, params, adapters = family
    ours = draw(model, {**params, "lora": adapters})
    base = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folders / "base"
    )
    assert np.abs(draw_in_torch(torch, base) - ours).max() > 0.01
    base.load_lora_weights(folders / "lora")
    # peft warns about every adapter of the UNet alone.
    logged_warnings = [text for text in logged_warnings if "CLIPTextModel" not in text]
    assert logged_warnings == []
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


def test_the_tokenizer_that_is_named_gives_our_ids(folders):
    """As the pipeline calls it; the slow class splits CJK unless ftfy is installed."""
    import transformers

    library, name = json.loads((folders / "merged" / "model_index.json").read_text())[
        "tokenizer"
    ]
    assert library == "transformers"
    ours = diffusers_layout.load(folders / "merged", components=())[0]
    for load in (getattr(transformers, name), transformers.AutoTokenizer):
        theirs = load.from_pretrained(folders / "merged" / "tokenizer")
        length = theirs.model_max_length
        padded = {"padding": "max_length", "truncation": True, "max_length": length}
        ids = theirs(list(texts.TEXTS), **padded, return_tensors="np")["input_ids"]
        np.testing.assert_array_equal(ids, ours.tokenize(list(texts.TEXTS)))
    for text in texts.TEXTS:  # also those that are cut
        assert theirs(text)["input_ids"] == ours.tokenizer(text)["input_ids"]


FACTS = model_card.Facts(
    base="someone/small-diffusion",
    revision="0123abc",
    license={"license": "creativeml-openrail-m"},
    dataset="digits",
    classes=("one", "two"),
    images=120,
    resolution=16,
    prompt=PROMPT,
    hyperparameters={"learning_rate": 1e-4, "batch_size": 50},
    steps=300,
)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def code_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_card_contains_every_fact():
    text = model_card.text(FACTS)
    assert front_matter(text) == {
        "license": "creativeml-openrail-m",
        "base_model": "someone/small-diffusion",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": front_matter(text)["tags"],
        "classes": ["one", "two"],
    }
    for part in (
        "someone/small-diffusion",
        "0123abc",
        "creativeml-openrail-m",
        "digits",
        "`one`, `two`",
        "| images | `120` |",
        "16 x 16",
        "| learning_rate | `0.0001` |",
        "| batch_size | `50` |",
        "| steps | `300` |",
        "arXiv 2412.15358",
        "WACV 2025",
        "arXiv 2211.09800",
        "training images",
        "do not\n  publish",
        "not for diagnosis",
    ):
        assert part in text
    assert "lora" not in model_card.text(FACTS).lower()


def test_a_local_base_is_not_named_as_a_hub_model():
    text = model_card.text(dataclasses.replace(FACTS, base="/data/x", revision=None))
    assert "base_model" not in front_matter(text)
    assert "/data/x" in text and "revision" not in text


ODD = [
    "no",
    "3",
    "null",
    "a: b",
    "- x",
    "#",
    "'",
    '"',
    "é|`<b>",
    "{",
    "a\n---\nb",
    "---",
]


@hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
@hypothesis.given(st.lists(st.one_of(st.text(), st.sampled_from(ODD)), min_size=1))
@hypothesis.example(ODD)
def test_unusual_names_survive_the_front_matter(names):
    odd = names[0]
    text = model_card.text(
        dataclasses.replace(
            FACTS, classes=names, dataset=odd, prompt=odd, hyperparameters={"x": odd}
        )
    )
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["classes"] == names
    (block,) = code_blocks(text)
    nodes = ast.walk(ast.parse(block))
    assert odd in [node.value for node in nodes if isinstance(node, ast.Constant)]
    rows = [line for line in text.splitlines() if line.startswith("| x | ")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 3


@pytest.mark.parametrize(
    "card, wanted",
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Base\n", {"license": "mit"}),
        (
            "\ufeff---\r\nlicense: other\r\nlicense_name: x\r\nlicense_link: y\r\n---",
            {"license": "other", "license_name": "x", "license_link": "y"},
        ),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- license\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_base_or_unknown(card, wanted, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    license = model_card.base_license(tmp_path)
    text = model_card.text(dataclasses.replace(FACTS, license=license))
    if wanted is None:
        wanted = {"license": "other", "license_name": "unknown-see-the-base"}
        assert "unknown, see the base" in text
    assert license == wanted
    assert front_matter(text).items() >= wanted.items()


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_code_in_the_card_runs(
    tiny, tmp_path, torch, logged_warnings, monkeypatch, variant
):
    """Both ways to load, from a folder that holds the whole model and the adapters."""
    base, folder = tmp_path / "base", tmp_path / "export"
    diffusers_layout.save(base, *tiny)
    if variant:
        to_variant(base, variant)
    narrow, params = diffusers_layout.load(base, variant=variant)
    model, params = narrow.widened(params)
    rng = np.random.default_rng(10)
    adapters = new_adapters(params["unet"], rng)
    merged = {**params, "unet": lora.merge(params["unet"], adapters)}
    diffusers_layout.save(folder, model, merged)
    lora_file.write(folder / "lora", adapters)
    named = {"base": str(base), "revision": None, "variant": variant}
    facts = dataclasses.replace(FACTS, **named, adapters="lora", classes=["one"])
    assert model_card.write(folder, facts) == ["README.md"]
    pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "source.png")
    monkeypatch.chdir(folder)
    drawn = []
    blocks = code_blocks((folder / "README.md").read_text())
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
        drawn.append(np.asarray(Image.open("drawn.png"), np.float32))
    assert drawn[0].shape == (16, 16, 3) and np.std(drawn[0]) > 5
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1)  # of 255
    assert [text for text in logged_warnings if "CLIPTextModel" not in text] == []
