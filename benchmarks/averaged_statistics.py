"""Averaged weights with which batch statistics? Test accuracy of each choice.

    python benchmarks/averaged_statistics.py --data=FOLDER

FOLDER has CIFAR-10 as `train*.parquet` and `test*.parquet` with the columns `img` or
`image`, and `label`. ResNet-8 is trained by SGD; its weights are averaged with a decay
of 0.999, and tested with the statistics of the raw weights, with the averaged ones (as
validation, prediction and export do), and with those of the averaged weights, computed
from the training images after the end.
"""

import argparse
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mvc_jax.classification import classifier
from mvc_jax.models import classifiers
from mvc_jax.training import optim, rng, sharding

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--schedule", choices=optim.SCHEDULES, default="constant")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    images, labels = read(arguments.data, "train", arguments.images)
    tests, answers = read(arguments.data, "test", arguments.test)
    mesh = sharding.make_mesh(1, 1)
    spec = classifier.ClassifierSpec(
        model=classifiers.VARIANTS["resnet8"].make(10),
        mean=MEAN,
        std=STD,
        policy="flip_crop",
        ema_decay=0.999,
    )
    tx = optim.optimizer("sgd", 1.0, weight_decay=5e-4, momentum=0.9)
    schedule = optim.schedule(
        arguments.schedule, arguments.rate, warmup=0, steps=arguments.steps
    )
    rates = jnp.asarray([schedule(step) for step in range(arguments.steps)])
    step = jax.jit(
        lambda state, batch: classifier.train_seeds(state, batch, spec=spec, tx=tx)
    )
    refresh = jax.jit(
        lambda variables, part: spec.model.apply(
            variables,
            spec.normalize(part.astype(jnp.float32)),
            train=True,
            mask=jnp.ones(len(part), bool),
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )[1]["batch_stats"]
    )
    predict = classifier.predictor(spec, mesh, batch_size=500)
    print("| seed | raw weights | averaged: raw | averaged | recomputed statistics |")
    print("|---:|---:|---:|---:|---:|")
    for seed in range(arguments.seeds):
        key = rng.purpose_key(seed, "benchmark")
        state = classifier.create_state(
            spec, tx, key[None], mesh, image_shape=images.shape[1:]
        )
        data = {"images": jnp.asarray(images), "labels": jnp.asarray(labels)}
        order = np.random.default_rng(seed)
        for _ in range(arguments.steps):
            index = order.integers(len(images), size=(arguments.batch, 1))
            batch = data | {
                "index": index.astype(np.int32),
                "weight": np.ones((arguments.batch, 1), np.float32),
                "key": np.asarray(jax.random.key_data(key))[None],
                "rates": rates,
            }
            state, _ = step(state, batch)
        variables = {
            "params": jax.tree.map(lambda x: x[0], state.ema_params),
            "batch_stats": jax.tree.map(lambda x: x[0], state.batch_stats),
        }
        for start in range(0, len(images), 100):
            variables["batch_stats"] = refresh(variables, images[start : start + 100])
        again = jax.tree.map(lambda x: x[None], variables["batch_stats"])
        chosen = (
            state.replace(ema_params=state.params, ema_batch_stats=state.batch_stats),
            state.replace(ema_batch_stats=state.batch_stats),
            state,
            state.replace(ema_batch_stats=again),
        )
        found = [
            100 * (predict(s, tests)[0].argmax(1) == answers).mean() for s in chosen
        ]
        cells = " | ".join(f"{accuracy:.1f}" for accuracy in found)
        print(f"| {seed} | {cells} |", flush=True)


def read(folder: pathlib.Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images uint8 [N, 32, 32, 3] of a part, and their labels."""
    [path] = sorted(folder.glob(f"{part}*.parquet"))
    table = pq.read_table(path).slice(0, count)
    column = "img" if "img" in table.column_names else "image"
    pictures = [
        np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
        for cell in table[column].to_pylist()
    ]
    return np.stack(pictures), np.asarray(table["label"].to_pylist(), np.int32)


if __name__ == "__main__":
    main()
