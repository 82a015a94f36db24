"""Real, synthetic -> classifiers, one per run and seed, at equal optimiser steps.

Reads: the training and test images, the sets of `generate/`. Writes:
`results/<run>.json`: accuracy and predictions on test, once at the end of each fit.

A run is named `<regime>[:<set>][+<policy>]`, e.g. `combined:unmixed+affine`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.augment.affine import random_affine
from mvc_jax.data import manifest, order, splits, synthetic
from mvc_jax.errors import UserError, require
from mvc_jax.models import resnet
from mvc_jax.training import rng, sharding
from mvc_jax.training.loop import weighted_mean
from mvc_jax.training.metrics import MetricsLog, Progress

REGIMES = ("real", "combined", "two_phase", "probabilistic")
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
    head, _, policy = name.partition("+")
    regime, _, set_ = head.partition(":")
    run_ = Run(name, regime, "" if regime == "real" else set_ or "mixed", policy or "none")
    good = run_.regime in REGIMES and run_.policy in POLICIES
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
    for run_ in map(parse_run, section.runs):
        require(
            not run_.set or run_.set in config.generate.sets,
            "config.classify.runs",
            wanted=f"a set of config.generate.sets {tuple(config.generate.sets)}",
            got=repr(run_.name),
            fix="Add the set there or take the run out.",
        )
    require(
        len(set(section.runs)) == len(section.runs) > 0,
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
    runs = [parse_run(name) for name in config.classify.runs]
    data, test, ranges = _load(config, workdir, runs)
    section = config.classify
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
        path = stage.folder / "results" / f"{run_.name.replace(':', '-')}.json"
        artifacts.append(f"results/{path.name}")
        if not path.exists():
            result = dataclasses.asdict(run_) | {"seeds": []}
            for seed in range(section.seeds):
                rows = schedule_rows(run_, section, ranges, config.seed, seed)
                result |= _examples_seen(rows, ranges)
                predictions, losses = fit(
                    data,
                    test_images,
                    _place(rows, mesh),
                    rng.purpose_key(config.seed, f"classify/{seed}"),
                    model=model,
                    policy=run_.policy,
                    weight_decay=section.weight_decay,
                )
                predictions = np.asarray(predictions)
                accuracy = float((predictions == test.labels).mean())
                result["seeds"].append(
                    {"accuracy": accuracy, "predictions": predictions.tolist()}
                )
                name = f"loss/{run_.name}/{seed}".replace(":", "-")
                _log_losses(log, name, np.asarray(losses))
                progress.advance(1, accuracy=accuracy)
            files.write_json(path, result)
        else:
            progress.advance(section.seeds)
    progress.close()
    log.close()
    stage.finish(artifacts, runs=len(runs), fits=len(runs) * section.seeds)


def _load(config: ConfigDict, workdir: epath.Path, runs: list[Run]):
    """All images in one array, real ones first, and each set's range in it."""
    read = functools.partial(
        splits.read_split,
        workdir / "caption" / "splits.json",
        source=config.data.source,
        size=config.data.size,
    )
    train, test = read("train"), read("test")
    images, labels = [train.images], [train.labels]
    ranges = {"": (0, len(train.labels))}
    for name in sorted({run_.set for run_ in runs} - {""}):
        drawn, drawn_labels, _ = synthetic.read_images(workdir / "generate" / name)
        first = sum(map(len, labels))
        ranges[name] = (first, first + len(drawn_labels))
        images.append(drawn)
        labels.append(drawn_labels)
    data = {"images": np.concatenate(images), "labels": np.concatenate(labels)}
    return data, test, ranges


