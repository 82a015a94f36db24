"""The conditionings of the ablation, with the demo's and with a real model layout."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import sd_families
from etils import epath
from PIL import Image
from shared_samplers import shared_programs
from test_controlnet import base as two_levels

from mvc_jax import files, generate, mix
from mvc_jax.checkpoints import (
    clip_checkpoint,
    controlnet_checkpoint,
    diffusers_layout,
)
from mvc_jax.configs import common
from mvc_jax.errors import UserError
from mvc_jax.generation import ablation, figures, preview, synthetic
from mvc_jax.generation.conditionings import CONDITIONINGS
from mvc_jax.models import clip
from mvc_jax.pretraining import companions
from mvc_jax.stage import Spec, open_stage

IMAGES = 4


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with shared_programs():
        yield


def _real():
    """77 tokens and an autoencoder of four levels, as in Stable Diffusion 1.x."""
    model, params = two_levels()
    _, whole = sd_families.checkpoint("pix2pix")
    return model, {**whole, **params}


def _noisy(tree, draw, scale=0.05):
    return jax.tree.map(
        lambda x: x + draw.normal(0, scale, x.shape).astype(np.float32), tree
    )


def _finish(workdir, name, written, inputs=()):
    open_stage(workdir, Spec(name, {}, inputs)).finish(written)


def _encoded(workdir, model, write_shards, draw):
    """Writes `caption` and `encode`: random arrays of the model's shapes."""
    side, length, width = 2 * model.downsampling, model.context_length, model.text_width
    ids = [f"s/{i}" for i in range(IMAGES)]
    names, labels = ["one", "two"], [i % 2 for i in range(IMAGES)]
    folder = workdir / "caption"
    pixels = draw.integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8)
    files.write_array(folder / "images.npy", pixels)
    rows = [
        {"id": id_, "split": "train", "label": label, "width": side, "height": side}
        for id_, label in zip(ids, labels, strict=True)
    ]
    files.write_jsonl(folder / "images.jsonl", rows)
    files.write_json(folder / "splits.json", {"pool": [], "train": ids, "test": []})
    dataset = {"name": "strokes", "class_names": names, "grey": False}
    files.write_json(folder / "dataset.json", dataset)
    _finish(workdir, "caption", ["images.npy", "images.jsonl", "splits.json"])

    folder = workdir / "encode"
    states = draw.normal(size=(IMAGES + 1, length, width)).astype(np.float32)
    states[:, 0] = states[0, 0]  # BOS
    moments = draw.normal(size=(IMAGES, 2, 2, 8)).astype(np.float32)
    written = [*write_shards(folder / "text_states", states)]
    written += write_shards(folder / "moments", moments)
    prompts = [
        {
            "id": id_,
            "label": label,
            "class_name": names[label],
            "state": i + 1,
            "prompt": f"stroke {i}",
            "caption_start": 1,
            "caption_tokens": 5,
            "tokens": 10,
        }
        for i, (id_, label) in enumerate(zip(ids, labels, strict=True))
    ]
    files.write_jsonl(folder / "prompts.jsonl", prompts)
    base = {"path": "", "variant": "", "revision": None}
    files.write_json(folder / "base.json", base)
    _finish(workdir, "encode", [*written, "prompts.jsonl", "base.json"])


@pytest.fixture(scope="module", params=["demo", "real"])
def run(request, tiny, write_shards, tmp_path_factory):
    """(config, workdir) before `generate`; the base has all models of the ablation."""
    model, params = tiny if request.param == "demo" else _real()
    workdir = epath.Path(tmp_path_factory.mktemp(request.param))
    draw = np.random.default_rng(0)
    _encoded(workdir, model, write_shards, draw)
    network = companions.new_controlnet(model)
    # As after training: the zero convolutions are no longer zero.
    control = _noisy(
        companions.initial_controlnet_params(network, params["unet"], draw), draw
    )
    tower = clip.small_tower(
        side=8, patch=4, width=8, layers=1, heads=2, embedding=model.text_width
    )
    random = functools.partial(sd_families.random, "tower")
    folder = workdir / "pretrain"
    clip_checkpoint.save(folder / "model", tower, random(tower.shapes()))
    diffusers_layout.save(
        folder / "model", model, params, index_entries=clip_checkpoint.INDEX_ENTRIES
    )
    controlnet_checkpoint.save(folder / "controlnet", network, control)
    _finish(workdir, "pretrain", ["model/model_index.json"])
    model, params = model.widened(params)
    params = params | {"unet": _noisy(params["unet"], draw)}
    written = diffusers_layout.save(workdir / "finetune" / "model", model, params)
    _finish(workdir, "finetune", [f"model/{name}" for name in written], ("encode",))

    config = common.get_config()
    config.data.size, config.data.class_type = 2 * model.downsampling, "digit"
    config.pretrain.image_encoder.steps = config.pretrain.controlnet.steps = 1
    config.mix.per_image, config.mix.levels = 1, True
    config.mix.tokens = config.mix.dims = 2
    config.generate.steps, config.generate.batch_size = 2, 8
    config.generate.sets = tuple(CONDITIONINGS)
    config.generate.conditioning, config.generate.coarse_fine = "all", 3
    mix.run(config, workdir)
    return config, workdir


