"""Generation: images depend only on (seed, k), whatever was interrupted."""

import errno
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from many_processes import run_together
from PIL import Image
from shared_samplers import shared_programs

from mvc_jax import caption, encode, files, finetune, generate, mix, pairs, pretrain
from mvc_jax import train as command
from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.configs import common
from mvc_jax.data import splits
from mvc_jax.data.cache import open_cache
from mvc_jax.errors import UserError
from mvc_jax.generation import (
    edits,
    image_sampler,
    image_status,
    preview,
    set_writer,
    synthetic,
)
from mvc_jax.generation.conditionings import CONDITIONINGS
from mvc_jax.generation.text_states import TEXT_STATES, TextInputs
from mvc_jax.metrics import distances
from mvc_jax.mixing import operations, recipe_file
from mvc_jax.models import stable_diffusion
from mvc_jax.stage import open_stage, read_manifest
from mvc_jax.training import sharding

IMAGES, LENGTH, WIDTH = 5, 12, 16  # real images; shape of `tiny`'s text states
WEIGHTS = "finetune/model/unet/diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    pass


def settings(**fields):
    """A config with these fields of `generate`, and `per_image` of `mix`."""
    config = common.get_config()
    config.data.size, config.data.class_type = 8, "digit"
    config.mix.per_image = fields.pop("per_image", 1)
    config.mix.modes = ("both",)
    config.mix.tokens = config.mix.dims = 2
    config.generate.steps, config.generate.text_scale = 2, 3.0
    config.generate.batch_size, config.generate.shard_size = 8, 4
    config.generate.sets = ("mixed",)
    config.generate.update(fields)
    return config


@pytest.fixture(scope="module")
def finetuned(tiny, write_shards, tmp_path_factory):
    """A workdir as the stage `finetune` leaves it, of random arrays and weights."""
    workdir = tmp_path_factory.mktemp("finetuned")
    draw = np.random.default_rng(0)
    ids = [f"s/{i}" for i in range(IMAGES)]
    names, labels = ["one", "two"], [i % 2 for i in range(IMAGES)]

    def finish(stage, written):
        open_stage(workdir, stage.stage_spec(settings())).finish(written)

    folder = workdir / "caption"
    pixels = draw.integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    files.write_array(folder / "images.npy", pixels)
    rows = [
        {"id": id_, "split": "train", "label": label, "width": 6, "height": 4}
        for id_, label in zip(ids, labels, strict=True)
    ]
    files.write_jsonl(folder / "images.jsonl", rows)
    files.write_json(folder / "splits.json", {"pool": [], "train": ids, "test": []})
    dataset = {"name": "strokes", "class_names": names, "grey": False}
    files.write_json(folder / "dataset.json", dataset)
    finish(caption, ["images.npy", "images.jsonl", "splits.json", "dataset.json"])

    folder = workdir / "encode"
    states = draw.normal(size=(IMAGES + 1, LENGTH, WIDTH)).astype(np.float32)
    states[:, 0] = states[0, 0]  # BOS
    written = write_shards(folder / "text_states", states)
    moments = draw.normal(size=(IMAGES, 2, 2, 8)).astype(np.float32)
    written = [*written, *write_shards(folder / "moments", moments)]
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
    model, params = tiny
    base_files = diffusers_layout.save(workdir / "pretrain" / "model", model, params)
    finish(pretrain, [f"model/{name}" for name in base_files])
    finish(encode, [*written, "prompts.jsonl", "base.json"])
    pairs.run(settings(), workdir)

    model, params = model.widened(params)
    noisy = jax.tree.map(
        lambda x: x + draw.normal(0, 0.05, x.shape).astype(np.float32), params["unet"]
    )
    params = params | {"unet": noisy}
    written = diffusers_layout.save(workdir / "finetune" / "model", model, params)
    finish(finetune, [f"model/{name}" for name in written])
    return workdir


@pytest.fixture
def make(finetuned, tmp_path):
    """`make(**fields)` generates in a new workdir, or in a given one."""

    def run(workdir=None, **fields):
        if workdir is None:
            workdir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
            shutil.copytree(finetuned, workdir)
        config = settings(**fields)
        mix.run(config, workdir)
        generate.run(config, workdir)
        return workdir

    return run


def digests(folder, *, without=()):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in without
    }


def rows_of(workdir, name="mixed"):
    return files.read_jsonl(workdir / "generate" / name / "train" / "metadata.jsonl")


