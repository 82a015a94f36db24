"""Parts of the script for an accelerator that fail in the ways that parts can."""

import os
import pathlib
import signal
import subprocess
import sys
import time


def yields_then_raises(text, kind="RuntimeError"):
    yield {"setting": "first", "figure": 1.0, "unit": "s"}
    raise {"RuntimeError": RuntimeError, "absent": ModuleNotFoundError}[kind](
        text, **({"name": "torch"} if kind == "absent" else {})
    )


def kills_itself():
    yield {"setting": "first", "figure": 1.0, "unit": "s"}
    print("the last words")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps_with_a_child(file):
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(file).write_text(str(child.pid))
    yield {"setting": "first", "figure": 1.0, "unit": "s"}
    time.sleep(600)
