"""BLIP-2 in its child process: deterministic captions, no process left behind."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file

from mvc_jax.checkpoints import blip2_captioner
from mvc_jax.errors import UserError
from mvc_jax.models import blip2

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = {
    "batch_size": 3,
    "dtype": "float32",
    "prompt": "",
    "max_new_tokens": 8,
    "num_beams": 2,
}


OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="session")
def checkpoints(torch, tmp_path_factory):
    """Random BLIP-2s as folders of the hub, by the language model in them.

    That of T5 is in several shards.
    """
    folder = tmp_path_factory.mktemp("captioners")
    for name, text, size in (("opt", OPT, "5GB"), ("t5", T5, "30KB")):
        processor = _processor()
        image = processor.tokenizer.convert_tokens_to_ids("<image>")
        config = transformers.Blip2Config(
            vision_config={**TOWER, "image_size": 32, "patch_size": 16},
            qformer_config={
                **TOWER,
                "vocab_size": 8,
                "cross_attention_frequency": 1,
                "encoder_hidden_size": 16,
            },
            text_config={**text, "vocab_size": len(processor.tokenizer)},
            num_query_tokens=4,
            image_token_index=image,
        )
        model = transformers.Blip2ForConditionalGeneration(config)
        generator = torch.Generator().manual_seed(SEEDS[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.8, generator=generator)
        model.save_pretrained(folder / name, max_shard_size=size)
        processor.save_pretrained(folder / name)
    return {name: folder / name for name in ("opt", "t5")}


SEEDS = {"opt": 24, "t5": 6}  # of models that tell the images below apart


def _processor():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    words = ["a bold dark stroke on the left of a photo"] * 3
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    marks = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.Blip2Processor(
        transformers.BlipImageProcessor(size={"height": 32, "width": 32}),
        transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **marks),
        num_query_tokens=4,
    )


@pytest.fixture(scope="session")
def images_path(tmp_path_factory):
    """Eight images of one colour each and a little noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 236, (8, 1, 1, 3))
    images = (colours + rng.integers(0, 20, (8, 20, 20, 3))).astype(np.uint8)
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, images, allow_pickle=False)
    return path


@pytest.fixture
def here(images_path):
    """`answer` in this process, which is faster: the captions of rows, by row."""

    def captions(folder, rows, **options):
        request = {"images": str(images_path), "rows": list(rows), "field": "a field"}
        pairs = blip2.answer(OPTIONS | request | {"folder": str(folder)} | options)
        return dict(pairs)

    return captions


# What it writes.


@pytest.mark.parametrize("language_model", ["opt", "t5"])
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_a_caption_does_not_depend_on_its_batch(
    checkpoints, here, language_model, prompt
):
    folder = checkpoints[language_model]
    texts = here(folder, range(8), prompt=prompt)
    assert len(set(texts.values())) > 2  # else the rest would see nothing
    assert not any(prompt and prompt in text for text in texts.values())
    for batch_size, rows in ((1, [5, 0]), (2, [7, 2, 1]), (8, [3]), (11, range(8))):
        found = here(folder, rows, batch_size=batch_size, prompt=prompt)
        assert found == {row: texts[row] for row in rows}


def test_a_caption_is_what_the_model_scores_highest(checkpoints, here, images_path):
    """Greedy search by whole forward passes: no cache, no batch, no `generate`."""
    import torch

    folder, prompt = checkpoints["opt"], "a dark"
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.Blip2Processor.from_pretrained(folder)
    found = here(folder, [2, 6], prompt=prompt, num_beams=1)
    for row, text in found.items():
        image = np.load(images_path, allow_pickle=False)[row]
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        start, tokens = inputs["input_ids"], inputs["input_ids"]
        assert start.shape[1] > 4 + 2  # placeholders, the start, the prompt
        for _ in range(OPTIONS["max_new_tokens"]):
            with torch.no_grad():
                logits = model(inputs["pixel_values"], tokens).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
            if tokens[0, -1] == OPT["eos_token_id"]:
                break
        words = tokens[0, start.shape[1] :]
        assert text == processor.decode(words, skip_special_tokens=True)