def pixels(workdir, name="mixed"):
    return synthetic.read_images(workdir / "generate" / name)[0].astype(int)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with shared_programs():
        yield


def test_the_choices_of_the_stage_are_those_of_the_rooms():
    texts = {conditioning.text for conditioning in CONDITIONINGS.values()}
    assert texts == set(TEXT_STATES)
    assert set(preview.TITLES) == set(CONDITIONINGS)


# Image k is a function of (seed, k).


def test_more_images_leave_the_earlier_files_identical(make):
    """Raising `per_image` equals a run that had it from the start."""
    workdir = make()  # 5 images in shards of 4: the last one is not full
    before = digests(
        workdir / "generate" / "mixed" / "train", without=["metadata.jsonl"]
    )
    assert len(before) == 5
    make(workdir, per_image=2, include_real=True)
    after = digests(workdir / "generate")
    assert {f"mixed/train/{k}": v for k, v in before.items()}.items() <= after.items()
    fresh = digests(make(per_image=2, include_real=True) / "generate")
    assert after.pop("manifest.json") != fresh.pop("manifest.json")  # grew_from
    assert after == fresh
    counts = read_manifest(workdir, "generate")["counts"]
    assert counts == {"images": 10, "redrawn": 0, "left_out": 0}


def test_a_rerun_draws_only_what_is_missing(make, monkeypatch):
    workdir = make()
    folder = workdir / "generate"
    whole = digests(folder)
    shard = folder / "mixed" / "data" / "train-00001.parquet"
    picture = next(folder.glob("mixed/train/one/*.png"))
    drawn = []
    stream = image_sampler.ImageSampler.stream

    def counted(self, groups, redraw=0, **options):
        drawn.extend(recipe["index"] for group in groups for recipe in group)
        return stream(self, groups, redraw, **options)

    monkeypatch.setattr(image_sampler.ImageSampler, "stream", counted)
    shard.unlink()
    picture.unlink()
    make(workdir)
    assert drawn == [4]
    assert digests(folder) == whole
    picture.unlink()  # of a complete stage
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.p*[gt]")}
    make(workdir)
    assert drawn == [4]
    assert digests(folder) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_many_processes_draw_the_files_of_one(make, finetuned, tmp_path, monkeypatch):
    """Three are killed when they have three shards; two draw the rest of the sets."""
    filters = {"outliers": True, "outliers_quantile": 0.5}
    fields = {"sets": ("mixed", "pretrained"), "include_real": True, "filter": filters}
    fields |= {"shard_size": 2, "folder": False}
    workdir = shutil.copytree(finetuned, tmp_path / "together")
    write, written = set_writer.SetWriter.write, []

    def mortal(writer, part, *rest):
        if len(written) > 2:
            raise Killed
        write(writer, part, *rest)
        written.append(part)

    config = settings(**fields)
    mix.run(config, workdir)
    with monkeypatch.context() as patch, pytest.raises((Killed, AssertionError)):
        patch.setattr(set_writer.SetWriter, "write", mortal)
        run_together(monkeypatch, 3, lambda: generate.run(config, workdir))
    assert not (workdir / "generate" / "manifest.json").exists()
    kept = {part.path: os.stat(part.path).st_mtime_ns for part in written}
    assert 3 <= len(kept) <= 5
    run_together(monkeypatch, 2, lambda: generate.run(config, workdir))
    assert kept == {path: os.stat(path).st_mtime_ns for path in kept}
    assert digests(workdir / "generate") == digests(make(**fields) / "generate")


def opened(workdir, devices, batch_size):
    """A sampler, and the recipes of its workdir."""
    mesh = sharding.make_mesh(devices, 1, jax.devices()[:devices])
    recipes = files.read_jsonl(workdir / "mix" / "recipes.jsonl")
    texts = TextInputs(open_cache(workdir / "encode"), operations.widths_of(recipes))
    settings = image_sampler.Settings("ddim", steps=2, batch_size=batch_size)
    workdir = epath.Path(workdir)
    return image_sampler.ImageSampler(workdir, mesh, settings, texts), recipes


