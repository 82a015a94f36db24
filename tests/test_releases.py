"""Every loader reads what old and today's releases of the libraries wrote.

`golden/releases/` holds the files; `golden/make_releases.py` wrote them.
"""

import functools
import json
import pathlib
import shutil
import tarfile

import flax.traverse_util
import numpy as np
import pytest
import transformers
from base_folders import answer
from etils import epath
from golden.write_release import TEXTS, TOKENS, drawn

from mvc_jax.checkpoints import (
    blip2_captioner,
    classifier_checkpoint,
    classifier_weights,
    clip_checkpoint,
    clip_tokenizer,
    controlnet_checkpoint,
    diffusers_layout,
    pipeline_folder,
    vit_gpt2_captioner,
    weights,
)
from mvc_jax.errors import UserError
from mvc_jax.models import blip2
from mvc_jax.models.classifiers import VARIANTS
from mvc_jax.models.resnet import ResNet

RELEASES = pathlib.Path(__file__).with_name("golden") / "releases"
OLD, NEW = "2023", "2026"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A release -> its folder, with the archives unpacked."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp("releases") / name
        for archive in (RELEASES / name).iterdir():
            with tarfile.open(archive) as tar:
                tar.extractall(folder / archive.name.split(".")[0], filter="data")
        return folder

    return of


@pytest.fixture(params=[OLD, NEW])
def release(request, unpacked):
    """The folder of each release."""
    return unpacked(request.param)


def assert_drawn(tree, name_of=weights.torch_name):
    """Every leaf is what `write_release` drew for its name."""
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        name = name_of(path).removeprefix("text_model.")
        if path[-1] == "kernel":
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        np.testing.assert_array_equal(leaf, drawn(name, leaf.shape), name)


def ids_of(tokenizer):
    return [tokenizer(text, max_length=77, truncation=True).input_ids for text in TEXTS]


# Stable Diffusion.


def test_a_stable_diffusion(release, tmp_path):
    folder = release / "stable_diffusion"
    diffusers_layout.check_base(folder, size=8)
    model, params = diffusers_layout.load(folder)
    for part in params.values():
        assert_drawn(part)
    expected = json.loads((folder / "tokenizer" / "ids.json").read_text())
    assert ids_of(model.tokenizer) == expected
    cats = model.tokenizer.convert_tokens_to_ids(list(TOKENS))
    assert expected[TEXTS.index("<my-cat>")][1:-1] == cats[:1]
    table = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]
    assert len(table["embedding"]) == len(model.tokenizer) == cats[1] + 1

    written = diffusers_layout.save(tmp_path, *model.widened(params))
    assert {*written} == {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")
    }
    for file in pipeline_folder.TOKENIZER_FILES:  # copied as they are
        own = folder / "tokenizer" / file
        copy = tmp_path / "tokenizer" / file
        assert not own.exists() or copy.read_bytes() == own.read_bytes()
    again, _ = diffusers_layout.load(tmp_path, ("text_encoder",))
    assert ids_of(again.tokenizer) == expected


def test_a_word_of_several_vectors_is_read_as_in_pytorch(release, torch):
    """Its further vectors follow it, unless they are written out."""
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    model = diffusers_layout.load(release / "stable_diffusion", ())[0]
    texts = ("", "the cat", "a <my-cat>, of", "the<my-cat>of", "<my-cat> " * 50)
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    wanted = [convert(text, model.tokenizer) for text in texts]
    lengths = {"max_length": 77, "padding": "max_length", "truncation": True}
    ids = model.tokenizer(wanted, **lengths).input_ids
    np.testing.assert_array_equal(model.tokenize(texts), ids)
    assert [model.count_tokens(x) for x in texts[:4]] == [
        2 + len(model.tokenizer.tokenize(x)) for x in wanted[:4]
    ]
    assert model.token_offsets([texts[3]])[0][-3:] == [(3, 11), (3, 11), (11, 13)]
    assert len(model.token_offsets(texts)[4]) == 75
    (written,) = model.tokenize(["a <my-cat> <my-cat>_1 of"])
    (short,) = model.tokenize(["a <my-cat> of"])
    np.testing.assert_array_equal(written, short)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "CLIPTokenizerFast"])
def test_an_export_has_a_tokenizer_for_older_libraries(release, tmp_path, kind):
    """Without `tokenizer.json`, which the slow class of 4.x does not read."""
    base = diffusers_layout.load(release / "stable_diffusion", ())[0]
    epath.Path(tmp_path / "old").mkdir()
    clip_tokenizer.write(epath.Path(tmp_path), base.tokenizer, base.tokenizer_files)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    read = getattr(transformers, kind).from_pretrained(tmp_path)
    for text in ("a photo of <my-cat> <my-cat>_1", "the<my-cat>of", "It's the cat!"):
        assert read(text).input_ids == base.tokenizer(text).input_ids
    assert (read.model_max_length, len(read)) == (77, len(base.tokenizer))


