"""What the real trackers record, offline: run by benchmarks/trackers.sh.

wandb and mlflow are not installed with the tests, which have stand-ins of them.
"""

import os
import pathlib
import struct

import numpy as np
import pytest
from etils import epath

from mvc_jax.training import metrics, trackers

NAMES = ("tensorboard", "wandb", "mlflow")
ROWS = [{"stage": "pretrain/vae", "step": 3, "loss": 0.5}]
BLOCK = 1 << 15


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run that was stopped after step 2, and resumed from step 1."""
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    folder = epath.Path(tmp_path_factory.mktemp("run"))
    trackers.check(NAMES)
    for first, steps in ((0, (1, 2)), (1, (2, 3))):
        with trackers.opened(NAMES, folder, {"seed": 0}, lambda: ROWS):
            log = metrics.MetricsLog(folder, "finetune", from_step=first)
            for step in steps:
                log.write(step, loss=1 / step)
            log.picture(steps[-1], "samples", np.zeros((2, 3, 3), np.uint8))
            log.close()
            trackers.table("accuracy", ["run", "mean"], [["real", 0.5], ["b", None]])
            trackers.results({"accuracy/real": 0.5})
    return folder


def test_mlflow(workdir):
    client = trackers._mlflow_client(workdir)
    experiment = client.get_experiment_by_name("mvc_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (
        run.info.run_id == trackers.files.read_json(workdir / "trackers.json")["mlflow"]
    )
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "finetune/loss")
    assert [(x.step, x.value) for x in losses] == [
        (1, 1.0), (2, 0.5), (2, 0.5), (3, pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert [x.step for x in client.get_metric_history(
        run.info.run_id, "pretrain/vae/loss")] == [3]  # fmt: skip
    assert run.data.metrics["results/accuracy/real"] == 0.5
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"accuracy.json", "accuracy.md", "config.json", "finetune"}
    pictures = client.list_artifacts(run.info.run_id, "finetune")
    assert [x.path for x in pictures] == [
        "finetune/samples_000002.png",
        "finetune/samples_000003.png",
    ]


def records(path: pathlib.Path):
    """The records of an offline run, in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place < len(content):
        room = BLOCK - place % BLOCK
        if room < 7:
            place += room
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb(workdir):
    folders = sorted((workdir / "tracked" / "wandb").glob("offline-run-*"))
    known = trackers.files.read_json(workdir / "trackers.json")["wandb"]
    assert folders and all(x.name.endswith(known) for x in folders)
    rows, summary = [], {}
    for path in sorted((workdir / "tracked" / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(pathlib.Path(path)):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                rows.append(
                    {x.key or "/".join(x.nested_key): x.value_json for x in items}
                )
            if kind == "summary":
                items = record.summary.update
                summary |= {
                    x.key or "/".join(x.nested_key): x.value_json for x in items
                }
            if kind == "run":
                assert record.run.run_id == known
    losses = [
        (int(row["finetune/step"]), float(row["finetune/loss"]))
        for row in rows
        if "finetune/loss" in row
    ]
    assert losses == [(1, 1.0), (2, 0.5), (2, 0.5), (3, pytest.approx(1 / 3))]
    keys = {key for row in rows for key in row}
    assert {"finetune/samples/sha256", "accuracy/sha256"} <= keys
    assert float(summary["accuracy/real"]) == 0.5


def test_tensorboard(workdir):
    from tensorboard.backend.event_processing import event_accumulator

    folder = str(workdir / "tensorboard" / "finetune")
    board = event_accumulator.EventAccumulator(folder)
    board.Reload()
    assert [(x.step, x.value) for x in board.Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)),
    ]  # fmt: skip
