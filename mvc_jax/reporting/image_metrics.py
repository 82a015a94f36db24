"""The table of what `evaluate` measured of images."""

from typing import Any

from mvc_jax.reporting.likeness import SPACES

_METRICS = {  # key -> (title, one sentence); `{}` is the space
    "kid": (
        "KID, {}",
        "Distance of the distributions; 0 or below: none is seen. Unbiased, so that "
        "small sets compare.",
    ),
    "kid_error": ("its standard error", "By the jackknife over images."),
    "frechet_distance": (
        "Fréchet distance, {}",
        "Distance of means and covariances; too large for few images.",
    ),
    "cmmd": ("CMMD", "Distance of the distributions of CLIP embeddings, times 1000."),
    "precision": (
        "Precision, {}",
        "Fraction of its images that are among training images.",
    ),
    "recall": (
        "Recall, {}",
        "Fraction of the training images that are among its images.",
    ),
    "density": (
        "Density, {}",
        "As precision, counting how many training images an image is near to.",
    ),
    "coverage": (
        "Coverage, {}",
        "Fraction of the training images that have one of its images near.",
    ),
    "within_class": (
        "Distance within a class, {}",
        "Mean distance of two of its images of one class: diversity.",
    ),
    "vendi": ("Vendi score, {}", "Effective number of different images."),
    "clip_score": ("CLIP score", "100 times the cosine of image and prompt."),
    "label_agreement": (
        "Zero-shot label agreement",
        "Fraction of its images whose class CLIP recognises.",
    ),
    "classification_accuracy_score": (
        "Classification accuracy score",
        "Test accuracy of a classifier that was trained on this set alone.",
    ),
    "nearest_train": (
        "Distance to the nearest training image, pixels",
        "Of test images: what is usual for images that are new.",
    ),
    "near_train": (
        "Near a training image, pixels",
        "Fraction nearer to a training image than 95 % of the test images are; 0.05 "
        "is as new as these.",
    ),
    "nearest_test": (
        "Distance to the nearest test image, pixels",
        "Smaller than the distance to train: the generator may know test images.",
    ),
    "copies": (
        "Copies, pixels",
        "Images nearer to a training image than any two different ones are.",
    ),
    "leaks": (
        "Leaks, pixels",
        "Images nearer to a test image than any different training image is.",
    ),
    "source_distance": (
        "Distance to its source, pixels",
        "Mean distance of an image and the training image that it was made from.",
    ),
    "unmixed_distance": (
        "Distance to the unmixed image, pixels",
        "Mean distance of an image and the one of set unmixed by the same recipe and "
        "noise: what mixing changes.",
    ),
    "histogram_shift": (
        "Shift of colours",
        "Mean shift of the pixel values of a channel, in [0, 1].",
    ),
    "spectrum_shift": (
        "Shift of frequencies, dB",
        "Difference of the radial power spectra; 10 dB are a factor of ten.",
    ),
}
_FID = (
    "FID",
    "Fréchet distance by Inception’s published weights; too large for few images.",
)


def table(images: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rows and columns of what `evaluate` measured of images; None: an older run."""
    if images is None:
        return None
    space = SPACES.get(images["features"], images["features"])
    metrics = {**_METRICS, "frechet_distance": _FID} if images.get("fid") else _METRICS
    sets = images["sets"]
    rows = [
        {
            "title": title.format(space),
            "about": about,
            "values": [sets[name].get(key) for name in sets],
        }
        for key, (title, about) in metrics.items()
        if any(sets[name].get(key) is not None for name in sets)
    ]
    classes = [
        {
            "name": name,
            "cells": [
                {key: row["classes"][k].get(key) for key in ("images", "kid")}
                for row in sets.values()
            ],
        }
        for k, name in enumerate(
            x["name"] for x in next(iter(sets.values()))["classes"]
        )
    ]
    counts = {name: sets[name]["images"] for name in sets}
    return {
        **images,
        "space": space,
        "counts": counts,
        "rows": rows,
        "by_class": classes,
    }
