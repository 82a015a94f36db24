"""The Flax libraries import neither PyTorch nor TensorFlow, and print no warning."""

import importlib.util
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import importlib, json, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
from mvc_jax.models.flax_classes import transformers
transformers.CLIPTokenizerFast, transformers.AutoImageProcessor
print([n for n in ("torch", "torchvision", "tensorflow") if n in sys.modules])
import importlib.util
print(importlib.util.find_spec("torch") is None)
"""


def test_no_module_imports_pytorch_or_tensorflow():
    """Although they are installed; afterwards they can be found again."""
    modules = [
        ".".join(("mvc_jax", room, path.stem))
        for room in ("checkpoints", "models", "pretraining")
        for path in sorted((ROOT / "mvc_jax" / room).glob("[!_]*.py"))
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("USE_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *modules],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    imported, torch_missing = done.stdout.splitlines()
    assert imported == "[]"
    assert torch_missing == str(importlib.util.find_spec("torch") is None)