def test_neither_batch_nor_devices_change_an_image(make):
    """Bit-identical with the same shapes and devices, else within 1 grey level."""
    workdir = make(per_image=2, sets=("mixed", "interpolated"))
    stored = pixels(workdir)
    for devices, batch_size in ((8, 8), (1, 7)):
        sampler, recipes = opened(workdir, devices, batch_size)
        sampler.load("mixed")
        counts = []
        drawn = next(sampler.stream([recipes], advance=counts.append))
        assert sum(counts) == len(recipes) and len(counts) > 1  # after every batch
        assert not drawn.status.any()
        assert np.abs(drawn.images.astype(int) - stored).max() <= (devices == 1)
        some = [recipes[k] for k in (9, 2, 3)]
        again = sampler.draw(some).images
        np.testing.assert_array_equal(again, drawn.images[[9, 2, 3]])


def test_image_k_has_row_k_of_its_batch_modulo_the_size():
    batches = image_sampler.batches_by_index([6, 7, 8, 9, 10, 14], 4)
    assert [batch.tolist() for batch in batches] == [
        [2, 3, 0, 1],
        [-1, -1, 4, -1],
        [-1, -1, 5, -1],
    ]


# Conditionings.


def test_sets_differ_in_their_inputs_and_share_sources_and_noise(make):
    names = ("mixed", "unmixed", "pretrained", "caption_only", "noised", "interpolated")
    workdir = make(sets=names, shard_size=8, folder=False)
    drawn = [pixels(workdir, name) for name in names]
    for i, one in enumerate(drawn):
        assert one.std() > 5
        assert all((one != other).any() for other in drawn[:i])
    sources = [synthetic.read_images(workdir / "generate" / name)[2] for name in names]
    assert all(ids == sources[0] for ids in sources)
    assert not (workdir / "generate" / "mixed" / "train").exists()
    recipes = files.read_jsonl(workdir / "mix" / "recipes.jsonl")
    cache = open_cache(workdir / "encode")
    texts = TextInputs(
        cache, operations.widths_of(recipes), noise_scale=0.5, interpolation=0.25
    )
    states = {
        name: np.asarray(TEXT_STATES[CONDITIONINGS[name].text](texts, recipes))
        for name in names
    }
    own, partner = (
        cache.states_of(rows)
        for rows in (texts.source_rows(recipes), texts.partner_rows(recipes))
    )
    for name in ("unmixed", "pretrained", "caption_only"):
        np.testing.assert_array_equal(states[name], own)
    np.testing.assert_allclose(
        states["interpolated"], 0.75 * own + 0.25 * partner, atol=1e-6
    )
    noise = (states["noised"] - own)[:, 1:]
    std = own[:, 1:].std((1, 2))
    np.testing.assert_allclose(noise.std((1, 2)), 0.5 * std, rtol=0.3)
    assert all((s[:, 0] == own[:, 0]).all() for s in states.values())  # BOS
    changed = (states["mixed"] != own).any(-1).sum(-1)
    assert (changed == LENGTH - 1).all()  # fine mixing changes every token


def test_the_recipe_of_an_unmixed_set_has_only_what_it_uses():
    recipe = {
        "index": 3,
        "source": "a",
        "partners": ["b", "c"],
        "mode": "both",
        "positions": [1],
        "donors": [1],
        "dims": [[2]],
        "dim_donors": [0],
        "dim_tokens": [1, 9],
        "noise_seed": 3,
    }
    assert CONDITIONINGS["mixed"].applied(recipe, "mixed") == recipe
    for name, partners in (("unmixed", []), ("interpolated", ["b"])):
        expected = recipe | {
            "mode": name,
            "partners": partners,
            "positions": [],
            "donors": [],
            "dims": [],
            "dim_donors": [],
            "dim_tokens": [1, 1],
        }
        assert CONDITIONINGS[name].applied(recipe, name) == expected


# Rivals: sets that start from the noised source.

RIVALS = ("real_guidance", "gif_sd", "da_fusion", "diff_mix")


@pytest.fixture(scope="module")
def rivals(finetuned, tmp_path_factory):
    """A run with every rival, at strengths 0, 0.5 and 1."""
    workdir = shutil.copytree(finetuned, tmp_path_factory.mktemp("rivals") / "run")
    config = settings(
        sets=("pretrained", *RIVALS),
        strength=(0.0, 0.5, 1.0),
        per_image=4,
        shard_size=8,
        folder=False,
    )
    mix.run(config, workdir)
    generate.run(config, workdir)
    return workdir


def columns_of(workdir, name):
    columns = ("index", "source", "label", "prompt", *edits.COLUMNS)
    return [*synthetic.read_rows(workdir / "generate" / name, columns)]