def test_special_tokens_of_release_5_are_a_list(unpacked, tmp_path):
    """Which 4.x calls `additional_special_tokens`, and fails at."""
    folder = shutil.copytree(
        unpacked(NEW) / "stable_diffusion" / "tokenizer", tmp_path / "x"
    )
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"extra_special_tokens": ["<my-cat>"]}
    file.write_text(json.dumps(config))
    expected = json.loads((folder / "ids.json").read_text())
    read, found = clip_tokenizer.read(folder)
    epath.Path(tmp_path / "y").mkdir()
    clip_tokenizer.write(epath.Path(tmp_path / "y"), read, found)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "y")
    for tokenizer in (read, again):
        assert tokenizer.additional_special_tokens == ["<my-cat>"]
        assert ids_of(tokenizer) == expected


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(release, tmp_path, file):
    folder = shutil.copytree(release / "stable_diffusion" / "tokenizer", tmp_path / "x")
    for damage in ("{", "[]"):
        (folder / file).write_text(damage)
        with pytest.raises(UserError, match="damaged ones"):
            clip_tokenizer.read(folder)


def test_a_tokenizer_has_one_of_two_forms(tmp_path):
    missing = pipeline_folder.missing_of_tokenizer
    assert missing({"tokenizer.json"}) == missing({"vocab.json", "merges.txt"}) == []
    assert missing({"vocab.json"}) == ["merges.txt (or tokenizer.json)"]
    with pytest.raises(UserError, match="no vocab.json and merges.txt .or tokenizer.j"):
        clip_tokenizer.read(tmp_path)


def test_the_hub_is_asked_for_every_form(release, monkeypatch, tmp_path):
    folder = release / "stable_diffusion"
    names = [f"{p.parent.name}/{p.name}" for p in folder.glob("[!c]*/*")]
    names += ["model_index.json"]
    answer(monkeypatch, names, cache=tmp_path)
    assert pipeline_folder.look_up("some/model") is None
    answer(monkeypatch, [n for n in names if "token" not in n], cache=tmp_path)
    with pytest.raises(UserError, match="1 missing: tokenizer/vocab.json and merges"):
        pipeline_folder.look_up("some/model")


def test_a_controlnet(release):
    base = diffusers_layout.load(release / "stable_diffusion", ())[0]
    path = release / "stable_diffusion" / "controlnet"
    controlnet_checkpoint.check(path, base.configs, field="config.x")
    _, params = controlnet_checkpoint.load(path, base.configs, field="config.x")
    assert_drawn(params)


# CLIP.


def test_a_clip(release):
    """With the image processor of the checkpoint, in whichever file it is."""
    model, params = clip_checkpoint.load(release / "clip", field="x", text=True)
    assert_drawn(params)
    expected = json.loads((release / "clip" / "ids.json").read_text())
    assert ids_of(model.tokenizer) == expected
    assert model.processor.image_mean == [0.5, 0.25, 0.125]
    assert model.processor.crop_size == {"height": 8, "width": 8}


def test_an_image_tower(release):
    model, params = clip_checkpoint.load(release / "clip" / "tower", field="x")
    assert_drawn(params)
    assert model.processor.image_mean == [0.5, 0.25, 0.125]


def test_a_clip_on_the_hub_needs_a_tokenizer_for_texts(monkeypatch, tmp_path):
    names = ["config.json", "model.safetensors"]
    answer(monkeypatch, names, cache=tmp_path)
    assert clip_checkpoint.check("some/model", field="x") is None
    with pytest.raises(UserError, match="wanted vocab.json and merges.txt"):
        clip_checkpoint.check("some/model", field="x", text=True)
    answer(monkeypatch, [*names, "tokenizer.json"], cache=tmp_path)
    assert clip_checkpoint.check("some/model", field="x", text=True) is None


# Captioners.


def test_a_vit_gpt2(release):
    folder = str(release / "vit_gpt2")
    vit_gpt2_captioner.check_model(folder)
    model, params = vit_gpt2_captioner.load(folder, "float32")
    del params["encoder"]["pooler"]
    assert_drawn(params)
    text = "a photo of the cat"
    assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text


def test_a_blip2(release, torch, tmp_path):
    folder = str(release / "blip2")
    blip2_captioner.check_model(folder)
    np.save(tmp_path / "images.npy", np.zeros((1, 8, 8, 3), np.uint8))
    request = {
        "folder": folder,
        "images": str(tmp_path / "images.npy"),
        "rows": [0],
        "field": "a field",
        "batch_size": 1,
        "dtype": "float32",
        "prompt": "",
        "max_new_tokens": 2,
        "num_beams": 1,
    }
    assert [row for row, _ in blip2.answer(request)] == [0]


# Classifiers.


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_a_classifier_of_timm(release, name):
    path = str(release / "classifiers" / name)
    found = classifier_checkpoint.find(path, field="x")
    assert (found.naming.library, found.variant, found.num_classes) == ("timm", name, 3)
    assert found.size == 224
    model = VARIANTS[name].make(num_classes=3, **found.fields)
    variables, unused = classifier_weights.read(found, model)
    assert all(part.startswith(("fc.", "classifier.")) for part in unused)
    names = classifier_weights.names.timm_name
    for path, leaf in flax.traverse_util.flatten_dict(variables).items():
        if leaf.ndim == 1:  # of one value only where they are large
            expected = drawn(names(path), leaf.shape)
            np.testing.assert_array_equal(leaf, expected, names(path))


def test_a_classifier_of_transformers(release):
    path = str(release / "classifiers" / "transformers")
    found = classifier_checkpoint.find(path, field="x")
    assert found.naming.library == "transformers"
    model = ResNet(3, depths=(1, 2), width=8)
    variables, _ = classifier_weights.read(found, model)

    def name_of(path):
        return found.naming.name(classifier_weights.names.timm_name(path), ())

    assert_drawn(variables, name_of)
