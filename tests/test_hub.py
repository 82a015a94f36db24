"""Base models on the Hugging Face hub: downloads, look-ups and the cache."""

import shlex
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
import requests
from base_folders import (
    COMMIT,
    NAME,
    TEXT,
    UNET,
    VAE,
    answer,
    cast,
    config_of,
    edit,
    find_base,
    matching,
    to_variant,
)
from huggingface_hub import errors

from mvc_jax import encode, files
from mvc_jax.checkpoints import (
    blip2_captioner,
    classifier_checkpoint,
    clip_checkpoint,
    controlnet_checkpoint,
    diffusers_layout,
    hub,
    pipeline_folder,
    vit_gpt2_captioner,
)
from mvc_jax.errors import UserError

# The files of stable-diffusion-v1-5 on the hub.
LISTING = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v1-inference.yaml",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "safety_checker/config.json",
    "safety_checker/model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "safety_checker/pytorch_model.fp16.bin",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.fp16.bin",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
SMALL = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
]


@pytest.fixture
def cached(saved, tmp_path, monkeypatch):
    """`saved` as the hub's cache holds it, in offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    repository = tmp_path / "hub" / "models--some--model"
    files.write_text(repository / "refs" / "main", COMMIT)
    (repository / "snapshots").mkdir()
    return shutil.copytree(saved, repository / "snapshots" / COMMIT)


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ("", [UNET, VAE, TEXT]),
        ("fp16", [x.replace(".", ".fp16.", 1) for x in (UNET, VAE, TEXT)]),
        ("non_ema", [UNET.replace(".", ".non_ema.", 1), VAE, TEXT]),
    ],
)
def test_only_required_files_are_downloaded_once(saved, monkeypatch, variant, wanted):
    if variant:
        to_variant(saved, variant, keep=True)
    answer(monkeypatch, LISTING, cache=saved / "none")
    asked = []

    def download(name, allow_patterns, **options):
        asked.append((name, options))
        small = {*SMALL, "feature_extractor/preprocessor_config.json"}
        assert matching(LISTING, allow_patterns) == {*small, *wanted}
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = diffusers_layout.load(NAME, ("vae",), variant, "v1")
    assert model.latent_channels == 4
    assert asked == [(NAME, {"revision": "v1"})]


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_the_cache_is_read_without_a_network(cached, revision):
    folder, commit = pipeline_folder.resolve(NAME, "", revision)
    assert (str(folder), commit) == (str(cached), COMMIT)
    assert hub.commit_of(cached.parent) is None
    params = diffusers_layout.load(NAME, ("vae",), revision=revision)[1]
    assert params["vae"]


def test_a_half_snapshot_lists_what_is_missing(cached):
    for name in (UNET, "vae/config.json"):
        (cached / name).unlink()
    with pytest.raises(UserError) as error:
        diffusers_layout.load(NAME)
    assert error.value.name == f"config.base.path '{NAME}'"
    assert "2 missing: vae/config.json; " + UNET in str(error.value)
    assert "HF_HUB_OFFLINE" in str(error.value)
    assert f"from_pretrained('{NAME}'" in str(error.value)


@pytest.mark.parametrize("name", ["nobody/nothing", "models/stable-diffusion"])
def test_a_failed_download_is_a_readable_error(cached, name):
    with pytest.raises(
        UserError, match="from the hub LocalEntryNotFoundError"
    ) as error:
        diffusers_layout.load(name)
    assert error.value.name == f"config.base.path '{name}'"
    with pytest.raises(UserError, match="LocalEntryNotFoundError"):
        diffusers_layout.load(NAME, revision="another")


def test_in_offline_mode_the_cache_is_checked_before_any_work(cached):
    encode.check(config_of(NAME))
    with pytest.raises(UserError, match="LocalEntryNotFoundError"):
        encode.check(config_of("nobody/nothing"))
    (cached / UNET).unlink()
    with pytest.raises(UserError, match="1 missing: unet/"):
        encode.check(config_of(NAME))


def refusal(kind):
    return kind("404 Client Error. (Request ID: 1)", response=requests.Response())


# The check of each setting that may hold the name of a model on the hub, and files with
# which it passes.
NAMED = {
    "captioner": (
        vit_gpt2_captioner.check_model,
        ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"],
    ),
    "blip2": (
        blip2_captioner.check_model,
        [
            "config.json",
            "model.safetensors.index.json",
            "preprocessor_config.json",
            "tokenizer.json",
        ],
    ),
    "base": (lambda name: encode.check(config_of(name)), LISTING),
    "clip": (
        lambda name: clip_checkpoint.check(name, field="config.generate.clip"),
        ["config.json", "model.safetensors"],
    ),
    "controlnet": (
        lambda name: controlnet_checkpoint.check(name, None, field="config.x"),
        ["config.json", "diffusion_pytorch_model.safetensors"],
    ),
    "classifier": (
        lambda name: classifier_checkpoint.check(name, field="config.y"),
        ["model.safetensors"],
    ),
}


@pytest.mark.parametrize("stage", NAMED)
def test_a_name_on_the_hub_passes_without_a_download(monkeypatch, tmp_path, stage):
    check, names = NAMED[stage]
    answer(monkeypatch, names, cache=tmp_path)
    check(NAME)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", NAMED)
@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (refusal(errors.RepositoryNotFoundError), "Correct the name.*hf auth login"),
        (refusal(errors.RevisionNotFoundError), "Correct the revision"),
        (refusal(errors.HfHubHTTPError), "With a network"),
        (requests.exceptions.ConnectTimeout("no answer"), "With a network"),
        (requests.exceptions.ConnectionError("no route"), "With a network"),
        (ValueError("an impossible name"), "With a network"),
        ("offline", "With a network, and without HF_HUB_OFFLINE"),
    ],
)
def test_what_cannot_be_had_is_an_error_before_any_work(
    monkeypatch, tmp_path, stage, error, fix
):
    if error == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    answer(monkeypatch, cache=tmp_path, error=error)
    with pytest.raises(UserError, match=f"{fix}.*: hf download {NAME} --incl") as found:
        NAMED[stage][0](NAME)
    assert f"'{NAME}'" in found.value.name


@pytest.mark.parametrize("stage", NAMED)
def test_a_gated_model_needs_a_permission(monkeypatch, tmp_path, stage):
    check, names = NAMED[stage]
    answer(monkeypatch, names, gated="auto", cache=tmp_path)
    check(NAME)
    denied = refusal(errors.GatedRepoError)
    answer(monkeypatch, names, gated="auto", cache=tmp_path, denied=denied)
    terms = (
        f"terms at https://huggingface.co/{NAME}, run `hf auth login`, then: hf down"
    )
    with pytest.raises(UserError, match=terms):
        check(NAME)


@pytest.mark.parametrize("stage", NAMED)
def test_a_model_of_pickles_alone_is_refused_before_any_work(
    monkeypatch, tmp_path, stage
):
    check, names = NAMED[stage]
    pickles = [
        "model.bin"
        if "safetensors" in name and "/" not in name
        else name.replace(".safetensors", ".bin")
        for name in names
    ]
    answer(monkeypatch, pickles, cache=tmp_path)
    with pytest.raises(UserError, match="Pickles are never opened"):
        check(NAME)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["sd.ckpt"],
            r"from_single_file\('https://huggingface.co/some/model/blob/main",
        ),
        (["pytorch_lora_weights.safetensors"], "LoRA adapters"),
        (["config.json"], "without model_index.json"),
        ([], "without model_index.json"),
        ([x for x in LISTING if x != VAE], f"1 missing: {VAE} .*base.variant=fp16"),
        ([x for x in LISTING if "bin" in x or "json" in x], "Pickles are never opened"),
    ],
)
def test_files_that_the_hub_does_not_have_are_listed(
    monkeypatch, tmp_path, names, words
):
    answer(monkeypatch, names, cache=tmp_path)
    with pytest.raises(UserError, match=words):
        diffusers_layout.check_base(NAME)


def test_the_variant_that_all_parts_have_is_suggested(monkeypatch, tmp_path):
    answer(monkeypatch, [x for x in LISTING if "fp16" not in x], cache=tmp_path)
    with pytest.raises(UserError, match="3 missing.*base.variant='', which is present"):
        diffusers_layout.check_base(NAME, "fp16")


def test_a_whole_snapshot_in_the_cache_is_read_before_any_work(cached, monkeypatch):
    """Also where the hub does not answer; and where it does, if it has the same."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    listing = [x for x in LISTING if (cached / x).exists()]
    folder = cached.parents[2]
    timeout = requests.exceptions.ConnectTimeout("no answer")
    for error in (timeout, None):
        answer(monkeypatch, listing, cache=folder, error=error)
        diffusers_layout.check_base(NAME)
    edit(cached / "unet" / "config.json", act_fn="gelu")
    for error in (timeout, None):
        answer(monkeypatch, listing, cache=folder, error=error)
        with pytest.raises(UserError, match="act_fn is 'gelu'"):
            diffusers_layout.check_base(NAME)
    (cached / UNET).unlink()
    answer(monkeypatch, listing, cache=folder, error=timeout)
    with pytest.raises(
        UserError, match=f"1 missing: {UNET}.*hf download {NAME} --incl"
    ):
        diffusers_layout.check_base(NAME)
    answer(monkeypatch, listing, cache=folder)
    diffusers_layout.check_base(NAME)  # the download will complete it


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("variant", ["", "fp16", "non_ema"])
def test_the_printed_command_downloads_what_is_needed(variant, known):
    """Where the hub did not list its files, plain weights too: some may be needed."""
    needed = pipeline_folder.download_patterns(variant, frozenset(LISTING))
    patterns = needed if known else pipeline_folder.download_patterns(variant)
    assert matching(LISTING, needed) <= matching(LISTING, patterns)
    words = shlex.split(hub.download_command(NAME, patterns, "v1"))
    assert words[:5] == ["hf", "download", NAME, "--revision", "v1"]
    chosen = matching(LISTING, words[words.index("--include") + 1 :])
    assert matching(LISTING, patterns) <= chosen
    large = {x for x in chosen if x.endswith((".safetensors", ".bin", ".ckpt"))}
    plain = {UNET, VAE, TEXT}
    own = {
        file
        for file in (name.replace(".", f".{variant}.", 1) for name in plain)
        if variant and file in LISTING
    }
    of_own = {name.split("/")[0] for name in own}
    rest = {x for x in plain if x.split("/")[0] not in of_own} if known else plain
    assert large == own | rest