def test_strength_0_is_the_decoded_source_and_1_plain_noise(rivals, tiny):
    model, params = tiny
    cache = open_cache(rivals / "encode")
    latents = cache.moments_of(np.arange(IMAGES))[..., :4] * model.scaling_factor
    decoded = stable_diffusion.to_pixels(model.decode(params, jnp.asarray(latents)))
    plain = pixels(rivals, "pretrained")
    drawn, seen = pixels(rivals, "real_guidance"), set()
    for row, image in zip(columns_of(rivals, "real_guidance"), drawn, strict=True):
        seen.add(row["strength"])
        source = np.asarray(decoded[int(row["source"].removeprefix("s/"))], int)
        if row["strength"] == 0:
            assert np.abs(image - source).max() <= 1
        elif row["strength"] == 1:
            assert np.abs(image - plain[row["index"]]).max() <= 1
        else:
            assert np.abs(image - source).max() > 1
    assert seen == {0.0, 0.5, 1.0}


def test_rivals_share_sources_strengths_and_seeds(rivals):
    found = {name: columns_of(rivals, name) for name in RIVALS}
    for name in RIVALS[:3]:
        assert all(row["soft_label"] is None for row in found[name])
        assert all(row["target"] == row["source"] for row in found[name])
    for rows in zip(*found.values(), strict=True):
        assert len({(row["source"], row["strength"]) for row in rows}) == 1
    images = files.read_jsonl(rivals / "caption" / "images.jsonl")
    label_of = {row["id"]: row["label"] for row in images}
    for row in found["diff_mix"]:
        own, other = (label_of[row[name]] for name in ("source", "target"))
        weight = row["strength"] ** 0.8
        assert own != other
        assert row["soft_label"][other] == pytest.approx(weight)
        assert sum(row["soft_label"]) == pytest.approx(1.0)
        assert row["label"] == (other if weight > 0.5 else own)
        assert row["prompt"] == f"stroke {row['target'].removeprefix('s/')}"
    card = (rivals / "generate" / "diff_mix" / "README.md").read_text()
    assert "strength^0.8" in card and "`soft_label` has the probability" in card
    plain = (rivals / "generate" / "da_fusion" / "README.md").read_text()
    assert "Each label is that of the real image" in plain and "0, 0.5, 1" in plain


def test_gif_sd_changes_the_channels_of_real_guidance(rivals):
    """Same sources, noise and steps; `perturbation` is on its card alone."""
    plain, changed = (pixels(rivals, name) for name in ("real_guidance", "gif_sd"))
    assert (np.abs(changed - plain).max((1, 2, 3)) > 1).all()
    cards = [(rivals / "generate" / x / "README.md").read_text() for x in RIVALS[:2]]
    assert ["perturbation" in card for card in cards] == [False, True]


def test_soft_labels_reach_the_training_set(rivals):
    folder = rivals / "generate"
    soft = synthetic.read_soft_labels(folder / "diff_mix", 2)
    assert soft.shape == (4 * IMAGES, 2) and soft.dtype == np.float32
    np.testing.assert_allclose(soft.sum(1), 1.0, rtol=1e-6)
    for name in ("pretrained", "da_fusion"):
        assert synthetic.read_soft_labels(folder / name, 2) is None


def test_recipes_of_a_rival_are_not_those_of_mixing(rivals, tmp_path):
    """A user may copy them from the provenance of a set."""
    (row,) = files.read_jsonl(rivals / "mix" / "recipes.jsonl")[:1]
    path = tmp_path / "recipes.jsonl"
    files.write_jsonl(path, [row | {"mode": "diff_mix"}])
    with pytest.raises(UserError, match="diff_mix") as caught:
        recipe_file.read_recipes(path)
    assert "coarse or fine or both" in "".join(
        [str(caught.value), *caught.value.details]
    )


def test_diff_mix_needs_another_class():
    alone = edits.Edits(
        (0.5,), 0.8, ids=("a", "b"), labels=np.ones(2, int), classes=2, seed=0
    )
    with pytest.raises(UserError, match="at least two classes.*got one"):
        alone.completed({"index": 0, "source": "a"}, towards=True)


