"""Base models: every family as PyTorch writes it; errors for everything else."""

import inspect
import json
import os
import re
import shutil
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import stores
from base_folders import (
    TEXT,
    UNET,
    VAE,
    cast,
    config_of,
    edit,
    error_of,
    find_base,
    full_text,
    matching,
    to_variant,
)
from jax.extend.core import jaxprs_in_params

from mvc_jax import encode, files, store_client
from mvc_jax.checkpoints import (
    diffusers_layout,
    families,
    family,
    pipeline_folder,
    weights,
)
from mvc_jax.errors import UserError
from mvc_jax.models.flax_classes import FlaxAutoencoderKL, FlaxUNet2DConditionModel

# Checkpoints as PyTorch writes them.


def torch_pipeline(torch, family, tokenizer):
    """A small random pipeline of PyTorch's own classes."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    second, edits = family == "2.x", family == "instruct"
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=8 if edits else 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24 if second else 16,
        attention_head_dim=(2, 4) if second else 2,
        use_linear_projection=second,
        upcast_attention=second,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24 if second else 16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            hidden_act="gelu" if second else "quick_gelu",
        )
    )
    options = {"beta_start": 0.00085, "beta_end": 0.012}
    options |= {"beta_schedule": "scaled_linear", "steps_offset": 1}
    if second:
        options |= {"prediction_type": "v_prediction", "clip_sample": False}
    scheduler = diffusers.EulerAncestralDiscreteScheduler if edits else None
    scheduler = scheduler or (
        diffusers.DDIMScheduler if second else diffusers.PNDMScheduler
    )
    class_ = diffusers.StableDiffusionPipeline
    if edits:
        class_ = diffusers.StableDiffusionInstructPix2PixPipeline
    return class_(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def pipelines(torch, tiny):
    with warnings.catch_warnings():  # PyTorch's scheduler hands NumPy its tensors
        warnings.filterwarnings("ignore", "__array__ implementation")
        return {
            family: torch_pipeline(torch, family, tiny[0].tokenizer)
            for family in ("1.x", "2.x", "instruct")
        }


def assert_same_weights(params, pipeline, dtype=np.float32):
    for part, tree in params.items():
        state = getattr(pipeline, part).state_dict()
        leaves = flax.traverse_util.flatten_dict(tree)
        names = {weights.torch_name(key): key for key in leaves}
        assert names.keys() == {n for n in state if "position_ids" not in n}
        for name, key in names.items():
            leaf = leaves[key]
            assert leaf.dtype == (np.float32 if key[-1] == "embedding" else dtype)
            if key[-1] == "kernel":
                leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
            wanted = state[name].float().numpy().astype(dtype)
            np.testing.assert_array_equal(leaf, wanted)


@pytest.mark.parametrize("family", ["1.x", "2.x", "instruct"])
def test_families_as_pytorch_saves_them(pipelines, family, tmp_path):
    pipelines[family].save_pretrained(tmp_path)
    diffusers_layout.check_base(tmp_path, size=8)
    model, params = diffusers_layout.load(tmp_path)
    assert_same_weights(params, pipelines[family])
    assert model.prediction_type == ("v_prediction" if family == "2.x" else "epsilon")
    assert model.conditioned == (family == "instruct")
    wide, widened = model.widened(params)
    assert wide.conditioned
    if family == "instruct":
        assert wide is model and widened is params
    else:
        kernel = widened["unet"]["conv_in"]["kernel"]
        assert kernel.shape[2] == 8 and not kernel[:, :, 4:].any()


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [False, True])
def test_variants_and_shards_as_pytorch_saves_them(
    pipelines, torch, variant, shards, tmp_path
):
    """In fp16, at most 60 kB a file; the names are the libraries' own."""
    pipeline = pipelines["1.x"]
    options = {"variant": variant} | ({"max_shard_size": "60KB"} if shards else {})
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipeline, part).half()
    try:
        pipeline.save_pretrained(tmp_path, **options)
    finally:
        halves = {p: getattr(pipeline, p) for p in ("unet", "vae", "text_encoder")}
        for module in halves.values():
            module.float()
    assert bool(list(tmp_path.rglob("*-00002-of-*.safetensors"))) == shards
    assert bool(list(tmp_path.rglob("*.index*.json"))) == shards
    params = diffusers_layout.load(tmp_path, variant=variant or "")[1]
    assert_same_weights(params, pipeline, np.float16)
    count = len(pipeline_folder.weight_files(tmp_path, "unet", variant or ""))
    assert (count > 1) == shards
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    asked = matching(written, pipeline_folder.download_patterns(variant or ""))
    assert asked == written


