"""What is given as a base but is not one is recognised, with commands that work.

The commands for PyTorch are run, and what they write is read as a base.
"""

import json
import re
import tarfile
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from base_folders import NAME, UNET, answer, error_of
from test_releases import NEW, OLD, RELEASES

from mvc_jax.checkpoints import diffusers_layout, pipeline_folder

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def made(saved, tiny, monkeypatch, tmp_path):
    """Runs the command of an error; returns (the base's UNet, the new one)."""

    def run(error, base=saved):
        command = str(error).split("python -c ")[1].split('"')[1]
        (target,) = re.findall(r"--config\.base\.path=([\w-]+)\.", str(error))
        monkeypatch.chdir(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own
            exec(command.replace("'BASE'", repr(str(base))), {})
        diffusers_layout.check_base(tmp_path / target)
        new = diffusers_layout.load(tmp_path / target)[1]
        return tiny[1], new

    return run


def changed(made, part="unet"):
    """Names of the modules whose kernels differ."""
    before, after = (jax.tree.leaves_with_path(tree[part]) for tree in made)
    pairs = zip(before, after, strict=True)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), (_, new) in pairs
        if not np.array_equal(old, new)
    ]


def write_lora(path, names, rank=2):
    """Adapters of one layer of `tiny`, 32 to 32; `names` of (down, up, further)."""
    down, up, *further = names
    drawn = np.random.default_rng(0).standard_normal((2, 32, rank)).astype(np.float32)
    tensors = {down: np.ascontiguousarray(drawn[0].T), up: drawn[1]}
    tensors |= {name: np.array(rank, np.float32) for name in further}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path)
    return path


KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
LORA = {
    "kohya": [f"{KOHYA}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")],
    "diffusers": [f"unet.{LAYER}.lora_{x}.weight" for x in "AB"],
    "diffusers 0.25": [f"unet.{LAYER}.lora.{x}.weight" for x in ("down", "up")],
}


@pytest.mark.parametrize("kind", LORA)
def test_a_lora_file_is_merged_by_the_command(made, torch, tmp_path, kind):
    path = write_lora(tmp_path / "style" / "mine-000002.safetensors", LORA[kind])
    for named in (path, path.parent):
        error = error_of(named)
        assert f"LoRA adapters in the form of {kind.split()[0]}" in str(error)
    (layer,) = changed(made(error))
    assert layer.endswith("attn1/to_q/kernel") and "down_blocks_0" in layer


@pytest.mark.parametrize("release", [OLD, NEW])
@pytest.mark.parametrize("library", ["diffusers", "peft"])
def test_the_lora_folders_of_the_libraries(made, torch, tmp_path, release, library):
    with tarfile.open(RELEASES / release / "adapters.tar.xz") as tar:
        tar.extractall(tmp_path / "made", filter="data")
    error = error_of(tmp_path / "made" / library)
    assert f"LoRA adapters in the form of {library}" in str(error)
    layers = changed(made(error))
    assert layers and all(re.search("attn[12]/to_", layer) for layer in layers)


def test_other_adapters_and_embeddings(saved, tmp_path, made, torch):
    path = tmp_path / "loha.safetensors"
    zeros = np.zeros((2, 2), np.float32)
    names = [f"{KOHYA}.hada_w{n}_{x}" for n in (1, 2) for x in "ab"]
    safetensors.numpy.save_file(dict.fromkeys(names, zeros), path)
    assert "LyCORIS adapters" in str(error_of(path))
    path = tmp_path / "learned_embeds.safetensors"
    embedding = np.full((1, 16), 0.5, np.float32)
    safetensors.numpy.save_file({"<my-cat>": embedding}, path)
    error = error_of(path)
    assert "embeddings of a textual inversion" in str(error)
    before, after = made(error)
    path = ("text_encoder", "text_model", "embeddings", "token_embedding", "embedding")
    for key in path:
        before, after = before[key], after[key]
    np.testing.assert_array_equal(after, np.concatenate([before, embedding]))


def state(folder, *networks):
    """What accelerate writes beside the networks of a training script."""
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for number, part in enumerate(networks):
        (folder / part).mkdir()
        unet = pipeline_folder.WEIGHTS["unet"]
        yield part, folder / part / unet, number


def training_folder(saved, folder, *networks):
    """The networks of `saved`, each moved by another number."""
    tensors = safetensors.numpy.load_file(saved / UNET)
    config = json.loads((saved / "unet" / "config.json").read_text())
    for _, path, number in state(folder, *networks):
        moved = {name: tensor + number + 1 for name, tensor in tensors.items()}
        safetensors.numpy.save_file(moved, path, {"format": "pt"})
        path.with_name("config.json").write_text(
            json.dumps(config | {"_class_name": "UNet2DConditionModel"})
        )
    return folder


@pytest.mark.parametrize("networks", [("unet",), ("unet", "unet_ema")])
def test_a_training_folder_is_put_into_its_base(saved, tmp_path, made, torch, networks):
    training_folder(saved, tmp_path / "out" / "checkpoint-500", *networks)
    last = training_folder(saved, tmp_path / "out" / "checkpoint-1000", *networks)
    outer, inner = error_of(tmp_path / "out"), error_of(last)
    assert "of which checkpoint-1000 is the last" in str(outer)
    assert "the state of a training run, which is no pipeline" in str(inner)
    assert str(outer).split(". Put")[1] == str(inner).split(". Put")[1]
    assert ("averaged weights" in str(inner)) == (len(networks) == 2)
    before, after = made(inner)
    bias = before["unet"]["conv_in"]["bias"]
    moved = bias + len(networks)
    np.testing.assert_allclose(after["unet"]["conv_in"]["bias"], moved, rtol=1e-6)
    # The folder of one network.
    before, after = made(error_of(last / "unet"))
    np.testing.assert_allclose(after["unet"]["conv_in"]["bias"], bias + 1, rtol=1e-6)


def test_the_state_beside_a_whole_pipeline(saved):
    """A script that came to its end has written the pipeline around it."""
    error = error_of(training_folder(saved, saved / "checkpoint-500", "unet"))
    assert str(error).endswith(f"Use {saved}, which its training wrote at its end.")
    diffusers_layout.check_base(saved)


def test_a_state_without_networks_has_no_command(tmp_path):
    [*state(tmp_path)]
    (tmp_path / "model.safetensors").write_bytes(b"")  # accelerate's, of any module
    assert "writes at its end" in str(error_of(tmp_path))
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", LORA["diffusers"])
    assert "LoRA adapters" in str(error_of(tmp_path))


def test_adapters_on_the_hub(monkeypatch, tmp_path):
    for names, kind in (
        (["README.md", "pytorch_lora_weights.safetensors"], "diffusers"),
        (["adapter_config.json", "adapter_model.safetensors"], "peft"),
    ):
        answer(monkeypatch, names, cache=tmp_path)
        with pytest.raises(Exception, match=f"form of {kind}.*{NAME}") as error:
            diffusers_layout.check_base(NAME)
        assert "https" not in str(error.value)


def test_a_damaged_file_is_still_a_single_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"123")
    assert "from_single_file" in str(error_of(path))
