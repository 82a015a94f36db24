"""What is known of a small base: reconstructions, samples, and the words about them."""

import dataclasses
import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mvc_jax import pretrain
from mvc_jax.checkpoints import base_card, clip_tokenizer, model_card
from mvc_jax.classification import judge
from mvc_jax.configs import brain_tumor, common, presets
from mvc_jax.errors import UserError
from mvc_jax.models import classifiers
from mvc_jax.models.feature_maps import feature_maps
from mvc_jax.pretraining import base, quality, reconstruction, samples, small
from mvc_jax.pretraining import tokenizer as own_tokenizer
from mvc_jax.training import sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.train_logger import TrainLogger

DRAW = np.random.default_rng(0)
IMAGES = hnp.arrays(np.uint8, (2, 6, 5, 3))


# Measures of reconstructions.


@settings(max_examples=30, deadline=None)
@given(images=IMAGES, offset=st.floats(-1, 1, width=32))
def test_an_offset_has_no_error_of_gradients(images, offset):
    images = jnp.asarray(images / 127.5 - 1.0, jnp.float32)
    error = reconstruction.gradient_error(images + offset, images)
    np.testing.assert_allclose(error, 0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(images=IMAGES)
def test_psnr_is_that_of_the_definition(images):
    decoded = np.clip(images.astype(int) + 10, 0, 255).astype(np.uint8)
    squared = np.square(decoded.astype(float) - images).mean((1, 2, 3))
    np.testing.assert_allclose(
        reconstruction.psnr(decoded, images),
        np.minimum(10 * np.log10(255**2 / np.maximum(squared, 1e-9)), 60),
    )
    assert (reconstruction.psnr(images, images) == 60).all()


def test_black_pixels_flatter_psnr_but_not_inside():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[:, :4, :4] = 200
    decoded = np.where(images, 180, 0).astype(np.uint8)
    whole = reconstruction.psnr(decoded, images)
    inside = reconstruction.psnr(decoded, images, inside=True)
    np.testing.assert_allclose(inside, 10 * np.log10(255**2 / 400))
    np.testing.assert_allclose(whole - inside, 10 * np.log10(4))
    nothing = reconstruction.psnr(decoded, 0 * images, inside=True)
    assert np.isnan(nothing).all()
    found = quality.reconstruction_measures(decoded, 0 * images)
    assert found["psnr_inside"] == found["psnr"]


def test_a_blurred_image_is_less_sharp():
    images = DRAW.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    blurred = (images.astype(int) + np.roll(images, 1, axis=2)) // 2
    assert reconstruction.sharpness(images, images) == 1
    assert reconstruction.sharpness(blurred.astype(np.uint8), images) < 0.9


# Feature maps, and the judge.


@pytest.mark.parametrize(
    ("name", "sides"),
    [("resnet8", [16, 8, 4]), ("efficientnet_lite0", [8, 4, 2, 1])],
)
def test_feature_maps_are_of_the_last_block_of_each_resolution(name, sides):
    network = classifiers.make(name, num_classes=2, dtype="float32")
    images = jnp.zeros((1, 16, 16, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    maps = jax.eval_shape(feature_maps(network), variables, images)
    assert [x.shape[1] for x in maps] == sides
    assert all(x.ndim == 4 for x in maps)


def loop_of(folder, name, steps, mesh):
    return base.Loop(
        mesh,
        steps,
        Checkpoints(folder / name, every=steps),
        TrainLogger(folder, f"pretrain/{name}", log_every=steps),
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A judge of bright and dark images."""
    labels = np.arange(40, dtype=np.int32) % 2
    noise = DRAW.integers(0, 60, (40, 8, 8, 3))
    images = (noise + 180 * labels[:, None, None, None]).astype(np.uint8)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    found = judge.train(
        images,
        labels,
        classes=2,
        seed=0,
        loop=loop_of(tmp_path_factory.mktemp("judge"), "judge", 30, mesh),
        width=8,
        batch_size=10,
        learning_rate=1e-2,
    )
    return found, images, labels


def test_a_judge_tells_its_classes_apart(judged):
    found, images, labels = judged
    assert found.agreement(images, labels) > 0.9
    assert found.agreement(images, 1 - labels) < 0.1


def test_the_error_of_features_is_zero_for_the_image_itself_alone(judged):
    found, images, _ = judged
    loss = reconstruction.ReconstructionLoss(1.0, 1.0, found.maps)
    images = jnp.asarray(images[:2] / 127.5 - 1.0)

    @jax.jit
    def value_and_slope(decoded):
        return jax.value_and_grad(lambda x: loss(x, images, found.variables).sum())(
            decoded
        )

    same, slope = value_and_slope(images)
    assert float(same) == pytest.approx(0, abs=1e-5)
    other, slope = value_and_slope(images[::-1])
    assert float(other) > 0.1 and bool(jnp.isfinite(slope).all())


# Samples.


def test_samples_are_of_all_classes_in_turn():
    labels = np.asarray([0] * 9 + [2] * 3 + [5], np.int32)
    chosen = samples.choose(labels, 12, seed=0)
    assert labels[chosen].tolist() == [0, 2, 5] * 4
    assert len({*chosen[labels[chosen] == 0].tolist()}) == 4


def test_samples_depend_on_their_number_alone(tiny):
    model, params = tiny
    ids = model.tokenize(["a bold stroke", "a photo of digit one", "one"])
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    draw = functools.partial(samples.draw, model, params, seed=0, grey=True, mesh=mesh)
    drawn = draw(ids)
    assert drawn.shape == (3, 8, 8, 3) and drawn.dtype == np.uint8
    assert (drawn == drawn[..., :1]).all()  # grey
    np.testing.assert_array_equal(drawn, draw(ids))


def test_reconstructions_are_of_the_mode(tiny):
    model, params = tiny
    images = DRAW.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    unscaled = {**model.configs["vae"], "scaling_factor": 1.0}

    model = dataclasses.replace(model, configs={**model.configs, "vae": unscaled})
    found = base.reconstruct(model, params["vae"], images, batch_size=2, mesh=mesh)
    moments = model.moments(params, jnp.asarray(images / 127.5 - 1.0, jnp.float32))
    expected = model.decode(params, moments[..., :4])
    expected = np.clip(np.asarray(expected + 1) * 127.5, 0, 255)
    assert np.abs(found - expected).max() <= 1
    none = base.reconstruct(model, params["vae"], images[:0], batch_size=2, mesh=mesh)
    assert len(none) == 0


# What is said.


@settings(deadline=None)
@given(count=st.integers(1, 5000), fraction=st.floats(0, 0.5))
def test_held_out_images_are_never_trained_on(count, fraction):
    kept, held = quality.hold_out(count, fraction, seed=3)
    assert len(kept) >= 1 and len(held) <= 200
    assert sorted([*kept, *held]) == list(range(count))


def known(**fields):
    measured = {"psnr": 31.0, "psnr_inside": 28.0, "sharpness": 0.9, "judged": 100}
    measured |= {"agreement": 0.6, "judge_accuracy": 0.7, **fields}
    return quality.Quality(900, 45, 4, **measured)


def test_a_base_that_blurs_or_is_not_recognised_is_warned_about_with_the_numbers():
    assert known().warnings() == []
    assert len(known().in_words()) == 2
    (blurs,) = known(psnr=22.9, psnr_inside=19.0, sharpness=0.41).warnings()
    assert "22.9 dB (19.0 " in blurs and "41 %" in blurs and "27 dB" in blurs
    assert known(psnr=24.0, sharpness=0.98).warnings() == []
    for psnr, sharpness in ((12.4, 1.0), (24.0, 1.75), (24.0, math.nan)):
        assert len(known(psnr=psnr, sharpness=sharpness).warnings()) == 1
    (strange,) = known(agreement=0.3).warnings()
    assert "30 % of 100 samples" in strange and "70 % of the 45" in strange
    assert "chance is 25 %" in strange
    assert quality.Quality(900, 0, 4).warnings() == []
    assert known().as_dict()["warnings"] == []


def test_the_card_says_what_the_base_has_seen(tmp_path):
    facts = base_card.Facts(
        dataset="folder:caltech101",
        classes=("ant", "brain_2"),
        images=855,
        resolution=64,
        captioner="attributes",
        prompt="dark, a photo of object ant",
        steps={"vae": 1200, "unet": 4000},
        measures=known(psnr=22.9, sharpness=0.41).as_dict(),
    )
    text = base_card.text(facts)
    for part in ("folder:caltech101", "`855`", "`ant`, `brain_2`", "22.9 dB", "`4000`"):
        assert part in text
    assert "> Warning: the base blurs" in text
    base_card.write(tmp_path, facts)
    assert model_card.base_license(tmp_path) == model_card.UNKNOWN


# Architectures.


@pytest.mark.parametrize("name", presets.BASES)
def test_a_preset_has_latents_of_16_and_attention_on_8_only(name):
    argument = f"path=a,per_class=25,pretrain={name}"
    config = brain_tumor.get_config(argument)
    common.FIELDS.check(config)
    assert config.caption.attributes == "scan" and not config.base.path
    config.data.pool = 900
    pretrain.check(config)
    sizes = pretrain.base_of(config)
    assert sizes.moments_shape(config.data.size) == (16, 16, 8)
    assert sizes.parameters["unet"] <= 10_000_000
    architecture = pretrain._architecture(config, 30)
    unet = small.configs(vocab_size=640, **architecture)["unet"]
    assert unet["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D"]
    assert unet["up_block_types"] == ["CrossAttnUpBlock2D", "UpBlock2D"]
    with pytest.raises(UserError, match="pretrain=small32 or small64"):
        brain_tumor.get_config("path=a,pretrain=small32+small64")


def test_attention_on_more_levels_than_there_are_is_refused():
    config = common.get_config()
    config.data.size, config.data.pool = 16, 10
    config.pretrain.unet.attention_levels = 2
    with pytest.raises(UserError, match="attention_levels"):
        pretrain.check(config)


def test_features_in_the_loss_need_a_classifier():
    config = common.get_config()
    config.data.size, config.data.pool = 16, 10
    config.pretrain.vae.feature_weight = 0.1
    pretrain.check(config)
    config.pretrain.judge.steps = 0
    with pytest.raises(UserError, match="pretrain.vae.features.*judge.steps is 0"):
        pretrain.check(config)


def test_the_context_is_as_long_as_the_longest_prompt(tmp_path):
    texts = ["a dark scan", "a bright scan of a head, detailed, vertical lines"]
    own_tokenizer.train(tmp_path, texts, vocab_size=560, max_length=77)
    read, _ = clip_tokenizer.read(tmp_path)
    longest = own_tokenizer.longest(read, texts, most=77)
    assert longest == len(read(texts[1])["input_ids"])
    assert own_tokenizer.longest(read, texts, most=9) == 9
    own_tokenizer.set_length(tmp_path, longest)
    assert clip_tokenizer.read(tmp_path)[0].model_max_length == longest


def test_the_sheet_has_no_column_without_a_sample():
    """One sample of each of many classes: one column; up to four are shown."""
    images = np.zeros((12, 8, 8, 3), np.uint8)
    names = [f"class {k}" for k in range(12)]

    def width(labels):
        png = quality.sheet(images, np.asarray(labels), names, 64)
        return Image.open(io.BytesIO(png)).width

    one, two, four = (width(np.arange(12) // n) for n in (1, 2, 4))
    assert two - one == (four - two) / 2 >= 64
    assert width(np.zeros(12, int)) == four
