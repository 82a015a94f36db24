"""A classifier's training step, initial state and predictions.

`train_step` is the step of one seed. `train_seeds` is `jax.vmap` of it: several seeds
are trained side by side, stacked on the first axis of the state; they share the images
and nothing else.

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

from mvc_jax import augment, processes
from mvc_jax.augment.mixup import cutmix, mixup
from mvc_jax.checkpoints.classifier_weights import head_name
from mvc_jax.training import loop, optim, rng, sharding

_MIXES = {"mixup": mixup, "cutmix": cutmix}
_REPLICATED: sharding.Rules = ((r".*", "replicate"),)  # classifiers fit on one device
_HALF = (0.5, 0.5, 0.5)
# Initialisation runs once but compiles for long: ResNet-8's takes 10 s of a core, and
# 2.4 at level 1, which draws the same bits.
FAST_COMPILE_OPTIONS = {"xla_backend_optimization_level": 1}
# PyramidNet-272's takes more than 8 minutes on two cores, and 1.5 with these options,
# which may change the last bits of a weight.
FASTEST_COMPILE_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_MANY_KERNELS = 100
Fields = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
    """A network with its preprocessing, augmentation and loss.

    It is hashable: a step is compiled once for each spec.

    Attributes:
      model: maps images [B, H, W, 3], `train` and `mask` [B] to logits [B, K].
      mean, std: per channel, of pixels in [0, 1]; the network's input is
        (pixel - mean) / std.
      policy: augmentation policy of each image, one of `augment.NAMES`.
      policy_fields: (name, value) pairs that override the policy's defaults.
      mix: augmentation of a whole batch, `mixup` or `cutmix`; "" for none.
      alpha: parameter of the mix's Beta distribution.
      label_smoothing: probability mass that is spread over all classes, in [0, 1].
      class_weights: K weights of the loss; () for equal weights.
      ema_decay: decay of the averaged parameters and batch statistics; 0 keeps no
        average.
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

    def normalize(self, images: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
        """Maps images in [0, 255] to the network's input."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (images / 255.0 - mean.reshape(shape)) / std.reshape(shape)


@flax.struct.dataclass
class ClassifierState(loop.TrainState):
    """`loop.TrainState` with the running statistics of batch normalisation.

    Of S stacked seeds, every leaf but `step` and the counts of skipped steps has a
    leading axis [S].
    """

    batch_stats: Any = None
    ema_batch_stats: Any = None

    @property
    def averaged_variables(self) -> dict[str, Any]:
        """`{"params", "batch_stats"}`, averaged where there is an average.

        Averaged parameters give other activations than the present ones, which the
        running statistics of those would not normalise.
        """
        averaged = self.ema_params is not None
        stats = self.ema_batch_stats if averaged else self.batch_stats
        return {"params": self.averaged, "batch_stats": stats}


def create_state(
    spec: ClassifierSpec,
    tx: optax.GradientTransformation,
    keys: Key[Array, " S"],
    mesh: Mesh,
    *,
    image_shape: tuple[int, int, int],
    pretrained: Mapping[str, Any] | None = None,
) -> ClassifierState:
    """Initialises S classifiers at step 0, replicated on `mesh`.

    Args:
      spec: of all S classifiers.
      tx: the optimiser.
      keys: initialisation keys, one per classifier.
      image_shape: (H, W, 3).
      pretrained: `{"params", "batch_stats"}` of the network without its head, to start
        from; the head is always initialised at random. None: so is the network.
    """
    init = _initializer(spec.model, tx, image_shape)
    variables, opt_state = init(keys, pretrained)
    params, zero = variables["params"], np.zeros((), np.int32)
    stats = variables.get("batch_stats", {})
    state = ClassifierState(
        step=zero,
        params=params,
        opt_state=opt_state,
        skipped=zero,
        skipped_in_a_row=zero,
        ema_params=params if spec.ema_decay else None,
        batch_stats=stats,
        ema_batch_stats=stats if spec.ema_decay else None,
    )
    shardings = sharding.tree_shardings(state, mesh, _REPLICATED)
    # Leaves are donated, so no two of them may share a buffer.
    if processes.count() > 1:
        return sharding.place(state, shardings)
    return jax.device_put(state, shardings, may_alias=False)


@functools.cache
def count_parameters(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Number of parameters and statistics of a network; starts no backend."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)))
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@functools.cache
def _initializer(
    model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, ...]
) -> Callable:
    """Returns a jitted function: keys [S], pretrained -> stacked variables, moments."""
    images = jnp.zeros((1, *image_shape))
    head = head_name(model)

    def init(key, pretrained):
        variables = model.init(key, images)
        if pretrained is not None:
            heads = {head: variables["params"][head]}
            variables = {**pretrained, "params": {**pretrained["params"], **heads}}
        return variables, tx.init(variables["params"])

    options = init_options(model, image_shape)
    return jax.jit(jax.vmap(init, in_axes=(0, None)), compiler_options=options)


def init_options(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The compiler's options for a network's initialisation, which runs once."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    kernels = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(shapes["params"]))
    many = kernels > _MANY_KERNELS
    return FASTEST_COMPILE_OPTIONS if many else FAST_COMPILE_OPTIONS


def train_step(
    state: ClassifierState,
    batch: dict[str, Array],
    *,
    spec: ClassifierSpec,
    tx: optax.GradientTransformation,
) -> tuple[ClassifierState, dict[str, Array]]:
    """Trains one classifier for one step.

    Args:
      state: of one seed. If its loss or gradient is not finite, the step is skipped.
      batch: `key` uint32 [2], a key's data, from which slot b of step n draws by
        (key, n, b); `weight` [B], 0 for slots that do not count; `rates` [steps], the
        learning rates; and either the whole dataset, `images` uint8 [R, H, W, 3] and
        `labels` int32 [R], with `index` int32 [B] into it, or the batch itself,
        `images` [B, H, W, 3] and `labels` [B]. Soft labels are float32, with a last
        axis [K].
      spec: the classifier.
      tx: the optimiser, whose own learning rate is 1.

    Returns:
      the next state, and metrics: `loss`.
    """
    images, labels = batch["images"], batch["labels"]
    if "index" in batch:
        images, labels = images[batch["index"]], labels[batch["index"]]
    key = jax.random.fold_in(jax.random.wrap_key_data(batch["key"]), state.step)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return _loss(variables, images, labels, batch["weight"], key, spec=spec)

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss}
    ema_stats = state.ema_batch_stats
    if ema_stats is not None:
        ema_stats = optim.ema_update(ema_stats, stats, state.step, spec.ema_decay)
    new = state.update(
        grads,
        tx,
        metrics,
        ema_decay=spec.ema_decay,
        rate=batch["rates"][state.step],
        batch_stats=stats,
        ema_batch_stats=ema_stats,
    )
    return new, metrics


def train_seeds(
    state: ClassifierState,
    batch: dict[str, Array],
    *,
    spec: ClassifierSpec,
    tx: optax.GradientTransformation,
) -> tuple[ClassifierState, dict[str, Array]]:
    """Trains S classifiers for one step: `jax.vmap` of `train_step` over seeds.

    Args:
      state: of S seeds.
      batch: as for `train_step`, with `key` [S, 2], `index` and `weight` [B, S], and
        `images` and `labels` [B, S, ...] if there is no `index`.
      spec: of all S classifiers.
      tx: the optimiser, whose own learning rate is 1.

    Returns:
      the next state, in which the step counts as skipped if any seed skipped it; and
      metrics averaged over seeds.
    """
    step = functools.partial(train_step, spec=spec, tx=tx)
    stacked = {"key": 0, "index": 1, "weight": 1}
    if "index" not in batch:
        stacked |= {"images": 1, "labels": 1}
    axes = {name: stacked.get(name) for name in batch}
    if len(batch["key"]) == 1:
        # Without vmap, which turns the condition of `update` into a selection between
        # the old state and the new one, and so keeps both.
        alone = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, state)
        rows = {
            name: array if axes[name] is None else jnp.squeeze(array, axes[name])
            for name, array in batch.items()
        }
        new, metrics = step(alone, rows)
        return jax.tree.map(lambda x, old: x.reshape(old.shape), new, state), metrics
    shared = {"step": None, "skipped": None, "skipped_in_a_row": None}
    seeds = jax.tree.map(lambda _: 0, state).replace(**shared)
    counted = seeds.replace(skipped=0, skipped_in_a_row=0)
    new, metrics = jax.vmap(step, in_axes=(seeds, axes), out_axes=(counted, 0))(
        state, batch
    )
    new = new.replace(
        skipped=new.skipped.max(), skipped_in_a_row=new.skipped_in_a_row.max()
    )
    return new, jax.tree.map(jnp.mean, metrics)


def _loss(variables, images, labels, weight, key, *, spec: ClassifierSpec):
    """Weighted mean cross entropy of a batch, and the batch statistics after it."""
    image_key, mix_key, model_key = jax.random.split(key, 3)
    if spec.policy != "none":
        policy = augment.policy(spec.policy, **dict(spec.policy_fields))
        keys = rng.example_keys(image_key, jnp.arange(len(labels)))
        images = jax.vmap(policy)(keys, images)
    images = images.astype(jnp.float32)
    targets = labels  # soft
    if labels.ndim == 1:
        targets = jax.nn.one_hot(labels, spec.model.num_classes)
    if spec.mix:
        images, targets = _MIXES[spec.mix](
            mix_key, images, targets, weight, alpha=spec.alpha
        )
    logits, updated = spec.model.apply(
        variables,
        spec.normalize(images),
        train=True,
        mask=weight > 0,
        rngs={"dropout": model_key},
        mutable=["batch_stats"],
    )
    if spec.class_weights:
        weight = weight * (targets @ jnp.asarray(spec.class_weights))
    targets = optax.smooth_labels(targets, spec.label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    return loop.weighted_mean(losses, weight), updated.get("batch_stats", {})


def predictor(
    spec: ClassifierSpec, mesh: Mesh, *, batch_size: int
) -> Callable[[ClassifierState, UInt8[np.ndarray, "T H W 3"]], np.ndarray]:
    """Returns a function from state and images to class probabilities [S, T, K], fp32.

    It is compiled once, and uses the averages if there are any.
    """
    size = sharding.padded_size(batch_size, mesh)
    function = jax.jit(functools.partial(_probabilities, spec=spec))

    def predict(state: ClassifierState, images: np.ndarray) -> np.ndarray:
        variables, found = state.averaged_variables, []
        for start in range(0, len(images), size):
            part = np.asarray(images[start : start + size])
            batch = sharding.place(
                sharding.pad_rows(part, size), sharding.batch_sharding(mesh)
            )
            found.append((function(variables, batch), len(part)))
        fetched = ((np.asarray(sharding.readable(p)), n) for p, n in found)
        return np.concatenate([p[:, :n] for p, n in fetched], axis=1)

    return predict


def _probabilities(
    variables: Any, images: UInt8[Array, "B H W 3"], *, spec: ClassifierSpec
) -> Float[Array, "S B K"]:
    images = spec.normalize(images.astype(jnp.float32))
    logits = jax.vmap(lambda v: spec.model.apply(v, images))(variables)
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def unstack(state: ClassifierState) -> list[dict[str, Any]]:
    """`{"params", "batch_stats"}` of each of the stacked classifiers, on the host."""
    stacked = sharding.to_host(state.averaged_variables)
    seeds = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(seeds)]