def test_a_pickle_is_refused_with_a_command_that_works(
    pipelines, tmp_path, monkeypatch
):
    pipelines["1.x"].save_pretrained(tmp_path / "old", safe_serialization=False)
    error = error_of(tmp_path / "old")
    assert "there is diffusion_pytorch_model.bin" in full_text(error)
    assert "text_encoder/model.safetensors (there is pytorch_model.bin)" in full_text(
        error
    )
    assert "Pickles are never opened" in str(error)
    command = str(error).split("python -c ")[1].split('"')[1]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        exec(command, {})
    target = str(error).split("config.base.path=")[1].rstrip(".")
    params = diffusers_layout.load(tmp_path / target)[1]
    assert_same_weights(params, pipelines["1.x"])


def test_every_option_of_pytorch_is_followed_or_refused(torch):
    """A parameter of the PyTorch classes that is new here must be looked at."""
    import diffusers

    harmless = {
        "unet": {  # precision alone, or read where a refused option is set
            "upcast_attention",
            "addition_time_embed_dim",
            "addition_embed_type_num_heads",
            "projection_class_embeddings_input_dim",
        },
        "vae": {"force_upcast"},
    }
    for part, torch_class, flax_class in (
        ("unet", diffusers.UNet2DConditionModel, FlaxUNet2DConditionModel),
        ("vae", diffusers.AutoencoderKL, FlaxAutoencoderKL),
    ):
        theirs = inspect.signature(torch_class.__init__).parameters
        ours = inspect.signature(flax_class).parameters
        for option, parameter in theirs.items():
            if option == "self" or option in harmless[part]:
                continue
            assert option in families.FIXED[part] or option in ours, option
            default = parameter.default
            if option in families.FIXED[part]:
                if part == "vae" and option in ("in_channels", "out_channels"):
                    assert default == 3
                assert families.FIXED[part][option][0] == default, option
            elif option != "sample_size":
                assert ours[option].default == default, option
            if option in families.DEFAULTS[part]:
                value = families.DEFAULTS[part][option]
                value = tuple(value) if isinstance(value, list) else value
                assert value == default, option


# Precisions.


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stays_half_and_computes_as_fp32(saved, tiny, dtype):
    to_variant(saved, "half", dtype)
    model, params = diffusers_layout.load(saved, variant="half")
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), tiny[1])
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    table = params["text_encoder"]["text_model"]["embeddings"]
    tables = sum(leaf.nbytes for leaf in jax.tree.leaves(table))
    full = sum(leaf.nbytes for leaf in jax.tree.leaves(rounded))
    assert stored == (full + tables) // 2
    of = jnp.zeros
    for compute in (
        lambda params: model.text_states(params, of((1, 12), jnp.int32)),
        lambda params: model.moments(params, of((1, 8, 8, 3))),
        lambda params: model.decode(params, of((1, 2, 2, 4))),
        lambda params: model.denoise(
            params, of((1, 2, 2, 4)), of(1, jnp.int32), of((1, 12, 16))
        ),
    ):
        traced = jax.make_jaxpr(compute)(params)
        assert [x.dtype for x in traced.out_avals] == [jnp.float32]
        readers = {name for name in half_readers(traced.jaxpr, dtype)}
        assert "convert_element_type" in readers
        assert readers <= {"convert_element_type", "reshape", "broadcast_in_dim"}


