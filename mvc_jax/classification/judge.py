"""A small classifier of a pool of images, by which drawn images are judged.

Its feature maps are also a term of the autoencoder's loss. Legend: N images, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax.checkpoints import classifier_checkpoint, classifier_weights
from mvc_jax.classification import classifier
from mvc_jax.data import order
from mvc_jax.models import classifiers
from mvc_jax.models.feature_maps import feature_maps
from mvc_jax.training import optim, rng

_NETWORK = "resnet8"
_SIDE = 32  # pixels; of larger images the first layer takes every second, or fewer
_WEIGHT_DECAY = 1e-4
_PURPOSE = "pretrain/judge"


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained classifier.

    Attributes:
      spec: its network and preprocessing.
      state: of one classifier.
      mesh: the devices.
    """

    spec: classifier.ClassifierSpec
    state: classifier.ClassifierState
    mesh: Mesh

    def predict(self, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, " N"]:
        """The most probable class of each image."""
        return self._probabilities(self.state, images)[0].argmax(-1)

    def agreement(
        self, images: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, " N"]
    ) -> float:
        """The fraction of images that it takes for their class."""
        return float((self.predict(images) == labels).mean())

    @property
    def variables(self) -> dict[str, Any]:
        """`params` and `batch_stats`, on the host."""
        return classifier.unstack(self.state)[0]

    @property
    def maps(self) -> Callable[[Any, Float[Array, "B H W 3"]], list[Array]]:
        """(variables, images in [-1, 1]) -> feature maps."""
        maps, spec = feature_maps(self.spec.model), self.spec
        return lambda variables, x: maps(variables, spec.normalize((x + 1) * 127.5))

    @functools.cached_property
    def _probabilities(self) -> Callable:
        return classifier.predictor(self.spec, self.mesh, batch_size=100)


def train(
    images: UInt8[np.ndarray, "N H W 3"],
    labels: Int[np.ndarray, " N"],
    *,
    classes: int,
    seed: int,
    loop: Any,
    width: int,
    batch_size: int,
    learning_rate: float,
) -> Judge:
    """Trains a judge.

    Args:
      images: of the pool.
      labels: of the images.
      classes: K.
      seed: of the run.
      loop: `mesh`, `steps`, `fit` and `warmup_cosine`, as `pretraining.base.Loop`.
      width: channels of the first stage.
      batch_size: images per step.
      learning_rate: its peak.
    """
    stride = max(images.shape[1] // _SIDE, 1)
    network = classifiers.make(
        _NETWORK,
        num_classes=classes,
        dtype="float32",
        width=width,
        stem_stride=stride,
    )
    spec = classifier.ClassifierSpec(network)
    tx = optim.optimizer("adam", 1.0, weight_decay=_WEIGHT_DECAY, momentum=0.9)
    keys = rng.example_keys(rng.purpose_key(seed, _PURPOSE), jnp.zeros(1, jnp.int32))
    state = classifier.create_state(
        spec, tx, keys, loop.mesh, image_shape=images.shape[1:]
    )
    rates = loop.warmup_cosine(learning_rate)(np.arange(loop.steps))
    arrays = {"images": images, "labels": labels}
    read = order.reader(seed, _PURPOSE, arrays, batch_size=batch_size)

    def read_stacked(step: int, *rows: Any) -> dict[str, np.ndarray]:
        found = {name: array[:, None] for name, array in read(step, *rows).items()}
        return {**found, "weight": np.ones((len(found["labels"]), 1), np.float32)}

    state = loop.fit(
        functools.partial(classifier.train_seeds, spec=spec, tx=tx),
        state,
        read=read_stacked,
        constants={
            "key": jax.random.key_data(keys),
            "rates": np.asarray(rates, np.float32),
        },
    )
    return Judge(spec, state, loop.mesh)


def read_maps(
    path: str, *, field: str
) -> tuple[Callable[[Any, Float[Array, "B H W 3"]], list[Array]], dict[str, Any]]:
    """The feature maps of pretrained weights, and their variables.

    Args:
      path: folder, file or hub name of a classifier.
      field: of the config, for errors.
    """
    checkpoint = classifier_checkpoint.find(path, field=field)
    network = classifiers.make(
        checkpoint.variant,
        num_classes=max(checkpoint.num_classes, 1),
        dtype="float32",
        **checkpoint.fields,
    )
    variables, _ = classifier_weights.read(checkpoint, network)
    spec = classifier.ClassifierSpec(
        network, mean=tuple(checkpoint.mean), std=tuple(checkpoint.std)
    )
    maps = feature_maps(network)
    return (lambda found, x: maps(found, spec.normalize((x + 1) * 127.5))), variables
