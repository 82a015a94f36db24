"""Feature spaces: networks from images to the features that metrics compare.

A distance is called by its space. A network sees images resized to its own size by
bicubic interpolation, as a batch of a fixed number, so that it is compiled once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image

from mvc_jax.checkpoints import (
    classifier_checkpoint,
    classifier_weights,
    clip_checkpoint,
    dinov2_checkpoint,
)
from mvc_jax.errors import UserError
from mvc_jax.metrics import inception
from mvc_jax.models import classifiers, clip, dinov2

FIELD = "config.evaluate.weights"


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """A network that is ready to embed images.

    Attributes:
      dims: P.
      preprocess: images -> the input of `network`, on the host.
      network: (params, input) -> features; it is compiled.
      params: on the device.
      batch: images at once.
      text: CLIP's texts; None where there are none.
    """

    dims: int
    preprocess: Callable[[Sequence[np.ndarray]], np.ndarray]
    network: Callable[[Any, Any], Array]
    params: Any
    batch: int
    text: "ClipTexts | None" = None

    @functools.cached_property
    def _compiled(self) -> Callable[[Any, Any], Array]:
        return jax.jit(self.network)

    def embed(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> Float[np.ndarray, "N {self.dims}"]:
        """Features of images in [0, 255], in float32."""
        found = [np.zeros((0, self.dims), np.float32)]
        for start in range(0, len(images), self.batch):
            some = self.preprocess(images[start : start + self.batch])
            padding = [(0, self.batch - len(some))] + [(0, 0)] * (some.ndim - 1)
            features = self._compiled(self.params, jnp.asarray(np.pad(some, padding)))
            found.append(np.asarray(features, np.float32)[: len(some)])
        return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class ClipTexts:
    """The text tower of a CLIP, whose embeddings are compared with those of images."""

    model: clip.Clip
    params: Any
    batch: int

    @functools.cached_property
    def _compiled(self) -> Callable[[Any, Any], Array]:
        return jax.jit(self.model.text_embeddings)

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "N P"]:
        """Embeddings of length 1."""
        found = []
        for start in range(0, len(texts), self.batch):
            ids = self.model.tokenize(texts[start : start + self.batch])
            padded = np.pad(ids, ((0, self.batch - len(ids)), (0, 0)), mode="edge")
            found.append(np.asarray(self._compiled(self.params, padded))[: len(ids)])
        return unit(np.concatenate(found))


def unit(rows: Float[np.ndarray, "N P"]) -> Float[np.ndarray, "N P"]:
    """Rows of length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, np.finfo(np.float32).tiny)


def check(name: str, weights: str) -> None:
    """Checks the files of a feature space, without a download or a device.

    Args:
      name: one of `config.evaluate.features`, not `pixels`.
      weights: folder, file or hub name.

    Raises:
      UserError: they are missing, damaged, or of another network.
    """
    if name == "inception":
        inception.check(weights)
        return
    if not weights:
        raise UserError(
            FIELD,
            wanted=f"the weights of the feature space {name}",
            got="none",
            fix=f"Name a folder, a file or a model of the hub by --{FIELD}, or set "
            "--config.evaluate.features=pixels, which needs none.",
        )
    if name == "clip":
        clip_checkpoint.check(weights, field=FIELD)
    elif name == "dinov2":
        dinov2_checkpoint.check(weights, field=FIELD)
    elif found := classifier_checkpoint.check(weights, field=FIELD):
        checkpoint = classifier_checkpoint.find(found, field=FIELD)
        network = _network(name, checkpoint)
        classifier_weights.check_tensors(checkpoint, network)


def load(
    name: str, weights: epath.PathLike, *, batch: int
) -> FeatureSpace | inception.Inception:
    """Loads the network of a feature space onto the first device.

    Args:
      name: `inception`, `clip`, `dinov2`, or a classifier of `classifiers.VARIANTS`.
      weights: folder, file or hub name.
      batch: images at once.

    Raises:
      UserError: see `check`.
    """
    if name == "inception":
        return inception.Inception(weights, batch=batch)
    if name == "clip":
        return _clip(weights, batch)
    if name == "dinov2":
        model, params = dinov2_checkpoint.load(weights, field=FIELD)
        model, params = dinov2.resized(model, params, dinov2.SIZE)
        prepare = functools.partial(
            _prepare, size=dinov2.SIZE, mean=dinov2.MEAN, std=dinov2.STD
        )
        return _space(model.width, prepare, model.features, params, batch)
    return _classifier(name, weights, batch)


def _space(
    dims: int,
    prepare: Callable,
    network: Callable,
    params: Any,
    batch: int,
    **more: Any,
) -> FeatureSpace:
    params = jax.device_put(jax.tree.map(np.float32, params))
    return FeatureSpace(dims, prepare, network, params, batch, **more)


def _clip(weights: epath.PathLike, batch: int) -> FeatureSpace:
    """CLIP's image embeddings of length 1, as CMMD takes them."""
    text = clip_checkpoint.has_text(weights, field=FIELD)
    model, params = clip_checkpoint.load(weights, field=FIELD, text=text)
    params = jax.device_put(params)

    def embed(params: Any, pixels: Array) -> Array:
        return clip.normalize(model.image_embeddings(params, pixels))

    texts = ClipTexts(model, params, batch) if text else None
    return FeatureSpace(
        model.width,
        lambda images: np.concatenate([model.preprocess(x[None]) for x in images]),
        embed,
        params,
        batch,
        texts,
    )


def _classifier(name: str, weights: epath.PathLike, batch: int) -> FeatureSpace:
    """The pooled features from which a classifier's last layer computes its logits."""
    checkpoint = classifier_checkpoint.find(str(weights), field=FIELD)
    network = _network(name, checkpoint)
    variables, _ = classifier_weights.read(checkpoint, network)
    side = max(checkpoint.size, network.stride)
    features = pooled(network)
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    dims = jax.eval_shape(features, variables, pixels).shape[1]
    mean, std = checkpoint.mean, checkpoint.std
    prepare = functools.partial(_prepare, size=side, mean=mean, std=std)
    return _space(dims, prepare, features, variables, batch)


def pooled(network: nn.Module) -> Callable[[Any, Array], Array]:
    """(variables, images) -> the input of the last layer, whose own are not needed."""
    head = classifier_weights.head_name(network)

    def stop_before_head(next_call, args, kwargs, context):
        if context.module.name == head and isinstance(context.module, nn.Dense):
            return args[0]
        return next_call(*args, **kwargs)

    def features(variables: Any, images: Array) -> Array:
        with nn.intercept_methods(stop_before_head):
            return network.apply(variables, images)

    return features


def _network(name: str, checkpoint: classifier_checkpoint.Checkpoint) -> Any:
    """The network `name`, with the fields that only its checkpoint knows."""
    classes = max(checkpoint.num_classes, 1)
    return classifiers.make(
        name, num_classes=classes, dtype="float32", **checkpoint.fields
    )


def _prepare(
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[np.ndarray, "N S S 3"]:
    """Resizes images and normalises their pixels."""
    box = (size, size)
    resized = [
        np.asarray(Image.fromarray(image).resize(box, Image.Resampling.BICUBIC))
        for image in images
    ]
    pixels = np.stack(resized).astype(np.float32) / 255
    return (pixels - np.float32(mean)) / np.float32(std)
