"""Real, synthetic -> classifiers, one per run and seed, at equal optimiser steps.

Reads: the training and test images, the sets of `generate/`. Writes:
`results/<run>.json`: accuracy and predictions on test, once at the end of each fit.

A run is named `<regime>[:<set>][+<policy>]`, e.g. `combined:unmixed+affine`.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.augment.affine import random_affine
from mvc_jax.data import decode, manifest, splits, synthetic
from mvc_jax.data.regimes import REGIMES, schedule
from mvc_jax.errors import UserError, require
from mvc_jax.models import resnet
from mvc_jax.training import rng, sharding
from mvc_jax.training.console import Progress
from mvc_jax.training.loop import weighted_mean
from mvc_jax.training.metrics import MetricsLog

POLICIES = {"none": None, "affine": random_affine}


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the table: how real and synthetic images meet, and what bends them."""

    name: str
    regime: str
    set: str
    policy: str


def parse_run(name: str) -> Run:
    """`"two_phase:unmixed+affine"` -> its parts; the set defaults to `mixed`.

    Raises:
      UserError: a part is unknown.
    """
    head, plus, policy = name.partition("+")
    regime, colon, set_ = head.partition(":")
    run_ = Run(
        name, regime, "" if regime == "real" else set_ or "mixed", policy or "none"
    )
    good = run_.regime in REGIMES and run_.policy in POLICIES
    good = good and bool(plus) == bool(policy) and bool(colon) == bool(set_)
    require(
        good and not (regime == "real" and set_),
        "config.classify.runs",
        wanted=f"<regime>[:<set>][+<policy>] with a regime of {', '.join(REGIMES)} "
        f"(real takes no set) and a policy of {', '.join(POLICIES)}",
        got=repr(name),
        fix="Mend this run's name.",
    )
    return run_


def check(config: ConfigDict) -> None:
    """Checks the section `classify`."""
    section = config.classify
    runs = [parse_run(name) for name in section.runs]
    for run_ in runs:
        require(
            not run_.set or run_.set in config.generate.sets,
            "config.classify.runs",
            wanted=f"a set of config.generate.sets {tuple(config.generate.sets)}",
            got=repr(run_.name),
            fix="Add the set there or take the run out.",
        )
    require(
        len({(r.regime, r.set, r.policy) for r in runs}) == len(runs) > 0,
        "config.classify.runs",
        wanted="at least one run, each once",
        got=tuple(section.runs),
        fix="Mend the list.",
    )
    require(
        section.model in resnet.VARIANTS,
        "config.classify.model",
        wanted=f"one of {', '.join(resnet.VARIANTS)}",
        got=repr(section.model),
        fix="Name one of these.",
    )
    for field in ("seeds", "steps", "batch_size", "width", "stem_stride"):
        require(
            section[field] > 0,
            f"config.classify.{field}",
            wanted="at least 1",
            got=section[field],
            fix="Raise it.",
        )
    require(
        0 <= section.size <= config.data.size,
        "config.classify.size",
        wanted=f"at most config.data.size={config.data.size}, or 0 for that",
        got=section.size,
        fix="Lower it.",
    )
    require(
        0 < section.learning_rate < float("inf"),
        "config.classify.learning_rate",
        wanted="a number above 0",
        got=section.learning_rate,
        fix="Adam's usual one is 0.001.",
    )
    for field in ("probability", "phase_two"):
        require(
            0 <= section[field] <= 1,
            f"config.classify.{field}",
            wanted="a number in [0, 1]",
            got=section[field],
            fix="The paper's p is 0.8.",
        )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains and tests every run; results that exist are kept."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings["classify"] = config.classify.to_dict()
    stage = manifest.open_stage(workdir, "classify", settings, inputs=("generate",))
    if stage.complete:
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    section = config.classify
    runs = [parse_run(name) for name in section.runs]
    data, test, ranges = _load(workdir, runs, config)
    model = resnet.VARIANTS[section.model](
        num_classes=int(data["labels"].max()) + 1,
        width=section.width,
        stem_stride=section.stem_stride,
    )
    data = jax.device_put(data, sharding.replicated(mesh))
    test_images = jax.device_put(test.images, sharding.replicated(mesh))
    log = MetricsLog(workdir, "classify")
    progress = Progress("classify", len(runs) * section.seeds, unit="fit")
    artifacts = []
    for run_ in runs:
        path = stage.folder / "results" / f"{_plain(run_.name)}.json"
        artifacts.append(f"results/{path.name}")
        if path.exists():
            progress.advance(section.seeds)
            continue
        result = dataclasses.asdict(run_) | {"seeds": []}
        for seed in range(section.seeds):
            rows = _rows(run_, section, ranges, config.seed, seed)
            result |= _examples_seen(rows, ranges)
            state, losses = fit(
                data,
                _place(rows, mesh),
                rng.purpose_key(config.seed, f"classify/{seed}"),
                model=model,
                policy=run_.policy,
                weight_decay=section.weight_decay,
            )
            _log_losses(log, f"loss/{_plain(run_.name)}/{seed}", losses)
            predicted = np.asarray(predict(state, test_images, model=model))
            accuracy = float((predicted == test.labels).mean())
            row = {"accuracy": accuracy, "predictions": predicted.tolist()}
            result["seeds"].append(row)
            progress.advance(1, accuracy=accuracy)
        files.write_json(path, result)
    progress.close()
    log.close()
    stage.finish(artifacts, runs=len(runs), fits=len(runs) * section.seeds)


