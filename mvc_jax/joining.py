"""How the processes of a run join, watch each other, and end together.

`join` connects to the hub (hub.py) that process 0 starts, and gives JAX its client.
From then on a thread sends signs of life and hears of the others: when one is lost or
ends by an error, it prints a sentence and ends this process too, whatever the main
thread waits for. `stop_here` agrees on the step after which all of them stop.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from mvc_jax import processes
from mvc_jax.errors import UserError
from mvc_jax.hub import BEAT_SECONDS, LOST_SECONDS, Lines

LOST_CODE = 75  # the rerun resumes: launchers retry on it
JOIN_SECONDS = 180.0
CLOCK_SECONDS = 5.0
_SHUTDOWN_SECONDS = 60
_NEVER = 10**6


def join(
    coordinator: str,
    count: int,
    number: int,
    *,
    local_devices: list[int] | None = None,
    seconds: float = JOIN_SECONDS,
) -> list[str]:
    """Joins the other processes; returns warnings. Before JAX starts its backend.

    Args:
      coordinator: `HOST:PORT` of process 0, as the others reach it.
      count: of the processes.
      number: of this one.
      local_devices: indices of the machine's GPUs that this process uses; None: all.
      seconds: to wait for the others.

    Raises:
      UserError: the coordinator does not answer; a process does not come; or two
        processes have the same number, or other counts.
    """
    global _watch
    if _watch is not None:
        return []
    child = _start_hub(coordinator, count, seconds) if number == 0 else None
    lines = _call(coordinator, seconds)
    hello = {
        "process": number,
        "count": count,
        "host": socket.gethostname(),
        "time": time.time(),
    }
    lines.send({"hello": hello})
    ready = _answer(lines, coordinator, seconds)
    _connect_jax(coordinator, count, number, local_devices)
    processes.hosts[:] = ready["hosts"]
    _watch = _Watch(lines, child, ready["hosts"])
    _watch.start()
    if number:
        return []
    return [
        f"the clock of {processes.named(other)} is {abs(ahead):.0f} s "
        f"{'ahead of' if ahead > 0 else 'behind'} that of process 0"
        for other, ahead in enumerate(ready["ahead"])
        if abs(ahead) > CLOCK_SECONDS
    ]


def detected() -> dict[str, Any] | None:
    """What JAX finds of a TPU pod, SLURM, Kubernetes or MPI; None for one process.

    JAX is not imported where none of their variables or devices is there.
    """
    if not _may_be_cluster():
        return None
    from jax._src import clusters

    known = [env for env in clusters.ClusterEnv._cluster_types]
    found = (
        env for env in known if not env.opt_in_only_method and env.is_env_present()
    )
    cluster = next(found, None)
    if cluster is None or cluster.get_process_count() < 2:
        return None
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    coordinator, count, number, local_devices = detect(
        address, None, None, None, None, int(JOIN_SECONDS)
    )
    return {
        "coordinator": coordinator,
        "count": count,
        "number": number,
        "local_devices": local_devices,
    }


def _may_be_cluster() -> bool:
    environment = os.environ
    if environment.get("SLURM_NTASKS", "1") != "1":
        return "SLURM_PROCID" in environment
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and (
        "JOB_COMPLETION_INDEX" in environment
    ):
        return True
    devices = (f"/dev/{name}" for name in ("accel0", "vfio/0"))
    return any(map(os.path.exists, devices))


def stop_here() -> bool:
    """Whether all processes stop now; called by all at the same places."""
    return _watch is not None and _watch.stop_here()


def stopping() -> bool:
    """Whether the processes have agreed to stop."""
    return _watch is not None and _watch.agreed


def request_stop() -> None:
    """Asks all processes to stop at a place that all of them are yet to reach."""
    if _watch is not None:
        _watch.wanted = True


def leave(code: int, sentence: str = "", *, together: bool = False) -> None:
    """Ends this process with `code` where there are several; else does nothing.

    Args:
      code: of its end; with 0 the caller goes on, apart from the others.
      sentence: what the others say of an end by an error.
      together: whether all processes end here, each by itself.
    """
    global _watch
    if _watch is None:
        return
    watch = _watch
    if code == 0:
        processes.barrier("the end")
        watch.leaving = True
        from jax._src import distributed

        state = distributed.global_state
        state.client.shutdown()
        state.client, state.process_id, state.num_processes = None, 0, 1
        processes.hosts.clear()
        watch.say({"bye": True})
        watch.close()
        _watch = None
        return
    watch.leaving = True
    watch.say({"bye": True} if together else {"end": [code, sentence]})
    _exit(code)


def await_verdict(error: Exception) -> None:
    """Waits for word of a lost process, which ends this one; returns without it.

    What JAX raises in a collective of which a process was lost does not name it.
    """
    if _watch is not None:
        by_jax = type(error).__name__ == "JaxRuntimeError"
        time.sleep(LOST_SECONDS + 5 if by_jax else 1.0)


class _Watch(threading.Thread):
    """The connection to the hub: says that this process lives, hears of the others."""

    def __init__(self, lines: Lines, child: Any, hosts: list[str]):
        super().__init__(name="watch", daemon=True)
        self._lines, self._child, self._hosts = lines, child, hosts
        self._sending = threading.Lock()
        self._condition = threading.Condition()
        self._position, self._asked = 0, False
        self._target: int | None = None
        self.leaving = self.wanted = self._told = False

    def stop_here(self) -> bool:
        with self._condition:
            self._position += 1
            while self._asked and self._target is None:
                self._condition.wait()
            return self._target is not None and self._position >= self._target

    @property
    def agreed(self) -> bool:
        return self._target is not None

    def run(self) -> None:
        spoke, heard = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - spoke > BEAT_SECONDS:
                self.say({"beat": True})
                spoke = now
            if self.wanted and not self._told:
                self.say({"stop": True})
                self._told = True
            try:
                comes = select.select([self._lines.socket], [], [], 0.2)[0]
                messages = self._lines.receive() if comes else []
            except (OSError, ValueError):
                messages = None
            if messages:
                heard = time.monotonic()
            if messages is None or now - heard > LOST_SECONDS:
                if self.leaving:
                    return
                self._end_by_loss(0, self._hosts[0], "does not answer")
            for message in messages:
                self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        if "where" in message:
            with self._condition:
                self._asked = True
                self.say({"at": self._position})
        elif "stop_at" in message:
            with self._condition:
                self._target = message["stop_at"]
                self._condition.notify_all()
        elif self.leaving:
            return
        elif "lost" in message:
            self._end_by_loss(*message["lost"])
        elif "ended" in message:
            number, code, sentence = message["ended"]
            _print(f"process {number} on {self._hosts[number]} ended: {sentence}")
            self.leaving = True
            self.say({"bye": True})
            _exit(code)

    def _end_by_loss(self, number: int, host: str, why: str) -> NoReturn:
        _print(
            f"process {number} on {host} was lost ({why}); rerun the same command in "
            "every process to resume"
        )
        self.leaving = True
        self.say({"bye": True})
        _exit(LOST_CODE)

    def say(self, message: dict[str, Any]) -> None:
        with self._sending:
            self._lines.send(message)

    def close(self) -> None:
        self._lines.socket.close()
        if self._child is not None:
            self._child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5)


_watch: _Watch | None = None


def _print(sentence: str) -> None:
    print(f"{processes.prefix()}{sentence}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """Ends the process, whatever its threads wait for."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _start_hub(coordinator: str, count: int, seconds: float) -> subprocess.Popen:
    """Starts the hub as a child, which ends soon after this process."""
    port = coordinator.rpartition(":")[2]
    child = subprocess.Popen(
        [sys.executable, "-m", "mvc_jax.hub", port, f"{count}", f"{seconds}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # signals to the group are for the run
        text=True,
    )
    said = child.stdout.readline().strip()
    if said != "listening":
        raise UserError(
            f"--coordinator={coordinator}",
            wanted="a free port of this machine, which process 0 opens",
            got=said or "no answer of the program that opens it",
            fix="Choose another port, the same in every process; if another run is "
            "under way there, wait for it.",
        )
    return child


def _call(coordinator: str, seconds: float) -> Lines:
    """Connects to the hub, which may not have been started yet."""
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    began, reason = time.monotonic(), "no answer"
    while time.monotonic() - began < seconds:
        try:
            left = max(seconds - (time.monotonic() - began), 0.1)
            connection = socket.create_connection((host, int(port)), min(left, 10.0))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Lines(connection)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.2, seconds / 10))
    raise UserError(
        f"--coordinator={coordinator}",
        wanted=f"process 0 there within {seconds:g} s",
        got=reason[:1].lower() + reason[1:],
        fix="Correct the address, which is the same in every process, start process 0, "
        "or open the port in the firewall.",
    )


