"""The shipped digits config, end to end as a user runs it: whole, killed, and again."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mvc_jax.generation import synthetic
from mvc_jax.train import STAGES

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Fewer steps, nothing else: the stages, shapes and paths are the demo's.
SHORT = (
    "pretrain.vae.steps=30",
    "pretrain.unet.steps=30",
    "pretrain.checkpoint_every=10",
    "finetune.steps=20",
    "finetune.checkpoint_every=5",
    "mix.per_image=2",
    "generate.steps=4",
    "generate.shard_size=40",
    "generate.batch_size=20",
    "classify.seeds=2",
    "classify.steps=10",
)


def command(workdir, *more):
    cache = ROOT / ".pytest_cache" / "xla-one-device"
    return [
        sys.executable,
        "-m",
        "mvc_jax.train",
        "--config=configs/digits.py",
        f"--workdir={workdir}",
        f"--config.compilation_cache={cache}",
        *(f"--config.{setting}" for setting in SHORT),
        *more,
    ]


def environment():
    """As a user's: one device, none of the tests' switches."""
    ours = ("XLA_FLAGS", "JAX_PLATFORMS")
    return {key: value for key, value in os.environ.items() if key not in ours}


def run(workdir, *more):
    return subprocess.run(
        command(workdir, *more),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def digests(folder):
    """Hash of every file of a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing interrupted: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "with a space"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert "deprecated" not in done.stderr
    assert "Traceback" not in done.stderr
    timings = json.loads((workdir / "timings.json").read_text())
    assert set(timings) == set(STAGES)
    assert timings["pretrain"]["compile_seconds"] > 0


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


def test_a_second_run_does_no_work_and_says_so(whole):
    workdir, _ = whole
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    began = time.monotonic()
    done = run(workdir)
    seconds = time.monotonic() - began
    assert done.returncode == 0
    assert "nothing to do: 10 stages were done before" in done.stderr
    assert "±" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert after == before
    assert seconds < 60  # seconds, on a machine with its hands full


@pytest.mark.parametrize(
    "flag, difference",
    [
        ("--config.mix.per_image=1", "mix.per_image: 2 -> 1"),
        ("--config.seed=1", "seed: 0 -> 1"),
        ("--config.classify.steps=11", "classify.steps: 10 -> 11"),
    ],
)
def test_other_settings_in_a_finished_workdir_are_refused(whole, flag, difference):
    workdir, _ = whole
    before = digests(workdir)
    done = run(workdir, flag)
    assert done.returncode == 2
    assert difference in done.stderr
    assert "--workdir" in done.stderr and "delete" in done.stderr
    assert "Traceback" not in done.stderr
    assert digests(workdir) == before


def test_a_stage_without_its_input_is_refused(tmp_path):
    done = run(tmp_path, "--config.stages=generate,classify")
    assert done.returncode == 2
    assert "stage generate: wanted the finished stage finetune" in done.stderr


def killed_in(workdir, stage, marker, delay):
    """Starts the run and kills it `delay` seconds after `marker` came to be."""
    process = subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((workdir / stage).glob(marker)):
        assert process.poll() is None, f"ended before {stage}/{marker}"
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_killed_in_every_long_stage_ends_as_if_nothing_had_been(whole, tmp_path):
    """SIGKILL at random moments; then the same command. The same bytes come out."""
    seed = random.SystemRandom().randrange(1000)
    print(f"delays drawn from seed {seed}")
    draw = random.Random(seed)
    for stage, marker in (
        ("caption", "*"),
        ("pretrain", "checkpoints/vae/*"),
        ("pretrain", "checkpoints/unet/*"),
        ("encode", "text_states/*.npy"),
        ("finetune", "checkpoints/*"),
        ("generate", "mixed/data/*"),
        ("generate", "unmixed/train/*"),
        ("classify", "results/*"),
    ):
        killed_in(tmp_path, stage, marker, draw.uniform(0, 0.5))
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = whole[0]
    for part in ("mix", "pairs", "encode", "generate", "finetune/model"):
        assert digests(tmp_path / part) == digests(expected / part), part
    for part in ("caption/captions.jsonl", "evaluate/metrics.json"):
        assert (tmp_path / part).read_bytes() == (expected / part).read_bytes(), part
    leftovers = [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp-")]
    assert not leftovers


def test_a_base_model_given_by_path_takes_the_place_of_pretrain(whole, tmp_path):
    """The folder that `pretrain` wrote, named as a user names a downloaded one."""
    base = whole[0] / "pretrain" / "model"
    stages = "--config.stages=caption,encode,pairs,finetune"
    done = run(tmp_path, f"--config.base.path={base}", stages)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "pretrain").exists()
    expected = whole[0]
    for part in ("encode/moments", "encode/text_states"):
        assert digests(tmp_path / part) == digests(expected / part), part
    assert (
        digests(tmp_path / "pairs")["pairs.npy"]
        == digests(expected / "pairs")["pairs.npy"]
    )
    model = "finetune/model/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / model).read_bytes() == (expected / model).read_bytes()


def test_a_disk_that_fills_up_is_one_sentence(whole, tmp_path):
    """Every write past a limit fails as on a full disk; what is whole stays whole."""
    script = (
        "import errno, sys, mvc_jax.train as train\n"
        "from mvc_jax import files\n"
        "write = files.write_bytes\n"
        "def full(path, content):\n"
        "    if 'captions' in str(path):\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', str(path))\n"
        "    write(path, content)\n"
        "files.write_bytes = full\n"
        "sys.exit(train.main(sys.argv))\n"
    )
    flags = command(tmp_path)[3:]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "captions.jsonl" in last
    assert "a full disk" in last and "Traceback" not in done.stderr
    assert (tmp_path / "caption" / "splits.json").exists()
    assert not (tmp_path / "caption" / "manifest.json").exists()