def _load(workdir: epath.Path, runs: list[Run], config: ConfigDict):
    """All images in one array, real ones first, and each set's range in it."""
    caption, size = workdir / "caption", config.classify.size
    fit = {"resize": config.data.resize, "resample": config.data.resample}
    fit["size"] = config.data.size  # whatever size they were stored at
    train, test = (splits.read_split(caption, name) for name in ("train", "test"))
    images, labels = [_smaller(train.images, size)], [train.labels]
    ranges = {"": (0, len(train.labels))}
    for name in sorted({run_.set for run_ in runs} - {""}):
        folder = workdir / "generate" / name
        drawn, drawn_labels, _ = synthetic.read_images(folder, **fit)
        first = sum(map(len, labels))
        ranges[name] = (first, first + len(drawn_labels))
        images.append(_smaller(drawn, size))
        labels.append(drawn_labels)
    data = {"images": np.concatenate(images), "labels": np.concatenate(labels)}
    return data, dataclasses.replace(test, images=_smaller(test.images, size)), ranges


def _smaller(images: UInt8[np.ndarray, "N H W 3"], size: int):
    """All images at `size` pixels by area; 0: as they are."""
    if not size:
        return images
    return np.stack([decode.fit(image, size, resample="area") for image in images])


def _rows(run_: Run, section: ConfigDict, ranges: dict, seed: int, repeat: int):
    """Every batch of one fit, by the run's regime and the config."""
    return schedule(
        run_.regime,
        ranges[""],
        ranges[run_.set] if run_.set else (0, 0),
        seed=seed,
        repeat=repeat,
        steps=section.steps,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        probability=section.probability,
        phase_two=section.phase_two,
        phase_two_rate=section.phase_two_rate,
    )


def _plain(name: str) -> str:
    """A run's name as a file's name and a TensorBoard tag."""
    return name.replace(":", "-").replace("+", "_")


def _place(rows: dict, mesh) -> dict:
    size = sharding.padded_size(rows["index"].shape[1], mesh)
    placed = {
        name: jax.device_put(
            sharding.pad_rows(rows[name], size, 1), sharding.batch_sharding(mesh, 1)
        )
        for name in ("index", "weight")
    }
    return placed | {"rate": jax.device_put(rows["rate"], sharding.replicated(mesh))}


def _examples_seen(rows: dict, ranges: dict) -> dict[str, int]:
    counted = rows["index"][rows["weight"] > 0]
    real = int((counted < ranges[""][1]).sum())
    return {"real_seen": real, "synthetic_seen": int(counted.size) - real}


