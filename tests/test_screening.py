"""The filters of `generate` with a CLIP, with recipes, and switched off."""

import jax
import numpy as np
import pytest
import test_clip
from etils import epath

from mvc_jax.checkpoints import clip_checkpoint
from mvc_jax.data import splits
from mvc_jax.errors import UserError
from mvc_jax.models import clip
from mvc_jax.screening import screener, selection
from mvc_jax.screening.settings import FilterSettings, check_filters

clip_folder = test_clip.folder
NAMES = ("red_digit", "blue_digit")
NOWHERE = epath.Path("/nowhere")


def check(settings, *, clip_path="", base_path="", pretrain_image_encoder=False):
    check_filters(
        settings,
        partners=1,
        clip_path=str(clip_path),
        base_path=str(base_path),
        pretrain_image_encoder=pretrain_image_encoder,
    )


def open_screener(settings, train, recipes, clip_path=""):
    return screener.open_screener(
        settings,
        workdir=NOWHERE,
        train=train,
        recipes=recipes,
        seed=0,
        clip_path=str(clip_path),
        class_type="small",
    )


@pytest.fixture(scope="module")
def train():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (12, 8, 8, 3), np.uint8)
    labels = np.repeat(np.arange(2, dtype=np.int32), 6)
    return splits.Split(images, labels, tuple("abcdefghijkl"), NAMES, False)


def recipe(index, train, partners=1):
    others = [id_ for id_ in train.ids if id_ != train.ids[index]]
    return {
        "index": index,
        "label": int(train.labels[index]),
        "source": train.ids[index],
        "partners": others[:partners],
    }


def test_clip_classifies_each_image_independently_of_the_batch(clip_folder, train):
    settings = FilterSettings(label="clip", label_threshold=1.0, label_top=1)
    check(settings, clip_path=clip_folder)
    rows = [recipe(i, train) for i in range(len(train.ids))]
    find = open_screener(settings, train, rows, clip_folder).filters
    found = find(train.images, rows)

    model, params = clip_checkpoint.load(clip_folder, field="clip", text=True)
    words = model.tokenize(
        ["a photo of small red digit", "a photo of small blue digit"]
    )
    texts = jax.jit(model.text_embeddings)(params, words)
    images = jax.jit(model.image_embeddings)(params, model.preprocess(train.images))
    expected = jax.jit(clip.zero_shot)(images, texts, params["logit_scale"])
    expected = np.asarray(expected)
    wrong = np.flatnonzero(np.argmax(expected, axis=1) != train.labels)
    assert 0 < len(wrong) < len(rows)
    assert [i for i, findings in enumerate(found) if findings] == wrong.tolist()
    for i in wrong:
        own = expected[i, train.labels[i]]
        assert found[i][0].score == pytest.approx(own, abs=1e-3)
    one_by_one = [find(train.images[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert one_by_one == found  # bit for bit


def test_clip_without_a_text_encoder_only_gives_features(clip_folder, train, tmp_path):
    model, params = clip_checkpoint.load(clip_folder, field="clip")
    clip_checkpoint.save(tmp_path, model, params)
    encoder = tmp_path / "image_encoder"
    outliers = FilterSettings(outliers=True)
    outliers_by_clip = FilterSettings(outliers=True, features="clip")
    for path, settings in ((encoder, outliers), (clip_folder, outliers_by_clip)):
        check(settings, clip_path=path)
        opened = open_screener(settings, train, [recipe(0, train)], path)
        assert opened.filters.facts["features"] == "clip"
    by_text = FilterSettings(label="clip")
    with pytest.raises(UserError, match="text tower.*an image tower alone"):
        check(by_text, clip_path=encoder)
    with pytest.raises(UserError, match=r"filter\.label: .*text encoder.*pretrain mak"):
        check(by_text, pretrain_image_encoder=True)
    with pytest.raises(UserError, match=r"filter\.features: .*generate\.clip"):
        check(outliers_by_clip)
    (tmp_path / "model_index.json").write_text("{}")
    check(outliers_by_clip, base_path=tmp_path)  # a pipeline with an image_encoder


def test_recipes_with_too_many_partners_for_the_folds_are_rejected(train):
    settings = FilterSettings(label="folds", label_folds=3, features="pixels")
    check(settings)
    rows = [recipe(0, train), recipe(1, train, partners=2)]
    with pytest.raises(UserError, match="label_folds: .*at least 4.*2 partners.*got 3"):
        open_screener(settings, train, rows)
    open_screener(settings, train, rows[:1])


def test_disabled_filters_do_nothing(train):
    check(FilterSettings())
    opened = open_screener(FilterSettings(), train, [])
    assert opened.for_set(NOWHERE) is None
    assert opened.finish_set(NOWHERE, [], train.labels) == ([], {})
    assert opened.write_facts(NOWHERE) == [] and opened.count_names == ()


def test_unusable_images_are_never_screened_or_kept():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    usable = np.asarray([True, False, True, True, False])
    rows = [{"index": index} for index in range(10, 15)]
    seen = []

    def screen(images, rows):
        seen.extend(zip(images[:, 0, 0, 0].tolist(), rows, strict=True))
        return [[row | {"filter": "copies"}] * (row["index"] == 12) for row in rows]

    assert selection.select(images, usable, rows, None) == ([0, 2, 3], [])
    kept, removed = selection.select(images, usable, rows, screen)
    assert kept == [0, 3] and removed == [{"index": 12, "filter": "copies"}]
    assert seen == [(0, rows[0]), (2, rows[2]), (3, rows[3])]
