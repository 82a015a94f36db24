"""What a run left on disk -> one page and one picture to judge it by.

Reads: the artifacts of its input stages, and `metrics.jsonl` and `timings.json` of the
workdir. Writes: `report.html`, which asks nothing of the network (mail it, archive it),
and `grid.png`. Results are printed, never computed, here.
"""

import base64
import dataclasses
import io
import math
import re
from collections.abc import Iterable
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mvc_jax import files, pictures
from mvc_jax.data import splits
from mvc_jax.errors import require
from mvc_jax.stage import open_stage

_INPUTS = ("caption", "mix", "generate", "classify", "evaluate")
_MODES = ("coarse", "fine")
_SETS = ("unmixed", "mixed", "pretrained")  # order of the columns; others follow
_PROVENANCE = ["index", "label", "source", "partners", "mode", "prompt"]
_MOST_CLASSES = 20  # in the grid; of more, the first are shown
_EXAMPLES = 6  # rows of the comparison, and captions
_MOST_NUMBERS = 12  # positions or dims of a recipe
_MOST_POINTS = 400  # of a curve
_PICTURE_BYTES = 150_000
_FIGURES = {
    "conditionings.png": "The same images and noise under every conditioning",
    "levels.png": "Mixing more and more",
}
_FIGURE_SIDE = 1400  # pixels


@dataclasses.dataclass(frozen=True)
class _Run:
    """What of a run the images and their texts are made from.

    Attributes:
      generate: folder of the synthetic sets.
      class_names: K strings that the labels index.
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
    """Checks the section `report`."""
    for field, least, most in (("grid_columns", 1, 8), ("grid_scale", 16, 256)):
        value = config.report[field]
        require(
            isinstance(value, int) and least <= value <= most,
            f"config.report.{field}",
            wanted=f"a whole number from {least} to {most}",
            got=value,
            fix="Set it within this range.",
        )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the page and the picture."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings["report"] = config.report.to_dict()
    stage = open_stage(workdir, "report", settings, inputs=_INPUTS)
    if stage.complete:
        return
    metrics = files.read_json(workdir / "evaluate" / "metrics.json")
    found = _read(workdir, metrics["class_names"])
    grid = _grid(found, config.report.grid_columns)
    compared = _comparison(found)
    _add_pixels(found, [cell for row in grid + compared for cell in row["cells"]])
    page = _render(
        scale=config.report.grid_scale,
        title=config.report.title,
        data=settings["data"],
        metrics=metrics,
        grid=grid,
        compared=compared,
        set_names=list(found.sets),
        captions=_captions(found),
        splits=_splits(workdir, found.captions),
        curves=_curves(workdir),
        figures=_figures(workdir / "generate"),
        config=config.to_dict(),
        timings=_optional(workdir / "timings.json"),
        manifests=_manifests(workdir),
    )
    files.write_text(stage.folder / "report.html", page)
    picture = pictures.grid_png(
        grid, config.report.grid_scale, most_bytes=_PICTURE_BYTES
    )
    files.write_bytes(stage.folder / "grid.png", picture)
    logging.info("the report is %s", stage.folder / "report.html")
    stage.finish(["report.html", "grid.png"], classes=len(grid))


def _render(*, scale: int, **values: Any) -> str:
    import jinja2  # not at the top: a finished stage is skipped at once

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(epath.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = lambda image: _data_uri(image, scale)
    return environment.get_template("report.html.j2").render(scale=scale, **values)


def _read(workdir: epath.Path, class_names: list[str]) -> _Run:
    captions = files.read_jsonl(workdir / "caption" / "captions.jsonl")
    recipes = files.read_jsonl(workdir / "mix" / "recipes.jsonl")
    names = [path.name for path in (workdir / "generate").iterdir() if path.is_dir()]
    sets = {}
    for name in [*(n for n in _SETS if n in names), *sorted({*names} - {*_SETS})]:
        rows = _read_set(workdir / "generate" / name, _PROVENANCE)
        sets[name] = {row["index"]: row for row in rows}
    return _Run(
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
    """Rows of a synthetic set in the order of their index; all, or those asked for."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    keep = None if indices is None else pc.field("index").isin(sorted(indices))
    rows = []
    for path in sorted((folder / "data").glob("train-*.parquet")):
        with path.open("rb") as file:
            rows += pq.read_table(file, columns=columns, filters=keep).to_pylist()
    return sorted(rows, key=lambda row: row["index"])