STUB = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
raise ImportError("JAX has no place beside PyTorch")
"""


def test_the_child_writes_the_same_and_knows_no_jax(
    checkpoints, here, images_path, tmp_path, monkeypatch
):
    (tmp_path / "jax.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = [6, 0, 3]
    folder = checkpoints["t5"]
    pairs = list(
        blip2_captioner.captions(images_path, rows, model=str(folder), **OPTIONS)
    )
    assert pairs == list(here(folder, rows, batch_size=1).items())
    assert not (tmp_path / "imported").exists()


def test_bfloat16(checkpoints, here):
    assert len(here(checkpoints["opt"], range(3), dtype="bfloat16")) == 3


def test_a_checkpoint_older_than_its_image_token(checkpoints, here, tmp_path):
    texts = here(checkpoints["opt"], range(8))
    folder = pathlib.Path(shutil.copytree(checkpoints["opt"], tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").unlink()
    assert here(folder, range(8)) == texts


# Memory.


def test_the_child_has_the_gpus_of_its_process(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in blip2._environment()
    monkeypatch.setenv("JAX_CUDA_VISIBLE_DEVICES", "1,2")
    assert blip2._environment()["CUDA_VISIBLE_DEVICES"] == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert blip2._environment()["CUDA_VISIBLE_DEVICES"] == "5,7"


def test_a_full_gpu_halves_the_batch(torch):
    sizes = []

    def caption(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.cuda.OutOfMemoryError
        return [f"image {row}" for row in rows]

    rows = [4, 9, 1, 7, 0]
    pairs = list(blip2._in_batches(caption, rows, 11))
    assert pairs == [(row, f"image {row}") for row in rows]
    assert sizes == [11, 5, 2, 2, 2]


def test_a_gpu_too_small_for_one_image(torch):
    def caption(rows):
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(blip2.Refused) as error:
        list(blip2._in_batches(caption, [1, 2, 3], 4))
    assert error.value.name == "config.caption.model"
    assert "int8" in error.value.fix


def test_a_gpu_too_small_for_the_model(torch, checkpoints, here, monkeypatch):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(transformers.Blip2ForConditionalGeneration, "to", full)
    with pytest.raises(blip2.Refused) as error:
        here(checkpoints["opt"], [0])
    assert error.value.wanted == "GPU memory for the model"


def test_int8_needs_a_gpu_and_its_packages(torch, checkpoints, here, monkeypatch):
    with pytest.raises(blip2.Refused) as error:
        blip2._dtype_options("int8", "cpu")
    assert "no GPU" in error.value.got
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(blip2.Refused) as error:
        blip2._dtype_options("int8", "cuda")
    assert error.value.got == "no bitsandbytes and no accelerate"
    assert "pip install bitsandbytes accelerate" in error.value.fix


def test_auto_is_bfloat16_where_there_is_a_gpu(torch):
    assert blip2._dtype_options("auto", "cuda") == {"dtype": torch.bfloat16}
    assert blip2._dtype_options("auto", "cpu") == {"dtype": torch.float32}


# Weights.


def test_a_pickle_beside_the_weights_is_not_opened(
    torch, checkpoints, here, tmp_path, monkeypatch
):
    folder = pathlib.Path(shutil.copytree(checkpoints["opt"], tmp_path / "copy"))
    (folder / "pytorch_model.bin").write_bytes(b"not to be looked at")
    monkeypatch.setattr(torch, "load", None)
    assert here(folder, [1]) == here(checkpoints["opt"], [1])


def test_missing_weights_are_an_error(checkpoints, here, tmp_path):
    folder = pathlib.Path(shutil.copytree(checkpoints["opt"], tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("language_model")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(blip2.Refused) as error:
        here(folder, [0])
    assert error.value.name == "a field"
    assert "missing: language_model" in error.value.got


# What is refused before anything is loaded.


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A folder with every file that is looked for, and a PyTorch that is found."""
    folder = tmp_path / "shell"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "blip-2"}')
    (folder / "model-00001-of-00002.safetensors").touch()
    (folder / "model-00002-of-00002.safetensors").touch()
    index = {f"layer.{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(blip2, "check_torch", lambda: None)
    return folder


def _without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def _only_a_pickle(folder):
    _without("model.safetensors.index.json")(folder)
    (folder / "pytorch_model-00001-of-00001.bin").touch()


def _config(text):
    return lambda folder: (folder / "config.json").write_text(text)


DAMAGED_FOLDERS = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (_without("config.json"), "config.json, got none"),
    "bad config": (_config("[]"), "bad JSON .*not an object"),
    "another model": (_config('{"model_type": "blip"}'), "'blip-2' .* got 'blip'"),
    "no model_type": (_config("{}"), "'blip-2' .* got None"),
    "a pickle": (
        _only_a_pickle,
        r"got pytorch_model-.*\.bin in .* never opened.*python -c .*Blip2ForCond",
    ),
    "a shard is missing": (
        _without("model-00002-of-00002.safetensors"),
        "the 2 files .* without model-00002-of-00002.safetensors",
    ),
    "no processor": (_without("preprocessor_config.json"), "preprocessor_config.json"),
    "no tokenizer": (_without("tokenizer.json"), "tokenizer.json or .* got none"),
}


