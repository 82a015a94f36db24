"""Samples of a model during training, always of the same inputs and noise."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from mvc_jax import files, pictures, processes
from mvc_jax.training import sharding
from mvc_jax.training.loop import TrainState, place_batch
from mvc_jax.training.metrics import MetricsLog

_TILE = (64, 256)  # minimum and maximum side of an image, in pixels


class Gallery:
    """Draws a grid of images with a row for each of N examples."""

    def __init__(
        self,
        folder: epath.PathLike,
        sample: Callable[[Any, dict], Any],
        batch: dict[str, Any],
        *,
        names: Sequence[str],
        beside: dict[str, UInt8[np.ndarray, "N H W 3"]],
        mesh: Mesh,
    ):
        """
        Args:
          folder: where `step_<n>.png` is written.
          sample: jitted, `(parameters, batch) -> images`, uint8 [B, H, W, 3].
          batch: the inputs of `sample`, a tree of arrays [N, ...].
          names: the title of each row.
          beside: heading -> N images of a further column, in this order; the samples
            are the second column.
          mesh: the devices; each draws one example at a time.
        """
        self._folder, self._sample, self._batch = epath.Path(folder), sample, batch
        self._names, self._beside, self._mesh = names, beside, mesh

    def draw(self, step: int, state: TrainState, log: MetricsLog) -> None:
        """Writes the grid of `step` to the folder and to TensorBoard."""
        drawn: list[np.ndarray] = []
        for start in range(0, len(self._names), self._mesh.size):
            here = slice(start, start + self._mesh.size)
            part = jax.tree.map(lambda array, here=here: array[here], self._batch)
            images = self._sample(state.averaged, place_batch(part, self._mesh))
            images = np.asarray(sharding.readable(images))
            drawn.append(images[: len(self._names[here])])
        if not processes.is_first():
            return
        (first, sources), *others = self._beside.items()
        columns = {first: sources, "drawn": np.concatenate(drawn), **dict(others)}
        rows = []
        for i, name in enumerate(self._names):
            cells = [
                {"heading": heading, "image": Image.fromarray(images[i])}
                for heading, images in columns.items()
            ]
            rows.append({"name": name, "cells": cells})
        low, high = _TILE
        picture = pictures.grid(rows, min(max(sources.shape[1], low), high))
        files.write_bytes(self._folder / f"step_{step:06d}.png", pictures.png(picture))
        log.picture(step, "samples", np.asarray(picture))