def schedule_rows(
    run_: Run,
    section: ConfigDict,
    ranges: dict[str, tuple[int, int]],
    seed: int,
    repeat: int,
) -> dict[str, np.ndarray]:
    """Every batch of one fit, as indices into the array of all images.

    `real`: real images. `combined`: real and synthetic as one dataset. `two_phase`:
    `combined`, then real only, at a smaller rate, for the share `phase_two` of the
    steps. `probabilistic`: a real batch, and beside each slot a synthetic image with
    probability p. Regimes after the supplement.

    Args:
      run_: the run.
      section: `config.classify`.
      ranges: first and last + 1 of the real images (`""`) and of each set.
      seed: of the config.
      repeat: which classifier; the same for all runs means the same initialisation.

    Returns:
      `index` int32 and `weight` float32 [steps, B'], `rate` float32 [steps].
    """
    steps, batch_size = section.steps, section.batch_size
    real = np.arange(*ranges[""], dtype=np.int32)
    drawn = np.arange(*ranges[run_.set], dtype=np.int32) if run_.set else real[:0]
    everything = np.concatenate([real, drawn])

    def batches(pool: np.ndarray, purpose: str, first: int, last: int) -> np.ndarray:
        purpose = f"classify/{repeat}/{purpose}"
        rows = [
            pool[
                order.batch_indices(
                    seed, purpose, step, batch_size=batch_size, size=len(pool)
                )
            ]
            for step in range(first, last)
        ]
        return np.asarray(rows, np.int32).reshape(last - first, batch_size)

    turn = steps
    if run_.regime == "two_phase":
        turn = steps - round(steps * section.phase_two)
    if run_.regime in ("real", "probabilistic"):
        index = batches(real, "real", 0, steps)
    else:
        index = np.concatenate(
            [
                batches(everything, "combined", 0, turn),
                batches(real, "real", turn, steps),
            ]
        )
    weight = np.ones(index.shape, np.float32)
    if run_.regime == "probabilistic":
        draw = order.generator(seed, f"classify/{repeat}/probabilistic")
        extra = (draw.random(index.shape) < section.probability).astype(np.float32)
        index = np.concatenate(
            [index, batches(drawn, "synthetic", 0, steps)], axis=1
        )
        weight = np.concatenate([weight, extra], axis=1)
    rates = [_cosine(section.learning_rate, turn)]
    rates.append(_cosine(section.learning_rate * section.phase_two_rate, steps - turn))
    return {"index": index, "weight": weight, "rate": np.concatenate(rates)}


def _cosine(peak: float, steps: int) -> np.ndarray:
    """A half cosine from `peak` to 0 in `steps` steps."""
    return (peak * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1)))).astype(
        np.float32
    )


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


@functools.partial(jax.jit, static_argnames=("model", "policy", "weight_decay"))
def fit(
    data: dict[str, Array],
    test_images: Array,
    rows: dict[str, Array],
    key: Array,
    *,
    model: nn.Module,
    policy: str,
    weight_decay: float,
) -> tuple[Array, Float[Array, " steps"]]:
    """One classifier from initialisation to test, in one compiled call.

    Adam with decoupled weight decay on kernels, by the rates in `rows`.

    Args:
      data: `images` uint8 [N, H, W, 3] and `labels` int32 [N].
      test_images: uint8 [T, H, W, 3].
      rows: of `schedule_rows`.
      key: of initialisation and augmentation.
      model: of `models.resnet`.
      policy: a key of `POLICIES`.
      weight_decay: decoupled.

    Returns:
      predicted labels [T] and the loss of each step.
    """
    init_key, augment_key = jax.random.split(key)
    variables = model.init(init_key, _scaled(test_images[:1]))
    tx = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(
            weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
        ),
    )

    def train_step(carry, row):
        variables, opt_state, step = carry
        images, labels = _scaled(data["images"][row["index"]]), data["labels"][row["index"]]
        if POLICIES[policy]:
            keys = rng.example_keys(
                jax.random.fold_in(augment_key, step), jnp.arange(len(labels))
            )
            images = jax.vmap(POLICIES[policy])(keys, images)

        def loss_of(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mask=row["weight"] > 0,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return weighted_mean(losses, row["weight"]), updated

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, updated), grads = value_and_grad(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        updates = jax.tree.map(lambda u: -row["rate"] * u, updates)
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **updated}, opt_state, step + 1), loss

    carry = (variables, tx.init(variables["params"]), jnp.zeros((), jnp.int32))
    (variables, _, _), losses = jax.lax.scan(train_step, carry, rows)
    logits = model.apply(variables, _scaled(test_images))
    return logits.argmax(-1), losses


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
