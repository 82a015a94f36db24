"""Captions by BLIP-2 (arXiv 2301.12597), a PyTorch model, in a separate process.

PyTorch and JAX would each reserve an accelerator's memory for themselves, and neither
releases it before its process ends. So `captions` starts this module as a program,
which does not import JAX, sends it one request and reads one line for each image:

    parent -> child, stdin     {"images": ..., "rows": [...], "folder": ..., ...}
    child -> parent, stdout    {"row": 3, "caption": "a bold stroke"}
                               {"refused": {"name": ..., "wanted": ..., ...}}

The parent keeps stdin open: when it closes, however the parent ended, the child ends
too. Whatever libraries print goes to stderr, whose last lines explain a crash.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from mvc_jax import files
from mvc_jax.errors import UserError
from mvc_jax.models import tokenizer_release

DTYPES = ("auto", "float32", "bfloat16", "int8")
_PROGRAM = (sys.executable, "-P", "-m", "mvc_jax.models.blip2")
_REFUSED = 2  # exit code after a line with the reason
_SHOWN = 3  # last lines of a crash; first names of missing weights

Captions = Iterator[tuple[int, str]]


def captions(
    images_path: epath.PathLike,
    rows: Sequence[int],
    *,
    folder: epath.PathLike,
    field: str,
    batch_size: int,
    dtype: str,
    prompt: str,
    max_new_tokens: int,
    num_beams: int,
) -> Captions:
    """Captions some rows of an array of images, in the order of `rows`.

    The child starts when the first caption is requested, and ends after the last one or
    when the generator is closed. A batch that is too large for a GPU is halved.

    Args:
      images_path: a `.npy` file, uint8 [N, S, S, 3].
      rows: indices of images, 0 to N - 1.
      folder: a checkpoint folder, with weights in safetensors.
      field: config field that holds the model, for errors.
      batch_size: images per batch.
      dtype: one of `DTYPES`; "auto" is bfloat16 on a GPU, float32 on a CPU.
      prompt: text that the model continues; it is not part of the caption.
      max_new_tokens: maximum number of tokens of a caption.
      num_beams: width of the beam search; 1 is greedy. Nothing is sampled.

    Yields:
      (row, caption exactly as generated, with its white space).

    Raises:
      UserError: PyTorch or memory for the model is missing, or the child crashed.
    """
    if not rows:
        return
    request = {
        "images": os.fspath(images_path),
        "rows": list(rows),
        "folder": os.fspath(folder),
        "field": field,
        "batch_size": batch_size,
        "dtype": dtype,
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
    }
    with tempfile.TemporaryFile() as log, _child(log) as child:
        with contextlib.suppress(BrokenPipeError):  # it crashed: its log has the reason
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        for line in child.stdout:
            message = json.loads(line) if line.endswith(b"\n") else {}
            if "refused" in message:
                raise UserError(**message["refused"])
            if message:
                yield message["row"], message["caption"]
        if child.wait():
            raise _crash(child.returncode, log)


def check_torch() -> None:
    """Raises a `UserError` unless PyTorch is installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "config.caption.captioner",
            wanted="PyTorch, in which BLIP-2 runs",
            got="none in this Python",
            fix="Install it by the line for this machine's devices in "
            "docs/your-own-images.md, section 1. Or use another captioner.",
        )


