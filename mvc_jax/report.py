"""The artifacts of a run -> an HTML page and a picture.

Reads: the artifacts of its input stages, and `metrics.jsonl` and `timings.json` of the
workdir. Writes: `report.html`, which needs no network (to mail or archive), and
`grid.png`. Nothing is computed here that `evaluate` has not written.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data import splits
from mvc_jax.mixing.recipes import MODES
from mvc_jax.stage import Spec, open_stage
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    from mvc_jax.training import metrics as metrics_log

_INPUTS = ("caption", "mix", "generate", "classify", "evaluate")
_SETS = ("unmixed", "mixed", "pretrained")  # first columns; other sets follow
_PROVENANCE = ["index", "label", "source", "partners", "mode", "prompt"]
_MAX_CLASSES = 20  # in the grid
_MAX_CONFUSED = 20  # classes of a confusion matrix that is shown
_EXAMPLES = 6  # rows of the comparison, and captions
_MAX_NUMBERS = 12  # positions or dims shown of a recipe
_MAX_POINTS = 400  # of a curve
_PICTURE_BYTES = 150_000
_FIGURES = {
    "conditionings.png": "The same images and noise under every conditioning",
    "levels.png": "Mixing more and more",
}
_FIGURE_SIZE = 1400  # pixels
_SPACES = {"pixels": "pixels", "clip": "CLIP", "dinov2": "DINOv2"}
_IMAGE_METRICS = {  # key -> (title, one sentence); `{}` is the space
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
    "histogram_shift": (
        "Shift of colours",
        "Mean shift of the pixel values of a channel, in [0, 1].",
    ),
    "spectrum_shift": (
        "Shift of frequencies, dB",
        "Difference of the radial power spectra; 10 dB are a factor of ten.",
    ),
}


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Images of a run, and the texts about them.

    Attributes:
      generate: folder of the synthetic sets.
      class_names: K strings indexed by label.
      real: the training images.
      captions: rows of `captions.jsonl` by image id.
      recipes: rows of `recipes.jsonl` by index.
      sets: set -> index -> provenance of a synthetic image, without its pixels.
    """

    generate: epath.Path
    class_names: list[str]
    real: splits.Split
    captions: dict[str, dict]
    recipes: dict[int, dict]
    sets: dict[str, dict[int, dict]]


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
    inputs = _read_inputs(workdir, metrics["class_names"])
    grid = _grid(inputs, config.report.grid_columns)
    compared = _comparison(inputs)
    _read_pixels(inputs, [cell for row in grid + compared for cell in row["cells"]])
    page = _render(
        scale=config.report.grid_scale,
        title=config.report.title,
        data=config.data.to_dict(),
        metrics=metrics,
        image_metrics=_image_metrics(metrics.get("images")),
        confusion=_confusion(metrics),
        grid=grid,
        compared=compared,
        set_names=list(inputs.sets),
        captions=_captions(inputs),
        splits=_splits(workdir, inputs.captions),
        curves=_curves(workdir),
        figures=_figures(workdir / "generate"),
        config=config.to_dict(),
        timings=_timings(workdir),
        manifests=_manifests(workdir),
    )
    files.write_text(stage.folder / "report.html", page)
    picture = pictures.grid_png(
        grid, config.report.grid_scale, max_bytes=_PICTURE_BYTES
    )
    files.write_bytes(stage.folder / "grid.png", picture)
    logging.info("the report is %s", stage.folder / "report.html")
    stage.finish(["report.html", "grid.png"], classes=len(grid))


