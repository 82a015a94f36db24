"""The digits config end to end, as a user runs it: whole, killed, rerun, documented."""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import nbclient
import nbformat
import numpy as np
import pytest
from documented import SHORT, commands, train_arguments
from etils import epath
from fork_server import ROOT, user_environment
from forked_processes import Many
from PIL import Image

from mvc_jax import stage as contract
from mvc_jax import train
from mvc_jax.command import command_line, pipeline, plan, price, run_config
from mvc_jax.data import splits
from mvc_jax.errors import UserError
from mvc_jax.generation import synthetic
from mvc_jax.pipeline import InstructPix2Pix
from mvc_jax.stage import read_manifest
from mvc_jax.train import STAGES
from mvc_jax.training import rng, runtime, sharding

CACHE = ROOT / ".pytest_cache" / "xla-one-device"
TIMED = ("report.html", "report.md")  # they show how long the stages took


def arguments(workdir, *more):
    return [
        "--config=configs/digits.py",
        f"--workdir={workdir}",
        f"--config.compilation_cache={CACHE}",
        *(f"--config.{setting}" for setting in SHORT),
        *more,
    ]


def python(*words):
    """Runs Python in a process like a user's."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
    )


def digests(folder):
    """Relative path of every file in a folder -> its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Names are never patterns, and need no quotes.
