"""Stable Diffusion XL: what is refused, and the digits from end to end."""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import sd_families
import sd_parity
from base_folders import edit, error_of
from etils import epath

from mvc_jax import finetune, train
from mvc_jax.checkpoints import diffusers_layout, families, family, lora_file
from mvc_jax.command import run_config
from mvc_jax.data import cache, decode, time_ids
from mvc_jax.diffusion import guidance
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.mixing import operations
from mvc_jax.models import lora
from mvc_jax.pipeline import InstructPix2Pix
from mvc_jax.stage import read_manifest
from mvc_jax.training import loop, rng, runtime, sharding

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = {  # what every stage does, but little of it
    "data.size": 8,
    "data.pool": 40,
    "data.per_class": 2,
    "data.test_fraction": 0.05,
    "pretrain.context_length": 32,
    "pretrain.text.width": 16,
    "pretrain.text.layers": 1,
    "pretrain.unet.channels": (64,),  # a group of one channel would lose the timestep
    "pretrain.vae.channels": (4, 4),
    "pretrain.vae.groups": 2,
    "pretrain.vae.steps": 2,
    "pretrain.unet.steps": 3,
    "pretrain.unet.warmup": 1,
    "finetune.steps": 2,
    "finetune.batch_size": 8,
    "finetune.mode": "lora",  # all weights: test_sharded_recomputed_micro_batches
    "finetune.ema_decay": 0.9,
    "finetune.samples": 1,
    "mix.per_image": 2,
    "mix.pooled": "partner",
    "generate.sets": ("mixed", "unmixed"),
    "generate.steps": 4,
    "classify.runs": ("real", "combined"),
    "classify.seeds": 1,
    "classify.steps": 2,
    "classify.width": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("xl") / "base"
    diffusers_layout.save(made, *sd_families.checkpoint("sdxl"))
    return made


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "base")


def _index(**fields):
    return lambda folder: edit(folder / "model_index.json", **fields)


def _scheduler(**fields):
    file = "scheduler/scheduler_config.json"
    return lambda folder: edit(folder / file, **fields)


def _option(part, **fields):
    return lambda folder: edit(folder / part / "config.json", **fields)


def _without(part):
    def damage(folder):
        for path in sorted((folder / part).iterdir()):
            path.unlink()
        (folder / part).rmdir()

    return damage