def _grid(run: _Run, columns: int) -> list[dict]:
    """A row for each class: a real image, then `columns` of each mode made from it.

    The real one is the class's first with the most to show: no eye has picked it.
    """
    made: dict[tuple[str, str], list[dict]] = {}
    for row in run.sets.get("mixed", {}).values():
        made.setdefault((row["source"], row["mode"]), []).append(row)
    modes = [mode for mode in _MODES if any(key[1] == mode for key in made)]
    members: dict[int, list[str]] = {}
    for id_, label in zip(run.real.ids, run.real.labels.tolist(), strict=True):
        members.setdefault(label, []).append(id_)
    grid = []
    for label in sorted(members)[:_MOST_CLASSES]:
        shown = {
            id_: [made.get((id_, mode), [])[:columns] for mode in modes]
            for id_ in members[label]
        }
        source = max(shown, key=lambda id_: sum(map(len, shown[id_])))
        cells = [_real_cell(run, source, label, "real")]
        for mode, rows in zip(modes, shown[source], strict=True):
            cells += [_cell(run, "mixed", row, mode) for row in rows]
            cells += [{"heading": mode, "image": None}] * (columns - len(rows))
        grid.append({"name": run.class_names[label], "cells": cells})
    return grid


def _comparison(run: _Run) -> list[dict]:
    """One index under every set: same source, same noise. Modes take turns by class."""
    common = [
        row
        for index, row in run.sets.get("mixed", {}).items()
        if len(run.sets) > 1 and all(index in rows for rows in run.sets.values())
    ]
    modes = [mode for mode in _MODES if any(row["mode"] == mode for row in common)]
    last = {(row["label"], row["mode"]): row for row in common}
    compared = []
    for i, label in enumerate(sorted({row["label"] for row in common})[:_EXAMPLES]):
        turns = (modes[(i + k) % len(modes)] for k in range(len(modes)))
        row = next(last[label, mode] for mode in turns if (label, mode) in last)
        cells = [_real_cell(run, row["source"], label, "source")]
        for name, rows in run.sets.items():
            heading = row["mode"] if name == "mixed" else name
            cells.append(_cell(run, name, rows[row["index"]], heading))
        texts = {
            "name": run.class_names[label],
            "mixed": _mixed(run, row),
            "partner_captions": [
                run.captions[id_]["caption"]
                for id_ in row["partners"]
                if run.captions.get(id_, {}).get("caption")
            ],
        }
        compared.append(row | texts | {"cells": cells})
    return compared


def _captions(run: _Run) -> list[dict]:
    """The first few captions of training images, classes in turn."""
    rank: dict[int, int] = {}
    order = []
    for id_, label in zip(run.real.ids, run.real.labels.tolist(), strict=True):
        rank[label] = rank.get(label, 0) + 1
        order.append((rank[label], label, id_))
    return [
        run.captions[id_]
        | {"name": run.class_names[k], "cell": _real_cell(run, id_, k, "training")}
        for _, k, id_ in sorted(order)[:_EXAMPLES]
        if id_ in run.captions
    ]


def _real_cell(run: _Run, id_: str, label: int, heading: str) -> dict:
    caption = run.captions.get(id_, {}).get("caption", "")
    return {
        "heading": heading,
        "image": Image.fromarray(run.real.images[run.real.ids.index(id_)]),
        "alt": f"{run.class_names[label]}, {heading} image",
        "tooltip": f"{heading} image {id_}\ncaption: {caption}",
    }


def _cell(run: _Run, set_name: str, row: dict, heading: str) -> dict:
    """A synthetic image; `_add_pixels` completes it."""
    lines = [f"{heading} image {row['index']}", f"prompt: {row['prompt']}"]
    if set_name == "mixed":
        lines.append(f"mixed in: {_mixed(run, row)}")
    return {
        "heading": heading,
        "set": set_name,
        "index": row["index"],
        "alt": f"{run.class_names[row['label']]}, {heading} image",
        "tooltip": "\n".join(lines),
    }


def _mixed(run: _Run, row: dict) -> str:
    """What an image took of whom: `token positions 1, 4 and text dims 7 of a.png`."""
    recipe = run.recipes.get(row["index"], {})
    taken = []
    if recipe.get("positions"):
        taken.append(f"token positions {_numbers(recipe['positions'])}")
    if recipe.get("dims"):
        same = len(recipe["dims"]) == 1
        shown = _numbers(recipe["dims"][0]) if same else "that differ by token"
        start, stop = recipe["dim_tokens"]
        taken.append(f"text dims {shown} (tokens {start} to {stop - 1})")
    return f"{' and '.join(taken) or 'nothing'} of {' and '.join(row['partners'])}"


