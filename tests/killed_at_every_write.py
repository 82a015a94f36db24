"""Kills a run before each of its changes of the disk, and repeats its command.

Up to the second stage that works: from there on, the rules of `stage.py` hold. This is
a process without JAX, so that it can fork: a killed run ends as by SIGKILL.
"""

import contextlib
import os
import pathlib
import shutil
import sys

import made_stages
import pytest

from mvc_jax import files, train
from mvc_jax.training import runtime

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.unlink"}


def killing(number):
    """An audit hook that ends the process before its change of this number."""
    left = [number]

    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str)
        if event in CHANGES or (writes and arguments[1][0] in "wax"):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    return hook


def child(function):
    """Runs a function in a forked process; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder, *flags):
    return train.main(["train", f"--workdir={folder}", *flags])


def content(folder):
    """What must not depend on a kill: every file but those that have times in them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        timed = relative.name == "timings.json" or "digests" in relative.parts
        if path.is_file() and not timed:
            found[str(relative)] = path.read_bytes()
    return found


def stages(folder):
    """The content of the stages, and of what else belongs to them now."""
    found = content(folder)
    return {name: found[name] for name in found if not name.startswith("earlier")}


def moved(folder):
    """The content of all files that were moved aside, whichever folder they are in."""
    found = content(folder / "earlier")
    return {name.split("/", 1)[1]: found[name] for name in found}


def main(flag, base):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "set_up", lambda folder: None)
        made_stages.install(patch)
        source = base / "source"
        with contextlib.redirect_stdout(sys.stderr):
            assert run(source) == 0  # in this process, which then has all imports
        for name in ("finetune", "classify_real"):
            files.write_text(source / "tensorboard" / name / "events", name)
        rows = [{"stage": f"{x}/x", "step": 1} for x in ("finetune", "classify")]
        files.write_jsonl(source / "metrics.jsonl", rows)
        flags = ["--config.mix.modes=fine"]
        flags.append(f"--from={source}" if flag == "--from" else "--redo=mix")

        def prepare(name):
            if flag == "--redo":
                shutil.copytree(source, base / name)
            return base / name

        before = content(source)
        whole = prepare("whole")
        assert child(lambda: run(whole, *flags)) == 0
        number, works = 0, False
        while not works:
            folder = prepare(f"{number}")

            def killed(folder=folder, number=number):
                sys.addaudithook(killing(number))
                return run(folder, *flags)

            assert child(killed) == 9
            works = (folder / "generate" / "started.json").exists()
            assert child(lambda folder=folder: run(folder, *flags)) == 0, number
            for kept in (stages, moved):
                found, wanted = kept(folder).items(), kept(whole).items()
                names = sorted(name for name, _ in found ^ wanted)
                assert not names, (number, names)
            shutil.rmtree(folder)
            number += 1
        assert content(source) == before
        print(number)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
