"""ViT-GPT-2 in JAX: the captions of PyTorch, without PyTorch, for any batch."""

import copy
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import flax.serialization
import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
import transformers
from etils import epath
from safetensors.numpy import load_file, save_file

from mvc_jax import files
from mvc_jax.checkpoints import vit_gpt2_captioner, weights
from mvc_jax.errors import UserError
from mvc_jax.models import vit_gpt2

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = {"batch_size": 3, "dtype": "float32", "max_new_tokens": 8, "num_beams": 1}
END = "<|endoftext|>"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random ViT-GPT-2 as a folder of the hub; the two have different widths."""
    folder = epath.Path(tmp_path_factory.mktemp("captioners")) / "vit-gpt2"
    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=16,
            n_embd=24,
            n_layer=2,
            n_head=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        decoder_start_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(folder)
    shapes = vit_gpt2.Network(config).params_shape_tree
    weights.write(folder / "model.safetensors", _random(shapes))
    return folder


def _train_tokenizer():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    words = ["a bold dark stroke on the left of a photo"] * 3
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=[END], show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    return transformers.GPT2TokenizerFast(tokenizer_object=bpe)


def _random(shapes):
    """Parameters that give the images below different captions; no bias is zero."""
    rng = np.random.default_rng(2)

    def one(path, leaf):
        drawn = rng.normal(0.0, 0.5, leaf.shape).astype(np.float32)
        return drawn + 1 if path[-1].key == "scale" else drawn

    return jax.tree_util.tree_map_with_path(one, shapes)


@pytest.fixture
def own(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return epath.Path(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture(scope="session")
def images():
    """Eight images of one colour each and a little noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 236, (8, 1, 1, 3))
    return (colours + rng.integers(0, 20, (8, 20, 20, 3))).astype(np.uint8)


@pytest.fixture(scope="session")
def texts(checkpoint, images):
    """The greedy caption of every image."""
    found = _captions(images, range(8), checkpoint)
    assert len(set(found.values())) > 4  # else the tests below would see nothing
    return found


def _captions(images, rows, folder, **options):
    options = OPTIONS | {"model": str(folder)} | options
    pairs = list(vit_gpt2_captioner.captions(images, list(rows), **options))
    assert [row for row, _ in pairs] == list(rows)
    return dict(pairs)


def test_weights_on_disk_have_the_names_and_layout_of_pytorch(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    for name, shape in {
        "decoder.transformer.h.1.ln_2.weight": (24,),
        "decoder.transformer.h.0.attn.c_attn.weight": (24, 72),  # in x out, as no other
        "encoder.encoder.layer.0.attention.attention.query.weight": (16, 16),
        "encoder.embeddings.patch_embeddings.projection.weight": (16, 3, 16, 16),
        "enc_to_dec_proj.weight": (24, 16),
    }.items():
        assert tensors[name].shape == shape


@pytest.fixture(scope="session")
def twin(checkpoint, torch):
    """PyTorch's model of the same file, which has all its tensors and no others."""
    model, found = transformers.VisionEncoderDecoderModel.from_pretrained(
        checkpoint, use_safetensors=True, output_loading_info=True
    )
    assert not any(found.values())
    return model


@pytest.fixture(scope="session")
def pixels(checkpoint, images):
    return vit_gpt2_captioner.load(str(checkpoint), "float32")[0].preprocess(images)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_pytorch_writes_the_same(checkpoint, pixels, torch, twin, num_beams):
    options = {"max_new_tokens": 8, "num_beams": num_beams}
    expected = twin.generate(torch.tensor(pixels), do_sample=False, **options)
    model, params = vit_gpt2_captioner.load(str(checkpoint), "float32")
    generate = jax.jit(functools.partial(model.generate, **options))
    np.testing.assert_array_equal(generate(params, pixels), expected.numpy())


def test_logits_are_those_of_pytorch(checkpoint, pixels, torch, twin, monkeypatch):
    config = vit_gpt2_captioner._read_config(checkpoint, "tiny")
    monkeypatch.setattr(vit_gpt2_captioner, "DTYPES", ("float64",))
    ids = np.random.default_rng(1).integers(0, config.decoder.vocab_size, (8, 5))
    twin = copy.deepcopy(twin).double()
    with torch.no_grad():
        expected = twin(
            pixel_values=torch.tensor(pixels).double(),
            decoder_input_ids=torch.tensor(ids),
        ).logits.numpy()
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        model, params = vit_gpt2_captioner.load(str(checkpoint), "float64")
        compute = jax.jit(
            lambda params, *inputs: model.network(*inputs, params=params).logits
        )
        logits = compute(params, pixels, ids)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected, atol=1e-10)


