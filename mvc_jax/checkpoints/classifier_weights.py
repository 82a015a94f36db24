"""Pretrained classifiers: tensors of timm, torchvision and transformers, in.

ResNet-18/34/50, WRN-50-2 and EfficientNet-B0..B3, and what `classifier_export` wrote of
the other networks. `classifier_checkpoint.find` says what there is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mvc_jax.checkpoints import classifier_names as names
from mvc_jax.checkpoints import tensor_file, weights
from mvc_jax.checkpoints.classifier_checkpoint import OURS, Checkpoint, variant_of
from mvc_jax.errors import require
from mvc_jax.models.classifiers import VARIANTS

HEADS = ("keep", "zero", "fresh")
_COUNTERS = r"(^|\.)num_batches_tracked$"


def check(checkpoint: Checkpoint, model: Any) -> None:
    """Requires that a checkpoint is one of `model`'s network, whatever its head.

    Raises:
      UserError: it is another; the error says which it looks like.
    """
    family = checkpoint.naming.family if checkpoint.naming else ""
    same = family == names.family_of(model)
    if family:
        shapes = tensor_file.entries(checkpoint.weights)
        shapes = {key: entry.shape for key, entry in shapes.items()}
        parts = names.structure_of(shapes, checkpoint.naming)
        same = same and parts == names.structure(model)
        looks = names.in_words(family, parts)
        looks += f" ({checkpoint.variant})" if checkpoint.variant else ""
    else:
        looks = f"{OURS}{checkpoint.variant}"
        same = type(model) is type(VARIANTS[checkpoint.variant].make(num_classes=1))
    wanted = type(model).__name__
    if names.family_of(model):
        wanted = names.in_words(names.family_of(model), names.structure(model))
        known = variant_of(names.family_of(model), names.structure(model))
        wanted += f" ({known})" if known else ""
    require(
        same,
        f"{checkpoint.field} {checkpoint.name!r}",
        wanted=wanted,
        got=f"one that looks like {looks}",
        fix="Name a checkpoint of the network, or the network of the checkpoint.",
    )


def read(
    checkpoint: Checkpoint,
    model: Any,
    *,
    head: str = "zero",
    key: Key[Array, ""] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a checkpoint into variables of `model`.

    Args:
      checkpoint: of `find`.
      model: a module of `VARIANTS`, made with the checkpoint's `fields`.
      head: of the last layer: "keep" the checkpoint's, whose number of classes must be
        the model's; "zero"; or "fresh", drawn as in a new network.
      key: for "fresh".

    Returns:
      fp32 variables (`params` and `batch_stats`) on the host; and the names of tensors
      in the file that nothing was made of: the replaced head, other modules.

    Raises:
      UserError: it is another network, or tensors are missing, of another shape, or
        unexpected inside the network; all are named.
    """
    assert head in HEADS, head
    check(checkpoint, model)
    require(
        head != "keep" or checkpoint.num_classes == model.num_classes,
        f"{checkpoint.field} {checkpoint.name!r}",
        wanted=f"a head of {model.num_classes} classes",
        got=checkpoint.num_classes or "none",
        fix="Replace the head.",
    )
    shapes = flax.traverse_util.flatten_dict(variable_shapes(model))
    head_name = head_of(model)
    replaced = {path: leaf for path, leaf in shapes.items() if path[1] == head_name}
    body = (
        shapes if head == "keep" else {p: shapes[p] for p in shapes.keys() - replaced}
    )
    stored = set(tensor_file.entries(checkpoint.weights))
    name_of = _stored_name(checkpoint.naming, model, stored)
    left = _leftovers(stored, {name_of(path) for path in shapes}, map(name_of, body))
    tree = weights.read(
        checkpoint.weights,
        flax.traverse_util.unflatten_dict(body),
        "|".join([_COUNTERS, *(f"^{re.escape(name)}$" for name in left)]),
        name_of=name_of,
    )
    tree = flax.traverse_util.flatten_dict(tree)
    if head != "keep":
        tree |= _new_head(replaced, head, key)
    tree = {path: np.asarray(leaf, np.float32) for path, leaf in tree.items()}
    return flax.traverse_util.unflatten_dict(tree), left


def variable_shapes(model: Any) -> dict[str, Any]:
    """The variables of a classifier as shapes."""
    side = 2 * model.stride
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def head_of(model: Any) -> str:
    """The name of the last layer among a classifier's variables."""
    return "classifier" if names.family_of(model) == "EfficientNet" else "fc"


def _stored_name(
    naming: names.Naming | None, model: Any, stored: set[str]
) -> Callable[[weights.Path], str]:
    """A function: path of a variable -> its name in the file."""
    if naming is None:
        return names.timm_name
    depths = model.depths() if naming.family == "EfficientNet" else ()
    prefix = naming.prefix
    if any(name.startswith(prefix) for name in stored):
        prefix = ""  # none to take away

    def name_of(path):
        return naming.name(names.timm_name(path), depths).removeprefix(prefix)

    return name_of


def _leftovers(
    stored: set[str], network: set[str], read: Iterable[str]
) -> tuple[str, ...]:
    """Names that are no part of the network: its head, where replaced, and strangers.

    A stranger is in a module of which the network has nothing: what has no place inside
    one of the network's own modules computes something else, and `weights.read` says
    so.
    """
    read = set(read)
    modules = {name.split(".")[0] for name in network}
    return tuple(
        sorted(
            name
            for name in stored - read
            if not re.search(_COUNTERS, name)
            and (name in network or name.split(".")[0] not in modules)
        )
    )


def _new_head(leaves: Mapping[tuple, Any], head: str, key) -> dict[tuple, np.ndarray]:
    new = {path: np.zeros(leaf.shape, np.float32) for path, leaf in leaves.items()}
    if head == "fresh":
        draw = jax.nn.initializers.lecun_normal()
        for path, leaf in leaves.items():
            if path[-1] == "kernel":
                new[path] = np.asarray(draw(key, leaf.shape, jnp.float32))
    return new
