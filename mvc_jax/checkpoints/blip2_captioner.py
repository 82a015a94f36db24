"""Captions by a BLIP-2 checkpoint: found, checked, then run by `models/blip2.py`.

The checkpoint is read by a process with PyTorch; neither JAX nor PyTorch is imported
here.
"""

from collections.abc import Iterator, Sequence

from etils import epath

from mvc_jax.checkpoints import captioner_checkpoint
from mvc_jax.models import blip2

DTYPES = blip2.DTYPES
LAYOUT = captioner_checkpoint.Layout(
    model_type="blip-2",
    torch_class="Blip2ForConditionalGeneration",
    weights=("model.safetensors", "model.safetensors.index.json"),
    shards="model-*-of-*.safetensors",
)


def check_model(model: str) -> None:
    """Checks, without loading or downloading it, what `captions` needs.

    Raises:
      UserError: PyTorch is not installed, or a folder is not a BLIP-2 checkpoint.
    """
    blip2.check_torch()
    captioner_checkpoint.check(model, LAYOUT)


def captions(
    images_path: epath.PathLike,
    rows: Sequence[int],
    *,
    model: str,
    batch_size: int,
    dtype: str,
    prompt: str,
    max_new_tokens: int,
    num_beams: int,
) -> Iterator[tuple[int, str]]:
    """Yields (row, caption) of some rows of an array, see `models.blip2.captions`.

    `model` is a checkpoint folder or a name on the hub, which is downloaded first.

    Raises:
      UserError: PyTorch, the checkpoint or memory is missing, or the process crashed.
    """
    blip2.check_torch()
    if not rows:
        return
    yield from blip2.captions(
        images_path,
        rows,
        folder=captioner_checkpoint.find(model, LAYOUT),
        field=captioner_checkpoint.field(model),
        batch_size=batch_size,
        dtype=dtype,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
    )