_NAME = "-lr [1e-4] a**b x? ~ {y} 'z' \"\u00e9%s$HOME"


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run: (workdir, its finished process)."""
    workdir = tmp_path_factory.mktemp("runs") / _NAME
    done = python("-m", "mvc_jax.train", *arguments(workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.fixture
def here(monkeypatch):
    """Runs a command in this process, which keeps its own settings of JAX."""
    monkeypatch.setattr(runtime, "set_up", lambda _: None)
    monkeypatch.chdir(ROOT)
    return lambda workdir, *more: train.main(["train", *arguments(workdir, *more)])


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest_of(workdir, name):
    return json.loads((workdir / name / "manifest.json").read_text())


def test_every_stage_ends_with_a_manifest_and_the_terminal_with_the_table(whole):
    workdir, done = whole
    for stage in STAGES:
        manifest = json.loads((workdir / stage / "manifest.json").read_text())
        assert manifest["stage"] == stage
        assert not (workdir / stage / "started.json").exists()
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == f"report: {workdir}/report/report.html"
    runs = json.loads((workdir / "config.json").read_text())["classify"]["runs"]
    assert sum("±" in line for line in lines) == len(runs) > 5
    first, second = done.stderr.splitlines()[:2]  # no library's warning
    assert first.startswith("10 of 10 stages to do; ")
    assert second == "images: 0/1797 images"
    assert "deprecated" not in done.stderr
    assert "Traceback" not in done.stderr
    timings = json.loads((workdir / "timings.json").read_text())
    assert set(timings) == set(STAGES)
    assert timings["pretrain"]["compile_seconds"] > 0
    known = {name for name, row in timings.items() if "devices" in row}
    assert known == {*pipeline.MESH_STAGES}
    assert timings["generate"]["devices"] == {"kind": "cpu", "count": 1}


def test_a_run_makes_what_its_price_said(whole, tmp_path):
    workdir, done = whole
    config = run_config.load(str(workdir / "config.json"))
    new = epath.Path(tmp_path) / "new"
    prices = price.make(plan.make(STAGES, config, new), config, new)
    works = {priced.step.name: priced.work for priced in prices}
    trained = pipeline.module("encode").base_of(config, epath.Path(workdir))
    assert works["finetune"].speed["base"] == trained.speed  # known before and after
    assert done.stderr.startswith("10 of 10 stages to do; ")
    read = {name: read_manifest(workdir, name)["counts"] for name in STAGES}
    caption = read["caption"]
    assert works["caption"].makes == {
        "images": sum(caption[name] for name in ("pool", "train", "test")),
        "captions": caption["pool"] + caption["train"],
    }
    assert works["encode"].makes["images"] == read["encode"]["images"]
    assert works["encode"].makes["prompts, at most"] >= read["encode"]["prompts"]
    assert works["pairs"].makes == read["pairs"]
    assert works["finetune"].makes["steps"] == read["finetune"]["steps"]
    assert works["mix"].makes["recipes"] == read["mix"]["recipes"]
    left_out = read["generate"]["left_out"]
    assert works["generate"].makes["images"] == read["generate"]["images"] + left_out
    assert works["classify"].makes["classifiers"] == read["classify"]["fits"]
    rows = read_jsonl(workdir / "metrics.jsonl")
    last = {row["stage"]: row["step"] for row in rows}
    steps = {"pretrain": 0, "finetune": 0, "classify": 0}
    for name, step in last.items():
        if name.split("/")[0] in steps:
            steps[name.split("/")[0]] += step
    assert steps == {name: works[name].makes["steps"] for name in steps}
    pixels = (workdir / "caption" / "images.npy").stat().st_size
    assert 0 <= pixels - works["caption"].disk["pixels"] < 1000
    moments = (workdir / "encode" / "moments" / "00000.npy").stat().st_size
    assert 0 <= moments - works["encode"].disk["moments"] < 1000
    for name in ("pretrain", "finetune", "generate", "classify"):
        written = (p for p in (workdir / name).rglob("*") if p.is_file())
        size = sum(path.stat().st_size for path in written)
        assert works[name].leaves < size < 2 * works[name].disk_bytes, name


def test_no_test_image_is_seen_and_no_pool_image_reaches_a_classifier(whole):
    workdir, _ = whole
    parts = json.loads((workdir / "caption" / "splits.json").read_text())
    pool, train, test = (set(parts[name]) for name in ("pool", "train", "test"))
    assert (len(pool), len(train), len(test)) == (900, 100, 797)
    assert len(pool | train | test) == 1797
    captioned = {row["id"] for row in read_jsonl(workdir / "caption/captions.jsonl")}
    assert captioned == pool | train
    encoded = [row["id"] for row in read_jsonl(workdir / "encode" / "prompts.jsonl")]
    assert sorted(encoded) == sorted(train)
    pairs = np.load(workdir / "pairs" / "pairs.npy")
    assert pairs.min() >= 0 and pairs.max() < len(train)
    recipes = read_jsonl(workdir / "mix" / "recipes.jsonl")
    assert {row["source"] for row in recipes} == train
    assert {id_ for row in recipes for id_ in row["partners"]} <= train
    for name in ("mixed", "unmixed", "pretrained"):
        sources = synthetic.read_images(workdir / "generate" / name)[2]
        assert set(sources) == train
    result = json.loads((workdir / "classify/results/combined.json").read_text())
    assert [len(seed["predictions"]) for seed in result["seeds"]] == [797, 797]


def test_every_class_has_its_synthetic_images_in_both_forms(whole):
    workdir, _ = whole
    images, labels, _ = synthetic.read_images(workdir / "generate" / "mixed")
    assert images.shape == (200, 16, 16, 3)
    assert np.bincount(labels).tolist() == [20] * 10
    folder = workdir / "generate" / "mixed" / "train"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir())[:2] == [
        "eight",
        "five",
    ]
    rows = read_jsonl(folder / "metadata.jsonl")
    assert len(rows) == 200
    assert all((folder / row["file_name"]).exists() for row in rows)


def test_sets_share_sources_and_noise_and_differ_in_what_they_control(whole):
    workdir, _ = whole
    read = {
        name: synthetic.read_images(workdir / "generate" / name)
        for name in ("mixed", "unmixed", "pretrained")
    }
    assert read["mixed"][2] == read["unmixed"][2] == read["pretrained"][2]
    assert (read["mixed"][0] != read["unmixed"][0]).any()
    assert (read["unmixed"][0] != read["pretrained"][0]).any()


def test_a_program_draws_the_same_images(whole):
    """`mvc_jax.pipeline`, given a run's model, prompts and recipes."""
    workdir = epath.Path(whole[0])
    config = run_config.load(str(workdir / "config.json"))
    train = splits.read_split(workdir / "caption", "train")
    prompts = read_jsonl(workdir / "encode" / "prompts.jsonl")
    recipes = read_jsonl(workdir / "mix" / "recipes.jsonl")[:3]
    row_of = {row["id"]: i for i, row in enumerate(prompts)}
    sources = [row_of[recipe["source"]] for recipe in recipes]
    section = config.generate
    drawer = InstructPix2Pix.from_pretrained(
        workdir / "finetune" / "model",
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        batch_size=section.batch_size,
    )
    drawn = drawer.sample(
        train.images[sources],
        [prompts[row]["prompt"] for row in sources],
        key=rng.purpose_key(config.seed, "noise"),
        partners=[
            [prompts[row_of[id_]]["prompt"] for id_ in recipe["partners"]]
            for recipe in recipes
        ],
        recipe=recipes,
        sampler=section.sampler,
        steps=section.steps,
        guidance_interval=tuple(section.guidance_interval),
        grey=train.grey,
    )
    folder = workdir / "generate" / "mixed"
    expected = [
        row["image"].astype(int)
        for row in synthetic.read_rows(folder, ("image",), indices=range(3))
    ]
    np.testing.assert_allclose(drawn.astype(int), expected, atol=1)