def half_readers(jaxpr, dtype):
    """The primitives that read a half-precision value, of a whole computation."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        for part in inner:
            yield from half_readers(part, dtype)
        if not inner and any(x.aval.dtype == dtype for x in equation.invars):
            yield equation.primitive.name


def test_precisions_that_differ_between_components_are_logged(saved, caplog):
    cast(saved / UNET, np.float16)
    with caplog.at_level("INFO"):
        diffusers_layout.load(saved)
    (line,) = [r.getMessage() for r in caplog.records if "precisions" in r.getMessage()]
    assert "unet float16, vae float32, text_encoder float32" in line


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_mixed_precision_within_a_component_is_refused(saved, dtype):
    tensors = safetensors.numpy.load_file(saved / UNET)
    tensors["conv_in.bias"] = tensors["conv_in.bias"].astype(dtype)
    safetensors.numpy.save_file(tensors, saved / UNET)
    assert "conv_in.bias is" in full_text(error_of(saved))


# Folders of another kind.


def _without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def _option(part, **fields):
    file = "scheduler/scheduler_config.json" if part == "scheduler" else None
    return lambda folder: edit(folder / (file or f"{part}/config.json"), **fields)


def _pipeline(name):
    return lambda folder: edit(folder / "model_index.json", _class_name=name)


def _alone(**config):
    def damage(folder):
        shutil.rmtree(folder)
        files.write_json(folder / "config.json", config)

    return damage


def _class(component, name):
    index = {component: ["transformers", name]}
    return lambda folder: edit(folder / "model_index.json", **index)


def _tensors(file, change):
    def damage(folder):
        tensors = safetensors.numpy.load_file(folder / file)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / file)

    return damage


def _only(name):
    def damage(folder):
        shutil.rmtree(folder)
        files.write_bytes(folder / name, b"")

    return damage


def _write(name, content):
    return lambda folder: (folder / name).write_text(content)


DAMAGED_FOLDERS = {
    "xl": (
        _pipeline("StableDiffusionXLPipeline"),
        "3 missing: text_encoder_2/config.json; tokenizer_2/vocab.json",
    ),
    "3": (_pipeline("StableDiffusion3Pipeline"), "got StableDiffusion3Pipeline"),
    "flux": (_pipeline("FluxPipeline"), "got FluxPipeline"),
    "inpaint": (_pipeline("StableDiffusionInpaintPipeline"), "InpaintPipeline"),
    "no class": (_pipeline(None), "got None"),
    "projection": (
        _class("text_encoder", "CLIPTextModelWithProjection"),
        "text_encoder is a CLIPTextModelWithProjection, not a CLIPTextModel",
    ),
    "projection's tensors": (
        _tensors(
            TEXT, lambda x: x.update({"text_projection.weight": np.eye(16, dtype="f4")})
        ),
        "text_encoder/.* text_projection.weight is unexpected",
    ),
    "tiny VAE": (_class("vae", "AutoencoderTiny"), "vae is a AutoencoderTiny"),
    "class": (lambda x: edit(x / "model_index.json", unet=None), "unet is a None"),
    "tensor": (
        _tensors(UNET, lambda tensors: tensors.pop("conv_out.bias")),
        "unet/.* conv_out.bias is missing",
    ),
    "shape": (
        _tensors(UNET, lambda x: x.update({"conv_in.bias": np.zeros(4, "f4")})),
        r"unet/.* conv_in.bias has shape \[4\], not \[32\]",
    ),
    "activation": (_option("text_encoder", hidden_act="none"), "cannot be built"),
    "no network": (_option("unet", block_out_channels=[33]), "cannot be built"),
    "sides": (_option("unet", sample_size=[8]), r"sample_size is \[8\], not"),
    "side": (_option("vae", sample_size=None), "sample_size is None, not"),
    "inpainting UNet": (_option("unet", in_channels=9), "got 9, as an inpainting"),
    "depth": (_option("unet", in_channels=5), "got 5, as an inpainting, depth"),
    "out": (_option("unet", out_channels=8), "4 output channels"),
    "latents": (_option("vae", latent_channels=16), "16 output channels"),
    "llm": (
        _alone(architectures=["LlamaForCausalLM"], model_type="llama"),
        "one model, LlamaForCausalLM, and no pipeline",
    ),
    "controlnet": (_alone(_class_name="ControlNetModel"), "one model, ControlNetModel"),
    "unet alone": (_alone(_class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
    "lora": (_only("pytorch_lora_weights.safetensors"), "LoRA adapters"),
    "ckpt": (
        _only("sd.ckpt"),
        r"single files \(sd.ckpt\).*from_single_file\('.*sd.ckpt",
    ),
    "outer": (
        lambda folder: (
            shutil.move(shutil.move(folder, f"{folder}-inner"), f"{folder}/inner")
            if folder.mkdir is None
            else _nest(folder)
        ),
        "around inner. Use .*/inner",
    ),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "an empty one"),
    "gone": (shutil.rmtree, "no such folder"),
    "file": (_write("model_index.json", "{"), "model_index.json.*bad JSON"),
    "index": (_write("model_index.json", "[]"), "model_index.json.*not an object"),
    "config": (_write("unet/config.json", "nonsense"), "unet/config.json.*bad JSON"),
    "tokenizer": (_write("tokenizer/vocab.json", "{"), "tokenizer: wanted .* damaged"),
    "half": (_without(VAE, TEXT), "2 missing.*Download the whole checkpoint again"),
    "small files": (
        _without("tokenizer/merges.txt", "scheduler/scheduler_config.json"),
        "2 missing: scheduler/scheduler_config.json; tokenizer/merges.txt .or token",
    ),
    "cut": (
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9]),
        "half-downloaded",
    ),
    "lfs": (_write(UNET, "version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "width": (_option("unet", cross_attention_dim=17), "a text width of 17"),
    "words": (_option("text_encoder", vocab_size=9), r"at most 9 tokens.* got \d+"),
    "length": (
        _option("text_encoder", max_position_embeddings=77),
        "model_max_length of 77.* got 12",
    ),
    "flow": (
        lambda folder: files.write_json(
            folder / "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        ),
        "FlowMatchEulerDiscreteScheduler has no beta_start",
    ),
}
OPTIONS = {
    "unet": {
        "class_embed_type": "projection",
        "addition_embed_type": "text_time",
        "encoder_hid_dim": 8,
        "dual_cross_attention": True,
        "time_cond_proj_dim": 256,
        "mid_block_type": None,
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
        "norm_eps": 1e-6,
        "norm_num_groups": 16,
        "only_cross_attention": [True],
        "num_class_embeds": 1000,
        "in_channels": "four",
        "layers_per_block": [2],
        "cross_attention_dim": None,
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "_class_name": "UNet2DModel",
    },
    "vae": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1,
        "mid_block_add_attention": False,
        "act_fn": "relu",
        "down_block_types": ["AttnDownEncoderBlock2D"] * 3,
        "block_out_channels": [4, 4],
        "in_channels": 1,
        "_class_name": "AutoencoderTiny",
    },
    "text_encoder": {"use_attention_mask": True, "model_type": "t5", "hidden_size": 0},
    "scheduler": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "sample",
        "beta_schedule": "sigmoid",
    },
}


def _nest(folder):
    shutil.copytree(folder, folder.parent / "copy")
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.move(folder.parent / "copy", folder / "inner")


@pytest.mark.parametrize("case", DAMAGED_FOLDERS)
def test_another_kind_of_folder_is_an_error_that_names_it(saved, case):
    diffusers_layout.check_base(saved)
    damage, message = DAMAGED_FOLDERS[case]
    damage(saved)
    error = error_of(saved)
    assert str(saved) in error.name
    assert re.search(message, str(error)), str(error)


@pytest.mark.parametrize(
    ("part", "option"), [(part, name) for part in OPTIONS for name in OPTIONS[part]]
)
def test_options_that_flax_would_ignore_are_refused_with_their_value(
    saved, part, option
):
    value = OPTIONS[part][option]
    _option(part, **{option: value})(saved)
    error = error_of(saved)
    assert error.name.startswith(f"{saved}/{part}/")
    assert option in str(error)
    if isinstance(value, list):  # an item, or the number of them
        assert f"{value[0]}" in str(error) or f"{len(value)} blocks" in str(error)
    else:
        assert repr(value) in str(error)


@pytest.mark.parametrize(
    ("part", "option", "value", "words"),
    [
        *(
            ("vae", "scaling_factor", value, f"is {value!r}, not a number above 0")
            for value in (None, "0.18", 0, -1.0, True, float("nan"), float("inf"))
        ),
        *(
            ("scheduler", option, value, f"is {value!r}, not a number between 0 and 1")
            for option in ("beta_start", "beta_end")
            for value in ("x", None, -1, 0, 1.5)
        ),
        ("scheduler", "trained_betas", [0.1], "has 1 values, not 1000 numbers"),
        ("scheduler", "trained_betas", ["x"] * 1000, "has 1000 values, not 1000"),
        ("scheduler", "trained_betas", "x", "has 'x', not 1000 numbers"),
        ("unet", "attention_head_dim", 0, "is 0, not a whole number above 0"),
        ("unet", "attention_head_dim", None, "is None, not a whole number"),
        ("unet", "attention_head_dim", [2, 2], "one for each of 1 blocks"),
        ("unet", "attention_head_dim", ["2"], "one for each of 1 blocks"),
        ("unet", "transformer_layers_per_block", [1, 1], "one for each of 1 blocks"),
    ],
)
def test_numbers_that_would_fail_late_or_train_wrong_are_refused(
    saved, part, option, value, words
):
    _option(part, **{option: value})(saved)
    message = str(error_of(saved))
    assert option in message and words in message


def test_other_forms_of_noise_and_heads_are_accepted(saved):
    _option("scheduler", trained_betas=[0.01] * 1000, beta_start=None)(saved)
    _option("unet", attention_head_dim=[2], transformer_layers_per_block=[1])(saved)
    model, _ = diffusers_layout.load(saved)
    np.testing.assert_allclose(model.alphas_cumprod[:2], [0.99, 0.99**2], rtol=1e-6)


def test_options_without_effect_are_accepted(saved):
    _option("unet", act_fn="swish", upcast_attention=True, norm_eps=1e-05)(saved)
    _option("unet", only_cross_attention=[False], unheard_of="x")(saved)
    _option("vae", force_upcast=False, shift_factor=None)(saved)
    diffusers_layout.check_base(saved)


@pytest.mark.parametrize("unet", [None, [4, 6], 3])
@pytest.mark.parametrize("vae", [[30, 48], 7])
def test_the_default_size_of_images_may_be_none_or_two_sides(saved, tiny, unet, vae):
    """As PyTorch's classes accept it; it shapes no weight."""
    _option("unet", sample_size=unet)(saved)
    _option("vae", sample_size=vae)(saved)
    diffusers_layout.check_base(saved)
    model, params = diffusers_layout.load(saved)
    jax.tree.map(np.testing.assert_array_equal, params, tiny[1])
    assert model.configs["unet"]["sample_size"] == unet  # is exported as it was