def test_a_checkpoint_that_pytorch_saved(images, texts, twin, own):
    (own / "model.safetensors").unlink()
    twin.save_pretrained(own)
    assert (own / "generation_config.json").exists()
    assert _captions(images, range(8), own) == texts


@pytest.mark.parametrize("batch_size", [1, 11])
def test_a_caption_does_not_depend_on_its_batch(checkpoint, images, texts, batch_size):
    rows = [5, 0, 7, 2, 1]
    found = _captions(images, rows, checkpoint, batch_size=batch_size)
    assert found == {row: texts[row] for row in rows}


def test_images_may_be_a_memory_map(checkpoint, images, texts, tmp_path):
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r", allow_pickle=False)
    assert _captions(mapped, [3], checkpoint) == {3: texts[3]}
    assert _captions(mapped, [], "no such folder/at/all") == {}


def test_flax_weights_give_the_same(own, images, texts):
    _, params = vit_gpt2_captioner.load(str(own), "float32")
    (own / "model.safetensors").unlink()
    content = flax.serialization.to_bytes(params)
    (own / "flax_model.msgpack").write_bytes(content)
    vit_gpt2_captioner.check_model(str(own))
    assert _captions(images, range(8), own) == texts

    (own / "flax_model.msgpack").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="flax_model.msgpack: .* damaged"):
        _captions(images, [0], own)
    del params["decoder"]["transformer"]["wte"], params["encoder"]["pooler"]
    (own / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(params))
    with pytest.raises(UserError, match="got 1 that .*: decoder/transformer/wte/embed"):
        _captions(images, [0], own)


def test_old_exports(own, images, texts):
    """Stored masks, a copy of the embedding, no pooler; another processor."""
    tensors = load_file(own / "model.safetensors")
    tensors["decoder.transformer.h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.uint8)
    tensors["decoder.transformer.h.0.attn.masked_bias"] = np.float32([-1e4])
    tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"]
    for leaf in ("weight", "bias"):
        del tensors[f"encoder.pooler.dense.{leaf}"]
    save_file(tensors, own / "model.safetensors")
    processor = json.loads((own / "preprocessor_config.json").read_text())
    del processor["image_processor_type"]
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}
    files.write_json(own / "preprocessor_config.json", processor | old)
    tokenizer = json.loads((own / "tokenizer_config.json").read_text())
    del tokenizer["tokenizer_class"]
    files.write_json(own / "tokenizer_config.json", tokenizer)
    assert _captions(images, range(8), own) == texts


def test_bfloat16_and_beams(checkpoint, images):
    options = {"dtype": "bfloat16", "num_beams": 3}
    found = _captions(images, range(8), checkpoint, **options)
    assert len(set(found.values())) > 4
    again = _captions(images, [4, 6], checkpoint, **options)
    assert again == {row: found[row] for row in (4, 6)}