@given(
    strength=st.floats(0, 1),
    gamma=st.floats(0.01, 5),
    pair=st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True),
)
def test_a_soft_label_goes_from_the_source_to_the_other_class(strength, gamma, pair):
    own, other = pair
    found = edits.soft_label(own, other, strength, gamma=gamma, classes=7)
    assert sum(found) == pytest.approx(1.0) and min(found) >= 0
    assert found[other] == pytest.approx(strength**gamma)
    assert {k for k, p in enumerate(found) if p} <= {own, other}


def test_settings_that_rivals_cannot_have_are_refused():
    config = common.get_config()
    config.generate.sets = ("mixed", "diff_mix")
    config.generate.filter.label = "folds"
    with pytest.raises(UserError, match="filter.label.*labels are soft"):
        generate.check(config)
    for wrong in ((1.5,), (-0.1,), ()):
        with pytest.raises(UserError, match="generate.strength.*from 0 to 1"):
            common.FIELDS.find("generate.strength").require("generate.strength", wrong)


# Unusable images.


def test_the_status_of_images():
    latents, images = np.zeros((6, 2, 2, 4), np.float32), np.zeros((6, 4, 4, 3))
    shown = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    latents[1, 0, 0, 0], images[2, 1, 1, 1] = np.nan, np.inf
    shown[3] = [1, 0, 2]
    shown[4] = [255, 3, 0]  # of one colour
    shown[5] = [0, 0, 0]
    shown[5, 2, 2] = 9  # a spot
    images = images.astype(np.float32)
    statuses = image_status.image_status(*map(jnp.asarray, (latents, images, shown)))
    names = [image_status.STATUSES[status] for status in np.asarray(statuses)]
    assert names == ["ok", "NaN", "NaN", "black", "constant", "ok"]


def test_redraws_have_their_own_noise_and_the_first_draw_that_of_its_seed():
    key = jax.random.key(0)
    seeds = jnp.asarray([4, 4, 4, 5])
    keys = image_sampler.image_keys(key, seeds, jnp.asarray([0, 1, 2, 1]))
    data = np.asarray(jax.random.key_data(keys))
    assert len({row.tobytes() for row in data}) == 4
    first = jax.random.key_data(jax.random.fold_in(key, 4))
    np.testing.assert_array_equal(data[0], first)


def make_unusable(monkeypatch, times):
    """Gives image k the status NaN the first `times[k]` times it is drawn."""
    original = image_sampler.ImageSampler.stream

    def stream(self, groups, redraw=0, **options):
        groups = list(groups)
        made = original(self, groups, redraw, **options)
        for group, drawn in zip(groups, made, strict=True):
            for place, recipe in enumerate(group):
                if redraw < times.get(recipe["index"], 0):
                    drawn.status[place] = 1
            yield drawn

    monkeypatch.setattr(image_sampler.ImageSampler, "stream", stream)


def test_unusable_images_are_redrawn_or_left_out_and_listed(make, monkeypatch):
    plain = make(per_image=3)
    with monkeypatch.context() as patch:
        make_unusable(patch, {3: 1, 6: 9})
        workdir = make(per_image=3, max_redraws=2)
    expected = [
        {"index": 3, "reason": "NaN", "redraws": 1, "kept": True},
        {"index": 6, "reason": "NaN", "redraws": 2, "kept": False},
    ]
    folder = workdir / "generate" / "mixed"
    assert files.read_jsonl(folder / "redrawn.jsonl") == expected
    rows = rows_of(workdir)
    assert [row["index"] for row in rows] == [k for k in range(15) if k != 6]
    assert {row["index"]: row["redraws"] for row in rows if row["redraws"]} == {3: 1}
    assert len(list(folder.glob("train/*/*.png"))) == 14
    drawn, before = pixels(workdir), pixels(plain)
    assert (drawn[3] != before[3]).any()
    np.testing.assert_array_equal(drawn[:3], before[:3])
    np.testing.assert_array_equal(drawn[6:], before[7:])
    counts = read_manifest(workdir, "generate")["counts"]
    assert counts == {"images": 14, "redrawn": 1, "left_out": 1}
    card = (folder / "README.md").read_text()
    assert "| recipes that change nothing | `" in card
    assert "Drawn again with other noise: 1 (1 NaN). Left out: 1 (1 NaN)." in card
    (folder / "data" / "train-00003.parquet").unlink()  # not that of image 6
    make(workdir, per_image=3, max_redraws=2)
    assert files.read_jsonl(folder / "redrawn.jsonl") == expected