# Numbers that are not finite.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_weights_that_are_not_finite_are_named(saved, file, dtype, value):
    tensors = safetensors.numpy.load_file(saved / file)
    name = sorted(tensors)[-1]
    tensors = {key: np.array(tensor, dtype) for key, tensor in tensors.items()}
    tensors[name].reshape(-1)[-1] = value
    safetensors.numpy.save_file(tensors, saved / file)
    component = file.split("/")[0]
    for read in (
        lambda: diffusers_layout.load(saved, (component,)),
        lambda: diffusers_layout.require_finite(saved, component),
    ):
        with pytest.raises(UserError, match="NaN or infinity in 1 of") as error:
            read()
        assert error.value.name == f"{saved / file}: {name}"
    for other in {"unet", "vae", "text_encoder"} - {component}:
        diffusers_layout.require_finite(saved, other)


@pytest.mark.parametrize("part", family.SD.components)
def test_a_model_that_is_not_finite_is_not_exported(tiny, tmp_path, part):
    model, params = tiny
    params = {**params, part: jax.tree.map(np.array, params[part])}
    jax.tree.leaves(params[part])[0].reshape(-1)[0] = np.nan
    with pytest.raises(UserError, match="Nothing is exported"):
        diffusers_layout.save(tmp_path, model, params)
    assert not (tmp_path / "model_index.json").exists()
    assert not list(tmp_path.glob(f"{part}/*safetensors"))


