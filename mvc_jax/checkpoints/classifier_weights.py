"""Reads pretrained classifiers: tensors of timm, torchvision and transformers.

Supported are ResNet-18/34/50, WRN-50-2, EfficientNet-B0..B3 and -Lite0, and what
`classifier_export` writes of the other networks. `classifier_checkpoint.find` finds and
describes a checkpoint.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mvc_jax.checkpoints import classifier_names as names
from mvc_jax.checkpoints import tensor_file, weights
from mvc_jax.checkpoints.classifier_checkpoint import OURS, Checkpoint, variant_of
from mvc_jax.errors import UserError
from mvc_jax.models.classifiers import VARIANTS

_COUNTERS = r"(^|\.)num_batches_tracked$"


def check(checkpoint: Checkpoint, model: Any) -> None:
    """Checks that a checkpoint is of `model`'s network, whatever its head.

    Raises:
      UserError: it is of another network; the error says which it looks like.
    """
    family = checkpoint.naming.family if checkpoint.naming else ""
    same = family == names.family_of(model)
    if family:
        found = names.structure_of(checkpoint.shapes(), checkpoint.naming)
        same = same and found == names.structure(model)
        looks_like = names.describe(family, found)
        looks_like += f" ({checkpoint.variant})" if checkpoint.variant else ""
    else:
        looks_like = f"{OURS}{checkpoint.variant}"
        same = type(model) is type(VARIANTS[checkpoint.variant].make(num_classes=1))
    if same:
        return
    wanted = type(model).__name__
    if names.family_of(model):
        wanted = names.describe(names.family_of(model), names.structure(model))
        known = variant_of(names.family_of(model), names.structure(model))
        wanted += f" ({known})" if known else ""
    raise UserError(
        f"{checkpoint.field} {checkpoint.name!r}",
        wanted=wanted,
        got=f"one that looks like {looks_like}",
        fix="Name a checkpoint of this network, or the network of this checkpoint.",
    )


def read(
    checkpoint: Checkpoint, model: Any, *, head: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a checkpoint into variables of `model`.

    Args:
      checkpoint: from `find`.
      model: a network of `VARIANTS`, made with the checkpoint's `fields`.
      head: whether the last layer is read, too, which has as many classes.

    Returns:
      fp32 variables (`params` and `batch_stats`) on the host, and the names of the
      tensors that were not used: the head, and modules that the network does not have.

    Raises:
      UserError: it is of another network, or tensors are missing, have another shape,
        or are unexpected inside the network; all are listed.
    """
    check(checkpoint, model)
    body, ignored, name_of, unused = _parts(checkpoint, model, head)
    tree = weights.read(checkpoint.weights, body, ignored, name_of=name_of)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree), unused


def check_tensors(checkpoint: Checkpoint, model: Any) -> None:
    """Raises the errors of `read`, but reads only the headers of the files."""
    check(checkpoint, model)
    body, ignored, name_of, _ = _parts(checkpoint, model)
    weights.check_tensors(checkpoint.weights, body, ignored, name_of=name_of)


def _parts(
    checkpoint: Checkpoint, model: Any, with_head: bool = False
) -> tuple[dict[str, Any], str, Callable[[weights.Path], str], tuple[str, ...]]:
    """What of a checkpoint is read.

    Returns:
      shapes of the variables that are read; the pattern of names to ignore;
      variable -> name in the file; the names that are not used.
    """
    shapes = flax.traverse_util.flatten_dict(variable_shapes(model))
    head = head_name(model)
    body = {p: leaf for p, leaf in shapes.items() if with_head or p[1] != head}
    stored = set(tensor_file.entries(checkpoint.weights))
    name_of = _stored_name(checkpoint.naming, model, stored, checkpoint.prefix)
    unused = _unused(
        stored,
        {name_of(path) for path in shapes},
        map(name_of, body),
        checkpoint.prefix,
        checkpoint.naming.head if checkpoint.naming else head,
    )
    ignored = "|".join([_COUNTERS, *(f"^{re.escape(name)}$" for name in unused)])
    return flax.traverse_util.unflatten_dict(body), ignored, name_of, unused


def variable_shapes(model: Any) -> dict[str, Any]:
    """The variables of a classifier as shapes and dtypes."""
    side = 2 * model.stride
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))  # starts no backend
    return jax.eval_shape(model.init, key, images)


def head_name(model: Any) -> str:
    """The name of the last layer among a classifier's variables."""
    return "classifier" if names.family_of(model) == "EfficientNet" else "fc"


def _stored_name(
    naming: names.Naming | None, model: Any, stored: set[str], start: str
) -> Callable[[weights.Path], str]:
    """Returns a function from the path of a variable to its name in the file.

    `start` is the checkpoint's prefix.
    """
    if naming is None:
        return names.timm_name
    depths = model.depths() if naming.family == "EfficientNet" else ()
    prefix = naming.prefix
    if any(name.startswith(start + prefix) for name in stored):
        prefix = ""  # the file has the prefix, so it is not removed

    def name_of(path):
        return start + naming.name(names.timm_name(path), depths).removeprefix(prefix)

    return name_of


def _unused(
    stored: set[str], network: set[str], read: Iterable[str], prefix: str, head: str
) -> tuple[str, ...]:
    """Names of tensors that can be left unread: the head, and unknown modules.

    All below the head's place is, as `fc.1.weight` of a head that was replaced by
    several layers. An unknown tensor inside one of the network's own modules is not:
    the file then computes something else, and `weights.read` raises.

    Args:
      stored: names in the file.
      network: names of the network's tensors in it.
      read: those that are read.
      prefix: of the network's names.
      head: name of the last layer, without the prefix.
    """
    read = set(read)

    def module(name: str) -> str:
        return name.removeprefix(prefix).split(".")[0]

    modules = {module(name) for name in network} - {module(head)}

    def left_over(name: str) -> bool:
        inside = name.startswith(prefix) and module(name) in modules
        return name in network or not inside

    counted = re.compile(_COUNTERS).search
    return tuple(sorted(x for x in stored - read if left_over(x) and not counted(x)))