REFUSED = {
    "refiner": (_index(requires_aesthetics_score=True), "got its refiner, which has"),
    "no first encoder": (_index(text_encoder=[None, None]), "got its refiner"),
    "refiner's UNet": (
        _option("unet", projection_class_embeddings_input_dim=5 * 8 + 40),
        "projection_class_embeddings_input_dim of 88.*got 80, as the refiner has",
    ),
    "turbo": (
        _scheduler(
            _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing"
        ),
        "distilled to a few steps.*Turbo",
    ),
    "lcm": (_scheduler(_class_name="LCMScheduler"), "distilled to a few steps"),
    "cosxl": (_index(is_cosxl_edit=True), "a CosXL, whose noise"),
    "no second tokenizer": (
        _without("tokenizer_2"),
        "1 missing: tokenizer_2/vocab.json and merges.txt",
    ),
    "no second encoder": (_without("text_encoder_2"), "text_encoder_2/config.json"),
    "first of both": (
        _index(text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is a CLIPTextModel, not a CLIPTextModelWithProjection",
    ),
    "width": (_option("unet", cross_attention_dim=48), "a text width of 48.*got 80"),
    "embedding": (_option("unet", addition_embed_type=None), "is None, not 'text_time"),
    "dims": (_option("unet", addition_time_embed_dim=None), "addition_time_embed_dim"),
    "lengths": (
        _option("text_encoder_2", max_position_embeddings=64),
        "model_max_length of 64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_base_of_xl_is_refused_by_name(copied, case):
    damage, message = REFUSED[case]
    damage(copied)
    with pytest.raises(UserError, match=message):
        error = error_of(copied)
        raise error


def test_parts_of_another_family_are_refused(copied, tmp_path):
    edit(copied / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(UserError, match="addition_embed_type is 'text_time', not None"):
        raise error_of(copied)


def test_adapters_of_another_family_are_no_base(tmp_path):
    """Adapters are merged by diffusers first, which refuses those of SD 1.x on XL."""
    safetensors.numpy.save_file(
        {"unet.a.lora_A.weight": np.zeros((1, 1), np.float32)},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    with pytest.raises(UserError, match="LoRA adapters.*load_lora_weights"):
        diffusers_layout.load(tmp_path)


def test_sizes_that_cannot_be_halved_are_refused():
    model, _ = sd_families.checkpoint("sdxl")
    families.check_size(model.configs, 64)
    with pytest.raises(UserError, match="a multiple of 32.*got 100.*96 or 128"):
        families.check_size(model.configs, 100)


# What the published files say beside the sizes of `benchmarks/architectures.py`.
PUBLISHED = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type_num_heads": 64,
        "in_channels": 4,
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
        "resnet_out_scale_factor": 1.0,
        "upcast_attention": None,
    },
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu"},
    "text_encoder": {"model_type": "clip_text_model", "eos_token_id": 2},
    "text_encoder_2": {"model_type": "clip_text_model", "eos_token_id": 2},
    "scheduler": sd_families.SCHEDULERS["sdxl"],
}
FP16_FIX = {"force_upcast": False, "latents_mean": None, "latents_std": None}


@pytest.mark.parametrize("vae", [{}, FP16_FIX])
def test_the_published_architecture_is_accepted(monkeypatch, vae):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import architectures

    configs = {
        "unet": architectures.UNETS["sdxl"],
        "vae": architectures.VAES["sdxl"] | vae,
        "text_encoder": architectures.TEXTS["sdxl"],
        "text_encoder_2": architectures.SECOND_TEXTS["sdxl"],
        "scheduler": {},
    }
    configs = {name: config | PUBLISHED[name] for name, config in configs.items()}
    for name, config in configs.items():
        families.check_config(name, families.completed(name, config), name, family.XL)
    sizes = dict.fromkeys(family.XL.tokenizers, (49408, 77))
    families.check_fit(configs, tokenizers=sizes, folder="xl")
    families.check_size(configs, 1024)


@pytest.mark.parametrize("resize", decode.RESIZING)
def test_time_ids_say_how_the_decoder_cropped(resize):
    """The crop, drawn back into the image before it, is where its pixels are from."""
    height, width, size = 40, 100, 20
    columns = np.broadcast_to(np.arange(width, dtype=np.uint8), (height, width))
    image = np.stack([columns] * 3, axis=-1).copy()
    row = {"height": height, "width": width}
    ids = time_ids.time_ids([row], size, resize=resize)[0]
    assert ids[[0, 1, 4, 5]].tolist() == [height, width, size, size]
    fitted = decode.fit(image, size, resize=resize)
    scale = size / min(height, width) if resize == "crop" else 1.0
    first = int(fitted[size // 2, 0, 0])
    if resize == "crop":
        assert abs(ids[3] / scale - first) <= 2 and ids[2] == 0
    else:
        assert ids[2:4].tolist() == [0, 0] and first <= 3


def test_null_states_leave_the_sizes_of_the_image():
    given = {"states": np.ones((2, 3, 4)), "pooled": np.ones((2, 5))}
    given["time_ids"] = np.arange(12.0).reshape(2, 6)
    null = {"states": np.zeros((3, 4)), "pooled": np.zeros(5)}
    found = guidance.without_text(given, null)
    np.testing.assert_array_equal(found["time_ids"], given["time_ids"])
    assert not found["states"].any() and found["pooled"].shape == (2, 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the digits config of the family, shortened: its workdir and config."""
    workdir = tmp_path_factory.mktemp("xl") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "set_up", lambda _: None)
        patch.chdir(ROOT)
        settings = [f"--config.{name}={value}" for name, value in SHORT.items()]
        config = "--config=configs/digits.py:family=sdxl"
        assert not train.main(["train", config, f"--workdir={workdir}", *settings])
    return workdir, run_config.load(str(workdir / "config.json"))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_stage_of_the_digits_ends(whole):
    workdir, _ = whole
    for name in train.STAGES:
        assert read_manifest(workdir, name)["stage"] == name


def test_the_cache_has_what_a_step_needs_and_its_price_says_so(whole):
    workdir, config = whole
    opened = cache.open_cache(workdir / "encode")
    model, params = diffusers_layout.load(workdir / "pretrain" / "model")
    assert opened.text_states.shape[1:] == (32, 2 * 16) and opened.pooled.shape[1] == 16
    prompts = [row["prompt"] for row in opened.rows]
    found = jax.jit(model.conditions)(params, model.tokenize(["", *prompts]))
    rows = np.arange(len(prompts))
    conditions = opened.conditions_of(rows)
    for name in ("states", "pooled"):
        np.testing.assert_allclose(conditions[name], found[name][1:], atol=1e-5)
        assert not np.any(opened.null_states[name]) and not np.any(found[name][0])
    assert conditions["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]] * len(prompts)
    encode = importlib.import_module("mvc_jax.encode")
    base = encode.base_of(config, epath.Path(workdir))
    held = 4 * (32 * 32 + 16) * len(opened.text_states)
    assert base.text_numbers() * 4 * len(opened.text_states) == held
    stored = sum(
        path.stat().st_size
        for name in ("text_states", "pooled")
        for path in (workdir / "encode" / name).glob("*.npy")
    )
    assert 0 <= stored - held < 4096  # headers


def test_recipes_say_what_becomes_of_the_pooled_embedding(whole):
    workdir, config = whole
    rows = read(workdir / "mix" / "recipes.jsonl")
    assert {row["pooled"] for row in rows} == {"partner"}
    shard = workdir / "generate" / "mixed" / "data" / "train-00000.parquet"
    drawn = pq.read_table(shard, columns=["pooled"])["pooled"]
    assert drawn.to_pylist() == [row["pooled"] for row in rows]
    dims = {dim for row in rows for line in row["dims"] for dim in line}
    assert max(dims) >= 16  # of the second encoder, too


def test_the_card_loads_the_class_of_xl_and_says_the_sizes(whole):
    workdir, _ = whole
    card = (workdir / "finetune" / "model" / "README.md").read_text()
    assert "# Stable Diffusion XL fine-tuned on" in card
    assert "StableDiffusionXLInstructPix2PixPipeline.from_pretrained" in card
    assert "original_size=Image.open" in card and "height=8," in card


def test_the_pipeline_draws_the_images_of_the_recipes(whole):
    workdir, config = whole
    recipes = read(workdir / "mix" / "recipes.jsonl")
    rows = {row["id"]: row for row in read(workdir / "encode" / "prompts.jsonl")}
    images = np.load(workdir / "caption" / "images.npy")
    places = read(workdir / "caption" / "images.jsonl")
    place = {row["id"]: i for i, row in enumerate(places)}
    chosen = [recipes[0], recipes[-1]]  # coarse, fine
    pipeline = InstructPix2Pix.from_pretrained(workdir / "finetune" / "model")
    drawn = pipeline.sample(
        np.stack([images[place[row["source"]]] for row in chosen]),
        [rows[row["source"]]["prompt"] for row in chosen],
        partners=[[rows[id_]["prompt"] for id_ in row["partners"]] for row in chosen],
        recipe=chosen,
        key=rng.purpose_key(config.seed, "noise"),
        steps=config.generate.steps,
        text_scale=config.generate.text_scale,
        image_scale=config.generate.image_scale,
        grey=True,
    )
    table = synthetic.read_rows(workdir / "generate" / "mixed", ["index", "image"])
    made = {row["index"]: row["image"] for row in table}
    for image, row in zip(drawn, chosen, strict=True):
        difference = np.abs(image.astype(int) - made[row["index"]].astype(int))
        assert difference.max() <= 1
    with pytest.raises(UserError, match="six numbers for each of the 2 images"):
        pipeline.sample(
            images[:2], ["a", "b"], key=jax.random.key(0), time_ids=np.zeros((2, 4))
        )


def test_adapters_are_loaded_by_pytorch(torch, tmp_path):
    import diffusers

    model, params = sd_families.fine_tuned("sdxl")
    diffusers_layout.save(tmp_path / "model", model, params)
    adapters = lora.init(
        params["unet"],
        rank=2,
        name_of=lora_file.layer_name,
        rng=np.random.default_rng(0),
    )
    for name, pair in adapters.items():
        pair["b"] = 0.1 * sd_families.normal(name, *pair["b"].shape)
    lora_file.write(tmp_path / "lora", adapters)
    pipeline = diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
        tmp_path / "model"
    )
    latents, timesteps, conditions = sd_parity.unet_inputs(model, "sdxl")
    tensors = jax.tree.map(sd_parity._tensor, (latents, timesteps, conditions))
    with torch.no_grad():
        arguments = (*tensors[:2],)
        named = sd_parity._named(tensors[2])
        before = sd_parity._array(pipeline.unet(*arguments, **named).sample)
        pipeline.load_lora_weights(tmp_path / "lora")
        theirs = sd_parity._array(pipeline.unet(*arguments, **named).sample)
    trees = {"unet": params["unet"], "lora": adapters}
    ours = sd_parity.jit_fast(model.denoise)(trees, latents, timesteps, conditions)
    assert np.abs(theirs - before).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def _step(model, unet, opened, shape, **options):
    """Loss and parameters after a step of 16 pairs on a mesh."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    tx, shardings = optax.sgd(0.01), sharding.tree_shardings(unet, mesh)
    model = model.with_compute_options(mesh=mesh, remat=options.pop("remat", "none"))
    model = dataclasses.replace(
        model,
        batch_sharding=sharding.batch_sharding(mesh),
        weight_shardings=shardings,
    )
    accumulate = options.get("accumulate", 1)
    step = functools.partial(
        finetune.train_step,
        model=model,
        tx=tx,
        schedule=optax.constant_schedule(0.01),
        key=rng.purpose_key(0, "finetune"),
        drop_rate=0.1,
        shardings=shardings,
        **options,
    )
    pairs = np.stack([np.arange(len(opened.rows))] * 2, axis=1).astype(np.int32)
    batch = cache.read_pairs(opened, pairs, 0, seed=0, batch_size=16)
    state = loop.create_state(unet, tx, mesh)
    null = {"null_states": opened.null_states}
    null = sharding.place(null, sharding.replicated(mesh))
    state, metrics = loop.jit_step(step, state)(
        state, null, loop.place_batch(batch, mesh, accumulate)
    )
    return float(metrics["loss"]), jax.device_get(state.params)


def test_sharded_recomputed_micro_batches_train_as_one_device(whole):
    """FSDP over four devices, two groups of them, remat, two micro-batches."""
    workdir, _ = whole
    opened = cache.open_cache(workdir / "encode")
    model, params = diffusers_layout.load(workdir / "pretrain" / "model", ("unet",))
    model, params = model.widened(params)
    loss, one = _step(model, params["unet"], opened, (1, 1))
    other_loss, other = _step(
        model, params["unet"], opened, (2, 4), remat="blocks", accumulate=2
    )
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, params["unet"])
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    assert moved["add_embedding"]["linear_1"]["kernel"] > 0  # pooled and sizes
    assert max(jax.tree.leaves(apart)) < 0.01 * max(jax.tree.leaves(moved))


@pytest.mark.parametrize("choice", ["source", "mixed", "partner"])
def test_the_pooled_embedding_is_what_the_field_says(choice):
    own, partners = np.ones(3, np.float32), np.full((2, 3), 5, np.float32)
    expected = {"source": 1, "mixed": 3, "partner": 5}[choice]
    mixed = operations.mix_pooled(own, partners, choice)
    np.testing.assert_array_equal(mixed, np.full(3, expected))


def test_a_workdir_of_another_family_is_not_continued(whole, monkeypatch, capsys):
    workdir, _ = whole
    monkeypatch.setattr(runtime, "set_up", lambda _: None)
    monkeypatch.chdir(ROOT)
    settings = [f"--config.{name}={value}" for name, value in SHORT.items()]
    settings += ["--config.mix.pooled=source", "--config=configs/digits.py"]
    assert train.main(["train", f"--workdir={workdir}", *settings]) == 2
    assert "pretrain.family: 'sdxl' -> 'sd'" in capsys.readouterr().err