@pytest.mark.parametrize("case", DAMAGED_FOLDERS)
def test_a_damaged_folder_is_refused_before_a_child_starts(shell, case, monkeypatch):
    damage, message = DAMAGED_FOLDERS[case]
    blip2_captioner.check_model(str(shell))
    damage(shell)
    monkeypatch.setattr(blip2, "_PROGRAM", ("no", "such", "program"))
    for refuse in (
        lambda: blip2_captioner.check_model(str(shell)),
        lambda: list(
            blip2_captioner.captions("no.npy", [0], model=str(shell), **OPTIONS)
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            refuse()
        assert error.value.name == f"config.caption.model {str(shell)!r}"


def test_a_folder_in_a_bucket_is_refused(shell):
    with pytest.raises(UserError, match="on a local disk, .* got a folder elsewhere"):
        blip2_captioner.check_model("gs://bucket/blip2")


def test_pytorch_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="docs/your-own-images.md"):
        blip2_captioner.check_model("Salesforce/blip2-opt-2.7b")
    with pytest.raises(UserError, match="PyTorch"):
        next(blip2_captioner.captions("no.npy", [0], model="a/b", **OPTIONS))


def test_a_hub_that_cannot_be_reached(shell, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="from the hub LocalEntryNotFoundError") as e:
        next(blip2_captioner.captions("no.npy", [0], model="nobody/nothing", **OPTIONS))
    assert e.value.name == "config.caption.model 'nobody/nothing'"


def test_only_required_files_are_downloaded(shell, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.extend([name, *allow_patterns])
        (shell / "preprocessor_config.json").unlink()
        return str(shell)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="config.caption.model 'some/model'"):
        next(blip2_captioner.captions("no.npy", [0], model="some/model", **OPTIONS))
    assert asked[0] == "some/model"
    assert "model-*-of-*.safetensors" in asked
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[1:])


# The child process, with a body that needs no PyTorch.

CHILD = """
import os, signal, sys, time
from mvc_jax.models import blip2
def answer(request):
    {body}
    yield 0, "unreachable"
blip2.answer = answer
sys.exit(blip2.main())
"""


