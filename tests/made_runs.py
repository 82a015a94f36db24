"""Runs that are finished up to `evaluate`, and pages as a reader sees them."""

import base64
import html.parser
import io
import itertools
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from PIL import Image

from mvc_jax import files
from mvc_jax.data import duplicates, gather
from mvc_jax.data.digits import NAMES, Digits
from mvc_jax.stage import Spec, open_stage

EVIL = "<script>alert(1)</script>"
SIZE = 8


def make_config() -> ConfigDict:
    data = {"source": "digits", "size": SIZE}
    page = {"title": f"Title {EVIL}", "grid_columns": 2, "grid_scale": 32}
    mix = {"deep": {"tokens": 9}}
    rest = {"generate": {"sets": ("mixed",)}, "report": page}
    return ConfigDict({"seed": 3, "data": data, "mix": mix, **rest})


def make_recipes(ids: dict[int, list[str]], modes=("coarse", "fine")) -> list[dict]:
    """Two images of each mode and class, all from the class's first training image."""
    recipes = []
    for label, mode, _ in itertools.product(ids, modes, range(2)):
        k = len(recipes)
        taken = {"positions": [], "dims": [], "dim_tokens": [1, 16]}
        chosen = [1 + k % 5, 40 + k]
        taken |= {"positions": chosen} if mode != "fine" else {}
        taken |= {"dims": [chosen]} if mode != "coarse" else {}
        recipe = {"index": k, "source": ids[label][0], "partners": [ids[label][1]]}
        recipes.append(recipe | {"label": NAMES[label], "mode": mode} | taken)
    return recipes


def pixels(set_name: str, index: int) -> np.ndarray:
    """A different image for each set and index, so that a mix-up is noticed."""
    rng = np.random.default_rng([*set_name.encode(), index])
    return rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def write_set(folder, name: str, recipes: list[dict]) -> None:
    rows = []
    for recipe in reversed(recipes):  # the order in the file must not matter
        buffer = io.BytesIO()
        Image.fromarray(pixels(name, recipe["index"])).save(buffer, "png")
        row = {"image": {"bytes": buffer.getvalue(), "path": "x.png"}}
        row |= {key: recipe[key] for key in ("index", "source", "partners")}
        row["mode"] = recipe["mode"] if name == "mixed" else name
        row["label"] = NAMES.index(recipe["label"])
        rows.append(row | {"prompt": f"prompt {recipe['index']} {EVIL}", "seed": 3})
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        path = folder / "data" / f"train-{shard:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path)


def make_metrics() -> dict:
    """Numbers that occur once each, so that they can be found on the page."""

    def row(name: str, title: str, mean: float, difference: dict | None) -> dict:
        return {
            "name": name,
            "title": title,
            "regime": "r",
            "policy": "none",
            "set": "",
            "accuracy": {
                "mean": mean,
                "std": mean / 71,
                "per_seed": [mean - 0.02, mean],
            },
            "difference": difference,
            "real_seen": int(mean * 20000),
            "synthetic_seen": int(mean * 19000),
            "per_class": [0.301 + mean / 30 + 0.011 * k for k in range(10)],
        }

    better = {"against": "real", "mean": 0.0312, "low": 0.0151, "high": 0.0473}
    unsure = {"against": "combined", "mean": -0.0061, "low": -0.0233, "high": 0.0111}
    question = {"run": "combined", "against": "real"} | better
    names = list(NAMES)
    names[3] = f"three {EVIL}"
    return {
        "class_names": names,
        "counts": {"pool": 5, "train": 20, "test": 17},
        "seeds": 2,
        "steps": 4321,
        "batch_size": 37,
        "confidence": 0.9,
        "runs": [
            row("real", "Real only", 0.8123, None),
            row("combined", "Real and synthetic", 0.8434, better),
            row("two_phase", "Two phases", 0.8374, unsure),
        ],
        "questions": [
            question | {"question": "Does it help?", "verdict": "yes"}
            | {"sentence": "Yes: it does."},
            question | {"question": "Does it pay?", "verdict": "unclear"}
            | {"sentence": "No evidence either way."},
        ],
        "sets": {"mixed": {"images": 4070, "diversity": 0.20991, "copies": 6}},
        "notes": [f"A note {EVIL}"],
    }  # fmt: skip