def _numbers(values: list[int]) -> str:
    rest = len(values) - _MOST_NUMBERS
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(str, values[:_MOST_NUMBERS])) + more


def _add_pixels(run: _Run, cells: list[dict]) -> None:
    """Reads the synthetic images of `cells`, and no others."""
    for name in run.sets:
        mine = [cell for cell in cells if cell.get("set") == name]
        indices = {cell["index"] for cell in mine}
        rows = _read_set(run.generate / name, ["index", "image"], indices)
        pixels = {row["index"]: row["image"]["bytes"] for row in rows}
        for cell in mine:
            image = Image.open(io.BytesIO(pixels[cell["index"]]))
            cell["image"] = image.convert("RGB")


def _data_uri(image: Image.Image, scale: int) -> str:
    """The image as an inline PNG, made smaller if it is larger than it is shown."""
    small = image.copy()
    small.thumbnail((scale, scale), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(pictures.png(small)).decode()


def _figures(folder: epath.Path) -> list[dict]:
    """The pictures of `generate` that were asked for, with a title."""
    figures = []
    for name, title in _FIGURES.items():
        if (folder / name).exists():
            image = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
            image.thumbnail((_FIGURE_SIDE, _FIGURE_SIDE), Image.Resampling.LANCZOS)
            image = image.quantize(256)
            figures.append({"title": title, "uri": _data_uri(image, _FIGURE_SIDE)})
    return figures


def _curves(workdir: epath.Path) -> list[dict]:
    """The loss of every loop that has one, with its drawing; of a run, all seeds."""
    path = workdir / "metrics.jsonl"
    loops: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in files.read_jsonl(path) if path.exists() else []:
        if isinstance(row.get("loss"), int | float):
            lines = loops.setdefault(re.sub(r"/seed-[\d-]+$", "", row["stage"]), {})
            lines.setdefault(row["stage"], []).append((row["step"], row["loss"]))
    curves = []
    for name, found in loops.items():
        thinned, bad = [], 0
        for pairs in found.values():
            finite = [pair for pair in pairs if math.isfinite(pair[1])]
            thinned.append(finite[:: math.ceil(len(finite) / _MOST_POINTS) or 1])
            bad += len(pairs) - len(finite)
        ends = [pairs[-1] for pairs in found.values()]
        last = max(step for step, _ in ends), sum(loss for _, loss in ends) / len(ends)
        curve = {"stage": name, "last": last, "svg": _curve(name, thinned)}
        curves.append(curve | {"bad": bad, "lines": len(ends)})
    return curves


def _curve(stage: str, lines: list[list[tuple[int, float]]]) -> str:
    """Lines of (step, loss) as an SVG element in the page's colours and letters."""
    import matplotlib
    from matplotlib import figure, ticker

    losses = [loss for pairs in lines for _, loss in pairs]
    muted, line, accent = "#010101", "#020202", "#030303"
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        fixed = {"svg.hashsalt": stage, "svg.fonttype": "none", "font.size": 8}
        matplotlib.rcParams.update(fixed | {"axes.edgecolor": line})
        drawing = figure.Figure(figsize=(3.2, 1.7), layout="constrained")
        axes = drawing.subplots()
        for pairs in lines:
            steps, own = zip(*pairs, strict=True) if pairs else ((), ())
            axes.plot(steps, own, color=accent, linewidth=1.3 / len(lines) ** 0.25)
        if losses and 0 < 10 * min(losses) < max(losses):
            axes.set_yscale("log")
            subs = (1, 2, 5) if max(losses) < 100 * min(losses) else (1,)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=line, linewidth=0.6)
        axes.tick_params(colors=muted, length=0)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    # The page has its own styles and letters, and the names recur in every drawing.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>|font-family.*?; ", "", svg)
    for colour, name in ((muted, "muted"), (line, "line"), (accent, "accent")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _splits(workdir: epath.Path, captions: dict[str, dict]) -> dict[str, Any]:
    """How many images of each split are captioned, and how many are in two splits."""
    ids = files.read_json(workdir / "caption" / "splits.json")
    captioned = {name: sum(i in captions for i in ids[name]) for name in ids}
    shared = sum(map(len, ids.values())) - len(set().union(*ids.values()))
    return {"captioned": captioned, "shared": shared}


def _manifests(workdir: epath.Path) -> dict[str, dict]:
    """Manifests of the finished stages by name, but for this one's."""
    paths = {path.parent.name: path for path in workdir.glob("*/manifest.json")}
    return {
        name: files.read_json(paths[name]) for name in sorted({*paths} - {"report"})
    }


def _optional(path: epath.Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {}
