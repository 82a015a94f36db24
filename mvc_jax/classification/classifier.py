"""A classifier in training: its state, its step, its predictions.

Not a stage but a part of one, `classify`: what it composes of models, augmentation and
training. Seeds are trained side by side, stacked on the first axis of the state: they
share the images and nothing else.

Legend: S seeds, B batch, R rows of the image array, K classes, T images to predict.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from mvc_jax import augment
from mvc_jax.augment.mixup import cutmix, mixup
from mvc_jax.checkpoints.classifier_weights import head_of
from mvc_jax.training import loop, rng, sharding

_MIXES = {"mixup": mixup, "cutmix": cutmix}
_WHOLE: sharding.Rules = ((r".*", "replicate"),)  # classifiers fit on one device
_HALF = (0.5, 0.5, 0.5)
# Initialisation runs once and may compile for minutes: PyramidNet-272's on two cores
# for more than 8, and with these for a minute and a half. It is level 0 that helps, and
# it may change a weight's last bits: fewer kernels are drawn with XLA's usual options.
_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_MANY_KERNELS = 100
Fields = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; hashable, so that a step is compiled once for it.

    Attributes:
      model: takes images [B, H, W, 3], `train`, `mask` [B]; gives logits [B, K].
      mean, std: of the colours of images in [0, 1], which it wants as 0 and 1.
      policy: of each image, of `augment.names()`.
      policy_fields: pairs (name, value) of the policy's fields.
      mix: of a batch, `mixup` or `cutmix`; "": none.
      alpha: of the mix.
      label_smoothing: share of the label that is spread over all classes.
      class_weights: K weights of the loss; (): all weigh alike.
      ema_decay: of the averaged parameters; 0: none are kept.
    """

    model: nn.Module
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    policy: str = "none"
    policy_fields: Fields = ()
    mix: str = ""
    alpha: float = 1.0
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
    keys: Key[Array, " S"],
    mesh: Mesh,
    *,
    image_shape: tuple[int, int, int],
    pretrained: Mapping[str, Any] | None = None,
) -> ClassifierState:
    """S classifiers at step 0, replicated on `mesh`.

    Args:
      recipe: of all of them.
      tx: the optimiser.
      keys: of the initialisation, one a classifier.
      image_shape: H, W, 3.
      pretrained: `{"params", "batch_stats"}` to start from, all but the last layer,
        which is always drawn; None: everything is.
    """
    variables = _initialiser(recipe.model, image_shape)(keys)
    if pretrained is not None:
        head = head_of(recipe.model)
        heads = {head: variables["params"][head]}
        variables = jax.tree.map(
            lambda leaf: jnp.repeat(leaf[None], len(keys), axis=0), dict(pretrained)
        )
        variables["params"] = {**variables["params"], **heads}
    params, zero = variables["params"], np.zeros((), np.int32)
    ema = params if recipe.ema_decay else None
    stats = variables.get("batch_stats", {})
    opt_state = jax.jit(tx.init)(params)
    state = ClassifierState(zero, params, opt_state, zero, zero, ema, stats)
    shardings = sharding.tree_shardings(state, mesh, _WHOLE)
    # No two leaves may share a buffer: they are donated.
    return jax.device_put(state, shardings, may_alias=False)


@functools.cache
def _initialiser(model: nn.Module, image_shape: tuple[int, int, int]) -> Callable:
    """From keys [S] to the variables that they draw, stacked."""
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    kernels = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(shapes["params"]))
    options = _QUICKLY if kernels > _MANY_KERNELS else None
    init = jax.vmap(lambda key: model.init(key, images))
    return jax.jit(init, compiler_options=options)


def train_step(
    state: ClassifierState,
    batch: dict[str, Array],
    *,
    recipe: Recipe,
    tx: optax.GradientTransformation,
) -> tuple[ClassifierState, dict[str, Array]]:
    """One step of each seed on batches of its own.

    A seed whose loss or gradient is not finite stays as it is, and the others go on;
    the step counts as skipped.

    Args:
      state: of S seeds.
      batch: `keys` uint32 [S, 2], of which slot b of step n draws by (key, n, b);
        `weight` [B, S], 0 for slots that do not count; and either the whole dataset,
        `images` uint8 [R, H, W, 3] and `labels` int32 [R], with `index` int32 [B, S]
        into it; or what a stream has read of it, `images` [B, S, H, W, 3] and `labels`
        [B, S]. `rates` [steps] are the learning rates.
      recipe: of the classifier.
      tx: the optimiser, its own learning rate 1.

    Returns:
      the next state; the `loss`, a mean over seeds.
    """
    images, labels = batch["images"], batch["labels"]
    if "index" in batch:
        images, labels = images[batch["index"]], labels[batch["index"]]
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
        jax.random.wrap_key_data(batch["keys"]), state.step
    )
    losses = jax.vmap(
        functools.partial(_loss, recipe=recipe), in_axes=(0, 0, 1, 1, 1, 0)
    )

    def total(params):
        parts = (images, labels, batch["weight"], keys)
        values, stats = losses(params, state.batch_stats, *parts)
        return values.sum(), (values, stats)  # each seed's gradient is its own

    grads, (values, stats) = jax.grad(total, has_aux=True)(state.params)
    new = state.update(
        grads,
        tx,
        {"loss": values},
        ema_decay=recipe.ema_decay,
        rate=batch["rates"][state.step],
        apart=True,
        batch_stats=stats,
    )
    return new, {"loss": values.mean()}


def _loss(params, batch_stats, images, labels, weight, key, *, recipe: Recipe):
    """Cross entropy of one seed's batch, and the statistics after it."""
    image_key, mix_key, model_key = jax.random.split(key, 3)
    if recipe.policy != "none":
        policy = augment.policy(recipe.policy, **dict(recipe.policy_fields))
        keys = rng.example_keys(image_key, jnp.arange(len(labels)))
        images = jax.vmap(policy)(keys, images)
    images = images.astype(jnp.float32)
    targets = jax.nn.one_hot(labels, recipe.model.num_classes)
    if recipe.mix:
        images, targets = _MIXES[recipe.mix](
            mix_key, images, targets, weight, alpha=recipe.alpha
        )
    logits, updated = recipe.model.apply(
        {"params": params, "batch_stats": batch_stats},
        recipe.normalised(images),
        train=True,
        mask=weight > 0,
        rngs={"dropout": model_key},
        mutable=["batch_stats"],
    )
    if recipe.class_weights:
        weight = weight * (targets @ jnp.asarray(recipe.class_weights))
    targets = optax.smooth_labels(targets, recipe.label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
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