def test_the_notebook_runs(whole, tmp_path):
    """Its stages are done by the same settings; its pictures are drawn."""
    shutil.copytree(whole[0], tmp_path / "runs" / "quickstart")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    cells = notebook.cells
    first = next(i for i, x in enumerate(cells) if x.metadata.get("tags"))
    lines = [f"config.{setting}" for setting in SHORT]
    lines.append(f"config.compilation_cache = {str(CACHE)!r}")
    cells.insert(first + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute(env=user_environment() | {"PYTHONPATH": str(ROOT)})
    drawn = [
        output
        for cell in cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == 8


def test_a_second_run_does_no_work_and_imports_nothing_heavy(whole):
    workdir, _ = whole
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    script = (
        "import sys\n"
        "from mvc_jax import train\n"
        "code = train.main(sys.argv)\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'diffusers'}\n"
        "heavy |= {'torch', 'tensorflow', 'scipy', 'sklearn', 'skimage', 'grain'}\n"
        "heavy |= {'matplotlib', 'pyarrow', 'tensorboardX'}\n"
        "sys.exit(code or ', '.join(sorted(heavy & {*sys.modules})) or 0)\n"
    )
    done = python("-c", script, *arguments(workdir))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "nothing to do: all 10 stages are complete\n"
    assert "±" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "flag, difference",
    [
        ("--config.mix.per_image=1", "mix.per_image: 2 -> 1"),
        ("--config.seed=1", "seed: 0 -> 1"),
        ("--config.classify.steps=11", "classify.steps: 10 -> 11"),
        ("--config.mix.per_image=3", "stage generate grows"),  # not half of the run
    ],
)
def test_other_settings_in_a_finished_workdir_are_refused(
    whole, here, capsys, flag, difference
):
    workdir, _ = whole
    before = digests(workdir)
    assert here(workdir, flag) == 2
    errors = capsys.readouterr().err
    assert difference in errors
    assert "--workdir" in errors and "--redo=" in errors
    assert digests(workdir) == before


def test_a_second_workdir_takes_over_what_a_change_does_not_affect(
    whole, here, capsys, tmp_path
):
    workdir, _ = whole
    before = digests(workdir)
    flags = [f"--from={workdir}", "--config.evaluate.confidence=0.9"]
    assert here(tmp_path, *flags) == 0
    printed = capsys.readouterr()
    assert f"taken over from {workdir}: {', '.join(STAGES[:8])}\n" in printed.err
    assert f"report: {tmp_path}/report/report.html" in printed.out
    for stage in STAGES[:8]:
        expected = {x: before[f"{stage}/{x}"] for x in digests(workdir / stage)}
        assert digests(tmp_path / stage) == expected
    record = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert record["confidence"] == 0.9
    assert train.main(["train", f"--workdir={tmp_path}"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert digests(workdir) == before


def test_a_sweep_draws_and_trains_only_what_a_value_changes(
    whole, fork_server, tmp_path
):
    workdir, _ = whole
    record = json.loads((workdir / "config.json").read_text())["mix"]
    flags = [
        f"--from={workdir}",
        f"--vary=mix.tokens={record['tokens'] - 1},{record['tokens']}",
        "--config.classify.runs=real,combined,combined:unmixed",
    ]
    words = ["train", "sweep", f"--workdir={tmp_path}", *flags]
    run = fork_server.start("mvc_jax.train:main", words, folder=tmp_path / "output")
    code, told, errors = run.wait()
    assert code == 0, errors
    own, other = (tmp_path / f"mix.tokens={record['tokens'] - x}" for x in (0, 1))
    same = {
        "finetune/model/unet/diffusion_pytorch_model.safetensors",
        "generate/unmixed/data/train-00000.parquet",
        "generate/pretrained/data/train-00000.parquet",
        "classify/results/real.json",
        "classify/results/combined-unmixed.json",
    }
    for name in same:
        assert (other / name).samefile(workdir / name), name
        assert (own / name).samefile(workdir / name), name
    changed = {"generate/mixed/data/train-00000.parquet"}
    for name in changed | {"classify/results/combined.json"}:
        assert not (other / name).samefile(workdir / name), name
        assert (own / name).samefile(workdir / name), name
    listed = manifest_of(other, "classify")["artifacts"]
    assert {f"classify/{x}" for x in listed} >= {x for x in same if "results" in x}
    summary = json.loads((tmp_path / "sweep.json").read_text())
    assert summary["same"] == ["real", "combined:unmixed"]
    assert summary["affected"] == ["combined"]
    assert "# Sweep over mix.tokens" in told


def test_a_stage_without_its_input_is_refused(here, capsys, tmp_path):
    assert here(tmp_path, "--config.stages=generate,classify") == 2
    errors = capsys.readouterr().err
    assert "stage generate: wanted the finished stage finetune" in errors


def killed_in(server, workdir, stage, marker, delay):
    """Starts the run and kills it `delay` seconds after the file `marker` appears."""
    flags = ["train", *arguments(workdir)]
    run = server.start("mvc_jax.train:main", flags, folder=workdir.parent / "killed")
    while not list((workdir / stage).glob(marker)):
        assert not run.ended(), f"ended before {stage}/{marker}: {run.wait()}"
        time.sleep(0.02)
    time.sleep(delay)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait()[0] == -signal.SIGKILL


def full_disk_in(server, workdir, stage, artifacts, draw):
    """Runs until the disk refuses one of the artifacts that are yet to come."""
    folder = workdir / stage
    ahead = [name for name in sorted(artifacts) if not (folder / name).exists()]
    path = folder / draw.choice(ahead)
    code = draw.choice(["ENOSPC", "EDQUOT", "EFBIG", "EROFS"])
    run = server.start(
        "full_disk:main",
        str(path),
        code,
        arguments(workdir),
        folder=workdir.parent / "full",
    )
    status, _, errors = run.wait()
    assert status == 2, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: {path}: wanted space to write, got "), last
    assert "Traceback" not in errors
    assert not path.exists() and not (folder / "manifest.json").exists()
    assert not list(workdir.rglob(".tmp-*"))


def test_a_run_stopped_in_every_stage_ends_with_the_same_files(
    whole, fork_server, tmp_path
):
    """By SIGKILL at random moments, and by a full disk at any artifact."""
    seed = random.SystemRandom().randrange(1000)
    print(f"delays and files drawn from seed {seed}")
    draw = random.Random(seed)
    workdir, expected = tmp_path / "run", whole[0]
    markers = {
        "pretrain": "checkpoints/unet/*",
        "finetune": "checkpoints/*",
        "generate": "mixed/data/*",
        "classify": "results/*",
    }
    for stage in STAGES:
        if stage in markers:
            delay = draw.uniform(0, 0.5)
            killed_in(fork_server, workdir, stage, markers[stage], delay)
        artifacts = manifest_of(expected, stage)["artifacts"]
        full_disk_in(fork_server, workdir, stage, artifacts, draw)
    flags = ["train", *arguments(workdir)]
    run = fork_server.start("mvc_jax.train:main", flags, folder=tmp_path / "last")
    code, _, errors = run.wait()
    assert code == 0, errors
    for part in ("mix", "pairs", "encode", "generate", "finetune/model"):
        assert digests(workdir / part) == digests(expected / part), part
    for part in ("caption/captions.jsonl", "evaluate/metrics.json"):
        assert (workdir / part).read_bytes() == (expected / part).read_bytes(), part
    assert not list(workdir.rglob(".tmp-*"))


@pytest.fixture
def copied(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole[0], tmp_path / "run"))


def known_files(workdir, name):
    """All files of a stage that are known by their content, as paths."""
    records = read_jsonl(workdir / "digests" / f"{name}.jsonl")
    names = {*manifest_of(workdir, name)["artifacts"], *(x["name"] for x in records)}
    return sorted(x for x in (workdir / name / each for each in names) if x.exists())


def damage(path, kind):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if not content:
        content += b"?"
    elif kind == "flipped":
        content[middle] ^= 1
    else:
        content = content[: {"cut": middle, "empty": 0}[kind]]
    path.write_bytes(content)


def same_as(expected, workdir, paths):
    for path in paths:
        name = path.relative_to(workdir)
        assert path.read_bytes() == (expected / name).read_bytes(), name


def losses_of(workdir, *names):
    """(stage, step) -> loss, of the stages whose names start so."""
    return {
        (row["stage"], row["step"]): row["loss"]
        for row in read_jsonl(workdir / "metrics.jsonl")
        if row["stage"].startswith(names)
    }


def test_two_processes_make_the_run_of_one(whole, fork_server, tmp_path):
    """From captions to the report, on its base; the second process has two devices."""
    one, workdir = whole[0], tmp_path / "run"
    words = arguments(
        workdir,
        f"--config.base.path={one / 'pretrain' / 'model'}",
        "--config.classify.runs=real,combined",
    )
    many = Many(
        fork_server, tmp_path / "said", "forked_processes:run_all", [1, 2], *words
    )
    codes, said = many.wait()
    assert codes == [0, 0], said
    assert said[0].strip().endswith(f"report: {workdir}/report/report.html")
    assert said[1] == ""
    assert (workdir / "report" / "report.md").exists()
    assert not [*(workdir / "digests").glob("*-1.jsonl")]
    for file in ("caption/captions.jsonl", "encode/prompts.jsonl", "mix/recipes.jsonl"):
        assert (workdir / file).read_bytes() == (one / file).read_bytes(), file
    trained = "finetune", "classify/real/"
    losses, expected = losses_of(workdir, *trained), losses_of(one, *trained)
    assert len(losses) == 4 + 2 and losses.keys() <= expected.keys()
    for key, loss in losses.items():
        assert loss == pytest.approx(expected[key], rel=1e-5), key
    for name in ("mixed", "unmixed", "pretrained"):
        images, labels, sources = synthetic.read_images(workdir / "generate" / name)
        theirs = synthetic.read_images(one / "generate" / name)
        # Another number of images on a device is another program.
        assert np.abs(images.astype(int) - theirs[0].astype(int)).max() <= 1, name
        np.testing.assert_array_equal(labels, theirs[1])
        assert sources == theirs[2]


@pytest.mark.parametrize("name", STAGES)
def test_a_damaged_file_is_named_by_every_stage_that_reads_it(copied, name):
    specs = {
        reader: contract.Spec(
            reader, {}, inputs=[*manifest_of(copied, reader)["inputs"]]
        )
        for reader in STAGES[STAGES.index(name) + 1 :]
    }
    for spec in specs.values():
        contract.require_inputs(copied, spec)
    for file in manifest_of(copied, name)["artifacts"]:
        path = copied / name / file
        content = path.read_bytes()
        damage(path, "flipped")
        named = set()
        for reader, spec in specs.items():
            with contextlib.suppress(UserError):
                contract.require_inputs(copied, spec)
                continue
            named.add(reader)
        beside = {("pairs", "mix"), ("finetune", "mix")}  # the others read all before
        assert named == {x for x in specs if (name, x) not in beside}, file
        path.write_bytes(content)


def test_damage_to_finished_stages_is_made_again_or_named(
    whole, copied, here, fork_server, tmp_path
):
    """Each file alone, in every way that a disk knows; then all that is made again."""
    config = command_line.parse(["train", *arguments(copied)]).config
    again = []
    for name in STAGES:
        spec = importlib.import_module(f"mvc_jax.{name}").stage_spec(config)
        artifacts = manifest_of(copied, name)["artifacts"]
        for number, path in enumerate(known_files(copied, name)):
            content, kind = path.read_bytes(), ("flipped", "cut", "empty")[number % 3]
            damage(path, kind)
            damaged = path.read_bytes()
            try:
                opened = contract.open_stage(copied, spec)
            except UserError as error:
                assert error.name == str(path), path
                assert path.read_bytes() == damaged, path
            else:
                is_artifact = str(path.relative_to(copied / name)) in artifacts
                assert opened.complete != is_artifact, path
                assert path.exists() != is_artifact, path
                again.append((path, kind))
            path.write_bytes(content)
    assert {path.suffix for path, _ in again} >= {".npy", ".parquet", ".png", ".html"}
    for path, kind in again:
        damage(path, kind)
    flags = ["train", *arguments(copied)]
    run = fork_server.start("mvc_jax.train:main", flags, folder=tmp_path / "output")
    code, _, errors = run.wait()
    assert code == 0, errors
    same_as(whole[0], copied, [x for x, _ in again if x.name not in TIMED])


def test_damage_to_unfinished_stages_is_made_again(
    whole, copied, fork_server, tmp_path
):
    """Every file that a killed run may have left, damaged before it is resumed."""
    known = []
    for name in STAGES:
        manifest = manifest_of(copied, name)
        started = {key: manifest[key] for key in ("settings", "inputs")}
        (copied / name / "started.json").write_text(json.dumps(started))
        known += known_files(copied, name)
        (copied / name / "manifest.json").unlink()
    for number, path in enumerate(known):
        damage(path, ("flipped", "cut", "empty")[number % 3])
    flags = ["train", *arguments(copied)]
    run = fork_server.start("mvc_jax.train:main", flags, folder=tmp_path / "output")
    code, _, errors = run.wait()
    assert code == 0, errors
    same_as(whole[0], copied, [x for x in known if x.name not in TIMED])


def test_a_base_model_given_by_path_takes_the_place_of_pretrain(
    whole, fork_server, tmp_path
):
    """The folder that `pretrain` wrote, named as a user names a downloaded one."""
    workdir, expected = tmp_path / "run", whole[0]
    base = f"--config.base.path={expected / 'pretrain' / 'model'}"
    stages = "--config.stages=caption,encode,pairs,finetune"
    flags = ["train", *arguments(workdir, base, stages)]
    run = fork_server.start("mvc_jax.train:main", flags, folder=tmp_path / "output")
    code, _, errors = run.wait()
    assert code == 0, errors
    assert not (workdir / "pretrain").exists()
    for part in ("encode/moments", "encode/text_states"):
        assert digests(workdir / part) == digests(expected / part), part
    for part in (
        "pairs/pairs.npy",
        "finetune/model/unet/diffusion_pytorch_model.safetensors",
    ):
        assert (workdir / part).read_bytes() == (expected / part).read_bytes(), part


@pytest.fixture(scope="session")
def place(whole, tmp_path_factory):
    """A working directory with what the documents assume: images and earlier runs."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(whole[0], folder / "runs" / "digits")
    draw = np.random.default_rng(0)
    for kind in ("bolt", "nut"):
        (folder / "parts" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "parts" / kind / f"{i}.png")
    return folder


def test_documented_commands_run(place, fork_server):
    """In the order of the documents, shortened as `documented.py` says."""
    done = []
    for words in commands():
        flags = train_arguments(words)
        if flags is None:
            continue
        if any("captions.jsonl" in flag for flag in flags):
            # The document says to copy this file.
            captions = place / "runs" / "parts" / "caption" / "captions.jsonl"
            shutil.copy(captions, place / "captions.jsonl")
        broken = place / "parts" / "bolt" / "broken.png"
        if any("on_bad_image=skip" in flag for flag in flags):
            # After a first look that was refused because of this image.
            broken.write_text("")
            shutil.rmtree(place / "runs" / "parts")
        flags = [flag.replace("/data/parts", f"{place}/parts") for flag in flags]
        flags.append(f"--config.compilation_cache={CACHE}")
        folder = place / f"output-{len(done)}"
        run = fork_server.start(
            "mvc_jax.train:main", ["train", *flags], folder=folder, cwd=place
        )
        code, _, errors = run.wait()
        assert code == 0, f"{' '.join(words)}\n{errors}"
        broken.unlink(missing_ok=True)
        done.append(" ".join(words))
    assert len(done) >= 9
    assert (place / "runs/digits/generate/contact_sheet.png").exists()
    modes = {row["mode"] for row in read_jsonl(place / "runs/fine/mix/recipes.jsonl")}
    assert modes == {"fine"}