@flax.struct.dataclass
class State:
    """A classifier in training; `step` alone fixes its batch and its randomness."""

    step: Any  # int32 []
    params: Any
    batch_stats: Any
    opt_state: Any


def fit(
    data: dict[str, Array],
    rows: dict[str, Array],
    key: Array,
    *,
    model: nn.Module,
    policy: str,
    weight_decay: float,
) -> tuple[State, Float[np.ndarray, " steps"]]:
    """One classifier from initialisation to its last step.

    Args:
      data: `images` uint8 [N, H, W, 3] and `labels` int32 [N].
      rows: of `regimes.schedule`, on the devices.
      key: of initialisation and augmentation.
      model: of `models.resnet`.
      policy: a key of `POLICIES`.
      weight_decay: decoupled, on kernels.

    Returns:
      the last state and the loss of each step.
    """
    init_key, augment_key = jax.random.split(key)
    state = init_state(init_key, data["images"][:1], model, weight_decay)
    losses = []
    for _ in range(len(rows["rate"])):
        state, loss = train_step(
            state,
            data,
            rows,
            augment_key,
            model=model,
            policy=policy,
            weight_decay=weight_decay,
        )
        losses.append(loss)
    return state, np.asarray(jax.device_get(losses))


@functools.partial(jax.jit, static_argnames=("model", "weight_decay"))
def init_state(key: Array, images: Array, model: nn.Module, weight_decay: float):
    variables = model.init(key, _scaled(images))
    opt_state = _adam(weight_decay).init(variables["params"])
    step = jnp.zeros((), jnp.int32)
    return State(step, variables["params"], variables["batch_stats"], opt_state)


@functools.partial(
    jax.jit, static_argnames=("model", "policy", "weight_decay"), donate_argnums=0
)
def train_step(
    state: State,
    data: dict[str, Array],
    rows: dict[str, Array],
    key: Array,
    *,
    model: nn.Module,
    policy: str,
    weight_decay: float,
) -> tuple[State, Float[Array, ""]]:
    """One step of Adam with decoupled weight decay; returns the next state and loss."""
    row = {name: array[state.step] for name, array in rows.items()}
    images, labels = _scaled(data["images"][row["index"]]), data["labels"][row["index"]]
    if POLICIES[policy]:
        step_key = jax.random.fold_in(key, state.step)
        keys = rng.example_keys(step_key, jnp.arange(len(labels)))
        images = jax.vmap(POLICIES[policy])(keys, images)

    def loss_of(params):
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mask=row["weight"] > 0,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return weighted_mean(losses, row["weight"]), updated["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = _adam(weight_decay).update(
        grads, state.opt_state, state.params
    )
    updates = jax.tree.map(lambda u: -row["rate"] * u, updates)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, stats, opt_state), loss


@functools.partial(jax.jit, static_argnames="model")
def predict(state: State, images: Array, *, model: nn.Module):
    """Predicted labels int32 [T] of uint8 images [T, H, W, 3]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return model.apply(variables, _scaled(images)).argmax(-1)


def _adam(weight_decay: float) -> optax.GradientTransformation:
    """Adam and the decay of kernels; the rate of each step is in its row."""
    decay = optax.add_decayed_weights(
        weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    )
    return optax.chain(optax.scale_by_adam(), decay)


def _scaled(images: Array) -> Array:
    """uint8 [0, 255] -> float [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def _log_losses(log: MetricsLog, name: str, losses: np.ndarray) -> None:
    if not np.isfinite(losses).all():
        raise UserError(
            name,
            wanted="a finite training loss",
            got=f"{losses[~np.isfinite(losses)][0]}",
            fix="Lower config.classify.learning_rate.",
        )
    every = max(len(losses) // 10, 1)
    for start in range(0, len(losses), every):
        part = losses[start : start + every]
        log.write(start + len(part), **{name: part.mean()})