def test_many_unusable_images_stop_the_run_and_nothing_is_kept(
    make, tmp_path, monkeypatch
):
    make_unusable(monkeypatch, dict.fromkeys(range(5), 99))
    with pytest.raises(UserError, match="4 of 4 .*NaN.*dtype=float32.*text_scale"):
        make(max_redraws=1, shard_size=4)
    (workdir,) = tmp_path.iterdir()
    assert not digests(workdir / "generate")
    monkeypatch.undo()
    make(workdir, text_scale=3.0)


def test_filtered_images_are_left_out_shown_and_counted(make):
    """The images to be removed are computed here, from a run without filters."""
    plain = make(per_image=3)
    assert not {*(plain / "generate").rglob("removed*"), *plain.rglob("filters.json")}
    train = splits.read_split(plain / "caption", "train")
    images, labels, sources = synthetic.read_images(plain / "generate" / "mixed")
    real, seen = (distances.pixels(some, 8) for some in (train.images, images))
    own = real[np.asarray([train.ids.index(id_) for id_ in sources])]
    closest = distances.nearest(real, real, skip_self=True).different.min()
    expected = {"copies": {*np.flatnonzero(distances.paired(seen, own) < closest)}}
    expected["outliers"] = set()
    for k in (0, 1):
        members, mine = real[train.labels == k], np.flatnonzero(labels == k)
        least = distances.nearest(members, members, skip_self=True).different.min()
        far = distances.nearest(seen[mine], members).distance > least
        expected["outliers"] |= {*mine[far]}
    gone = expected["copies"] | expected["outliers"]
    assert 0 < len(expected["outliers"]) < len(gone) < len(images)

    filters = {"copies": "source", "outliers": True, "outliers_quantile": 0.0}
    workdir = make(per_image=3, filter=filters, shard_size=5)
    folder = workdir / "generate" / "mixed"
    kept = [k for k in range(15) if k not in gone]
    assert [row["index"] for row in rows_of(workdir)] == kept
    np.testing.assert_array_equal(pixels(workdir), images[kept])
    found = files.read_jsonl(folder / "removed.jsonl")
    for name, these in expected.items():
        assert {row["index"] for row in found if row["filter"] == name} == these
    for k in gone:
        picture = np.asarray(Image.open(folder / "removed" / f"{k:08d}.png"))
        np.testing.assert_array_equal(picture, images[k])
    counts = read_manifest(workdir, "generate")["counts"]
    assert counts == {"images": len(kept), "redrawn": 0, "left_out": len(gone)} | {
        "removed": len(gone),
        "removed_copies": len(expected["copies"]),
        "removed_outliers": len(expected["outliers"]),
    }
    card = " ".join((folder / "README.md").read_text().split())
    assert f"Left out: {len(gone)} (" in card and "`removed.jsonl`" in card
    assert "outliers: quantile 0" in card

    whole = digests(workdir / "generate")
    (folder / "data" / "train-00001.parquet").unlink()
    (folder / "removed.png").unlink()
    make(workdir, per_image=3, filter=filters, shard_size=5)
    assert digests(workdir / "generate") == whole
    grown = make(filter=filters, shard_size=5)
    make(grown, per_image=3, filter=filters, shard_size=5)
    without = ["manifest.json"]
    assert digests(grown / "generate", without=without) == digests(
        workdir / "generate", without=without
    )


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"copies": "any"}, "mixed: .*none of 5 .*copies 5.*removed.png"),
        ({"label": "folds"}, "label_folds: .*5 different.*2 in class 'two'"),
    ],
)
def test_impossible_filters_are_an_error(make, tmp_path, filters, message):
    with pytest.raises(UserError, match=message):
        make(filter=filters)
    (workdir,) = tmp_path.iterdir()
    if "label" in filters:  # nothing was drawn: other settings are allowed
        make(workdir)
        assert len(rows_of(workdir)) == 5
    else:
        assert files.read_jsonl(workdir / "generate" / "mixed" / "removed.jsonl")


# Models and disks.


