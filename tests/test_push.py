"""`mvc-jax push`: one commit has everything, or nobody sees anything."""

import json
import shutil
import sys

import hub_server
import made_runs
import made_sets
import pytest
from etils import epath
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from mvc_jax import files, train
from mvc_jax.checkpoints import dataset_card, licenses, model_card
from mvc_jax.command import pipeline, run_config
from mvc_jax.configs import common
from mvc_jax.data.digits import NAMES
from mvc_jax.errors import UserError
from mvc_jax.stage import open_stage

LOCAL = "/home/someone/sd15"
SET_FILES = {"README.md", "redrawn.jsonl", "data/train-00000-of-00001.parquet"}
MODEL_FILES = {"README.md", "mvc_jax.json", "model_index.json", "unet/a.safetensors"}
OPEN = {"license": "creativeml-openrail-m"}
TO = ("dataset", "somebody/x"), ("model", "somebody/x")


def make_run(workdir, *, license_=None, on_hub=False, lora=False, **fields):
    """A finished run, whose stages wrote small files in place of what they make."""
    config = run_config.load("configs/digits.py")
    config.update_from_flattened_dict(fields)
    base = config.base.path or "../../pretrain/model"
    license_ = license_ or model_card.UNKNOWN
    data = config.data.source
    model = model_card.Facts(
        base, "0123abc" if on_hub else None, license_, data, NAMES, 100, 16, "a",
        {"steps": 3}, 3, "../lora" if lora else None,
    )  # fmt: skip
    of_sets = {}
    for name in config.generate.sets:
        card = dataset_card.text(
            dataset_card.Facts(
                name, "About it.", data, NAMES, NAMES, [2] * 10, [0] * 10, "16",
                {"seed": 0}, {}, {}, base, license_, True,
            )
        )  # fmt: skip
        of_sets |= {
            f"{name}/README.md": card,
            f"{name}/redrawn.jsonl": "",
            f"{name}/data/train-00000-of-00001.parquet": f"PAR1 {name}",
            f"{name}/train/one/0.png": "PNG",
        }
        if config.generate.include_real:
            of_sets[f"{name}/data/real-00000-of-00001.parquet"] = "PAR1 of mine"
    metrics = made_runs.measured([*NAMES], 10)
    written = {
        "generate": of_sets,
        "finetune": {
            "model/README.md": model_card.text(model),
            "model/mvc_jax.json": json.dumps({"base": base, "data": data}),
            "model/model_index.json": "{}",
            "model/unet/a.safetensors": "weights",
            **({"lora/pytorch_lora_weights.safetensors": "low rank"} if lora else {}),
        },
        "classify": {"models/real/seed-0/model.safetensors": "right"},
        "evaluate": {"metrics.json": json.dumps(metrics)},
    }
    for name in pipeline.select(config):
        stage = open_stage(workdir, pipeline.module(name).stage_spec(config))
        for path, content in written.get(name, {"made.json": ""}).items():
            files.write_text(stage.folder / path, content)
        stage.finish([*written.get(name, {"made.json": ""})])
    beside = workdir / "classify" / "models" / "real" / "seed-0"
    files.write_text(beside / "config.json", "{}")
    run_config.write(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(epath.Path(tmp_path_factory.mktemp("made")) / "run", license_=OPEN)


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return epath.Path(tmp_path / "run")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _http.reset_sessions()  # one that began offline stays so
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    bars = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with hub_server.serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def push(capsys):
    """Runs the command; returns its exit code, output and error."""

    def run(workdir, *words, to="x"):
        words = ["mvc-jax", "push", f"--to={to}", f"--workdir={workdir}", *words]
        code = train.main(words)
        return code, *capsys.readouterr()

    return run


def test_a_run_is_published_with_its_cards(run, hub, push):
    code, out, _ = push(run, "--what=dataset,model,classifiers")
    assert code == 0 and f"{hub.url}/datasets/somebody/x" in out
    third = ("model", "somebody/x-classifiers")
    of_third = {f"real/seed-0/{x}" for x in ("config.json", "model.safetensors")}
    assert hub.public() == {
        TO[0]: SET_FILES,
        TO[1]: MODEL_FILES,
        third: of_third | {"README.md"},
    }
    assert all(len(x.commits) == 2 for x in hub.repositories.values())
    dataset, model, classifiers = hub.repositories.values()
    assert dataset.files["data/train-00000-of-00001.parquet"] == b"PAR1 mixed"
    assert model.files["unet/a.safetensors"] == b"weights"
    for each in (dataset, model, classifiers):
        card = each.files["README.md"].decode()
        front, _ = model_card.split(card)
        assert front["license"] == OPEN["license"] and "mvc_jax" in front["tags"]
        assert "Real and synthetic | 84.3 (± 1.2) | +3.1 (−5.0 to +9.0)" in card
        assert "Does it help? Yes: it does." in card
        assert "you must pass" in card and "stable-diffusion-license" in card
        assert card.count("## Intended use and limits") == 1
    assert "Copies, pixels | 3 |" in dataset.files["README.md"].decode()
    card = model.files["README.md"].decode()
    assert model_card.split(card)[0]["datasets"] == ["somebody/x"]
    assert "[`real/seed-0`](real/seed-0)" in classifiers.files["README.md"].decode()


def test_a_dry_run_needs_no_hub(run, push, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, _ = push(run, "--dry_run")
    assert code == 0
    assert "dataset x: 3 files, " in out and "licence creativeml-openrail-m" in out
    assert "data/train-00000-of-00001.parquet  10 bytes" in out
    assert "# Stable Diffusion fine-tuned on `digits`" in out
    assert "the hub was not asked" in out
    code, _, error = push(run)
    assert code == 2 and "HF_HUB_OFFLINE: wanted a hub" in error


FAULTS = [
    ("GET /api/datasets/somebody/x$", [503], "can be looked at"),
    ("POST /api/repos/create", [403], "can be created"),
    ("POST /api/repos/create", [0, 503], "can be created"),
    ("POST /api/datasets/somebody/x/preupload", [401], "can be filled"),
    ("POST /api/models/somebody/x/preupload", [503], "can be filled"),
    ("POST /somebody/x.git/info/lfs", [503], "can be filled"),
    ("PUT /large", [403], "can be filled"),
    ("PUT /large", [0, 503], "can be filled"),
    ("POST /api/datasets/somebody/x/commit", [409], "can be committed to"),
    ("POST /api/models/somebody/x/commit", [503], "can be committed to"),
    ("POST /api/validate-yaml", [500], "can be committed to"),
]


@pytest.mark.parametrize(("pattern", "statuses", "step"), FAULTS)
def test_where_it_fails_nothing_is_published(run, hub, push, pattern, statuses, step):
    hub.faults[pattern] = [*statuses]
    hub.before = lambda asked: seen.append(hub.public())
    seen = []
    code, _, error = push(run)
    assert code == 2 and step in error and f"{statuses[-1]}" in error
    later = "Try again later" if step == "can be looked at" else "Nothing was published"
    assert later in error and error.count("error: ") == 1
    assert hub.repositories == {} and not any(seen)
    hub.faults.clear()
    assert push(run)[0] == 0
    assert hub.public() == {TO[0]: SET_FILES, TO[1]: MODEL_FILES}


def test_an_interruption_leaves_nothing(run, hub, push, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    assert push(run)[0] == 130
    assert hub.repositories == {}


@pytest.mark.parametrize("commit", ["/commit/", "POST /api/models/.*/commit/"])
def test_what_cannot_be_deleted_is_named_and_used_the_next_time(run, hub, push, commit):
    """As where the network is cut before the first or the second commit."""
    hub.faults = {commit: [503], "DELETE ": [503]}
    code, _, error = push(run)
    assert code == 2 and hub.public() == {}
    left = "the private dataset somebody/x and the model somebody/x are left"
    assert f"Nothing was published, but {left}" in error
    assert "run the same command with --update, which fills what is left" in error
    hub.faults.clear()
    code, out, _ = push(run, "--update")
    assert code == 0 and len(hub.repositories) == 2
    # That it was private may have been somebody's wish.
    assert {*hub.repositories[TO[0]].files} >= SET_FILES
    assert out.count(" (private: ") == 2


def test_complete_but_not_public(run, hub, push):
    hub.faults["PUT /api/models"] = [503]
    code, out, _ = push(run)
    assert code == 0 and hub.public() == {TO[0]: SET_FILES}
    assert "is complete, but still private" in out
    assert f"make it public at {hub.url}/somebody/x/settings" in out


def test_private_and_names_of_organisations(run, hub, push):
    assert push(run, "--private", "--what=model", to="lab/x")[0] == 0
    assert hub.public() == {}
    assert {*hub.repositories} == {("model", "lab/x")}
    for owner in ("readers", "others"):
        code, _, error = push(run, to=f"{owner}/x")
        assert code == 2
        assert "wanted a name of somebody or lab, to which the token may" in error


def test_an_update_replaces_everything_at_once(run, hub, push):
    assert push(run)[0] == 0
    code, _, error = push(run)
    assert code == 2 and "an earlier `mvc-jax push` filled" in error
    dataset = hub.repositories[TO[0]]
    dataset.files["data/old.parquet"] = b"old"
    assert push(run, "--update")[0] == 0
    assert hub.public() == {TO[0]: SET_FILES, TO[1]: MODEL_FILES}
    assert len(dataset.commits) == 3
    assert len(hub.repositories[TO[1]].commits) == 2  # it has not changed
    code, _, error = push(run, "--update", "--private")
    assert code == 2 and "one that is public, with --private" in error


def test_a_commit_of_somebody_else_in_the_middle_is_kept(run, hub, push):
    assert push(run, "--what=dataset")[0] == 0
    dataset = hub.repositories[TO[0]]
    dataset.files["data/old.parquet"] = b"old"

    def meanwhile(asked):
        if asked.endswith("/preupload/main"):
            dataset.commits.append("mine")

    hub.before = meanwhile
    code, _, error = push(run, "--update", "--what=dataset")
    assert code == 2 and "Somebody else has changed it meanwhile" in error
    assert "data/old.parquet" in dataset.files and "DELETE" not in str(hub.asked)


def test_of_two_updates_the_first_may_be_all(run, hub, push):
    assert push(run)[0] == 0
    for each in hub.repositories.values():
        each.files["old"] = b""
    hub.faults["POST /api/models/somebody/x/commit"] = [503]
    code, _, error = push(run, "--update")
    assert (
        code == 2 and "Only the dataset somebody/x was replaced: run the same" in error
    )
    assert hub.public() == {TO[0]: SET_FILES, TO[1]: MODEL_FILES | {"old"}}


def test_other_content_is_never_replaced(run, hub, push):
    hub.repositories[TO[1]] = hub_server.Repository({"a.txt": b""}, ["mine"], False)
    for words in ([], ["--update"]):
        code, _, error = push(run, *words)
        assert code == 2 and "one with other content (a.txt)" in error
    assert {*hub.repositories} == {TO[1]}


def test_tokens(run, hub, push, monkeypatch, tmp_path):
    hub.role = "read"
    assert "can only read" in push(run)[2]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub's token: wanted one that it accepts" in push(run)[2]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, error = push(run)
    assert code == 2 and "the hub's token: wanted one that can write, got none" in error
    assert hub.repositories == {}


def test_an_unfinished_or_changed_run_is_refused(run, push):
    def refused(*words):
        code, _, error = push(run, "--dry_run", *words)
        assert code == 2
        return error

    shard = run / "generate" / "mixed" / "data" / "train-00000-of-00001.parquet"
    files.write_text(shard, "PAR1 other")
    assert "parquet is missing or damaged" in refused()
    files.write_text(shard, "PAR1 mixed")
    config = run_config.read(run)
    config.mix.tokens = 9
    run_config.write(config, run)
    assert "one that is behind (stage mix is behind" in refused()
    config.mix.tokens = common.FIELDS.flat()["mix.tokens"].default
    (run / "evaluate" / "manifest.json").unlink()
    assert "one whose stage evaluate is not finished" in refused()
    assert "no such folder" in push(run / "none", "--dry_run")[2]


def test_real_images_and_sets(tmp_path, push):
    run = make_run(
        epath.Path(tmp_path) / "run", license_=OPEN, **{"generate.include_real": True}
    )
    code, _, error = push(run, "--dry_run")
    assert code == 2 and "wanted synthetic images alone, got your real images" in error
    code, out, _ = push(run, "--dry_run", "--with-real", "--set=mixed,unmixed")
    assert code == 0 and "dataset x-mixed: 4 files" in out
    assert "dataset x-unmixed: 4 files" in out
    assert "wanted some of the run's sets" in push(run, "--dry_run", "--set=best")[2]


def test_local_folders_are_not_told_and_adapters_need_one_of_the_hub(tmp_path, push):
    folder = epath.Path(tmp_path)
    fields = {"base.path": LOCAL, "data.source": "folder:/home/someone/cats"}
    run = make_run(folder / "local", lora=True, **fields)
    code, out, _ = push(run, "--dry_run", "--license=mit")
    assert code == 0 and "/home" not in out and "lora/" not in out
    assert "# `cats`, enlarged" in out and "pretty_name: cats, mixed" in out
    assert "`a local folder, sd15`" in out and "load_lora_weights" not in out
    run = make_run(
        folder / "hub", lora=True, on_hub=True, license_=OPEN, **{"base.path": "a/b"}
    )
    code, out, _ = push(run, "--dry_run")
    assert code == 0 and "base_model: a/b" in out
    assert "lora/pytorch_lora_weights.safetensors" in out
    assert "load_lora_weights('lora')" in out


NAMED = {"license": "other", "license_name": "their-own", "license_link": "https://x"}
GOOD = [
    (OPEN, "", OPEN),
    (OPEN, "creativeml-openrail-m", OPEN),
    (model_card.UNKNOWN, "cc-by-4.0", {"license": "cc-by-4.0"}),
    (model_card.UNKNOWN, "ours", {"license": "other", "license_name": "ours"}),
    (NAMED, "their-own", NAMED),
]
BAD = [
    (model_card.UNKNOWN, "", "--license: wanted the licence of what is published"),
    (OPEN, "mit", "wanted that of the base, creativeml-openrail-m, which is passed"),
    (NAMED, "", "wanted their-own, to confirm"),
    (NAMED, "mit", "add e.g. --license=their-own"),
    ({"license": "cc-by-nc-nd-4.0"}, "", "which allows unchanged copies only"),
    ({"license": "cc-by-nd-4.0"}, "mit", "which allows unchanged copies only"),
]


@pytest.mark.parametrize(("base", "given", "chosen"), GOOD)
def test_licences_that_allow_it(base, given, chosen):
    assert licenses.choose(base, given) == chosen


@pytest.mark.parametrize(("base", "given", "said"), BAD)
def test_licences_that_do_not(base, given, said):
    with pytest.raises(UserError) as error:
        licenses.choose(base, given)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to="], "--to: wanted the name to publish by"),
        (["--to=a/b/c"], "wanted NAME or OWNER/NAME"),
        (["--what=report"], "wanted some of dataset, model, classifiers"),
        (["--workdir=gs://bucket/run"], "a bucket"),
        (["--force"], "wanted flags of `mvc-jax push`, got --force"),
        (["runs/digits"], "got runs/digits"),
    ],
)
def test_flags(push, words, said):
    code, _, error = push("none", *words)
    assert code == 2 and said in error


@pytest.mark.parametrize(
    "more", [{}, {"class_folders": ["a", "b$", ".c"]}, {"rows": made_sets.ROWS[:1]}]
)
def test_a_card_without_pictures_is_that_of_a_set_without_them(more):
    texts = [
        dataset_card.text(made_sets.card(**more, pictures=pictures))
        for pictures in (True, False)
    ]
    assert texts[0] != texts[1]
    assert [dataset_card.without_pictures(x) for x in texts] == [texts[1]] * 2


def test_help_is_of_its_own(capsys):
    with pytest.raises(SystemExit):
        train.main(["mvc-jax", "push", "--help"])
    assert "--to=digits-mvc" in capsys.readouterr().out