ALONE = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
import json, numpy
from mvc_jax.checkpoints import vit_gpt2_captioner
images = numpy.load(sys.argv[1], allow_pickle=False)
options = json.loads(sys.argv[3])
pairs = vit_gpt2_captioner.captions(images, [2, 1], model=sys.argv[2], **options)
print(json.dumps(list(pairs)))
"""


def test_pytorch_is_not_needed(checkpoint, images, texts, tmp_path):
    """Nor does the library announce the end of its Flax classes."""
    np.save(tmp_path / "images.npy", images)
    result = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "images.npy", checkpoint]
        + [json.dumps(OPTIONS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Transformers" not in result.stderr
    assert json.loads(result.stdout) == [[2, texts[2]], [1, texts[1]]]


def test_how_to_convert_a_pickle_on_the_hub(own, images, monkeypatch):
    _only_a_pickle(own)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: str(own))
    hint = r"hf download some/model --local-dir FOLDER.*save_pretrained\('FOLDER'"
    with pytest.raises(UserError, match=hint):
        _captions(images, [0], "some/model")


def test_check_model_accepts_folders(checkpoint):
    vit_gpt2_captioner.check_model(str(checkpoint))


def _edit(path, **fields):
    files.write_json(path, json.loads(path.read_text()) | fields)


def _only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def _of_type(**fields):
    return lambda folder: _edit(folder / "config.json", **fields)


DAMAGED_FOLDERS = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (_without("config.json"), "config.json, got none"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "bad JSON"),
    "another model": (
        _of_type(model_type="blip-2"),
        "'vision-encoder-decoder' in its config.json, got 'blip-2'",
    ),
    "another encoder": (
        _of_type(encoder={"model_type": "swin"}),
        "'vit' and a decoder 'gpt2' .* got 'swin' and 'gpt2'",
    ),
    "a pickle": (
        _only_a_pickle,
        r"got pytorch_model.bin in .* never opened.*python -c .*VisionEncoderDecoder",
    ),
    "no processor": (_without("preprocessor_config.json"), "preprocessor_config.json"),
    "no tokenizer": (
        _without("tokenizer.json", "vocab.json"),
        "tokenizer.json or vocab.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_FOLDERS)
def test_a_damaged_folder_is_refused_before_anything_is_loaded(own, images, case):
    damage, message = DAMAGED_FOLDERS[case]
    damage(own)
    with pytest.raises(UserError, match=message) as error:
        vit_gpt2_captioner.check_model(str(own))
    assert error.value.name == f"config.caption.model {str(own)!r}"
    with pytest.raises(UserError, match=message):
        _captions(images, [0], own)


def test_weights_must_fit_the_architecture(own, images):
    tensors = load_file(own / "model.safetensors")
    tensors["decoder.transformer.h.0.ln_9.bias"] = tensors.pop("enc_to_dec_proj.bias")
    save_file(tensors, own / "model.safetensors")
    with pytest.raises(UserError, match="2 that differ: enc_to_dec_proj.*ln_9.bias is"):
        _captions(images, [0], own)


def test_images_must_have_the_size_of_the_encoder(own, images):
    _edit(own / "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(UserError, match="images of 32 pixels .* got 48 x 48"):
        _captions(images, [0], own)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "int8", "float32, bfloat16 for this captioner, got 'int8'"),
        ("max_new_tokens", 16, "at most 15, .* got 16"),
    ],
)
def test_unsupported_settings_are_errors(checkpoint, images, field, value, message):
    with pytest.raises(UserError, match=message) as error:
        _captions(images, [0], checkpoint, **{field: value})
    assert error.value.name == f"config.caption.{field}"


def test_a_hub_that_cannot_be_reached(images, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="from the hub LocalEntryNotFoundError") as e:
        _captions(images, [0], "nobody/nothing")
    assert e.value.name == "config.caption.model 'nobody/nothing'"


def test_a_hub_name_becomes_a_folder(checkpoint, images, texts, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert _captions(images, [1], "some/model") == {1: texts[1]}
    ((name, patterns),) = asked
    assert name == "some/model"
    assert "model.safetensors" in patterns
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)