def _answer(lines: Lines, coordinator: str, seconds: float) -> dict[str, Any]:
    """What the hub says once all processes have come."""
    lines.socket.settimeout(seconds + LOST_SECONDS)
    message: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # not our words
        while (messages := lines.receive()) is not None and not messages:
            pass  # the line has not come to its end
        message = messages[0] if messages else {}
    if "ready" in message:
        return message["ready"]
    if "refused" in message:
        raise UserError(**message["refused"])
    raise UserError(
        f"--coordinator={coordinator}",
        wanted="process 0 of a run that begins",
        got="another program, or a run that has begun",
        fix="Choose another port, or wait until that run has ended.",
    )


def _connect_jax(
    coordinator: str, count: int, number: int, local_devices: list[int] | None
) -> None:
    """Gives JAX the client of its coordination service.

    In place of `jax.distributed.initialize`, whose service would end with process 0,
    and whose preemption service takes SIGTERM away from `training/preemption.py`.
    """
    import jax
    from jax._src import distributed
    from jaxlib import _jax

    if local_devices:
        visible = ",".join(map(str, local_devices))
        os.environ["JAX_CUDA_VISIBLE_DEVICES"] = visible  # for children
        jax.config.update("jax_cuda_visible_devices", visible)
        jax.config.update("jax_rocm_visible_devices", visible)
    client = _jax.get_distributed_runtime_client(
        coordinator,
        number,
        init_timeout=60,
        shutdown_timeout=_SHUTDOWN_SECONDS,
        heartbeat_timeout=_NEVER,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    client.connect()
    state = distributed.global_state
    state.client, state.process_id, state.num_processes = client, number, count
    state.coordinator_address = coordinator
