"""Stages whose work is to write one file: their specs, rules and folders are real."""

import importlib
import json

import pytest
from etils import epath

from mvc_jax import caption, classify, evaluate, files
from mvc_jax.command import pipeline
from mvc_jax.stage import Spec, open_stage

FILES = {"evaluate": "metrics.json", "report": "report.html"}


def make(workdir, spec: Spec) -> bool:
    """Runs a stage; returns whether there was any work.

    Its file is a function of its settings and inputs, as those of the real stages are.
    """
    opened = open_stage(workdir, spec)
    if opened.complete:
        return False
    content = {"settings": opened.settings, "inputs": opened.inputs}
    name = FILES.get(spec.name, "made.json")
    files.write_text(opened.folder / name, json.dumps(content))
    opened.finish([name])
    return True


def finish(workdir, config, *names: str) -> None:
    """Finishes stages without their `run`."""
    for name in names:
        make(epath.Path(workdir), pipeline.module(name).stage_spec(config))


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts them in place of all ten; returns the list of those that will have worked.

    `check` of every stage stays the real one.
    """
    worked: list[str] = []

    def run_of(name):
        def run(config, workdir):
            if config.generate.limit and name == "generate":
                worked.append("preview")
            elif make(workdir, pipeline.module(name).stage_spec(config)):
                worked.append(name)

        return run

    for name in pipeline.STAGES:
        module = importlib.import_module(f"mvc_jax.{name}")
        monkeypatch.setattr(module, "run", run_of(name))
    # There are no images.
    monkeypatch.setattr(classify, "check_images", lambda config, workdir: None)
    monkeypatch.setattr(evaluate, "table", lambda metrics: "the table")
    monkeypatch.setattr(caption, "table", lambda workdir: "the captions")
    return worked