def test_configs_of_early_releases_leave_out_defaults(saved):
    """Stable Diffusion 1.4's autoencoder has no scaling factor in its config."""
    path = saved / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"], config["latent_channels"]
    files.write_json(path, config)
    assert diffusers_layout.load(saved, ("vae",))[0].scaling_factor == 0.18215


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt", "folder/sd.ckpt"])
def test_a_single_file_is_an_error_that_says_how_to_convert_it(
    tmp_path, name, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "which does not exist" in str(error_of(name))
    files.write_bytes(name, b"")
    error = error_of(name)
    assert f"from_single_file('{name}')" in str(error)
    assert error.name == f"config.base.path '{name}'"


@pytest.mark.parametrize("path", ["gs://bucket/model", "foo://bucket/model"])
def test_a_path_that_nothing_opens_is_refused(path, monkeypatch, tmp_path):
    """Soon: seconds of waiting are counted, not waited for."""
    stores.use(monkeypatch, "gs", "http://127.0.0.1:1", tmp_path)
    waits = []
    monkeypatch.setattr(store_client.time, "sleep", waits.append)
    assert error_of(path).name == f"config.base.path '{path}'"
    assert sum(waits) < 2 * 20  # of the check and of the reader


# Variants.


def test_a_variant_is_read_and_no_other(saved, tiny):
    to_variant(saved, keep=True)
    tensors = safetensors.numpy.load_file(saved / UNET)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    safetensors.numpy.save_file(changed, saved / UNET)
    bias = tiny[1]["unet"]["conv_in"]["bias"]
    for variant, wanted in (("fp16", bias.astype(np.float16)), ("", bias + 1)):
        read = diffusers_layout.load(saved, ("unet",), variant)[1]
        np.testing.assert_array_equal(read["unet"]["conv_in"]["bias"], wanted)


def test_the_variant_that_is_present_is_suggested(saved):
    assert "Set --config.base.variant='', which is present" in str(
        error_of(saved, variant="fp16")
    )
    to_variant(saved)
    assert "Set --config.base.variant=fp16, which is present" in str(error_of(saved))


def split_variants(folder, **variants):
    """Leaves each component with the files of its own variant alone."""
    for part, file in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        named = variants.get(part, "")
        path = folder / file
        for variant in named.split("+") if named else ():
            cast(path, np.float16, folder / file.replace(".", f".{variant}.", 1))
        if named:
            path.unlink()


# What there is of each component -> the variants that can be read, and those components
# that are then read without. diffusers' own reading is in the next test.
BY_PART = {
    "non_ema": ({"unet": "non_ema"}, {"non_ema": ["vae", "text_encoder"]}),
    "fp16": ({"unet": "fp16", "vae": "fp16"}, {"fp16": ["text_encoder"]}),
    "text": ({"text_encoder": "fp16"}, {"fp16": ["unet", "vae"]}),
    "two": (
        {"unet": "fp16+non_ema"},
        {"fp16": ["vae", "text_encoder"], "non_ema": ["vae", "text_encoder"]},
    ),
    "none in common": ({"unet": "non_ema", "vae": "fp16"}, {}),
}


@pytest.mark.parametrize("case", BY_PART)
def test_a_component_without_the_variant_is_read_without(saved, tiny, case, caplog):
    there, readable = BY_PART[case]
    split_variants(saved, **there)
    for variant in ("", "fp16", "non_ema", "ema"):
        if variant not in readable:
            message = str(error_of(saved, variant=variant))
            first, *more = [*readable, None]
            if first is None:
                assert (
                    "No variant has all: rename unet/diffusion_pytorch_model.non_ema."
                    "safetensors to diffusion_pytorch_model.safetensors and rename vae/"
                ) in message
            else:
                assert f"Set --config.base.variant={first}" in message
                assert all(other is None or other in message for other in more)
            continue
        diffusers_layout.check_base(saved, variant)
        caplog.clear()
        with caplog.at_level("INFO"):
            params = diffusers_layout.load(saved, variant=variant)[1]
        without = readable[variant]
        assert f"{', '.join(without)} has none and is read without" in caplog.text
        for part, tree in params.items():
            half = part in without
            leaf = jax.tree.leaves(tree)[-1]
            assert leaf.dtype == (np.float32 if half else np.float16)


@pytest.mark.parametrize("case", BY_PART)
def test_diffusers_reads_the_same_of_each_component(saved, torch, case):
    import diffusers

    there, readable = BY_PART[case]
    split_variants(saved, **there)
    for variant in readable:
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(
            saved, variant=variant
        )
        params = diffusers_layout.load(saved, variant=variant)[1]
        for part, tree in params.items():
            state = getattr(theirs, part).state_dict()
            for key, leaf in flax.traverse_util.flatten_dict(tree).items():
                if leaf.ndim == 1:
                    wanted = state[weights.torch_name(key)].numpy()
                    np.testing.assert_array_equal(np.float32(leaf), wanted)


def test_a_variant_that_a_component_has_as_a_pickle_is_refused(saved):
    """Its plain weights would be other ones than those that were asked for."""
    cast(saved / VAE, np.float16, saved / VAE.replace(".", ".non_ema.", 1))
    (saved / UNET.replace(".safetensors", ".non_ema.bin")).write_bytes(b"")
    message = str(error_of(saved, variant="non_ema"))
    assert "1 missing: unet/diffusion_pytorch_model.non_ema.safetensors" in message
    assert "Set --config.base.variant='', which is present" in message


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("{}.fp16-0000{}-of-00002.safetensors", "{}.safetensors.index.fp16.json"),
        ("{}-0000{}-of-00002.fp16.safetensors", "{}.safetensors.fp16.index.json"),
        ("{}-0000{}-of-00002.fp16.safetensors", "{}.safetensors.index.fp16.json"),
    ],
)
def test_both_spellings_of_the_shards_of_a_variant(saved, tiny, shard, index):
    for file in (UNET, VAE, TEXT):
        path = saved / file
        tensors = safetensors.numpy.load_file(path)
        names = [
            shard.format(path.name.removesuffix(".safetensors"), n) for n in (1, 2)
        ]
        placed = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
        for file_name in names:
            part = {k: v for k, v in tensors.items() if placed[k] == file_name}
            safetensors.numpy.save_file(part, path.parent / file_name)
        stem = path.name.removesuffix(".safetensors")
        files.write_json(path.parent / index.format(stem), {"weight_map": placed})
        path.unlink()
    params = diffusers_layout.load(saved, variant="fp16")[1]
    jax.tree.map(np.testing.assert_array_equal, params, tiny[1])
    here = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert matching(here, pipeline_folder.download_patterns("fp16")) == here
    (saved / "unet" / shard.format("diffusion_pytorch_model", 2)).unlink()
    assert shard.format("diffusion_pytorch_model", 2) in str(
        error_of(saved, variant="fp16")
    )