def test_a_model_that_changed_is_refused_before_anything_is_written(make, finetuned):
    workdir = make()
    manifest_ = workdir / "generate" / "manifest.json"
    finished = json.loads(manifest_.read_text())
    manifest_.unlink()
    weights = bytearray((workdir / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (workdir / WEIGHTS).write_bytes(weights)
    before = digests(workdir)
    with pytest.raises(UserError, match="unet.*changed since"):
        make(workdir)
    assert digests(workdir) == before
    files.write_json(manifest_, finished)  # also if there were to be more images
    with pytest.raises(UserError, match="unet.*changed since"):
        make(workdir, include_real=True)
    assert json.loads(manifest_.read_text()) == finished
    manifest_.unlink()
    assert digests(workdir) == before
    # With the manifest edited as well, the shards are of another model.
    path = workdir / "finetune" / "manifest.json"
    record = json.loads(path.read_text())
    name = WEIGHTS.removeprefix("finetune/")
    record["artifacts"][name]["sha256"] = hashlib.sha256(weights).hexdigest()
    files.write_json(path, record)
    shutil.copytree(workdir / "generate" / "mixed", workdir / "kept")
    shutil.rmtree(workdir / "generate")
    (workdir / "generate").mkdir()
    (workdir / "kept").rename(workdir / "generate" / "mixed")
    with pytest.raises(UserError, match=r"train-00000.*present model.*another"):
        make(workdir)


def test_a_damaged_shard_is_drawn_again(make, caplog):
    workdir = make()
    shard = workdir / "generate" / "mixed" / "data" / "train-00000.parquet"
    manifest = workdir / "generate" / "manifest.json"
    whole, finished = shard.read_bytes(), manifest.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    garbled = whole[:footer] + b"\xff" * 40 + whole[footer + 40 :]
    for damaged in (whole[:-9], garbled):
        manifest.unlink()
        shard.write_bytes(damaged)
        make(workdir)
        assert shard.read_bytes() == whole
        assert manifest.read_bytes() == finished
        assert "train-00000.parquet was damaged" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("limit", [0, 1])
def test_recipes_of_other_settings_are_refused(finetuned, tmp_path, monkeypatch, limit):
    """`generate` alone would draw them and write the new settings on the card."""
    monkeypatch.setattr(command.runtime, "set_up", lambda folder: None)
    workdir = shutil.copytree(finetuned, tmp_path / "run")
    mix.run(settings(), workdir)
    config = settings(text_scale=4.0, limit=limit)
    config.stages = "generate"
    with pytest.raises(UserError, match=r"generate.text_scale: 3.0 -> 4.0") as error:
        command.run(config, epath.Path(workdir))
    assert str(error.value).startswith("stage generate: wanted the finished stage mix")
    assert not (workdir / "generate").exists()


def test_a_small_disk_is_refused_and_a_full_one_leaves_what_is_whole(
    make, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1900))
        with pytest.raises(UserError, match="1920 bytes of free disk for 5 images"):
            make()
    (workdir,) = tmp_path.iterdir()
    assert not list((workdir / "generate").rglob("*.p*"))
    write = files.write_bytes

    def full(path, content):
        if "00000004.png" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            make(workdir)
    shards = [path.name for path in (workdir / "generate/mixed/data").iterdir()]
    assert shards == ["train-00000.parquet"]
    make(workdir)
    assert digests(workdir / "generate") == digests(make() / "generate")


# Sizes, formats and the contact sheet.


def test_images_of_any_size_in_any_format(make):
    native = make(size=-1, format="jpeg", include_real=True) / "generate" / "mixed"
    found = sorted(native.glob("train/*/*.jpg"))
    assert len(found) == 10
    for path in found:
        with Image.open(path) as picture:
            assert picture.size == (6, 4)
    assert "as the real images, at most 8 pixels" in (native / "README.md").read_text()
    images, _, _ = synthetic.read_images(native, 8)
    assert images.shape == (5, 8, 8, 3)
    small = make(size=4)
    whole = pixels(make())
    averaged = whole.reshape(5, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(pixels(small) - averaged).max() <= 1  # it rounds along each axis


def test_a_contact_sheet_leaves_the_stage_unchanged(make, caplog):
    with caplog.at_level("INFO"):
        workdir = make(limit=3)
    assert "samples start at timestep 999 of 0 to 999 (ddim" in caplog.text
    folder = workdir / "generate"
    assert [path.name for path in folder.iterdir()] == [generate.CONTACT_SHEET]
    with Image.open(folder / generate.CONTACT_SHEET) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 99
    make(workdir, max_redraws=2)  # another setting than that of the sheet
    done = digests(folder)
    make(workdir, max_redraws=2, limit=2)
    changed = {k for k, v in digests(folder).items() if done[k] != v}
    assert changed == {generate.CONTACT_SHEET}