@pytest.fixture
def child(shell, monkeypatch):
    """Captions from a child whose `answer` has the given body; and its processes."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    def captions(body, rows=(0, 1, 2)):
        program = (sys.executable, "-P", "-c", CHILD.format(body=body))
        monkeypatch.setattr(blip2, "_PROGRAM", program)
        monkeypatch.setattr(blip2.subprocess, "Popen", Popen)
        return blip2_captioner.captions("no.npy", rows, model=str(shell), **OPTIONS)

    captions.started = started
    return captions


def test_what_libraries_print_does_not_reach_the_answers(child):
    body = (
        "print('hello'); os.write(1, b'hello'); yield 5, 'π\\n'; print('bye'); return"
    )
    assert list(child(body)) == [(5, "π\n")]


def test_no_rows_need_no_child(child):
    assert list(child("raise ValueError", rows=[])) == []
    assert child.started == []


def test_a_generator_that_is_closed_ends_its_child(child):
    captions = child("yield 1, 'a'; time.sleep(600)")
    assert next(captions) == (1, "a")
    (process,) = child.started
    assert process.poll() is None
    captions.close()
    assert process.poll() is not None


def test_a_child_that_does_not_read_its_request(child, monkeypatch):
    """The pipe that breaks is not the error that is seen."""
    captions = child("", rows=list(range(200_000)))  # more than a pipe holds
    program = (sys.executable, "-c", "import sys; sys.exit('no room here')")
    monkeypatch.setattr(blip2, "_PROGRAM", program)
    with pytest.raises(UserError, match="exit code 1: no room here"):
        list(captions)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('odd\\n  weights')", r"exit code 1: ValueError: odd\. If"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9: no message"),
        ("yield 0, 'a'; os._exit(7)", "exit code 7: no message"),
        (
            "raise blip2.Refused('config.x', wanted='1', got='2', fix='Set 1.')",
            "^config.x: wanted 1, got 2. Set 1.$",
        ),
    ],
)
def test_failures_of_a_child_are_reported(child, body, message):
    with pytest.raises(UserError, match=message):
        list(child(body))
    assert child.started[0].poll() is not None


def test_a_crash_of_the_real_child_is_reported(shell, tmp_path):
    with pytest.raises(UserError, match="FileNotFoundError: .*no.npy"):
        list(
            blip2_captioner.captions(
                tmp_path / "no.npy", [0], model=str(shell), **OPTIONS
            )
        )


PARENT = """
import subprocess, sys
from mvc_jax.checkpoints import blip2_captioner
from mvc_jax.models import blip2
blip2.check_torch = lambda: None
class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
subprocess.Popen = Popen
blip2._PROGRAM = (sys.executable, "-P", "-c", sys.argv[1])
options = dict(batch_size=1, dtype="auto", prompt="", max_new_tokens=1, num_beams=1)
for row, text in blip2_captioner.captions("no.npy", [0], model=sys.argv[2], **options):
    print(text, flush=True)
"""


TALKER = "while True: yield 0, 'ready'; time.sleep(0.05)"


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize(
    "body",
    [
        "yield 0, 'ready'; time.sleep(600)",  # as when it loads or computes
        "while True: yield 0, 'ready'",  # as when it writes
    ],
)
def test_a_killed_parent_takes_its_child_along(shell, body):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(body=body), str(shell)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        assert _runs(child)
        parent.kill()
    patience = time.monotonic() + 20
    while _runs(child) and time.monotonic() < patience:
        time.sleep(0.02)
    assert not _runs(child)


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")
def test_sigterm_to_all_ends_the_parent_in_its_own_way_and_the_child_with_it(shell):
    """Whichever process hears of it first."""
    script = (
        "from mvc_jax.training import preemption\n"
        "with preemption.handled():\n"
        "    try:\n"
        f"{textwrap.indent(PARENT, ' ' * 8)}"
        "    except preemption.Preempted:\n"
        "        print('preempted', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, CHILD.format(body=TALKER), str(shell)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        os.kill(child, signal.SIGTERM)
        for _ in range(3):  # it still answers
            assert parent.stdout.readline() == "ready\n"
        parent.terminate()
        assert parent.stdout.read().splitlines()[-1] == "preempted"
        assert parent.wait() == 0
    assert not _runs(child)


def _runs(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state[0] not in "ZX"  # a zombie has ended: nobody has asked for its code yet
