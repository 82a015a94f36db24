"""What is known of a small base before anything is built on it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from mvc_jax import pictures
from mvc_jax.classification.judge import Judge
from mvc_jax.data import order
from mvc_jax.models.stable_diffusion import Params, StableDiffusion
from mvc_jax.pretraining import reconstruction, samples

FILE = "quality.json"
_MOST_HELD_OUT = 200  # images
# Reconstructions are warned about below the first PSNR, unless they are about as sharp
# as the originals and above the second: few pixels are mostly edges, which lower it.
_GOOD, _LOW = 27.0, 20.0  # dB
_AS_SHARP = (0.9, 1.1)
_RECOGNISED = 0.5  # of the judge's own accuracy, below which the base is warned about
_TILE = 64  # pixels of an image in the pictures, at least
_COLUMNS = 8  # of the strip
_PER_CLASS, _MOST_CLASSES = 4, 10  # of the samples that are shown


@dataclasses.dataclass(frozen=True)
class Pool:
    """What the base is trained on, and what it is measured on.

    Attributes:
      images: uint8 [N, H, W, 3], without the held-out ones.
      labels: of the images.
      prompts: of the images.
      held_out: uint8 [V, H, W, 3].
      held_labels: of the held-out images.
      class_names: K names.
      grey: whether no image has colour.
      time_ids: of a Stable Diffusion XL, int32 [N, 6], sizes of the images.
    """

    images: np.ndarray
    labels: np.ndarray
    prompts: list[str]
    held_out: np.ndarray
    held_labels: np.ndarray
    class_names: tuple[str, ...]
    grey: bool
    time_ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Quality:
    """Measures of a base; None: not measured.

    Attributes:
      images: of the pool, on which it was trained.
      held_out: of the pool, on which nothing was trained.
      classes: of the pool.
      psnr: mean over the held-out images of the PSNR of their reconstructions, in dB.
      psnr_inside: the same of the pixels that are not black.
      sharpness: see `reconstruction.sharpness`.
      judged: images that the base drew for the judge.
      agreement: the fraction of them that the judge takes for their class.
      judge_accuracy: of the judge, on the held-out images.
      to_augment: of images that are to be augmented, where the pool is of another
        source: how many, `images`, and `psnr`, `psnr_inside` and `sharpness` of them.
    """

    images: int
    held_out: int
    classes: int
    psnr: float | None = None
    psnr_inside: float | None = None
    sharpness: float | None = None
    judged: int = 0
    agreement: float | None = None
    judge_accuracy: float | None = None
    to_augment: dict[str, Any] | None = None

    def warnings(self) -> list[str]:
        """A sentence, with the numbers, for each reason not to build on this base."""
        found = [
            f"the base blurs: reconstructions of {measured['images']} {name} have "
            f"{measured['psnr']:.1f} dB ({measured['psnr_inside']:.1f} where they are "
            f"not black) and {100 * measured['sharpness']:.0f} % of the originals' "
            f"sharpness, where {_GOOD:g} dB are wanted; more pretrain.vae.steps, or "
            "fewer levels in pretrain.vae.channels, bring more"
            for name, measured in self._reconstructed().items()
            if _blurs(measured["psnr"], measured["sharpness"])
        ]
        accuracy, agreement = self.judge_accuracy, self.agreement
        if None not in (accuracy, agreement) and agreement < _RECOGNISED * accuracy:
            found.append(
                f"the base is not recognised: a classifier of the pool takes "
                f"{100 * agreement:.0f} % of {self.judged} samples for their class, "
                f"where it takes {100 * accuracy:.0f} % of the {self.held_out} "
                f"held-out images, and chance is {100 / self.classes:.0f} %; more "
                "pretrain.unet.steps bring more"
            )
        return found

    def _reconstructed(self) -> dict[str, dict[str, Any]]:
        """What was measured of reconstructions, by the name of the images."""
        found = {}
        if self.psnr is not None:
            found["held-out images of the pool"] = {
                "images": self.held_out,
                "psnr": self.psnr,
                "psnr_inside": self.psnr_inside,
                "sharpness": self.sharpness,
            }
        if self.to_augment is not None:
            found["images to augment"] = self.to_augment
        return found

    def in_words(self) -> list[str]:
        """A sentence for each thing that was measured."""
        found = [
            f"{measured['images']} {name} are reconstructed with "
            f"{measured['psnr']:.1f} dB, {measured['psnr_inside']:.1f} dB where they "
            f"are not black, and {100 * measured['sharpness']:.0f} % of their sharpness"
            for name, measured in self._reconstructed().items()
        ]
        if self.agreement is not None:
            known = ""
            if self.judge_accuracy is not None:
                known = (
                    f", and {100 * self.judge_accuracy:.0f} % of the held-out images"
                )
            found.append(
                f"a classifier of the pool takes {100 * self.agreement:.0f} % of "
                f"{self.judged} samples of the base for their class{known}"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """The measures, and `words` and `warnings`, as `quality.json` has them."""
        words = {"words": self.in_words(), "warnings": self.warnings()}
        return {**dataclasses.asdict(self), **words}


def _blurs(psnr: float, sharpness: float) -> bool:
    if psnr >= _GOOD:
        return False
    least, most = _AS_SHARP
    return psnr < _LOW or not least <= sharpness <= most


def spread(count: int) -> Int[np.ndarray, " M"]:
    """The places of some of `count` images, from all of the order."""
    most = min(count, _MOST_HELD_OUT)
    return np.arange(most) * count // most


def hold_out(
    count: int, fraction: float, *, seed: int
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " V"]]:
    """Divides `count` images into those to train on and those to measure on."""
    held = min(round(fraction * count), _MOST_HELD_OUT, count - 1)
    shuffled = order.generator(seed, "pretrain/held out").permutation(count)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def measure(
    model: StableDiffusion,
    params: Params,
    pool: Pool,
    judge: Judge | None,
    decoded: UInt8[np.ndarray, "V H W 3"],
    *,
    samples_drawn: int,
    seed: int,
    to_augment: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Quality, dict[str, bytes]]:
    """Measures a base.

    Args:
      model: the base.
      params: host parameters of all components.
      pool: its images.
      judge: a classifier of the pool; None: samples are not judged.
      decoded: reconstructions of `pool.held_out`.
      samples_drawn: images that are drawn for the judge.
      seed: of the run.
      to_augment: reconstructions and images, of those that are to be augmented; None:
        the pool is of their source.

    Returns:
      the measures, and pictures by the name of their file.
    """
    found = Quality(len(pool.images), len(pool.held_out), len(pool.class_names))
    written: dict[str, bytes] = {}
    tile = max(_TILE, pool.images.shape[1])
    if len(pool.held_out):
        measured = reconstruction_measures(decoded, pool.held_out)
        found = dataclasses.replace(found, **measured)
        written["reconstructions.png"] = strip(decoded, pool.held_out, tile)
    if to_augment is not None:
        measured = reconstruction_measures(*to_augment)
        measured = {"images": len(to_augment[0]), **measured}
        found = dataclasses.replace(found, to_augment=measured)
        written["reconstructions_to_augment.png"] = strip(*to_augment, tile)
    if judge is not None:
        chosen = samples.choose(pool.labels, samples_drawn, seed=seed)
        drawn = samples.draw(
            model,
            params,
            model.tokenize([pool.prompts[i] for i in chosen]),
            time_ids=None if pool.time_ids is None else pool.time_ids[chosen],
            seed=seed,
            grey=pool.grey,
            mesh=judge.mesh,
        )
        labels = pool.labels[chosen]
        accuracy = None
        if len(pool.held_out):
            accuracy = judge.agreement(pool.held_out, pool.held_labels)
        found = dataclasses.replace(
            found,
            judged=len(drawn),
            agreement=judge.agreement(drawn, labels),
            judge_accuracy=accuracy,
        )
        written["samples.png"] = sheet(drawn, labels, pool.class_names, tile)
    return found, written


def reconstruction_measures(
    decoded: UInt8[np.ndarray, "V H W 3"], images: UInt8[np.ndarray, "V H W 3"]
) -> dict[str, float]:
    """`psnr`, `psnr_inside` and `sharpness`."""
    inside = reconstruction.psnr(decoded, images, inside=True)
    whole = float(reconstruction.psnr(decoded, images).mean())
    return {
        "psnr": whole,
        "psnr_inside": float(np.nanmean(inside))
        if np.isfinite(inside).any()
        else whole,
        "sharpness": reconstruction.sharpness(decoded, images),
    }


def strip(
    decoded: UInt8[np.ndarray, "V H W 3"],
    images: UInt8[np.ndarray, "V H W 3"],
    tile: int,
) -> bytes:
    """A PNG: held-out images, below them their reconstructions."""
    rows = [
        {"name": name, "cells": _cells(some[:_COLUMNS])}
        for name, some in (("original", images), ("reconstructed", decoded))
    ]
    return pictures.png(pictures.grid(rows, tile, panels=1))


def sheet(
    drawn: UInt8[np.ndarray, "N H W 3"],
    labels: Int[np.ndarray, " N"],
    class_names: Sequence[str],
    tile: int,
) -> bytes:
    """A PNG of some samples, a row for each of the first classes."""
    classes = np.unique(labels)[:_MOST_CLASSES]
    of_each = [_cells(drawn[labels == k][:_PER_CLASS]) for k in classes]
    columns = max(map(len, of_each))
    rows = []
    for k, cells in zip(classes, of_each, strict=True):
        for n in range(len(cells) + 1, columns + 1):
            cells.append({"heading": str(n), "image": None})
        rows.append({"name": class_names[k], "number": int(k), "cells": cells})
    return pictures.png(pictures.grid(rows, tile, panels=1))


def _cells(images: UInt8[np.ndarray, "n H W 3"]) -> list[dict[str, Any]]:
    """Cells of a row, numbered from 1."""
    return [
        {"heading": str(n), "image": Image.fromarray(image)}
        for n, image in enumerate(images, start=1)
    ]