def measured(names: list[str], classes: int, *, seeds: int = 2) -> dict:
    """Metrics as `evaluate` writes them now, of a run with these class names.

    Args:
      names: K of them.
      classes: how many of them have images, from the first on.
      seeds: of the classifiers; with one, differences have no intervals.
    """
    rng, count = np.random.default_rng(0), len(names)
    ends = (-0.05, 0.09) if seeds > 1 else (None, None)
    spread = dict(zip(("low", "high"), ends, strict=True))
    metrics = make_metrics() | {"class_names": names, "seeds": seeds}
    for run in metrics["runs"]:
        confusion = rng.multinomial(60, np.eye(count) * 0.6 + 0.4 / count)
        run["confusion_counts"] = [
            {str(k): int(n) for k, n in enumerate(row) if n} for row in confusion
        ]
        run["per_class"] = (np.diag(confusion) / 60).tolist()
        run["accuracy"]["per_seed"] = run["accuracy"]["per_seed"][:seeds]
        run["calibration_error"] = 0.1
        run["difference_by_class"] = None
        if run["difference"]:
            run["difference"] |= spread
            means = rng.uniform(-0.1, 0.1, count).tolist()
            run["difference_by_class"] = [
                {"images": 30, "mean": x, **spread} for x in means
            ]
    sets = {x: _measured_set(names, classes, x) for x in ("test", "unmixed", "mixed")}
    metrics["headline"] = [{"question": "Which is best?", "sentence": "Real only."}]
    metrics["caveats"] = {
        "accuracy": [f"Of one split: see `mvc-jax repeat` {EVIL}."],
        "copies": ["By pixels."],
        "data": ["Two images were left out."],
    }
    metrics["images"] = {
        "features": "pixels",
        "dims": 192,
        "train_images": 2 * classes,
        "copy_distance": 0.0517,
        "sets": sets,
        "notes": ["Few images."],
    }
    return metrics


def _measured_set(names: list[str], classes: int, name: str) -> dict:
    """Of images that `make_workdir` makes: four of each class, by its first image."""
    digits = Digits().labels
    train = [f"digits/{np.flatnonzero(digits == k)[0]:04d}" for k in range(classes)]
    closest = [
        {"image": 4 * k, "label": k, "train": train[k], "distance": 0.0413 + 0.02 * k}
        | {"class_least": 0.0617, "class_median": 0.0718}
        for k in range(classes)
    ]
    certain = [
        {"image": 4 * k + 1, "label": k, "predicted": (k + 1) % classes, "votes": 5}
        | {"ratio": 0.8, "nearest": {"train": train[(k + 1) % classes]}}
        | {"own": {"train": train[k], "distance": 0.219}}
        for k in range(classes)
    ]
    for row in certain:
        row["nearest"]["distance"] = 0.173
    counts = {"images": 4, "nearest": 1, "test_images": 7, "test_nearest": 1}
    rule = {"images": 40, "count": 9, "fraction": 0.225, "effective": 11.0}
    rule |= {"test": {"images": 70, "count": 10, "fraction": 0.143}}
    rule |= {"difference": 0.082, "low": -0.03, "high": 0.2}
    classes_ = [{"name": x, "images": 4, "kid": 0.1} for x in names]
    found = {"images": 40, "kid": 0.01, "classes": classes_, "closest": closest}
    found |= {"copies": 3, "leaks": 1} if name != "test" else {}
    found["other_class"] = {
        "neighbours": 5,
        "rules": {"nearest": rule},
        "classes": [counts] * len(names),
        "most_certain": certain,
    }
    return found


def finish(workdir, stage: str, artifacts: list[str], **counts: int) -> None:
    open_stage(workdir, Spec(stage, {})).finish(artifacts, **counts)


