"""The artifacts of a run -> an HTML page and a picture.

Reads: the artifacts of its input stages, and `metrics.jsonl` and `timings.json` of the
workdir. Writes: `report.html`, which needs no network (to mail or archive), and
`grid.png`. Nothing is computed here that `evaluate` has not written.
"""

from __future__ import annotations

from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.stage import Spec, open_stage
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    from mvc_jax import pictures
    from mvc_jax.reporting import (
        accuracy,
        figures,
        image_metrics,
        image_rows,
        loss_curves,
        page,
        records,
        run_images,
    )

_INPUTS = ("caption", "mix", "generate", "classify", "evaluate")
_PICTURE_BYTES = 150_000


def check(config: ConfigDict) -> None:
    """Nothing: no field depends on another one, or on a file."""


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to show: one page, of all recipes."""
    return Work({"page": 1}, unit="page", speed={"recipes": sizes.recipes})


def stage_spec(config: ConfigDict) -> Spec:
    """What the page depends on."""
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "report": config.report.to_dict(),
    }
    return Spec(
        "report", settings, inputs=_INPUTS, restores=("report.html", "grid.png")
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the page and the picture."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    metrics = files.read_json(workdir / "evaluate" / "metrics.json")
    scale = config.report.grid_scale
    images = run_images.read(workdir, metrics["class_names"])
    grid = image_rows.grid(images, config.report.grid_columns)
    compared = image_rows.comparison(images)
    images.read_pixels(cell for row in grid + compared for cell in row["cells"])
    text = page.render(
        page.TEMPLATES / "report.html.j2",
        {"data_uri": lambda image: pictures.data_uri(image, scale)},
        scale=scale,
        title=config.report.title,
        data=config.data.to_dict(),
        metrics=metrics,
        titles={run["name"]: run["title"] for run in metrics["runs"]},
        image_metrics=image_metrics.table(metrics.get("images")),
        confusion=accuracy.confusion(metrics),
        grid=grid,
        compared=compared,
        set_names=list(images.sets),
        captions=image_rows.captions(images),
        splits=records.splits(workdir, images.captions),
        curves=loss_curves.plots(workdir),
        figures=figures.read(workdir / "generate"),
        config=config.to_dict(),
        timings=records.timings(workdir),
        manifests=records.manifests(workdir),
    )
    files.write_text(stage.folder / "report.html", text)
    picture = pictures.grid_png(grid, scale, max_bytes=_PICTURE_BYTES)
    files.write_bytes(stage.folder / "grid.png", picture)
    logging.info("the report is %s", stage.folder / "report.html")
    stage.finish(["report.html", "grid.png"], classes=len(grid))
