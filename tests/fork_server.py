"""A server that imports everything once and forks a process for each request.

A start of the program costs seconds of imports; a fork costs none. JAX is imported but
its backend is not started, so each process makes its own, as `train` sets it up.

Requests are lines of JSON on standard input: the function to call ("module:name"), its
arguments, the working directory, and the files for its output and errors. Two lines
answer each: the id of the process, and its exit code once it has ended.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]


def user_environment() -> dict[str, str]:
    """This process's environment without the switches of the tests: one device."""
    ours = ("XLA_FLAGS", "JAX_PLATFORMS")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return {**kept, "JAX_PLATFORMS": "cpu"}


class Server:
    """The client's side; one process runs at a time."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def start(
        self, function: str, *arguments: object, folder: pathlib.Path, cwd=ROOT
    ) -> "Run":
        """Calls `function` in a new process.

        Args:
          function: "module:name"; returns an exit code or None.
          *arguments: JSON values.
          folder: for the process's output and errors; created.
          cwd: its working directory.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = [str(folder / name) for name in ("output.txt", "errors.txt")]
        request = [function, arguments, str(cwd), *files]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Run(int(self._process.stdout.readline()), self._process, *files)


class Run:
    """A process of the server; `pid` is its id."""

    def __init__(self, pid: int, process: subprocess.Popen, output: str, errors: str):
        self.pid, self._process = pid, process
        self._files = [pathlib.Path(output), pathlib.Path(errors)]

    def wait(self) -> tuple[int, str, str]:
        """Waits for its end; returns (exit code, output, errors)."""
        code = int(self._process.stdout.readline())
        output, errors = (path.read_text() for path in self._files)
        return code, output, errors

    def ended(self) -> bool:
        """Whether the process has ended, or is about to be waited for."""
        with contextlib.suppress(OSError):
            state = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
            return state.rpartition(")")[2].split()[0] == "Z"
        return True


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Starts a server, which ends with the block."""
    command = [sys.executable, "-W", "ignore", str(pathlib.Path(__file__).resolve())]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=user_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Server(process)
        process.stdin.close()


def _import_everything() -> None:
    import orbax.checkpoint  # noqa: F401

    import mvc_jax

    for module in pkgutil.walk_packages(mvc_jax.__path__, "mvc_jax."):
        importlib.import_module(module.name)


def _serve() -> None:
    for line in sys.stdin:
        function, arguments, cwd, *files = json.loads(line)
        process = os.fork()
        if not process:
            for number, path in enumerate(files, start=1):
                flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
                os.dup2(os.open(path, flags), number)
            os.chdir(cwd)
            module, _, name = function.partition(":")
            call = getattr(importlib.import_module(module), name)
            sys.exit(call(*arguments))
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _import_everything()
    gc.freeze()  # what all have is not looked through, and so not copied, in each
    _serve()
