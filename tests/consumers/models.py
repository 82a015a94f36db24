"""Reads exported models with the programs that they are for; needs no mvc_jax.

    python tests/consumers/models.py KIND FOLDER OUT

Writes arrays, and under `version` the programs' versions, to OUT, an .npz file.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
import readers

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import texts  # noqa: E402

Arrays = dict[str, Any]


def classifier(folder: str) -> Arrays:
    """Runs the card's lines for timm, then its exact preprocessing."""
    readers.declare_operators_of_torchvision()
    import torch

    with contextlib.chdir(folder), torch.no_grad():
        in_timm, exact = readers.blocks("README.md")
        scope: dict[str, Any] = {}
        exec(in_timm, scope)
        shown = scope["transform"](scope["image"])[None]
        exec(exact, scope)
        exact_input = torch.from_numpy(scope["pixels"])
        return {
            "names": scope["names"],
            "input": shown.numpy(),
            "logits": scope["model"](shown).numpy(),
            "probabilities": scope["probabilities"].numpy(),
            "exact_input": exact_input.numpy(),
            "exact_logits": scope["model"](exact_input).numpy(),
        }


def pipeline(folder: str) -> Arrays:
    """Draws by the exported pipeline, and by its adapters on the base."""
    readers.declare_operators_of_torchvision()  # transformers imports it
    import diffusers
    import torch

    given = np.load(f"{folder}/start.npz")
    noise, source = (
        torch.from_numpy(given[x].transpose(0, 3, 1, 2)) for x in ("noise", "source")
    )
    options = json.loads(str(given["options"]))
    merged = diffusers.DiffusionPipeline.from_pretrained(f"{folder}/merged")
    base = type(merged).from_pretrained(f"{folder}/base")
    base.load_lora_weights(f"{folder}/lora")
    found = {}
    for name, pipe in (("merged", merged), ("adapters", base)):
        pipe.set_progress_bar_config(disable=True)
        found[name] = pipe(
            image=source, latents=noise, output_type="np", **options
        ).images
    lengths = {"padding": "max_length", "truncation": True}
    ids = merged.tokenizer(list(texts.TEXTS), **lengths)["input_ids"]
    return found | {"ids": np.asarray(ids)}


def scalars(folder: str) -> Arrays:
    """What TensorBoard shows of `loss`."""
    from tensorboard.backend.event_processing import event_accumulator

    found = event_accumulator.EventAccumulator(folder).Reload().Scalars("loss")
    return {"shown": [(x.step, x.value) for x in found]}


KINDS = {
    "classifier": (classifier, ["timm"]),
    "pipeline": (pipeline, ["torch", "diffusers", "transformers", "peft"]),
    "scalars": (scalars, ["tensorboard"]),
}


def main(kind: str, folder: str, out: str) -> None:
    read, packages = KINDS[kind]
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    np.savez(out, **read(os.path.abspath(folder)), version=", ".join(versions))


if __name__ == "__main__":
    main(*sys.argv[1:])
