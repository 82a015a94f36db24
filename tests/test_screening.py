"""The filters of `generate` where they meet the config, recipes and a CLIP."""

import jax
import numpy as np
import pytest
import test_clip
from etils import epath

from mvc_jax.checkpoints import clip_checkpoint
from mvc_jax.configs import common
from mvc_jax.data import splits
from mvc_jax.errors import UserError
from mvc_jax.screening import screener

clip_folder = test_clip.folder
NAMES = ("red_digit", "blue_digit")
NOWHERE = epath.Path("/nowhere")


def settings(path="", **fields):
    config = common.get_config()
    config.data.class_type = "small"
    config.generate.clip = str(path)
    config.generate.filter.update(fields)
    return config


@pytest.fixture(scope="module")
def train():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (12, 8, 8, 3), np.uint8)
    labels = np.repeat(np.arange(2, dtype=np.int32), 6)
    return splits.Split(images, labels, tuple("abcdefghijkl"), NAMES, False)


def recipe(index, train, partners=1):
    others = [id_ for id_ in train.ids if id_ != train.ids[index]]
    row = {"index": index, "label": int(train.labels[index])}
    return row | {"source": train.ids[index], "partners": others[:partners]}


def test_a_clip_names_images_one_by_one(clip_folder, train):
    """By the texts of the classes, whatever else is in the batch."""
    config = settings(clip_folder, label="clip", label_threshold=1.0, label_top=1)
    screener.check(config.to_dict())
    rows = [recipe(i, train) for i in range(len(train.ids))]
    judge = screener.open_screen(config.to_dict(), NOWHERE, train, rows).judge
    found = judge(train.images, rows)

    model, params = clip_checkpoint.load(clip_folder, field="clip", text=True)
    words = model.tokenize(
        ["a photo of small red digit", "a photo of small blue digit"]
    )
    texts = jax.jit(model.text_embeddings)(params, words)
    images = jax.jit(model.image_embeddings)(params, model.preprocess(train.images))
    shares = jax.jit(clip.zero_shot)(images, texts, params["logit_scale"])
    shares = np.asarray(shares)
    wrong = np.flatnonzero(np.argmax(shares, axis=1) != train.labels)
    assert 0 < len(wrong) < len(rows)
    assert [i for i, findings in enumerate(found) if findings] == wrong.tolist()
    for i in wrong:
        assert found[i][0].score == pytest.approx(shares[i, train.labels[i]], abs=1e-3)
    alone = [judge(train.images[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert alone == found  # to the bit


def test_a_clip_without_texts_gives_features_alone(clip_folder, train, tmp_path):
    model, params = clip_checkpoint.load(clip_folder, field="clip")
    clip_checkpoint.save(tmp_path, model, params)
    tower = tmp_path / "image_encoder"
    for config in (
        settings(tower, outliers=True),
        settings(clip_folder, outliers=True, features="clip"),
    ):
        screener.check(config.to_dict())
        screen = screener.open_screen(
            config.to_dict(), NOWHERE, train, [recipe(0, train)]
        )
        assert screen.judge.facts["features"] == "clip"
    with pytest.raises(UserError, match="text tower.*an image tower alone"):
        screener.check(settings(tower, label="clip").to_dict())
    config = settings(label="clip")
    config.pretrain.image_encoder.steps = 1
    with pytest.raises(UserError, match=r"filter\.label: .*text tower.*pretrain makes"):
        screener.check(config.to_dict())
    config = settings(outliers=True, features="clip")
    with pytest.raises(UserError, match=r"filter\.features: .*generate\.clip"):
        screener.check(config.to_dict())
    config.base.path = str(tmp_path)  # a pipeline with an image_encoder
    (tmp_path / "model_index.json").write_text("{}")
    screener.check(config.to_dict())


def test_recipes_of_ones_own_may_touch_too_many_folds(train):
    config = settings(label="folds", label_folds=3, features="pixels")
    config.mix.file = "mine.jsonl"
    screener.check(config.to_dict())
    rows = [recipe(0, train), recipe(1, train, partners=2)]
    with pytest.raises(UserError, match="label_folds: .*at least 4.*2 partners.*got 3"):
        screener.open_screen(config.to_dict(), NOWHERE, train, rows)
    screener.open_screen(config.to_dict(), NOWHERE, train, rows[:1])


def test_without_filters_nothing_is_looked_at(train):
    config = settings()
    screener.check(config.to_dict())
    screen = screener.open_screen(config.to_dict(), NOWHERE, train, [])
    assert screen.of_set(NOWHERE) is None
    assert screen.write_facts(NOWHERE) == [] and screen.counted == ()
