"""LoRA adapters as the file that diffusers' `load_lora_weights` reads."""

import json
from typing import Any

import numpy as np
from etils import epath

from mvc_jax.checkpoints import tensor_file, weights
from mvc_jax.models.lora import Adapters

FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights expects


def layer_name(path: str) -> str:
    """The PyTorch name of a layer of the UNet, from its Flax path.

    `"mid_block/attentions_0/proj_in"` -> `"mid_block.attentions.0.proj_in"`.
    """
    return weights.torch_name((*path.split("/"), "kernel")).removesuffix(".weight")


def write(folder: epath.PathLike, adapters: Adapters) -> list[str]:
    """Writes adapters for `load_lora_weights(folder)`.

    Names and layout are PEFT's, in fp32, with PEFT's configuration in the metadata.

    Returns:
      the files written, relative to `folder`.
    """
    tensors = {}
    for path, pair in adapters.items():
        name = f"unet.{layer_name(path)}"
        tensors[f"{name}.lora_A.weight"] = _to_torch(pair["a"])
        tensors[f"{name}.lora_B.weight"] = _to_torch(pair["b"])
    rank = next(iter(adapters.values()))["a"].shape[-1]
    config = {
        "unet.r": rank,
        "unet.lora_alpha": rank,
        "unet.target_modules": [layer_name(path) for path in adapters],
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
    }
    tensor_file.write(
        epath.Path(folder) / FILE,
        {name: tensor.shape for name, tensor in tensors.items()},
        tensors.__getitem__,
        metadata={"lora_adapter_metadata": json.dumps(config)},
    )
    return [FILE]


def _to_torch(kernel: Any) -> np.ndarray:
    kernel = np.asarray(kernel, np.float32)
    kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    return np.ascontiguousarray(kernel)
