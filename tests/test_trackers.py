"""Trackers: what they are told, that they go on, and that they stop no run."""

import json
import sys
import types

import numpy as np
import pytest
import swept_runs
from etils import epath
from PIL import Image

from mvc_jax import evaluate, files, pictures, report, train
from mvc_jax.errors import UserError
from mvc_jax.stage import open_stage
from mvc_jax.training import metrics, trackers

ROWS = [{"stage": "pretrain/vae", "step": 3, "loss": 0.5}]


class Recording:
    """A tracker that keeps what it is told.

    Attributes:
      opened: (id, settings) of every one that was opened.
      told: what they were told, with the name of the method.
      fails: the name of the method that raises.
    """

    opened: list = []
    told: list = []
    fails = ""

    def __init__(self, workdir, known, settings):
        self.tell("open")
        self.id = known or f"record-{len(Recording.opened)}"
        Recording.opened.append((self.id, settings))

    def tell(self, name, *values):
        if name == Recording.fails:
            raise ConnectionError("the service is gone\nand more")
        Recording.told.append((name, *values))

    def scalars(self, *values):
        self.tell("scalars", *values)

    def picture(self, series, step, name, image):
        self.tell("picture", series, step, name, image.shape)

    def table(self, *values):
        self.tell("table", *values)

    def results(self, values):
        self.tell("results", values)

    def flush(self):
        self.tell("flush")

    def close(self, *, finished):
        self.tell("close", finished)


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setattr(Recording, "opened", [])
    monkeypatch.setattr(Recording, "told", [])
    monkeypatch.setattr(Recording, "fails", "")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recording)
    monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Recording


def opened(folder, names=("wandb",)):
    return trackers.opened(names, epath.Path(folder), {"seed": 0}, lambda: ROWS)


def log(folder, step, **values):
    made = metrics.MetricsLog(folder, "finetune", from_step=step - 1)
    made.write(step, **values)
    made.picture(step, "samples", np.zeros((2, 3, 3), np.uint8))
    made.close()


def told(name):
    return [values for kind, *values in Recording.told if kind == name]


def test_a_loop_is_told_and_a_resumed_run_goes_on_with_its_record(tmp_path):
    with opened(tmp_path):
        log(tmp_path, 1, loss=0.25)
    with pytest.raises(RuntimeError), opened(tmp_path):
        log(tmp_path, 2, loss=0.125)
        raise RuntimeError
    assert Recording.opened == [("record-0", {"seed": 0})] * 2
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"] == "record-0"
    # Only a new record is told of what was logged before it.
    before = ["pretrain/vae", 3, {"loss": 0.5}]
    first, second = (["finetune", k, {"loss": x}] for k, x in ((1, 0.25), (2, 0.125)))
    assert told("scalars") == [before, first, second]
    assert told("picture") == [["finetune", k, "samples", (2, 3, 3)] for k in (1, 2)]
    assert told("close") == [[True], [False]]
    log(tmp_path, 3, loss=0.1)  # by a program without a run
    assert len(told("scalars")) == 3


@pytest.mark.parametrize("method", ["open", "scalars", "flush", "picture", "close"])
def test_one_that_fails_is_left_out_with_one_warning(tmp_path, caplog, method):
    Recording.fails = method
    with opened(tmp_path):
        for step in (1, 2):
            log(tmp_path, step, loss=0.5)
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [1, 2]
    (warning,) = [x for x in caplog.records if x.levelname == "WARNING"]
    assert warning.getMessage() == (
        "wandb is left out from here on: ConnectionError: the service is gone"
    )
    if method != "close":
        assert not told("close")


def test_tensorboard_is_one_of_them(tmp_path):
    with opened(tmp_path / "without"):
        log(tmp_path / "without", 1, loss=0.5)
    assert not (tmp_path / "without" / "tensorboard").exists()
    with opened(tmp_path / "with", ["tensorboard"]):
        log(tmp_path / "with", 1, loss=0.5)
    assert (tmp_path / "with" / "tensorboard" / "finetune").is_dir()
    assert len(Recording.opened) == 1  # of the first one, wandb


def test_before_any_work_a_package_and_credentials_are_asked_for(monkeypatch):
    trackers.check(["tensorboard", "wandb", "mlflow"])
    nobody = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", nobody)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="wanted an API key for WANDB_MODE=online"):
        trackers.check(["wandb"])
    nobody.api.api_key = "secret"
    trackers.check(["wandb"])

    class Client:
        def __init__(self, tracking_uri):
            assert tracking_uri == "http://127.0.0.1:9"

        def search_experiments(self, max_results):
            raise ConnectionError("refused")

    library = types.SimpleNamespace(MlflowClient=Client)
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="wanted an answer of MLFLOW_TRACKING_URI=http"):
        trackers.check(["mlflow"])
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"pip install 'mvc_jax\[wandb\]'"):
        trackers.check(["wandb"])
    trackers.check(["tensorboard"])


def test_records_need_a_local_workdir(monkeypatch):
    bucket = epath.Path("gs://bucket/run")
    with pytest.raises(UserError, match="a local --workdir for wandb, which is off"):
        trackers.check_folder(["wandb"], bucket)
    monkeypatch.setenv("WANDB_MODE", "online")
    trackers.check_folder(["tensorboard", "wandb"], bucket)


METRICS = {
    "runs": [
        {
            "title": "Real only",
            "name": "real",
            "accuracy": {"mean": 0.5, "std": 0.1, "per_seed": [0.4, 0.6]},
            "difference": None,
        },
        {
            "title": "Real + synthetic",
            "name": "combined",
            "accuracy": {"mean": 0.75, "std": 0.1, "per_seed": [0.7, 0.8]},
            "difference": {"mean": 0.25, "low": None, "high": None, "against": "real"},
        },
    ]
}


def test_at_its_end_a_run_tells_the_table_and_the_grid(tmp_path, monkeypatch):
    def make(stage, **contents):
        def run(config, workdir):
            opened = open_stage(workdir, stage.stage_spec(config))
            for name, content in {} if opened.complete else contents.items():
                files.write_bytes(opened.folder / name.replace("_", "."), content)
            if not opened.complete:
                opened.finish([name.replace("_", ".") for name in contents])

        monkeypatch.setattr(stage, "run", run)

    swept_runs.install(monkeypatch)
    image = pictures.png(Image.new("RGB", (4, 2)))
    make(evaluate, metrics_json=json.dumps(METRICS).encode())
    make(report, report_html=b"", grid_png=image)
    words = ["train", f"--workdir={tmp_path}", "--config.track=tensorboard,wandb"]
    assert train.main(words) == 0
    (settings,) = [settings for _, settings in Recording.opened]
    assert settings["data"]["source"] == "digits"
    [[name, columns, rows]] = told("table")
    assert name == "accuracy" and columns[:2] == ("training", "accuracy")
    assert rows[1] == ["Real + synthetic", 0.75, 0.1, 0.25, None, None, "real"]
    assert told("results") == [[{"accuracy/real": 0.5, "accuracy/combined": 0.75}]]
    assert told("picture") == [["report", 0, "grid", (2, 4, 3)]]
    boards = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    assert boards == {"evaluate", "report"}
    # A finished run has nothing to tell; a new tracker hears of it all.
    Recording.told.clear()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Recording)
    assert train.main(words) == 0 and not Recording.told
    assert train.main([*words[:2], "--config.track=wandb,mlflow"]) == 0
    assert len(Recording.opened) == 3 and told("table")
