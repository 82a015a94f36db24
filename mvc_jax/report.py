"""The artifacts of a run -> an HTML page, a text and a picture.

Reads: the artifacts of its input stages, and `metrics.jsonl`, `timings.json` and
`finetune/samples/` of the workdir. Writes: `report.html`, which needs no network (to
mail or archive), `report.md`, its facts as text, and `grid.png`. Nothing is computed
here that `evaluate` has not written.
"""

from __future__ import annotations

from typing import Any

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
        album,
        cost,
        figures,
        image_metrics,
        image_rows,
        likeness,
        page,
        records,
        run_images,
        training_pictures,
    )

_INPUTS = ("caption", "mix", "generate", "classify", "evaluate")
_OF_SETS = ("mix", "generate")  # those that are there only with synthetic sets
_ARTIFACTS = ("report.html", "report.md", "grid.png")
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
    sets = config.generate.sets
    inputs = [name for name in _INPUTS if sets or name not in _OF_SETS]
    return Spec("report", settings, inputs, restores=_ARTIFACTS)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the page, the text and the picture."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    metrics = files.read_json(workdir / "evaluate" / "metrics.json")
    images = run_images.read(workdir, metrics["class_names"])
    values = _measured(metrics, workdir)
    values |= _pictures(metrics, images, workdir, config.report.grid_columns)
    values |= {
        "title": config.report.title,
        "scale": config.report.grid_scale,
        "data": config.data.to_dict(),
        "config": config.to_dict(),
        "settings": records.settings(config.to_dict()),
        "splits": records.splits(workdir, images.captions),
    }
    values["contents"] = _contents(values)
    for name in ("report.html", "report.md"):
        text = page.render(page.TEMPLATES / f"{name}.j2", **values)
        files.write_text(stage.folder / name, text)
    grid = values["grid"]
    picture = pictures.grid_png(grid, values["scale"], max_bytes=_PICTURE_BYTES)
    files.write_bytes(stage.folder / "grid.png", picture)
    logging.info("the report is %s", stage.folder / "report.html")
    stage.finish([*_ARTIFACTS], classes=len(grid))


def _measured(metrics: dict[str, Any], workdir: epath.Path) -> dict[str, Any]:
    """What sections show that is numbers and plots."""
    manifests = records.manifests(workdir)
    questions = metrics["questions"]
    return {
        "metrics": metrics,
        "titles": {run["name"]: run["title"] for run in metrics["runs"]},
        "asked": questions if metrics.get("headline") else questions[1:],
        "accuracy": accuracy.table(metrics),
        "by_class": accuracy.by_class(metrics),
        "image_metrics": image_metrics.table(metrics.get("images")),
        "data_caveats": accuracy.caveats(metrics, "data"),
        "curves": training_pictures.curves(workdir),
        "cost": cost.table(workdir, manifests),
        "versions": records.versions(manifests),
    }


def _pictures(
    metrics: dict[str, Any],
    images: run_images.RunImages,
    workdir: epath.Path,
    columns: int,
) -> dict[str, Any]:
    """What sections show that is images; each is in `album` once."""
    shown = {
        "grid": image_rows.grid(images, columns),
        "compared": image_rows.comparison(images),
        "captions": image_rows.captions(images),
        "copies": likeness.copies(metrics, images),
        "other_class": likeness.other_class(metrics, images),
        "figures": figures.read(images),
    }
    cells = list(run_images.cells_in(shown))
    images.read_pixels(cells)
    images.read_words(cells)
    likeness.flag(cells, workdir / "evaluate", images)
    stored = album.Album()
    for cell in cells:
        if cell["image"] is not None:
            cell["picture"] = stored.add(cell["image"])
    any_flag = any("flag" in cell for row in shown["grid"] for cell in row["cells"])
    return {
        **shown,
        "album": stored,
        "any_flag": any_flag,
        "set_names": list(images.sets),
        "samples": training_pictures.samples(workdir),
        "base": training_pictures.base(workdir),
    }


def _contents(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The sections of the page that have something to show: name, heading."""
    metrics = values["metrics"]
    sections = {
        "questions": ("Questions", values["asked"]),
        "accuracy": ("Accuracy", True),
        "classes": ("Classes", True),
        "images": ("Images of every class", True),
        "mixing": ("Is it the mixing?", values["set_names"]),
        "copies": ("Copies", values["copies"]),
        "labels": ("Another class", values["other_class"]),
        "figures": ("Figures", values["figures"]),
        "metrics": ("Image metrics", values["image_metrics"]),
        "sets": ("Synthetic sets", metrics["sets"]),
        "captions": ("Captions", values["captions"]),
        "training": (
            "Training",
            values["curves"] or values["samples"] or values["base"],
        ),
        "cost": ("Time and memory", values["cost"]),
        "data": ("Data", True),
        "settings": ("Settings", True),
    }
    return [(name, heading) for name, (heading, shown) in sections.items() if shown]