def _confusion(metrics: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Run -> its confusion matrix, of up to `_MAX_CONFUSED` classes.

    Older metrics have the matrix itself, or none.
    """
    classes = range(len(metrics["class_names"]))
    found = {}
    for row in metrics["runs"] if len(classes) <= _MAX_CONFUSED else ():
        if "confusion_counts" in row:
            counts = row["confusion_counts"]
            found[row["name"]] = [[x.get(str(k), 0) for k in classes] for x in counts]
        elif row.get("confusion"):
            found[row["name"]] = row["confusion"]
    return found


def _render(*, scale: int, **values: Any) -> str:
    template = epath.Path(__file__).parent / "report.html.j2"
    filters = {"data_uri": lambda image: pictures.data_uri(image, scale)}
    return render(template, filters, scale=scale, **values)


def render(
    template: epath.Path,
    filters: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    **values: Any,
) -> str:
    """The page of a template, which fails on a value that it lacks."""
    import jinja2  # here, so that a finished stage is skipped fast

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(filters)
    return environment.get_template(template.name).render(**values)


def _read_inputs(workdir: epath.Path, class_names: list[str]) -> _Inputs:
    captions = files.read_jsonl(workdir / "caption" / "captions.jsonl")
    recipes = files.read_jsonl(workdir / "mix" / "recipes.jsonl")
    names = [path.name for path in (workdir / "generate").iterdir() if path.is_dir()]
    sets = {}
    for name in [*(n for n in _SETS if n in names), *sorted({*names} - {*_SETS})]:
        rows = _read_set(workdir / "generate" / name, _PROVENANCE)
        sets[name] = {row["index"]: row for row in rows}
    return _Inputs(
        generate=workdir / "generate",
        class_names=class_names,
        real=splits.read_split(workdir / "caption", "train"),
        captions={row["id"]: row for row in captions},
        recipes={row["index"]: row for row in recipes},
        sets={name: rows for name, rows in sets.items() if rows},
    )


def _read_set(
    folder: epath.Path, columns: list[str], indices: Iterable[int] | None = None
) -> list[dict]:
    """Reads rows of a synthetic set in the order of their index; None: all rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    keep = None if indices is None else pc.field("index").isin(sorted(indices))
    rows = []
    for path in files.matching(folder, "data/train-*.parquet"):
        with path.open("rb") as file:
            rows += pq.read_table(file, columns=columns, filters=keep).to_pylist()
    return sorted(rows, key=lambda row: row["index"])


def _grid(inputs: _Inputs, columns: int) -> list[dict]:
    """Returns a row per class: a real image and `columns` images of each mode from it.

    The real image is the first of those of its class with the most synthetic images.
    """
    made: dict[tuple[str, str], list[dict]] = {}
    for row in inputs.sets.get("mixed", {}).values():
        made.setdefault((row["source"], row["mode"]), []).append(row)
    modes = [mode for mode in MODES if any(key[1] == mode for key in made)]
    members: dict[int, list[str]] = {}
    for id_, label in zip(inputs.real.ids, inputs.real.labels.tolist(), strict=True):
        members.setdefault(label, []).append(id_)
    grid = []
    for label in sorted(members)[:_MAX_CLASSES]:
        shown = {
            id_: [made.get((id_, mode), [])[:columns] for mode in modes]
            for id_ in members[label]
        }
        source = max(shown, key=lambda id_: sum(map(len, shown[id_])))
        cells = [_real_cell(inputs, source, label, "real")]
        for mode, rows in zip(modes, shown[source], strict=True):
            cells += [_cell(inputs, "mixed", row, mode) for row in rows]
            cells += [{"heading": mode, "image": None}] * (columns - len(rows))
        name = inputs.class_names[label]
        grid.append({"name": name, "number": label, "cells": cells})
    return grid


def _comparison(inputs: _Inputs) -> list[dict]:
    """Returns rows of one index in every set: same source, same noise.

    There is one row per class, and the modes alternate between classes.
    """
    common = [
        row
        for index, row in inputs.sets.get("mixed", {}).items()
        if len(inputs.sets) > 1 and all(index in rows for rows in inputs.sets.values())
    ]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in common)]
    last = {(row["label"], row["mode"]): row for row in common}
    compared = []
    for i, label in enumerate(sorted({row["label"] for row in common})[:_EXAMPLES]):
        turns = (modes[(i + k) % len(modes)] for k in range(len(modes)))
        row = next(last[label, mode] for mode in turns if (label, mode) in last)
        cells = [_real_cell(inputs, row["source"], label, "source")]
        for name, rows in inputs.sets.items():
            heading = row["mode"] if name == "mixed" else name
            cells.append(_cell(inputs, name, rows[row["index"]], heading))
        captions = (
            inputs.captions.get(id_, {}).get("caption") for id_ in row["partners"]
        )
        compared.append(
            {
                "name": inputs.class_names[label],
                "prompt": row["prompt"],
                "mixed": _mixed(inputs, row),
                "partner_captions": [caption for caption in captions if caption],
                "cells": cells,
            }
        )
    return compared


def _captions(inputs: _Inputs) -> list[dict]:
    """Returns the captions of the first image of each class, then of each second."""
    rank: dict[int, int] = {}
    order = []
    for id_, label in zip(inputs.real.ids, inputs.real.labels.tolist(), strict=True):
        rank[label] = rank.get(label, 0) + 1
        order.append((rank[label], label, id_))
    return [
        {
            **inputs.captions[id_],
            "name": inputs.class_names[label],
            "cell": _real_cell(inputs, id_, label, "training"),
        }
        for _, label, id_ in sorted(order)[:_EXAMPLES]
        if id_ in inputs.captions
    ]


def _real_cell(inputs: _Inputs, id_: str, label: int, heading: str) -> dict:
    caption = inputs.captions.get(id_, {}).get("caption", "")
    return {
        "heading": heading,
        "image": Image.fromarray(inputs.real.images[inputs.real.ids.index(id_)]),
        "alt": f"{inputs.class_names[label]}, {heading} image",
        "tooltip": f"{heading} image {id_}\ncaption: {caption}",
    }


def _cell(inputs: _Inputs, set_name: str, row: dict, heading: str) -> dict:
    """Returns a cell of a synthetic image; `_read_pixels` adds the image."""
    lines = [f"{heading} image {row['index']}", f"prompt: {row['prompt']}"]
    if set_name == "mixed":
        lines.append(f"mixed in: {_mixed(inputs, row)}")
    return {
        "heading": heading,
        "set": set_name,
        "index": row["index"],
        "alt": f"{inputs.class_names[row['label']]}, {heading} image",
        "tooltip": "\n".join(lines),
    }


