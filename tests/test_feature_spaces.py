"""Feature spaces: each is the network's own features, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_clip
from test_classifier_weights import EFFICIENT, MEAN, STD, export

from mvc_jax.checkpoints import classifier_weights, clip_checkpoint
from mvc_jax.errors import UserError
from mvc_jax.metrics import feature_spaces
from mvc_jax.models import classifiers, clip

folder = test_clip.folder  # a tiny CLIP
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), np.uint8)


def test_an_efficientnet_stops_before_its_head():
    shapes = classifier_weights.variable_shapes(EFFICIENT)
    del shapes["params"]["classifier"]
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    found = jax.eval_shape(feature_spaces.pooled(EFFICIENT), shapes, images)
    assert found.shape == (2, EFFICIENT.ends()[1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(folder, model, variables) of a small network with timm's names."""
    path = tmp_path_factory.mktemp("classifier")
    model = classifiers.make("resnet8", num_classes=3, dtype="float32")
    return path, model, export(path, model, variant="resnet8", size=12)


def test_the_logits_follow_from_a_classifier_s_features(classifier):
    path, model, variables = classifier
    feature_spaces.check("resnet8", str(path))
    space = feature_spaces.load("resnet8", str(path), batch=3)
    found = space.embed(list(PICTURES))
    assert found.shape == (5, space.dims) and found.dtype == np.float32
    pixels = (PICTURES / 255 - np.asarray(MEAN)) / np.asarray(STD)
    logits = jax.jit(model.apply)(variables, jnp.asarray(pixels, jnp.float32))
    head = variables["params"]["fc"]
    again = found @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(space.embed([PICTURES[4]])[0], found[4], 1e-5, 1e-6)
    assert space.embed([]).shape == (0, space.dims)


def test_clip_s_features_are_normalised_embeddings(folder):
    space = feature_spaces.load("clip", folder, batch=2)
    model, params = clip_checkpoint.load(folder, field="f", text=True)
    pixels = jnp.asarray(model.preprocess(PICTURES))
    expected = clip.normalize(jax.jit(model.image_embeddings)(params, pixels))
    np.testing.assert_allclose(
        space.embed(list(PICTURES)), expected, rtol=1e-4, atol=1e-5
    )
    texts = space.text.embed(["a photo of one", "two", "three"])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(space.text.embed(["three"])[0], texts[2], 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("dinov2", "", "the weights of the feature space dinov2.*features=pixels"),
        ("clip", "/no/such/folder", "no folder"),
        ("dinov2", "/no/such/folder", "no folder"),
        ("resnet18", "/no/such/folder", "config.evaluate.weights '/no/such/folder'"),
        ("resnet18", "classifier", "looks like"),
    ],
)
def test_a_model_that_is_not_there_is_named(classifier, name, weights, words):
    weights = str(classifier[0]) if weights == "classifier" else weights
    with pytest.raises(UserError, match=f"(?s){words}"):
        feature_spaces.check(name, weights)