@pytest.mark.parametrize("variant", ["a/b", "fp 16", "."])
def test_a_variant_is_one_word(saved, variant):
    with pytest.raises(UserError, match="config.base.variant"):
        diffusers_layout.check_base(saved, variant)


# The stages.


def test_a_revision_is_of_a_hub_name(saved):
    assert error_of(saved, revision="v1").name == "config.base.revision"


def test_the_check_of_the_stage_covers_the_base(saved):
    encode.check(config_of(saved))
    (saved / VAE).unlink()
    with pytest.raises(UserError, match="1 missing: vae/"):
        encode.check(config_of(saved))
    for field in ("variant", "revision"):
        with pytest.raises(UserError, match="config.base: .* without a path"):
            encode.check(config_of("", **{field: "fp16"}))


@pytest.mark.parametrize("size", [6, 9, 2])
def test_sizes_that_cannot_be_halved_are_refused_before_any_work(saved, size):
    config = config_of(saved)
    config.data.size = size
    with pytest.raises(UserError, match="a multiple of 4") as error:
        encode.check(config)
    assert error.value.name == "config.data.size"


def test_the_unet_takes_the_sizes_that_pass_and_no_others(tiny):
    """A UNet of two levels, on latents; only shapes are computed."""
    model, _ = tiny
    unet = model.configs["unet"] | {
        "block_out_channels": [32, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    configs = model.configs | {"unet": unet}
    wide = type(model)(configs, model.tokenizer)
    params = {"unet": wide.shapes("unet")}
    assert families.size_factor(configs) == 8
    for side in range(2, 9):
        latents, steps, states = (
            jax.ShapeDtypeStruct(shape, kind)
            for shape, kind in (
                ((1, side, side, 4), np.float32),
                ((1,), np.int32),
                ((1, 12, 16), np.float32),
            )
        )
        size = side * model.downsampling
        if size % 8 == 0:
            families.check_size(configs, size)
            out = jax.eval_shape(wide.denoise, params, latents, steps, states)
            assert out.shape == latents.shape
            continue
        with pytest.raises(UserError, match="multiple of 8"):
            families.check_size(configs, size)
        with pytest.raises(Exception, match=r"concatenate|shape"):
            jax.eval_shape(wide.denoise, params, latents, steps, states)


def test_a_model_that_this_program_fine_tuned_needs_an_explicit_setting(tiny, tmp_path):
    made_by = {"stage": "finetune", "base": "sd", "data": "folder:/parts"}
    written = diffusers_layout.save(tmp_path, *tiny, made_by=made_by)
    assert "mvc_jax.json" in written
    with pytest.raises(UserError, match=r"of base 'sd' on data 'folder:/parts'") as e:
        encode.check(config_of(tmp_path))
    assert "--config.base.finetuned=True" in str(e.value)
    encode.check(config_of(tmp_path, finetuned=True))
    diffusers_layout.load(tmp_path, ("vae",))  # `generate` does, of `finetune`
    assert "mvc_jax.json" in pipeline_folder.download_patterns()


def test_a_base_of_pretrain_has_no_name(original, tmp_path):
    workdir, record = tmp_path / "run", tmp_path / "run" / "encode" / "base.json"
    shutil.copytree(original, workdir / "pretrain" / "model")
    own = workdir / "pretrain" / "model"
    assert os.fspath(find_base(config_of(""), workdir, record)) == str(own)
    assert files.read_json(record) == {"path": "", "variant": "", "revision": None}
    assert diffusers_layout.recorded_base(workdir)["path"] == own
