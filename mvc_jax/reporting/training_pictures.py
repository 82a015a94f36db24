"""What training looked like: the loss of every loop, and samples while it went on."""

import io
import math
import re
from typing import Any

from absl import logging
from etils import epath
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.reporting import album
from mvc_jax.training import metrics as metrics_log

_MAX_POINTS = 400  # of a curve
_MAX_GRIDS = 3  # of samples
_MAX_SIZE = 1000  # pixels of one
_OF_BASE = {  # file of `pretrain` -> title
    "reconstructions.png": "Held-out images of the pool, and their reconstructions",
    "reconstructions_to_augment.png": "Images to augment, and their reconstructions",
    "samples.png": "Samples of the base",
}
_LOSSES = {  # beginning of a loop's name -> what its loss is, with the unit if any
    "pretrain/judge": "cross-entropy, nats",
    "pretrain/vae": "reconstruction error + KL",
    "pretrain/image_encoder": "cross-entropy, nats",
    "pretrain": "squared error",
    "finetune": "squared error",
    "classify": "cross-entropy, nats",
}


def curves(workdir: epath.Path) -> list[dict[str, Any]]:
    """Plots the loss of every training loop; seeds of a run share a plot."""
    loops: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metrics_log.read_rows(workdir):
        if "loss" in row:
            name = re.sub(r"/seed-[\d-]+$", "", row["stage"])
            lines = loops.setdefault(name, {})
            lines.setdefault(row["stage"], []).append((row["step"], row["loss"]))
    return [_curve(name, list(lines.values())) for name, lines in loops.items()]


def _curve(name: str, lines: list[list[tuple[int, float]]]) -> dict[str, Any]:
    """Returns a plot of lines of (step, loss), and what is written below it."""
    thinned, not_finite = [], 0
    for points in lines:
        finite = [point for point in points if math.isfinite(point[1])]
        thinned.append(finite[:: math.ceil(len(finite) / _MAX_POINTS) or 1])
        not_finite += len(points) - len(finite)
    ends = [points[-1] for points in lines]
    titles = [title for start, title in _LOSSES.items() if name.startswith(start)]
    return {
        "name": name,
        "svg": pictures.line_plot_svg(
            thinned,
            x_title="optimiser step",
            y_title=(titles or ["loss"])[0],
            salt=name,
            line_colour="var(--accent)",
            text_colour="var(--muted)",
            axis_colour="var(--line)",
        ),
        "points": max(map(len, thinned)),
        "lines": len(lines),
        "last_step": max(step for step, _ in ends),
        "last_loss": sum(loss for _, loss in ends) / len(ends),
        "not_finite": not_finite,
    }


def samples(workdir: epath.Path) -> list[dict[str, Any]]:
    """Grids of samples that `finetune` drew: the first, one between, and the last."""
    found = [
        (int(match[1]), path)
        for path in files.matching(workdir / "finetune" / "samples", "step_*.png")
        if (match := re.fullmatch(r"step_(\d+)\.png", path.name))
    ]
    found.sort()
    last = len(found) - 1
    places = sorted({last * n // (_MAX_GRIDS - 1) for n in range(_MAX_GRIDS)})
    grids = []
    for step, path in (found[i] for i in places if found):
        if image := _read(path):
            grids.append({"step": step, "size": image.size, "uri": album.inline(image)})
    return grids


def base(workdir: epath.Path) -> dict[str, Any]:
    """What `pretrain` measured of the base that it made, and showed; {} without one."""
    path = workdir / "pretrain" / "quality.json"
    if not path.exists():
        return {}
    measured = files.read_json(path)
    shown = []
    for name, title in _OF_BASE.items():
        image = _read(path.parent / name) if (path.parent / name).exists() else None
        if image:
            size, uri = image.size, album.inline(image)
            shown.append({"title": title, "size": size, "uri": uri})
    return {
        "words": measured["words"],
        "warnings": measured["warnings"],
        "pictures": shown,
    }


def _read(path: epath.Path) -> Image.Image | None:
    """A picture, reduced; None, with a warning, if it is damaged."""
    try:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    except (OSError, SyntaxError):  # how Pillow calls what is damaged
        logging.warning("%s cannot be read: the report leaves it out", path)
        return None
    image.thumbnail((_MAX_SIZE, _MAX_SIZE), Image.Resampling.LANCZOS)
    return image