@contextlib.contextmanager
def _child(log: IO[bytes]) -> Iterator[subprocess.Popen]:
    """Runs this module as a program, with pipes; killed when the block ends."""
    process = subprocess.Popen(
        _PROGRAM,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=_environment(),
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # of a request that was not read
                process.stdin.close()


def _environment() -> dict[str, str]:
    """The environment of the child: transformers uses PyTorch alone, offline.

    The parent has downloaded the model, so the child needs no network. Of many
    processes on a machine, each has its own GPUs.
    """
    package = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    own = {}
    if chosen := os.environ.get(
        "JAX_CUDA_VISIBLE_DEVICES"
    ):  # of those that are visible
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = chosen.split(",")
        names = [visible.split(",")[int(i)] for i in numbers] if visible else numbers
        own = {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    return {
        **os.environ,
        **own,
        "PYTHONPATH": os.pathsep.join([package, path] if path else [package]),
        "USE_TORCH": "1",
        "USE_FLAX": "0",
        "USE_TF": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _crash(code: int, log: IO[bytes]) -> UserError:
    """The error for a child that ended without a line that gives the reason."""
    end = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()  # "\r" ends one as well
    messages = [
        line
        for line in lines
        if line.strip() and not line[0].isspace() and not line.startswith("Traceback ")
    ]
    return UserError(
        "config.caption.captioner",
        wanted="captions from the process that runs BLIP-2",
        got=": ".join([end, " | ".join(messages[-_SHOWN:]) or "no message"]),
        fix="If memory ran out, lower config.caption.batch_size or use a smaller "
        "config.caption.model.",
    )


# The functions below run in the child.


@dataclasses.dataclass(eq=False)
class Refused(Exception):
    """The fields of the `UserError` that the parent raises."""

    name: str
    wanted: str
    got: str
    fix: str


def main() -> int:
    """Answers the request on stdin, line by line; returns the exit code."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # A preempted machine sends SIGTERM to all processes, and the parent may still wait
    # for a caption. It ends this process by closing stdin.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for row, caption in answer(request):
            print(
                json.dumps({"row": row, "caption": caption}), file=answers, flush=True
            )
    except Refused as refused:
        line = {"refused": dataclasses.asdict(refused)}
        print(json.dumps(line), file=answers, flush=True)
        return _REFUSED
    return 0


def _end_with_parent() -> None:
    """Ends this process when stdin closes.

    `sys.stdin` is not used: at exit the interpreter would wait for its lock.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def answer(request: dict[str, Any]) -> Captions:
    """Yields what `captions` does, computed in this process.

    Raises:
      Refused: the dtype, the weights or this machine's memory do not permit it.
    """
    images = files.map_array(request["images"])
    caption = _captioner(request)
    yield from _in_batches(
        lambda rows: caption(images[rows]),
        request["rows"],
        request["batch_size"],
    )


def _in_batches(
    caption: Callable[[list[int]], list[str]], rows: Sequence[int], size: int
) -> Captions:
    """Captions `rows` in batches of `size`; halves `size` when the GPU runs out of
    memory.

    A short last batch is padded with its last row: kernels, and so the rounding of a
    caption's scores, do not depend on how many rows are left.
    """
    import torch

    done = 0
    while done < len(rows):
        batch = list(rows[done : done + size])
        try:
            texts = caption(batch + batch[-1:] * (size - len(batch)))
        except torch.cuda.OutOfMemoryError as error:
            if size == 1:
                raise _no_memory("one image at a time") from error
            texts = []
        if texts:
            yield from zip(batch, texts, strict=False)
            done += len(batch)
        else:  # not within the `except`, in which the tensors are still alive
            size //= 2
            torch.cuda.empty_cache()


def _captioner(request: dict[str, Any]) -> Callable[[np.ndarray], list[str]]:
    """Loads the model; returns a function from images to their captions."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _load(request, device)
    processor = _processor(request["folder"], model.config)
    # A decoder-only language model returns the image's placeholders and the prompt
    # before the new tokens; an encoder-decoder does not.
    echoes = model.config.use_decoder_only_language_model

    def caption(images: UInt8[np.ndarray, "B S S 3"]) -> list[str]:
        inputs = processor(
            images=list(images),
            text=[request["prompt"]] * len(images),
            input_data_format="channels_last",
            return_tensors="pt",
        ).to(device, model.dtype)
        tokens = model.generate(
            **inputs,
            do_sample=False,
            num_beams=request["num_beams"],
            num_return_sequences=1,
            max_new_tokens=request["max_new_tokens"],
        )
        skipped = inputs["input_ids"].shape[1] if echoes else 0
        return processor.batch_decode(tokens[:, skipped:], skip_special_tokens=True)

    return caption


def _load(request: dict[str, Any], device: str):
    """Loads the model onto its device: safetensors only, no weight may be missing."""
    import torch
    import transformers

    options = _dtype_options(request["dtype"], device)
    try:
        model, found = transformers.Blip2ForConditionalGeneration.from_pretrained(
            request["folder"],
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        model = model if "device_map" in options else model.to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise _no_memory("the model") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise Refused(
            request["field"],
            wanted="all weights of Blip2ForConditionalGeneration",
            got=f"{len(missing)} missing: {', '.join(missing[:_SHOWN])} ...",
            fix="Use a checkpoint that was trained to write captions.",
        )
    return model.eval()


def _dtype_options(dtype: str, device: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a precision."""
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype != "int8":
        return {"dtype": getattr(torch, dtype)}
    packages = ("bitsandbytes", "accelerate")
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if device != "cuda" or lacking:
        gpu = "no GPU that PyTorch can use"
        raise Refused(
            "config.caption.dtype",
            wanted="a CUDA GPU and the packages bitsandbytes and accelerate for 'int8'",
            got=gpu if device != "cuda" else f"no {' and no '.join(lacking)}",
            fix="Set it to 'auto', or pip install bitsandbytes accelerate on a machine "
            "with such a GPU.",
        )
    from transformers import BitsAndBytesConfig

    eight_bits = BitsAndBytesConfig(load_in_8bit=True)
    options = {"quantization_config": eight_bits, "device_map": {"": 0}}
    return options | {"dtype": torch.bfloat16}


def _processor(folder: str, config):
    """The checkpoint's processor, also of a checkpoint without image placeholders.

    It is built from its parts: `Blip2Processor.from_pretrained` would use torchvision's
    image processor where a checkpoint names it. `config` gets the placeholder's index
    if it has none: the processor adds the token, whose embedding is never read.
    """
    import transformers

    tokenizer, options = tokenizer_release.class_and_options(folder)
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessor.from_pretrained(folder),
        getattr(transformers, tokenizer).from_pretrained(folder, **options),
        num_query_tokens=config.num_query_tokens,
    )
    if config.image_token_index is None:
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content)
        config.image_token_index = image
    return processor


def _no_memory(what: str) -> Refused:
    return Refused(
        "config.caption.model",
        wanted=f"GPU memory for {what}",
        got="none left",
        fix="Set config.caption.dtype to 'int8', use a smaller model, or end other "
        "processes on the GPU.",
    )


if __name__ == "__main__":
    sys.exit(main())
