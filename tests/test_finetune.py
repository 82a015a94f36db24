"""Fine-tuning: the step and its parts, adapters, samples, the whole stage."""

import dataclasses
import functools
import json
import shutil
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CACHE
from etils import epath
from PIL import Image
from sd_parity import jit_fast

from mvc_jax import files, finetune, train
from mvc_jax.checkpoints import diffusers_layout, lora_file, tensor_file
from mvc_jax.configs import common
from mvc_jax.data.cache import pairs_of_all_classes
from mvc_jax.errors import UserError
from mvc_jax.models import lora
from mvc_jax.models.stable_diffusion import StableDiffusion
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.loop import create_state

KEY = rng.purpose_key(0, "finetune")


@pytest.fixture(scope="module")
def wide(tiny):
    model, params = tiny
    return model.widened(params)


def make_batch(size, *, seed=0):
    draw = np.random.default_rng(seed)
    moments = draw.normal(size=(2, size, 2, 2, 8)).astype(np.float32)
    return {
        "source_moments": moments[0],
        "target_moments": moments[1],
        "text_states": draw.normal(size=(size, 12, 16)).astype(np.float32),
        "null_states": draw.normal(size=(12, 16)).astype(np.float32),
        "weight": np.ones(size, np.float32),
    }


@dataclasses.dataclass(frozen=True)
class Toy(StableDiffusion):
    """A model whose UNet has one layer, and compiles fast."""

    def denoise(self, params, latents, timesteps, text_states):
        layer = params["unet"]["layer"]
        text = text_states.mean((1, 2))[:, None, None, None]
        bias = layer["bias"][None, None, None]
        return jnp.tanh(latents @ layer["kernel"] + bias + text)


@pytest.fixture(scope="module")
def toy(wide):
    """It, and the parameters of its UNet."""
    model, draw = wide[0], np.random.default_rng(0)
    kernel = draw.normal(size=(8, 4)).astype(np.float32)
    layer = {"kernel": kernel, "bias": np.zeros(4, np.float32)}
    return Toy(model.configs, model.tokenizer), {"layer": layer}


def one_step(model, trained, batch, **settings):
    tx = optax.sgd(0.1)
    step = functools.partial(
        finetune.train_step,
        model=model,
        tx=tx,
        schedule=optax.constant_schedule(0.1),
        key=KEY,
        drop_rate=0.05,
        **settings,
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state, metrics = jit_fast(step)(create_state(trained, tx, mesh), batch)
    return jax.device_get((state.params, metrics))


def test_micro_batches_train_as_the_whole_batch_does(toy):
    model, unet = toy
    batch = make_batch(12)
    batch["weight"][10:] = 0
    whole = one_step(model, unet, batch)
    parts = one_step(model, unet, batch, accumulate=3)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-4),
        whole,
        parts,
    )


def test_conditions_are_dropped_together_and_alone(wide):
    model, _ = wide
    batch = make_batch(4000)
    noised = jax.jit(functools.partial(finetune.noised, model=model, drop_rate=0.2))
    seen = jax.device_get(noised(batch, KEY))
    no_text = (seen["text_states"] == batch["null_states"]).all((1, 2))
    no_image = (seen["inputs"][..., 4:] == 0).all((1, 2, 3))
    for dropped, rate in (
        (no_text & ~no_image, 0.2),
        (no_image & ~no_text, 0.2),
        (no_text & no_image, 0.2),
    ):
        assert abs(dropped.mean() - rate) < 0.03
    kept, shown = ~no_text, ~no_image
    np.testing.assert_array_equal(seen["text_states"][kept], batch["text_states"][kept])
    source = batch["source_moments"][..., :4]  # the mode, unscaled
    np.testing.assert_array_equal(seen["inputs"][shown][..., 4:], source[shown])


def test_adapters_start_as_the_base_and_train_alone(wide):
    model, params = wide
    batch = make_batch(6)
    adapters = lora.init(
        params["unet"],
        rank=2,
        targets=("to_q",),
        name_of=lora_file.layer_name,
        rng=np.random.default_rng(0),
    )
    after, metrics = one_step(model, adapters, batch | {"base": params["unet"]})
    full = one_step(model, params["unet"], batch)[1]
    np.testing.assert_allclose(metrics["loss"], full["loss"], rtol=1e-5)
    assert metrics["grad_norm"] < full["grad_norm"]
    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), after, adapters)
    assert moved["conv_in"]["b"]  # how it learns to look at the source


