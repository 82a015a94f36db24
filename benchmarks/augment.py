"""Throughput of RandAugment: ours on the device against Pillow on the host.

    python benchmarks/augment.py

Ours: `augment.policy("randaugment")` without flip, crop and Cutout, vmapped over a
batch on the device. Pillow's: the same 14 operations at the same values, two for each
image, in processes, from NumPy array to NumPy array, like a data loader's workers. The
two alternate; the table shows the best round of each.
"""

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

BATCHES = {32: 512, 224: 64}  # side: images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of Pillow")
    parser.add_argument("--seconds", type=float, default=2.0, help="per round")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers) as pool:
        pool.map(rate_of_pillow, [(8, 0.1)] * arguments.workers)  # start them
        import jax

        print(f"{jax.devices()[0].device_kind}; load {os.getloadavg()[0]:.2f}\n")
        print("| side | ours, images/s | Pillow, images/s | ratio, best | by round |")
        print("|---:|---:|---:|---:|---|")
        for side, count in BATCHES.items():
            augment = ours(side, count)
            rates = []
            for _ in range(arguments.rounds):
                our_rate = rate(augment, count, arguments.seconds)
                work = [(side, arguments.seconds)] * arguments.workers
                rates.append((our_rate, sum(pool.map(rate_of_pillow, work))))
            us, pillow = map(max, zip(*rates, strict=True))
            ratios = ", ".join(f"{a / b:.2f}" for a, b in rates)
            print(
                f"| {side} | {us:.0f} | {pillow:.0f} | {us / pillow:.2f} | {ratios} |"
            )


def rates(*, batches: Mapping[int, int]) -> Iterator[dict]:
    """Rows of `accelerator.py`: ours alone.

    Args:
      batches: side in pixels -> number of images.
    """
    import measure

    for side, count in batches.items():
        augment = ours(side, count)
        augment()
        seconds = measure.seconds_per_call(
            lambda times, augment=augment: [augment() for _ in range(times)]
        )
        yield measure.row(
            f"RandAugment, {side} px, batch {count}", count / seconds, "images/s"
        )


def photos(side: int, count: int) -> np.ndarray:
    """Smooth random images with noise; uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    box = (side, side)
    smooth = [Image.fromarray(image).resize(box) for image in coarse]
    noise = rng.normal(0, 8, (count, side, side, 3))
    return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


def ours(side: int, count: int):
    """A function that augments a batch and waits for it."""
    import jax

    from mvc_jax import augment

    policy = augment.policy("randaugment", flip=False, crop=0, cutout=0)
    run = jax.jit(jax.vmap(policy))
    images = jax.device_put(photos(side, count))
    keys = jax.random.split(jax.random.key(0), count)
    return lambda: run(keys, images).block_until_ready()


def rate(augment, count: int, seconds: float) -> float:
    augment()
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        augment()
        batches += 1
    return batches * count / (time.perf_counter() - start)


def rate_of_pillow(work: tuple[int, float]) -> float:
    side, seconds = work
    operations = pillow_operations(side)
    images = photos(side, 16)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for image in images:
            picture = Image.fromarray(image)
            for operation in random.choices(operations, k=2):
                picture = operation(picture, random.choice((-1, 1)))
            np.asarray(picture)
            done += 1
    return done / (time.perf_counter() - start)


def pillow_operations(side: int) -> list:
    """RandAugment at our defaults, M = 9 of 30: functions of (picture, sign)."""
    pixels, grey = int(9 * side * 150 / 331 / 30), (128,) * 3

    def moved(picture, *matrix):
        affine = Image.Transform.AFFINE
        return picture.transform(picture.size, affine, matrix, fillcolor=grey)

    def enhanced(kind):
        return lambda picture, sign: kind(picture).enhance(1 + sign * 0.27)

    return [
        lambda picture, sign: picture,
        lambda picture, sign: ImageOps.autocontrast(picture),
        lambda picture, sign: ImageOps.equalize(picture),
        lambda picture, sign: picture.rotate(sign * 9, fillcolor=grey),
        lambda picture, sign: ImageOps.solarize(picture, 180),
        lambda picture, sign: ImageOps.posterize(picture, 7),
        lambda picture, sign: moved(picture, 1, sign * 0.09, 0, 0, 1, 0),
        lambda picture, sign: moved(picture, 1, 0, 0, sign * 0.09, 1, 0),
        lambda picture, sign: moved(picture, 1, 0, sign * pixels, 0, 1, 0),
        lambda picture, sign: moved(picture, 1, 0, 0, 0, 1, sign * pixels),
        enhanced(ImageEnhance.Color),
        enhanced(ImageEnhance.Contrast),
        enhanced(ImageEnhance.Brightness),
        enhanced(ImageEnhance.Sharpness),
    ]


if __name__ == "__main__":
    main()
