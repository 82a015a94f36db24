"""Stand-in stages with test images and results, for commands that compare workdirs."""

import importlib

import made_stages
import numpy as np
import pytest
from etils import epath

from mvc_jax import files
from mvc_jax.training import runtime

IMAGES = 400


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts them in place of all ten; returns the list of those that will have worked.

    Runs on real images alone have the same results with all settings of `mix`; others
    are better with more tokens. Test images depend on `data.per_class`.
    """
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    worked = made_stages.install(monkeypatch)
    for name, write in (("caption", write_images), ("classify", write_results)):
        module = importlib.import_module(f"mvc_jax.{name}")
        monkeypatch.setattr(module, "run", _then(module.run, write))
    return worked


def _then(run, write):
    def both(config, workdir):
        run(config, workdir)
        write(config, epath.Path(workdir))

    return both


def write_images(config, workdir):
    """The files of `data/splits.py`, with test images alone."""
    folder = workdir / "caption"
    if (folder / "splits.json").exists():
        return
    ids = [f"{config.data.per_class}-{i}" for i in range(IMAGES)]
    rows = [{"id": x, "split": "test", "label": i % 2} for i, x in enumerate(ids)]
    files.write_jsonl(folder / "images.jsonl", rows)
    files.write_json(folder / "splits.json", {"test": ids})
    names = list(config.data.classes) or ["cat", "dog"]
    files.write_json(folder / "dataset.json", {"class_names": names, "grey": False})
    files.write_array(folder / "images.npy", np.zeros((IMAGES, 4, 4, 3), np.uint8))


def accuracy(config, name):
    """How often a run is right: of real images alone 60 %."""
    if name.startswith("real"):
        return 0.6 + config.data.per_class / 1000
    if ":unmixed" in name:
        return 0.62
    by_partner = 0.01 * (config.mix.partner == "any")
    return 0.62 + 0.02 * config.mix.tokens + by_partner


def draw(config, name, seed):
    """Which images are the easiest ones, for a classifier."""
    return np.random.default_rng(seed).permutation(IMAGES)


def write_results(config, workdir):
    """Predictions of labels 0, 1, 0, 1, ..., more of them right with more tokens."""
    labels = np.arange(IMAGES) % 2
    for name in config.classify.runs:
        path = workdir / "classify" / "results"
        path /= name.replace(":", "-").replace("+", "_") + ".json"
        if path.exists():
            continue
        seeds = []
        for seed in range(config.classify.seeds):
            right = draw(config, name, seed) < accuracy(config, name) * IMAGES
            predictions = np.where(right, labels, 1 - labels)
            seeds.append({"predictions": predictions.tolist()})
        files.write_json(path, {"name": name, "seeds": seeds})