def make_workdir(
    workdir,
    *,
    made=("mixed", "unmixed", "pretrained"),
    modes=("coarse", "fine"),
    classes=10,
    **changes,
):
    """Writes a run finished up to `evaluate`; `changes` replace metrics."""
    source = Digits()
    labels = source.labels
    ids = {
        k: [f"digits/{i:04d}" for i in np.flatnonzero(labels == k)[:4]]
        for k in range(classes)
    }
    parts = {"pool": slice(2, 3), "train": slice(0, 2), "test": slice(3, 4)}
    split = {n: [i for k in ids for i in ids[k][part]] for n, part in parts.items()}
    index = {id_: i for i, id_ in enumerate(source.ids)}
    info = gather.ImageInfo(8, 8, "", True, duplicates.Fingerprint(0, np.zeros(0)))
    chosen = {n: np.asarray([index[i] for i in ids]) for n, ids in split.items()}
    order = [i for n in ("pool", "train", "test") for i in chosen[n].tolist()]
    images = np.stack([source[i]["image"] for i in order])
    files.write_array(workdir / "caption" / "images.npy", images)
    gathered = gather.Gathered(chosen, dict.fromkeys(order, info))
    gather.write_rows(workdir / "caption", source, gathered)
    stamp = {"captioner": "attributes", "version": "7"}
    captions = [
        {"id": i, "caption": f"caption {i} {EVIL}"} | stamp for i in split["train"]
    ]
    files.write_jsonl(workdir / "caption" / "captions.jsonl", captions)
    finish(workdir, "caption", ["splits.json", "captions.jsonl"], train=20)
    recipes = make_recipes(ids, modes)
    files.write_jsonl(workdir / "mix" / "recipes.jsonl", recipes)
    finish(workdir, "mix", ["recipes.jsonl"], recipes=len(recipes))
    (workdir / "generate").mkdir()
    for name in made:
        write_set(workdir / "generate" / name, name, recipes)
    finish(workdir, "generate", [], images=len(made) * len(recipes))
    finish(workdir, "classify", [], fits=6)
    files.write_json(workdir / "evaluate" / "metrics.json", make_metrics() | changes)
    finish(workdir, "evaluate", ["metrics.json"])
    losses = [("pretrain/vae", 10.0), ("pretrain/vae", 0.37), ("finetune", 0.25)]
    rows = [{"stage": s, "step": 10 * i, "loss": x} for i, (s, x) in enumerate(losses)]
    for seed, loss in enumerate((0.5, 0.7)):
        rows.append({"stage": f"classify/real/seed-{seed}", "step": 5, "loss": loss})
    files.write_jsonl(workdir / "metrics.jsonl", rows)
    times = {"seconds": 1234.56, "compile_seconds": 65.43, "peak_rss_mib": 2345}
    files.write_json(workdir / "timings.json", {"finetune": times})
    return workdir


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the text of each table row, and all text.

    Attributes:
      drawings: (alternative text, URI) of each picture, in the order of the page.
    """

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.rows = [" ".join(row.split()) for row in self.rows]
        stored = {a["id"]: a["href"] for tag, a in self.tags if tag == "image"}
        self.drawings, alt = [], ""
        for tag, attributes in self.tags:
            alt = attributes.get("aria-label", alt) if tag == "svg" else alt
            if tag == "use":
                self.drawings.append((alt, stored[attributes["href"][1:]]))
            if tag == "img":
                self.drawings.append((attributes["alt"], attributes["src"]))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data):
        self.text += data
        if self.rows:
            self.rows[-1] += f"{data} "

    def row(self, start: str) -> str:
        return next(row for row in self.rows if row.startswith(start))

    def images(self, alt: str) -> list[np.ndarray]:
        """Pixels of the pictures whose alternative text matches, in page order."""
        return [pixels_of(uri) for text, uri in self.drawings if re.search(alt, text)]


def pixels_of(uri: str) -> np.ndarray:
    kind, _, content = uri.partition(",")
    assert kind in ("data:image/png;base64", "data:image/webp;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