def test_the_logged_rate_is_the_one_applied_after_skipped_steps(toy):
    model, unet = toy
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    tx = optax.sgd(schedule)
    settings = {"model": model, "tx": tx, "schedule": schedule, "key": KEY}
    step = jax.jit(functools.partial(finetune.train_step, **settings, drop_rate=0.05))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = create_state(unet, tx, mesh)
    batch = make_batch(6)
    bad = batch | {"text_states": np.full_like(batch["text_states"], np.nan)}
    for given, rate in ((bad, 0.1), (bad, 0.1), (batch, 0.1), (batch, 0.075)):
        before = state
        state, metrics = step(state, given)
        assert float(metrics["learning_rate"]) == pytest.approx(rate)
    moved = jax.tree.map(jnp.subtract, state.params, before.params)
    np.testing.assert_allclose(
        optax.tree.norm(moved), 0.075 * metrics["grad_norm"], rtol=1e-3
    )


def test_min_snr_weights_the_loss_by_timestep(toy):
    model, unet = toy
    batch = make_batch(6)
    plain = one_step(model, unet, batch)[1]["loss"]
    weighted = one_step(model, unet, batch, min_snr=5.0)[1]["loss"]
    tiny_weights = one_step(model, unet, batch, min_snr=1e-12)[1]["loss"]
    assert 0 < weighted < plain
    assert tiny_weights < 1e-6 * plain


def test_a_v_prediction_base_is_trained_on_v(toy):
    model, unet = toy
    scheduler = model.configs["scheduler"] | {"prediction_type": "v_prediction"}
    other = dataclasses.replace(model, configs=model.configs | {"scheduler": scheduler})
    batch = make_batch(6)
    seen = jax.device_get(
        {
            m.prediction_type: jax.jit(
                functools.partial(finetune.noised, model=m, drop_rate=0.0)
            )(batch, KEY)
            for m in (model, other)
        }
    )
    noise, v = seen["epsilon"]["target"], seen["v_prediction"]["target"]
    alphas = model.alphas_cumprod[seen["epsilon"]["timesteps"]][:, None, None, None]
    noisy = seen["epsilon"]["inputs"][..., :4]
    # v = (noise - sigma x_t) / signal, whatever the clean latents were.
    expected = (noise - np.sqrt(1 - alphas) * noisy) / np.sqrt(alphas)
    np.testing.assert_allclose(v, expected, rtol=1e-3, atol=1e-3)
    assert one_step(other, unet, batch)[1]["loss"] > 0


LAST = {"constant": 1e-3, "cosine": 0.0, "multistep": 1e-5}


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("warmup", [0, 1, 4])  # 0 is the default
def test_learning_rates_warm_up_and_stay_or_fall(name, warmup):
    schedule = optim.schedule(
        name, 1e-3, warmup=warmup, steps=20, milestones=(0.5, 0.75)
    )
    rates = [float(schedule(step)) for step in range(21)]
    rising = 1e-3 * np.arange(warmup) / max(warmup, 1)
    np.testing.assert_allclose(rates[: warmup + 1], [*rising, 1e-3], rtol=1e-6)
    assert rates[20] == pytest.approx(LAST[name], abs=1e-9)
    assert all(
        a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False)
    )
    if name == "multistep":
        np.testing.assert_allclose(rates[9::2][:4], [1e-3, 1e-4, 1e-4, 1e-5], rtol=1e-5)


def test_milestones_that_round_to_one_step_all_count():
    made = optim.schedule(
        "multistep", 1.0, warmup=0, steps=4, milestones=(0.5, 0.55, 0.75)
    )
    rates = [float(made(step)) for step in range(4)]
    np.testing.assert_allclose(rates, [1, 1, 1e-2, 1e-3], rtol=1e-5)


def test_the_default_settings_train():
    """By the default schedule, from the first step on."""
    section = common.get_config().finetune
    times = {"warmup": section.warmup, "steps": section.steps}
    rate = optim.schedule(section.schedule, section.learning_rate, **times)
    assert float(rate(0)) == pytest.approx(section.learning_rate)
    assert float(rate(section.steps - 1)) == pytest.approx(section.learning_rate)


def test_samples_show_one_pair_of_each_class_first():
    labels = np.array([0, 0, 1, 2])
    pairs = np.array([[0, 1], [1, 0], [2, 2], [0, 0], [3, 3]])
    chosen = pairs_of_all_classes(pairs, labels, 4)
    np.testing.assert_array_equal(chosen, pairs[[0, 2, 4, 1]])


