"""InfoNCE: its minimum, repeated texts, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sd_families import normal

from mvc_jax.pretraining import info_nce

loss_and_accuracy = jax.jit(info_nce.info_nce)
GROUPS = np.array([0, 1, 1, 2], np.int32)


def _texts(groups):
    return normal("info_nce texts", 3, 6)[groups]


def test_without_repeats_it_is_clips_loss(torch):
    """transformers' own, of its CLIPModel."""
    from transformers.models.clip.modeling_clip import clip_loss

    images, texts = normal("contrastive images", 4, 6), normal("others", 4, 6)
    value, _ = loss_and_accuracy(
        images, texts, np.arange(4, dtype=np.int32), 1.5, np.ones(4)
    )
    units = [
        torch.nn.functional.normalize(torch.from_numpy(x)) for x in (images, texts)
    ]
    expected = clip_loss(units[1] @ units[0].T * np.exp(1.5))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)


def test_images_at_their_texts_are_right_repeated_or_not():
    texts = _texts(GROUPS)
    value, accuracy = loss_and_accuracy(texts, texts, GROUPS, np.log(100.0), np.ones(4))
    wrong, _ = loss_and_accuracy(
        texts, texts[[1, 2, 3, 0]], GROUPS[[1, 2, 3, 0]], 4.6, np.ones(4)
    )
    assert accuracy == 1
    # Two of the four have two right texts each, between which one bit is left open.
    np.testing.assert_allclose(value, np.log(2) / 2, atol=1e-3)
    assert wrong > 3


@pytest.mark.parametrize(("group", "fill"), [(0, 1), (1, 0), (7, 1)])
def test_padding_changes_nothing(group, fill):
    """Also zero embeddings, whose length is zero, and also gradients."""
    images, texts = normal("contrastive images", 4, 6), _texts(GROUPS)

    def pad(array, value, dtype=np.float32):
        shape = (2, *array.shape[1:])
        return np.concatenate([array, np.full(shape, value, dtype)])

    def loss(images, *rest):
        return info_nce.info_nce(images, *rest)[0]

    gradient = jax.jit(jax.value_and_grad(loss))
    weight = np.ones(4, np.float32)
    expected = gradient(jnp.asarray(images), texts, GROUPS, 2.0, weight)
    rest = (pad(texts, fill), pad(GROUPS, group, np.int32), 2.0, pad(weight, 0))
    value, grads = gradient(jnp.asarray(pad(images, fill)), *rest)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grads[:4], expected[1], atol=1e-7)
    np.testing.assert_array_equal(grads[4:], 0)