def test_in_offline_mode_no_name_is_looked_up(cached, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "model_info", None)  # a call would fail
    hub._list_files.cache_clear()
    found = hub.check_name(NAME, ["*"], field="config.base.path")
    assert str(found) == str(cached)


def test_a_full_disk_is_not_a_missing_model(monkeypatch):
    def download(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError, match="No space left"):
        diffusers_layout.load(NAME)


def test_later_stages_read_the_commit_that_encode_recorded(cached, tmp_path, tiny):
    """The hub's default branch moves on after `encode`; it is not read."""
    workdir, record = tmp_path / "run", tmp_path / "run" / "encode" / "base.json"
    folder = find_base(config_of(NAME), workdir, record)
    assert str(folder) == str(cached)
    assert files.read_json(record) == {
        "path": NAME,
        "variant": "",
        "revision": COMMIT,
    }
    moved = COMMIT[::-1]
    shutil.copytree(cached, cached.parent / moved)
    files.write_text(cached.parents[1] / "refs" / "main", moved)
    cast(cached.parent / moved / VAE, np.float16)
    recorded = diffusers_layout.recorded_base(workdir)
    params = diffusers_layout.load(**recorded, components=("vae",))[1]
    jax.tree.map(np.testing.assert_array_equal, params["vae"], tiny[1]["vae"])
    assert str(find_base(config_of(NAME), workdir, record)) == str(cached)
    other = find_base(config_of(NAME), workdir, tmp_path / "other" / "base.json")
    assert other.name == moved


def test_a_downloaded_base_is_checked(cached, tmp_path):
    files.write_json(cached / "mvc_jax.json", {"stage": "finetune"})
    with pytest.raises(UserError, match="fine-tuned already"):
        find_base(config_of(NAME), tmp_path, tmp_path / "encode" / "base.json")
    assert not (tmp_path / "encode" / "base.json").exists()
