"""Classifiers by name, at random or from a checkpoint: images in, probabilities out.

    from mvc_jax import classifiers

    classifier = classifiers.create(pretrained="runs/parts/classify/MODEL")
    probabilities = classifier.predict(images)

Networks and checkpoints are those of `config.classify.model` and
`config.classify.pretrained`.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike
from jaxtyping import Float, Key, UInt8

from mvc_jax.checkpoints import classifier_checkpoint, classifier_weights
from mvc_jax.classification.classifier import ClassifierSpec, init_options
from mvc_jax.configs import common
from mvc_jax.errors import UserError
from mvc_jax.models.classifiers import VARIANTS, make

__all__ = ["NAMES", "Classifier", "create"]

NAMES = tuple(VARIANTS)
_ALIASES = {  # what other libraries call them
    "wide_resnet16_4": "wrn16_4",
    "wide_resnet40_2": "wrn40_2",
    "wide_resnet28_10": "wrn28_10",
}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network with its variables and preprocessing.

    Attributes:
      network: `network.apply(variables, inputs)` maps normalised images [B, H, W, 3] to
        fp32 logits [B, K].
      variables: `{"params", "batch_stats"}`, on the host.
      mean, std: per channel, of pixels in [0, 1].
      size: image size that it was made for, in pixels.
      class_names: K names; () if they are not known.
    """

    network: nn.Module
    variables: dict[str, Any] = dataclasses.field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    class_names: tuple[str, ...] = ()

    def predict(
        self, images: UInt8[ArrayLike, "B H W 3"] | Sequence[Any]
    ) -> Float[np.ndarray, "B K"]:
        """The probability of each class.

        Args:
          images: uint8 with pixels in [0, 255], or a list of such arrays or of PIL
            images in RGB; of about `size`, to which they are to be resized as those of
            the training were.

        Raises:
          UserError: they are of another kind.
        """
        pixels = np.asarray(images)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise UserError(
                "images",
                wanted="uint8 [B, H, W, 3]",
                got=f"{pixels.dtype} {[*pixels.shape]}",
                fix="images[None] is a batch of one; pixels in [0, 1] become uint8 by "
                "(255 * x).round().astype('uint8').",
            )
        return np.asarray(self._predict(self.variables, pixels))

    @functools.cached_property
    def _predict(self) -> Callable:
        spec = ClassifierSpec(self.network, mean=self.mean, std=self.std)

        @jax.jit
        def predict(variables, images):
            inputs = spec.normalize(images.astype(jnp.float32))
            logits = self.network.apply(variables, inputs)
            return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

        return predict


def create(
    name: str = "",
    *,
    num_classes: int | None = None,
    pretrained: epath.PathLike = "",
    revision: str = "",
    key: Key[jax.Array, ""] | None = None,
    dtype: str = "auto",
    **fields: Any,
) -> Classifier:
    """Makes a classifier, as timm's `create_model` does.

    >>> classifier = create("resnet8", num_classes=10, key=jax.random.key(0))
    >>> classifier.size, classifier.network.num_classes
    (32, 10)
    >>> images = np.zeros((2, 32, 32, 3), np.uint8)
    >>> classifier.predict(images).shape
    (2, 10)

    Args:
      name: one of `NAMES`, or e.g. `wide_resnet28_10`; "": that of the checkpoint.
      num_classes: K; None: that of the checkpoint, or 1,000.
      pretrained: a folder or file with safetensors of timm, torchvision or
        transformers, or that this program wrote; or a name on the Hugging Face hub.
        Its head is kept where it has as many classes, and else drawn at random.
      revision: of a name on the hub.
      key: of random variables; None: `jax.random.key(0)`.
      dtype: of activations, `float32` or `bfloat16`; `auto` is bfloat16 on an
        accelerator.
      **fields: of the network, as `width`, `stem` and `stem_stride` of a ResNet.

    Raises:
      UserError: there is no such network, field or checkpoint, or the checkpoint is of
        another network.
    """
    _check(num_classes, pretrained, dtype)
    found = None
    if pretrained:
        found = classifier_checkpoint.find(
            str(pretrained), field="pretrained", revision=revision
        )
        fields = {**found.fields, **fields}
    name = _ALIASES.get(name, name or (found.variant if found else ""))
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, [*NAMES, *_ALIASES], n=1)
        raise UserError(
            "name",
            wanted=f"one of {', '.join(NAMES)}",
            got=repr(name),
            fix=f"{f'{close[0]} is one' if close else 'Choose one of these'}, or pass "
            "pretrained= alone.",
        )
    classes = num_classes or (found.num_classes if found else 0) or 1000
    network = _make(name, num_classes=classes, dtype=dtype, **fields)
    same_head = found is not None and found.num_classes == classes
    size = found.size if found else VARIANTS[name].size
    read: dict[str, Any] = {"params": {}}
    if found:
        read, _ = classifier_weights.read(found, network, head=same_head)
    variables = read
    if not same_head:
        shape = (size, size, 3)
        init = jax.jit(network.init, compiler_options=init_options(network, shape))
        images = jnp.zeros((1, *shape))
        drawn = init(jax.random.key(0) if key is None else key, images)
        variables = drawn | read | {"params": drawn["params"] | read["params"]}
    return Classifier(
        network=network,
        variables=jax.tree.map(np.asarray, variables),
        mean=tuple(found.mean) if found else ClassifierSpec.mean,
        std=tuple(found.std) if found else ClassifierSpec.std,
        size=size,
        class_names=found.class_names if same_head else (),
    )


def _check(num_classes: int | None, pretrained: object, dtype: str) -> None:
    """Checks arguments of `create`.

    Raises:
      UserError: one is wrong.
    """
    if num_classes is not None and (
        not isinstance(num_classes, int)
        or isinstance(num_classes, bool)
        or num_classes < 1
    ):
        raise UserError(
            "num_classes",
            wanted="a whole number of at least 1",
            got=repr(num_classes),
            fix="Leave it out for that of the checkpoint, or 1,000.",
        )
    if isinstance(pretrained, bool):
        raise UserError(
            "pretrained",
            wanted="a folder, a file or a name on the Hugging Face hub",
            got=f"{pretrained}",
            fix="Pass e.g. 'timm/resnet18.a1_in1k', or leave it out.",
        )
    common.FIELDS.find("classify.dtype").require("dtype", dtype)


def _make(name: str, **fields: Any) -> nn.Module:
    """The network; names arguments, not fields of a config, in a `UserError`."""
    try:
        return make(name, **fields)
    except UserError as error:
        texts = {
            key: text.replace("--config.classify.", "").replace("config.classify.", "")
            for key, text in error.fields().items()
            if isinstance(text, str)
        }
        raise UserError(**error.fields() | texts) from error
