"""Folders of base models, and changes of them for tests."""

import fnmatch
import json
import types

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from configs import common
from mvc_jax import encode, files
from mvc_jax.checkpoints import diffusers_layout, hub
from mvc_jax.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
NAME, COMMIT = "some/model", "0123456789abcdef0123456789abcdef01234567"


def edit(path, **fields):
    files.write_json(path, json.loads(path.read_text()) | fields)


def cast(path, dtype, to=None):
    tensors = safetensors.numpy.load_file(path)
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, to or path)


def to_variant(folder, variant="fp16", dtype=np.float16, keep=False):
    for file in (UNET, VAE, TEXT):
        cast(folder / file, dtype, folder / file.replace(".", f".{variant}.", 1))
        if not keep:
            (folder / file).unlink()


def matching(names, patterns):
    return {n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)}


def error_of(folder, **options):
    """The error of `load` and of the check, which must be equal."""
    with pytest.raises(UserError) as early:
        diffusers_layout.check_base(folder, **options)
    options = {k: v for k, v in options.items() if k in ("variant", "revision")}
    with pytest.raises(UserError) as late:
        diffusers_layout.load(folder, **options)
    assert str(early.value) == str(late.value)
    assert early.value.details == late.value.details
    return early.value


def full_text(error):
    return "\n".join([str(error), *error.details])


def config_of(path, **fields):
    config = common.get_config()
    config.base.path = str(path)
    config.data.size = 8
    config.data.class_type = "digit"
    config.base.update(fields)
    return config


def find_base(config, workdir, record):
    return encode._find_base(config, epath.Path(workdir), epath.Path(record))


def answer(monkeypatch, names=(), *, gated=False, cache, error=None, denied=None):
    """A hub that has one model, of these files, or answers with an error.

    Args:
      monkeypatch: pytest's.
      names: of the model's files.
      gated: whether a permission is needed.
      cache: folder of the library's cache.
      error: raised where the model is looked up.
      denied: raised where the permission is looked up.
    """

    def info(name, revision, timeout):
        if error is not None:
            raise error
        siblings = [types.SimpleNamespace(rfilename=file) for file in names]
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings, gated=gated)

    def auth_check(name):
        if denied is not None:
            raise denied

    monkeypatch.setattr(huggingface_hub, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "auth_check", auth_check)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    hub._list_files.cache_clear()