def _mixed(inputs: _Inputs, row: dict) -> str:
    """Describes the mixing: `token positions 1, 4 and text dims 7 from a.png`."""
    recipe = inputs.recipes.get(row["index"], {})
    taken = []
    if recipe.get("positions"):
        taken.append(f"token positions {_numbers(recipe['positions'])}")
    if recipe.get("dims"):
        same = len(recipe["dims"]) == 1
        shown = _numbers(recipe["dims"][0]) if same else "that differ by token"
        start, stop = recipe["dim_tokens"]
        taken.append(f"text dims {shown} (tokens {start} to {stop - 1})")
    return f"{' and '.join(taken) or 'nothing'} from {' and '.join(row['partners'])}"


def _numbers(values: list[int]) -> str:
    rest = len(values) - _MAX_NUMBERS
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(str, values[:_MAX_NUMBERS])) + more


def _read_pixels(inputs: _Inputs, cells: list[dict]) -> None:
    """Reads the synthetic images of `cells`, and no others, into them."""
    for name in inputs.sets:
        mine = [cell for cell in cells if cell.get("set") == name]
        indices = {cell["index"] for cell in mine}
        rows = _read_set(inputs.generate / name, ["index", "image"], indices)
        pixels = {row["index"]: row["image"]["bytes"] for row in rows}
        for cell in mine:
            image = Image.open(io.BytesIO(pixels[cell["index"]]))
            cell["image"] = image.convert("RGB")


def _figures(folder: epath.Path) -> list[dict]:
    """Reads the figures that `generate` has drawn, with their titles."""
    figures = []
    for name, title in _FIGURES.items():
        if (folder / name).exists():
            image = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
            image.thumbnail((_FIGURE_SIZE, _FIGURE_SIZE), Image.Resampling.LANCZOS)
            uri = pictures.data_uri(image.quantize(256), _FIGURE_SIZE)
            figures.append({"title": title, "uri": uri})
    return figures


def _curves(workdir: epath.Path) -> list[dict]:
    """Plots the loss of every training loop; seeds of a run share a plot."""
    loops: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metrics_log.read_rows(workdir):
        if "loss" in row:
            name = re.sub(r"/seed-[\d-]+$", "", row["stage"])
            lines = loops.setdefault(name, {})
            lines.setdefault(row["stage"], []).append((row["step"], row["loss"]))
    return [_curve(name, list(lines.values())) for name, lines in loops.items()]


def _curve(name: str, lines: list[list[tuple[int, float]]]) -> dict:
    """Returns a plot of lines of (step, loss), and what is written below it."""
    thinned, not_finite = [], 0
    for points in lines:
        finite = [point for point in points if math.isfinite(point[1])]
        thinned.append(finite[:: math.ceil(len(finite) / _MAX_POINTS) or 1])
        not_finite += len(points) - len(finite)
    ends = [points[-1] for points in lines]
    return {
        "name": name,
        "svg": pictures.line_plot_svg(
            thinned,
            salt=name,
            line_colour="var(--accent)",
            text_colour="var(--muted)",
            axis_colour="var(--line)",
        ),
        "lines": len(lines),
        "last_step": max(step for step, _ in ends),
        "last_loss": sum(loss for _, loss in ends) / len(ends),
        "not_finite": not_finite,
    }


def _image_metrics(images: dict[str, Any] | None) -> dict[str, Any] | None:
    """A table of what `evaluate` measured of images; None in older runs."""
    if images is None:
        return None
    space = _SPACES.get(images["features"], images["features"])
    sets = images["sets"]
    rows = [
        {
            "title": title.format(space),
            "about": about,
            "values": [sets[name].get(key) for name in sets],
        }
        for key, (title, about) in _IMAGE_METRICS.items()
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


def _splits(workdir: epath.Path, captions: dict[str, dict]) -> dict[str, Any]:
    """Counts the captioned images of each split, and ids in more than one split."""
    ids = files.read_json(workdir / "caption" / "splits.json")
    captioned = {name: sum(i in captions for i in ids[name]) for name in ids}
    shared = sum(map(len, ids.values())) - len(set().union(*ids.values()))
    return {"captioned": captioned, "shared": shared}


def _manifests(workdir: epath.Path) -> dict[str, dict]:
    """Reads the manifests of the other finished stages, by name."""
    paths = {
        path.parent.name: path for path in files.matching(workdir, "*/manifest.json")
    }
    return {
        name: files.read_json(paths[name]) for name in sorted({*paths} - {"report"})
    }


def _timings(workdir: epath.Path) -> dict[str, dict[str, float]]:
    """Reads the times of stages, without those of a damaged file."""
    names = ("seconds", "compile_seconds", "peak_rss_mib")
    return {
        stage: row
        for stage, row in files.read_record(workdir / "timings.json").items()
        if isinstance(row, dict)
        and all(type(row.get(name)) in (int, float) for name in names)
    }