@pytest.fixture(scope="module")
def drawn(run):
    """Pixels of each set."""
    config, workdir = run
    generate.check(config)
    generate.run(config, workdir)
    folder = workdir / "generate"
    return {
        name: synthetic.read_images(folder / name)[0].astype(int)
        for name in CONDITIONINGS
    }


def test_every_conditioning_draws_different_images(run, drawn):
    _, workdir = run
    for name, pixels in drawn.items():
        rows = files.read_jsonl(
            workdir / "generate" / name / "train" / "metadata.jsonl"
        )
        assert len(rows) == len(pixels) == IMAGES
        if name != "mixed":
            assert {row["mode"] for row in rows} == {name}
        for other in drawn:
            assert name == other or (pixels != drawn[other]).any(), (name, other)


def _figure(workdir, name, columns, rows):
    """A figure, whose picture has a tile of at least 128 pixels for each image."""
    data, picture = figures.paths(workdir / "generate", name)
    with Image.open(picture) as image:
        width, height = image.size
    assert width > columns * 128 and height > rows * 128
    figure = figures.read(data)
    assert [len(row.cells) for row in figure.rows] == [columns] * rows
    return figure


def test_figure_4_shows_the_images_of_every_set(run, drawn):
    """The first image of a source is drawn with the same noise as in the sets."""
    _, workdir = run
    found = _figure(workdir, "conditionings", IMAGES, 1 + len(CONDITIONINGS))
    train = generate.read_train(workdir)
    places = {id_: i for i, id_ in enumerate(train.ids)}
    original, *others = found.rows
    assert {row.name for row in others} == {*preview.TITLES.values()}
    for cell in original.cells:
        place = places[cell.provenance["source"]]
        np.testing.assert_array_equal(cell.image, train.images[place])
        assert cell.heading == cell.label == train.class_names[train.labels[place]]
    recipes = {recipe["index"]: recipe for recipe in generate.read_recipes(workdir)}
    for row in others:
        for real, cell in zip(original.cells, row.cells, strict=True):
            index = cell.provenance["index"]
            recipe = recipes[index]
            assert cell.provenance["source"] == recipe["source"]
            assert recipe["source"] == real.provenance["source"]
            assert cell.provenance["noise_seed"] == recipe["noise_seed"]
            np.testing.assert_array_equal(cell.image, drawn[cell.set][index])
            prompted = CONDITIONINGS[cell.set].text in preview._CAPTIONED
            assert ("prompt" in cell.provenance) == prompted


