"""Several processes of one run on this machine, forked by the server of fork_server.py.

They need no imports of their own. `start` says what they do; `Many` is the test's side.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import socket
import sys
import time

import numpy as np


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Many:
    """Processes that call a function each, as `function(flags, number, *arguments)`.

    Args:
      server: of fork_server.py.
      folder: of what they print.
      function: "module:name"; returns an exit code.
      devices: how many CPU devices each of them has.
      *arguments: JSON values.
    """

    def __init__(self, server, folder, function, devices, *arguments):
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True)
        self._count = len(devices)
        where = [str(self._folder), free_port(), devices]
        self._run = server.start(
            "forked_processes:start", where, function, arguments, folder=self._folder
        )

    def pids(self) -> list[int]:
        path = self._folder / "pids.json"
        while not path.exists():
            time.sleep(0.01)
        return json.loads(path.read_text())

    def await_file(self, path: pathlib.Path) -> None:
        """Waits until a file is there, or the processes have ended."""
        while not path.exists() and not (self._folder / "codes.json").exists():
            time.sleep(0.02)

    def wait(self) -> tuple[list[int], list[str]]:
        """Waits for all; returns the exit code of each, and what each has printed."""
        code, _, errors = self._run.wait()
        assert code == 0, errors
        codes = json.loads((self._folder / "codes.json").read_text())
        paths = (self._folder / f"{n}.txt" for n in range(self._count))
        return codes, [_without_gloo(path.read_text()) for path in paths]


_GLOO = re.compile(
    r"(\[Gloo\] Rank |is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+ ?)*\n"
)


def _without_gloo(text: str) -> str:
    """Without what the library of collectives on CPUs prints at each connection.

    Those of two devices of a process can be printed into each other.
    """
    if "[Gloo]" not in text:
        return text
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not _GLOO.fullmatch(line))


def start(where, function, arguments):
    """Forks the processes and waits for them; runs in a process of the server."""
    folder, port, devices = where
    folder, pids = pathlib.Path(folder), []
    for number, own in enumerate(devices):
        pid = os.fork()
        if not pid:
            _be(folder, port, number, len(devices), own, function, arguments)
        pids.append(pid)
    _write(folder / "pids.json", pids)
    statuses = {}
    while len(statuses) < len(pids):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
    _write(folder / "codes.json", [statuses[pid] for pid in pids])


def _be(folder, port, number, count, devices, function, arguments):
    code = 1
    try:
        output = os.open(folder / f"{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        module, _, name = function.partition(":")
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={count}",
            f"--process_id={number}",
        ]
        call = getattr(importlib.import_module(module), name)
        code = call(flags if count > 1 else [], number, *arguments) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _write(path, value):
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)


def run_all(flags, number, *words):
    """Runs the command line."""
    from mvc_jax import train

    del number
    return train.main(["train", *words, *flags])


def train_toy(flags, number, workdir, steps, fsdp, seconds):
    """Trains the toy of test_training under the real `main`, on all devices.

    Args:
      flags: of the processes.
      number: of this one.
      workdir: of the run.
      steps: to train.
      fsdp: of the mesh.
      seconds: that a step takes at least.
    """
    import jax
    import test_training as toy

    from mvc_jax import train
    from mvc_jax.data import order
    from mvc_jax.training import loop, sharding
    from mvc_jax.training.checkpoint import Checkpoints
    from mvc_jax.training.train_logger import TrainLogger

    data = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    rows = order.reader(0, "t", {"x": data, "y": data.sum(1)}, batch_size=5)

    def read(step, *mine):
        time.sleep(seconds)
        return rows(step, *mine)

    def run(config, workdir, **_):
        mesh = sharding.make_mesh(-1, fsdp)
        kernel = {"w": np.ones(3, np.float32), "kernel": np.ones(8, np.float32)}
        state = loop.fit(
            toy.noisy_step,
            loop.create_state(kernel, toy.TX, mesh, ema=True),
            read=read,
            constants={},
            mesh=mesh,
            steps=steps,
            checkpoints=Checkpoints(workdir / "checkpoints", every=4),
            logger=TrainLogger(workdir, "toy", log_every=1),
        )
        if number == 0:
            host = jax.device_get(sharding.readable(state.params["w"]))
            np.save(workdir / "end.npy", host)

    train.run = run
    return train.main(["train", f"--workdir={workdir}", *flags])
