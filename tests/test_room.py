"""Disks that take no more bytes: one kind of error, and nothing half-written."""

import errno
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fork_server import ROOT, user_environment
from PIL import Image

from mvc_jax import files, pictures, train
from mvc_jax.errors import UserError, no_room
from mvc_jax.training import runtime
from mvc_jax.training.metrics import MetricsLog

CODES = {
    errno.ENOSPC: "a full disk",
    errno.EDQUOT: "an exhausted disk quota",
    errno.EFBIG: "a limit on the size of files",
    errno.EROFS: "a disk that is mounted read-only",
}


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def forms(code):
    """An error as Python, Orbax, pyarrow, TensorStore and safetensors report it."""
    text = os.strerror(code)
    plain = OSError(code, text)
    yield plain
    yield OSError(f"[Errno {code}] {text}")
    yield ValueError(f"RESOURCE_EXHAUSTED: Error writing: {text} [{code}]")
    yield RuntimeError(f"[OS error {code}: {errno.errorcode[code]} of it]")
    yield raised_from(ValueError("a checkpoint"), plain)
    yield ExceptionGroup("two writers", [ValueError("other"), plain])


@pytest.mark.parametrize("code", CODES)
def test_every_form_of_the_error_is_one_sentence(code, tmp_path):
    for error in forms(code):
        found = no_room(error, tmp_path / "run")
        assert isinstance(found, UserError)
        assert f"{tmp_path}/run: wanted space to write, got {CODES[code]} (" in str(
            found
        )
        assert " bytes" in str(found) and "resume" in str(found)
    named = no_room(OSError(code, os.strerror(code), "a.npy"), tmp_path, 7)
    assert str(named).startswith("a.npy: wanted 7 bytes of free disk, got ")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        ValueError("No space for tokens"),
        KeyError("x"),
    ],
)
def test_other_errors_are_not(error, tmp_path):
    assert no_room(error, tmp_path) is None


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_nothing_half_written_stays_and_the_error_names_the_file(tmp_path, code, when):
    path = tmp_path / "array.npy"
    files.write_text(path, "old")
    with pytest.raises(OSError) as error, files.replacing(path) as temporary:
        if when != "before":
            temporary.write_text("ne")
        name = [] if when == "while" else [str(temporary)]
        raise OSError(code, os.strerror(code), *name)
    assert error.value.filename == str(path)
    assert [x.name for x in tmp_path.iterdir()] == ["array.npy"]
    assert path.read_text() == "old"


def test_a_limit_of_the_system_is_one_sentence(tmp_path):
    """No file may have more than 200 KiB: EFBIG, as from `ulimit -f`."""
    program = (
        "import resource, sys\n"
        "from mvc_jax import train\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, 200 << 10))\n"
        "sys.exit(train.main(['train', *sys.argv[1:]]))\n"
    )
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    flags += ["--config.stages=caption", f"--config.compilation_cache={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"{tmp_path}/caption/images.npy: wanted space to write, got a limit" in last
    assert "(204800 bytes)" in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob(".tmp-*"))


def test_each_write_of_a_stage_may_fail(tmp_path, monkeypatch, capsys):
    """The files are those that the stage writes: none is named here."""
    monkeypatch.setattr(runtime, "set_up", lambda _: None)
    monkeypatch.chdir(ROOT)
    replacing = files.replacing
    for seed, name in enumerate(("a/1.png", "a/2.png", "b/1.png", "b/2.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        content = pictures.png(Image.fromarray(pixels))
        files.write_bytes(tmp_path / "images" / name, content)

    def run(workdir):
        flags = [f"--config=configs/folder.py:path={tmp_path / 'images'}"]
        flags += [f"--workdir={workdir}", "--config.stages=caption"]
        flags += ["--config.caption.captioner=attributes", "--config.data.size=8"]
        return train.main(["train", *flags, "--config.data.test_fraction=0.5"])

    def artifacts(workdir):
        return json.loads((workdir / "caption/manifest.json").read_text())["artifacts"]

    assert run(tmp_path / "whole") == 0
    wanted = artifacts(tmp_path / "whole")
    failed = {}  # path -> the error of its first write

    def fails(path):
        if str(path) in failed:
            return replacing(path)
        failed[str(path)] = code = list(CODES)[len(failed) % len(CODES)]
        raise OSError(code, os.strerror(code), str(path))

    workdir = tmp_path / "run"
    monkeypatch.setattr(files, "replacing", fails)
    for count in itertools.count(1):
        if not run(workdir):
            break
        assert len(failed) == count
        path, code = [*failed.items()][-1]
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{path}: wanted space to write, got {CODES[code]}" in last
        assert not list(workdir.rglob(".tmp-*"))
    assert {f"{workdir}/caption/{name}" for name in wanted} <= failed.keys()
    assert artifacts(workdir) == wanted


def test_metrics_on_a_full_disk_end_the_run_and_do_not_hang_it(tmp_path, monkeypatch):
    """tensorboardX's own writer would wait forever for a thread that has ended."""
    log = MetricsLog(tmp_path, "toy")

    def full(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log._board._writer, "write_event", full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(100):
            log.write(step, loss=1.0)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 0
