"""A classifier in training: its state, its step, its predictions.

Not a stage but a part of one, `classify`: what it composes of models, augmentation and
training. Seeds are trained side by side, stacked on the first axis of the state: they
share the images and nothing else.

Legend: S seeds, B batch, R rows of the image array, K classes, T images to predict.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax.augment.affine import random_affine
from mvc_jax.training import loop, rng, sharding

POLICIES = {"none": None, "affine": random_affine}
_WHOLE: sharding.Rules = ((r".*", "replicate"),)  # classifiers fit on one device


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; hashable, so that a step is compiled once for it.

    Attributes:
      model: takes images [B, H, W, 3], `train`, `mask` [B]; gives logits [B, K].
      mean, std: of the colours of images in [0, 1], which it wants as 0 and 1.
      policy: a key of `POLICIES`.
      label_smoothing: share of the label that is spread over all classes.
      class_weights: K weights of the loss; (): all weigh alike.
      ema_decay: of the averaged parameters; 0: none are kept.
    """

    model: nn.Module
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    policy: str = "none"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    ema_decay: float = 0.0

    def normalised(self, images: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
        """What the model wants of images in [0, 255]."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (images / 255.0 - mean.reshape(shape)) / std.reshape(shape)


@flax.struct.dataclass
class ClassifierState(loop.TrainState):
    """`loop.TrainState` with the running statistics of batch normalisation.

    Parameters, statistics and moments of the S seeds are stacked on axis 0.
    """

    batch_stats: Any = None


def create_state(
    recipe: Recipe,
    tx: optax.GradientTransformation,
    seeds: Int[np.ndarray, " S"],
    mesh: Mesh,
    *,
    key: Array,
    image_shape: tuple[int, int, int],
    pretrained: Any = None,
) -> ClassifierState:
    """S classifiers at step 0, replicated on `mesh`.

    Args:
      recipe: of all of them.
      tx: the optimiser.
      seeds: numbers of the classifiers; number i depends on (key, i) alone.
      key: root of the initialisation.
      image_shape: H, W, 3.
      pretrained: `{"params", "batch_stats"}` to start from; None: at random.
    """
    state = _init(key, seeds, pretrained, recipe=recipe, tx=tx, image_shape=image_shape)
    return jax.device_put(state, sharding.tree_shardings(state, mesh, _WHOLE))


@functools.partial(jax.jit, static_argnames=("recipe", "tx", "image_shape"))
def _init(key, seeds, pretrained, *, recipe, tx, image_shape):
    def one(seed):
        return recipe.model.init(
            jax.random.fold_in(key, seed), jnp.zeros((1, *image_shape))
        )

    variables = jax.vmap(one)(seeds)
    if pretrained is not None:
        repeat = functools.partial(jnp.repeat, repeats=len(seeds), axis=0)
        variables = jax.tree.map(lambda leaf: repeat(leaf[None]), pretrained)
    params = variables["params"]
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if recipe.ema_decay else None
    stats = variables.get("batch_stats", {})
    return ClassifierState(zero, params, tx.init(params), zero, zero, ema, stats)


def train_step(
    state: ClassifierState,
    batch: dict[str, Array],
    *,
    recipe: Recipe,
    tx: optax.GradientTransformation,
    key: Array,
) -> tuple[ClassifierState, dict[str, Array]]:
    """One step of each seed on batches of its own.

    Args:
      state: of S seeds.
      batch: `seed` int32 [S]; `weight` [B, S], 0 for slots that do not count; and
        either the whole dataset, `images` uint8 [R, H, W, 3] and `labels` int32 [R],
        with `index` int32 [B, S] into it; or what a stream has read of it, `images`
        [B, S, H, W, 3] and `labels` [B, S].
      recipe: of the classifier.
      tx: the optimiser.
      key: root of the step's randomness; slot b of step n of seed s draws by (s, n, b).

    Returns:
      the next state; the `loss`, a mean over seeds.
    """
    images, labels = batch["images"], batch["labels"]
    if "index" in batch:
        images, labels = images[batch["index"]], labels[batch["index"]]
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
        fold(key, batch["seed"]), state.step
    )
    losses = jax.vmap(
        functools.partial(_loss, recipe=recipe), in_axes=(0, 0, 1, 1, 1, 0)
    )

    def total(params):
        parts = (images, labels, batch["weight"], keys)
        values, stats = losses(params, state.batch_stats, *parts)
        return values.sum(), (values.mean(), stats)  # each seed's gradient is its own

    grads, (loss, stats) = jax.grad(total, has_aux=True)(state.params)
    new = state.update(grads, tx, ema_decay=recipe.ema_decay)
    return new.replace(batch_stats=stats), {"loss": loss}


def _loss(params, batch_stats, images, labels, weight, key, *, recipe: Recipe):
    """Cross entropy of one seed's batch, and the statistics after it."""
    keys = rng.example_keys(key, jnp.arange(len(labels)))
    policy_keys, model_keys = rng.use_keys(keys, 2)
    images = images.astype(jnp.float32)
    if POLICIES[recipe.policy]:
        images = jax.vmap(POLICIES[recipe.policy])(policy_keys, images)
    logits, updated = recipe.model.apply(
        {"params": params, "batch_stats": batch_stats},
        recipe.normalised(images),
        train=True,
        mask=weight > 0,
        rngs={"dropout": model_keys[0]},
        mutable=["batch_stats"],
    )
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(targets, recipe.label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    if recipe.class_weights:
        weight = weight * jnp.asarray(recipe.class_weights)[labels]
    return loop.weighted_mean(losses, weight), updated.get("batch_stats", {})


def predictor(
    recipe: Recipe, mesh: Mesh, *, batch_size: int
) -> Callable[[ClassifierState, UInt8[np.ndarray, "T H W 3"]], np.ndarray]:
    """A function from state and images to class probabilities [S, T, K], fp32.

    It is compiled once, and takes the averaged parameters where there are any.
    """
    size = sharding.padded_size(batch_size, mesh)
    function = jax.jit(functools.partial(_probabilities, recipe=recipe))

    def predict(state: ClassifierState, images: np.ndarray) -> np.ndarray:
        variables = {"params": state.averaged, "batch_stats": state.batch_stats}
        found = []
        for start in range(0, len(images), size):
            part = np.asarray(images[start : start + size])
            placed = jax.device_put(
                sharding.pad_rows(part, size), sharding.batch_sharding(mesh)
            )
            found.append((function(variables, placed), len(part)))
        return np.concatenate([np.asarray(p)[:, :n] for p, n in found], axis=1)

    return predict


def _probabilities(
    variables: Any, images: UInt8[Array, "B H W 3"], *, recipe: Recipe
) -> Float[Array, "S B K"]:
    images = recipe.normalised(images.astype(jnp.float32))
    logits = jax.vmap(lambda v: recipe.model.apply(v, images))(variables)
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def one_seed(state: ClassifierState, index: int) -> dict[str, Any]:
    """`{"params", "batch_stats"}` of one of the stacked classifiers, on the host."""
    kept = {"params": state.averaged, "batch_stats": state.batch_stats}
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), kept)