def test_figure_5_has_the_recipes_of_the_levels(run, drawn):
    _, workdir = run
    levels = generate.read_levels(workdir)
    found = _figure(workdir, "levels", 8, len(levels) // 6)
    by_index = {row["index"]: row for row in levels}
    for row in found.rows:
        real, unmixed, *mixed = row.cells
        assert (real.set, unmixed.set) == (figures.REAL, "unmixed")
        assert unmixed.provenance["mode"] == "unmixed"
        assert [cell.provenance["mode"] for cell in mixed] == 3 * ["fine"] + 3 * [
            "coarse"
        ]
        for cell in mixed:
            recipe = by_index[cell.provenance["index"]]
            for key in ("source", "partners", "positions", "dims", "noise_seed"):
                assert cell.provenance[key] == recipe[key]
            assert cell.label == row.name == recipe["label"]


def test_figures_1_to_3_show_images_of_the_set(run, drawn):
    _, workdir = run
    found = _figure(workdir, "coarse_fine", 2, 3)
    for row in found.rows:
        real, coarse = row.cells
        assert (real.heading, coarse.heading) == ("real", "coarse")
        assert coarse.provenance["source"] == real.provenance["source"]
        index = coarse.provenance["index"]
        np.testing.assert_array_equal(coarse.image, drawn["mixed"][index])


def test_with_a_controlnet_only_the_text_is_guided(run, drawn):
    """The text scale changes the images, the image scale does not."""
    config, workdir = run
    sampler, recipes, _ = _opened(config, workdir)
    sampler.load("controlnet")

    def draw(**scales):
        return sampler.draw([recipe | scales for recipe in recipes[:2]]).images

    expected = draw()
    np.testing.assert_array_equal(draw(image_scale=9.0), expected)
    assert (draw(text_scale=1.0) != expected).any()
    np.testing.assert_array_equal(expected, drawn["controlnet"][:2])


def _opened(config, workdir):
    recipes, train = generate.read_recipes(workdir), generate.read_train(workdir)
    return generate.open_sampler(config, workdir, recipes, train), recipes, train


def test_images_are_numbered_within_their_class():
    rows = [{"label": label, "class_name": "ab"[label]} for label in (0, 1, 0, 0)]
    assert ablation.number_texts(rows, "digit") == [
        "a photo 1/3 of digit a",
        "a photo 1/1 of digit b",
        "a photo 2/3 of digit a",
        "a photo 3/3 of digit a",
    ]
    assert ablation.number_texts(rows, "")[1] == "a photo 1/1 of b"


@pytest.mark.parametrize("run", ["demo"], indirect=True)
def test_all_leaves_out_what_has_no_model_and_mentions_it(run, tmp_path):
    """Without an image tower and a ControlNet, the others are drawn."""
    config, workdir = run
    config = config.copy_and_resolve_references()
    config.pretrain.image_encoder.steps = config.pretrain.controlnet.steps = 0
    config.generate.sets = ("mixed",)
    plain = epath.Path(tmp_path) / "plain"
    shutil.copytree(workdir, plain, ignore=shutil.ignore_patterns("generate"))
    shutil.rmtree(plain / "pretrain" / "controlnet")
    shutil.rmtree(plain / "pretrain" / "model" / "image_encoder")
    generate.check(config)
    sampler, recipes, train = _opened(config, plain)
    figure, sentences = preview.conditioning_figure(
        preview.Cells(train, {}, sampler),
        recipes,
        names=[*CONDITIONINGS],
        optional=True,
    )
    assert len(sentences) == 3
    for field, count in (("image_encoder", 2), ("controlnet", 1)):
        fix = f"--config.pretrain.{field}.steps=500"
        assert sum(fix in sentence for sentence in sentences) == count
    assert len(figure.rows) == 1 + len(CONDITIONINGS) - 3
    assert figure.notes[-3:] == sentences


def _config(**fields):
    config = common.get_config()
    config.data.class_type = "digit"
    config.generate.update(fields)
    return config


REFUSED = {
    "an unknown name": (
        {"conditioning": "caption,unmixed"},
        "config.generate.conditioning.*all, or some of mixed.*'caption,unmixed'",
    ),
    "a repeated name": ({"conditioning": "unmixed,unmixed"}, "each once"),
    "no mixed set": (
        {"sets": ("unmixed",), "coarse_fine": 4},
        "config.generate.coarse_fine.*the set mixed in config.generate.sets",
    ),
    "no image tower": (
        {"conditioning": "image_embedding"},
        "config.generate.clip.*pretrain.image_encoder.steps is 0",
    ),
    "no ControlNet": (
        {"sets": ("controlnet",)},
        "config.generate.controlnet.*pretrain.controlnet.steps is 0",
    ),
    "no folder": (
        {"sets": ("image_embedding",), "clip": "/nowhere/at/all"},
        "config.generate.clip '/nowhere/at/all'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_an_error_before_any_work(case):
    fields, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        generate.check(_config(**fields))


def test_an_embedding_of_another_width_is_an_error(tmp_path):
    tower = clip.small_tower(side=8, patch=4, width=8, layers=1, heads=2, embedding=24)
    clip_checkpoint.save(tmp_path, tower, sd_families.random("tower", tower.shapes()))
    config = _config(sets=("image_embedding",), clip=str(tmp_path / "image_encoder"))
    with pytest.raises(UserError, match="64 dims, as wide.*got 24"):
        generate.check(config)


def test_a_controlnet_of_another_base_is_an_error(tmp_path):
    model, params = _real()
    diffusers_layout.save(tmp_path / "base", model, params)
    network = companions.new_controlnet(model)
    random = sd_families.random("control", network.shapes())
    controlnet_checkpoint.save(tmp_path / "control", network, random)
    path = tmp_path / "control" / "config.json"
    written = json.loads(path.read_text()) | {"cross_attention_dim": 768}
    path.write_text(json.dumps(written))
    config = _config(controlnet=str(path.parent), sets=("controlnet",))
    config.base.path = str(tmp_path / "base")
    with pytest.raises(UserError, match="cross_attention_dim is 768, not 32"):
        generate.check(config)