def test_the_flops_of_stable_diffusion_are_the_published_ones(tiny):
    model, _ = tiny
    unet = {
        "sample_size": 64,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    text = {"hidden_size": 768, "max_position_embeddings": 77}
    configs = model.configs | {"unet": unet, "text_encoder": text}
    model = dataclasses.replace(model, configs=configs)
    forward = finetune.step_flops(model, "full", 64, 64) / 3
    assert forward == pytest.approx(0.803e12, rel=1e-3)
    assert finetune.step_flops(model, "lora", 32, 32) == pytest.approx(
        2 * 0.180e12, rel=2e-3
    )


@pytest.mark.parametrize(("warmup", "good"), [(300, True), (301, False)])
def test_a_warmup_that_does_not_end_is_refused(warmup, good):
    config = common.get_config()
    config.finetune.steps, config.finetune.warmup = 300, warmup
    if good:
        finetune.check(config)
        return
    with pytest.raises(UserError, match=r"warmup: wanted at most .*steps=300, got 301"):
        finetune.check(config)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    diffusers_layout.save(folder, *tiny)
    return folder


def run(base, workdir, *flags):
    command = [
        "train",
        "--config=configs/digits.py",
        f"--workdir={workdir}",
        f"--config.base.path={base}",
        "--config.data.size=8",
        "--config.data.per_class=2",
        f"--config.compilation_cache={CACHE}",
        "--config.data.pool=0",
        "--config.stages=caption,encode,pairs,finetune",
        "--config.finetune.steps=4",
        "--config.finetune.batch_size=6",
        "--config.finetune.sample_every=2",
        "--config.finetune.samples=12",
        "--config.generate.steps=2",
        *flags,
    ]
    return train.main(command)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full")
    assert run(base, workdir) == 0
    return workdir


def test_samples_are_drawn_during_training(finished):
    folder = finished / "finetune" / "samples"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_000002.png", "step_000004.png"]
    image = np.asarray(Image.open(folder / names[0]))
    assert image.shape[2] == 3 and image.std() > 10
    assert list((finished / "tensorboard" / "finetune").iterdir())


def test_a_row_of_metrics_has_loss_speed_and_memory(finished):
    text = (finished / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    row = next(row for row in rows if row["stage"] == "finetune")
    assert {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "skipped",
        "examples_per_s",
        "tflops",
        "memory_gib",
    } <= set(row)


def test_the_card_has_the_steps_taken_and_the_path_of_a_local_base(
    base, finished, wide, tmp_path, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    model, params = wide
    counts = {"step": np.int32(4), "skipped": np.int32(1)}
    state = types.SimpleNamespace(**counts, averaged=params["unet"])
    config = common.get_config()
    monkeypatch.chdir(base.parent)
    config.base.path = base.name  # relative to here, not to the card
    finetune.export(config, epath.Path(tmp_path / "run"), model, params, state)
    card = (tmp_path / "run/finetune/model/README.md").read_text()
    assert "| steps | `3` |" in card and f"| base | `{base}` |" in card


def test_settings_without_influence_on_the_result_may_change(base, finished, capsys):
    assert run(base, finished, "--config.finetune.checkpoint_every=3") == 0
    assert run(base, finished, "--config.finetune.remat=blocks") == 0
    assert run(base, finished, "--config.finetune.learning_rate=0.5") == 2
    assert "finetune.learning_rate: 0.0002 -> 0.5" in capsys.readouterr().err


def test_steps_raised_after_the_end_say_the_way_on(base, finished, capsys):
    assert run(base, finished, "--config.finetune.steps=6") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "finetune.steps: 4 -> 6; the cosine falls to 0 at the last step" in said
    assert "with finetune.schedule=constant" in said and "--redo=finetune" in said


def test_at_a_constant_rate_a_finished_model_trains_on(base, encoded, capsys):
    """And equals the one that was not finished in between."""
    shutil.copytree(encoded, encoded / "whole")
    constant = ("--config.finetune.schedule=constant", "--config.finetune.samples=2")
    assert run(base, encoded, *constant, "--config.finetune.steps=2") == 0
    assert run(base, encoded, *constant, "--config.finetune.steps=4") == 0
    assert run(base, encoded / "whole", *constant) == 0
    name = "finetune/model/unet/diffusion_pytorch_model.safetensors"
    assert (encoded / name).read_bytes() == (encoded / "whole" / name).read_bytes()
    record = files.read_json(encoded / "finetune" / "manifest.json")
    assert record["counts"]["steps"] == 4 and len(record["grew_from"]) == 1
    capsys.readouterr()
    assert run(base, encoded, *constant, "--config.finetune.steps=3") == 2
    assert "finetune.steps: 4 -> 3; steps that were taken stay" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.fixture
def encoded(finished, tmp_path):
    """A workdir whose next stage is `finetune`."""
    for name in ("caption", "encode", "pairs"):
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path


def test_adapters_are_written_beside_the_merged_pipeline(base, encoded):
    assert run(base, encoded, "--config.finetune.mode=lora") == 0
    folder = encoded / "finetune"
    assert (folder / "lora" / lora_file.FILE).exists()
    model, merged = diffusers_layout.load(folder / "model", ("unet",))
    assert model.conditioned
    _, start = diffusers_layout.load(base, ("unet",))
    kernel = merged["unet"]["conv_in"]["kernel"]
    assert np.abs(kernel[:, :, 4:]).max() > 0
    np.testing.assert_array_equal(
        merged["unet"]["conv_out"]["kernel"], start["unet"]["conv_out"]["kernel"]
    )


def test_too_little_memory_is_an_error_before_the_first_step(base, encoded, capsys):
    flags = ("--config.finetune.memory_gib=0.0001", "--config.finetune.batch_size=9")
    assert run(base, encoded, *flags) == 2
    error = capsys.readouterr().err
    assert "config.finetune.batch_size (9)" in error
    assert "mode=lora (full)" in error
    assert not (encoded / "finetune" / "samples").exists()
    # Another fix may be tried in the same workdir.
    assert run(base, encoded) == 0


def test_a_lack_of_memory_is_answered_with_what_would_fit():
    gib = 2**30
    full = {"mode": "full", "batch_size": 50, "accumulate": 1}
    words = finetune.what_fits(9 * gib, 53 * gib, 37 * gib, remat="none", **full)
    # 3 GiB of gradients, 25 for activations of which 50 examples take 50.
    assert "remat=blocks" in words and "remat=full" in words
    assert "accumulate=2, batch_size=25" in words
    words = finetune.what_fits(9 * gib, 53 * gib, 37 * gib, remat="full", **full)
    assert "remat" not in words and "accumulate=2" in words
    # The frozen base takes 1.5 GiB in bfloat16, the activations 11.
    words = finetune.what_fits(9 * gib, 53 * gib, 13 * gib, remat="none", **full)
    assert words.endswith("mode=lora with remat=blocks (12.5 GiB).")
    words = finetune.what_fits(9 * gib, 53 * gib, 12 * gib, remat="none", **full)
    assert "state and gradients alone do not fit" in words
    words = finetune.what_fits(9 * gib, 53 * gib, 52 * gib, remat="none", **full)
    assert words.endswith("mode=lora (41.5 GiB).")
    words = finetune.what_fits(9 * gib, 53 * gib, 2 * gib, remat="none", **full)
    assert words == "Its state and gradients alone do not fit."
    lora = {**full, "mode": "lora", "batch_size": 1}
    assert "None of these" in finetune.what_fits(
        2 * gib, 30 * gib, 3 * gib, remat="none", **lora
    )


def spoiled(base, folder, value):
    """A copy of a base in which one weight of the UNet has this value."""
    model, params = diffusers_layout.load(base)
    unet = jax.tree.map(np.array, params["unet"])
    unet["conv_in"]["kernel"][0, 0, 0, 0] = value
    with mock.patch.object(tensor_file, "_require_finite"):
        diffusers_layout.save(folder, model, {**params, "unet": unet})
    return folder


def test_a_base_that_is_not_finite_is_refused_before_anything_is_encoded(
    base, tmp_path, capsys
):
    assert run(spoiled(base, tmp_path / "base", np.nan), tmp_path / "run") == 2
    assert (
        "unet/diffusion_pytorch_model.safetensors: conv_in.weight: wanted finite"
        in (capsys.readouterr().err)
    )
    assert not list((tmp_path / "run" / "encode").glob("*/*.npy"))


def test_a_base_whose_every_step_is_skipped_exports_nothing(base, tmp_path, capsys):
    folder = spoiled(base, tmp_path / "base", 3e38)  # finite, but no loss is
    flags = ("--config.finetune.max_skipped=100", "--config.finetune.sample_every=0")
    for _ in range(2):
        assert run(folder, tmp_path / "run", *flags) == 2
        assert "4 consecutive steps without" in capsys.readouterr().err
        assert not (tmp_path / "run" / "finetune" / "model").exists()


def test_an_unknown_target_of_adapters_is_refused_before_captioning(base, tmp_path):
    config = common.get_config()
    config.base.path, config.finetune.mode = str(base), "lora"
    finetune.check(config)
    config.finetune.lora.targets = ("to_x",)
    with pytest.raises(UserError, match=r"to_x.*to_out\.0"):
        finetune.check(config)


def test_an_unknown_target_of_adapters_is_refused_with_the_known_ones(
    base, encoded, capsys
):
    flags = ("--config.finetune.mode=lora", "--config.finetune.lora.targets=to_x")
    assert run(base, encoded, *flags) == 2
    assert "to_out.0" in capsys.readouterr().err
