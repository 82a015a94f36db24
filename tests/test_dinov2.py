"""DINOv2 against transformers' PyTorch class, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax.checkpoints import dinov2_checkpoint
from mvc_jax.errors import UserError
from mvc_jax.models import dinov2
from mvc_jax.models.flax_classes import transformers

FIELD = "config.evaluate.weights"


@pytest.fixture(scope="module")
def published(torch, tmp_path_factory):
    """(folder, PyTorch's model) of a tiny DINOv2 for images of 20 pixels."""
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=20,
        patch_size=4,
        layerscale_value=0.5,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("size", [20, 28])
def test_features_are_those_of_pytorch_at_any_size(published, torch, size):
    folder, theirs = published
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    dinov2_checkpoint.check(folder, field=FIELD)
    model, params = dinov2_checkpoint.load(folder, field=FIELD)
    model, params = dinov2.resized(model, params, size)
    ours = jax.jit(model.features)(params, jnp.asarray(pixels))
    with torch.no_grad():
        rows = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        expected = theirs(rows).pooler_output.numpy()
    assert ours.shape == (2, model.width)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_another_model_is_refused(published, tmp_path):
    folder, _ = published
    with pytest.raises(UserError, match="no folder"):
        dinov2_checkpoint.check(tmp_path / "none", field=FIELD)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = (folder / "config.json").read_text().replace('"dinov2"', '"vit"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="model_type 'dinov2'.*'vit'"):
        dinov2_checkpoint.load(tmp_path, field=FIELD)
