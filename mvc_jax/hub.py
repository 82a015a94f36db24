"""The program through which the processes of one run find and watch each other.

Process 0 starts it as a child, so that it outlives that process by the seconds in which
the others learn of its end. It answers on the coordinator's port: first to `joining`,
until all processes have come; then JAX's coordination service takes the port, and the
connections that are open by then carry signs of life. Messages are lines of JSON.

What JAX has for a lost process aborts the others, after minutes and without its name.
So its own heartbeats are switched off, and this program is what notices: a connection
that was closed without a word at once, one that is silent after `LOST_SECONDS`.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

LOST_SECONDS = 30.0
BEAT_SECONDS = 2.0
_LINGER_SECONDS = 15.0
_TICK_SECONDS = 0.5
_NEVER = 10**6  # seconds; more overflow what JAX makes of them


class Lines:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        self.socket, self._rest = connection, b""

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # of one that has ended
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """The messages that have come; None once the connection is closed."""
        try:
            found = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not found:
            return None
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [json.loads(line) for line in lines]


class _Member:
    """A process that has joined: its connection and what it has said."""

    def __init__(self, lines: Lines, hello: dict[str, Any]):
        self.lines, self.hello = lines, hello
        self.heard = time.monotonic()
        self.ahead = hello["time"] - time.time()
        self.position: int | None = None
        self.ended = False

    @property
    def place(self) -> str:
        return self.hello["host"]


class Hub:
    """The processes that have joined.

    Args:
      port: of the coordinator.
      count: how many processes there will be.
      seconds: to wait for them.
    """

    def __init__(self, port: int, count: int, seconds: float):
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=dual, backlog=max(count, 16)
        )
        self._port, self._count = port, count
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._members: dict[int, _Member] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        self._orphaned: float | None = None  # since when process 0 is gone
        self._service: Any = None
        self._asked = False  # where to stop

    def run(self) -> None:
        """Serves until all connections are closed."""
        try:
            self._serve()
        finally:
            for member in self._members.values():
                member.lines.socket.close()
            self._listener.close()
            self._selector.close()

    def _serve(self) -> None:
        spoke = 0.0
        while self._members or self._service is None:
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is None:
                    if not sys.stdin.buffer.read1(1):
                        self._selector.unregister(sys.stdin.buffer)
                        self._orphaned = time.monotonic()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if self._service is None and (self._orphaned or now > self._until):
                self._refuse_all()
                return
            if self._orphaned and now - self._orphaned > _LINGER_SECONDS:
                return
            if self._service and now - spoke > BEAT_SECONDS:
                spoke = now
                self._tell({"beat": True})  # of the machine that process 0 is on
            for number, member in [*self._members.items()]:
                if now - member.heard > LOST_SECONDS and self._service:
                    self._lose(number, f"silent for {LOST_SECONDS:g} s")

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(5.0)
        lines = Lines(connection)
        try:
            hello = lines.receive()[0]["hello"]
            number = hello["process"]
        except (TypeError, LookupError, ValueError):  # somebody else
            connection.close()
            return
        refusal = self._refusal(number, hello)
        if refusal:
            lines.send({"refused": refusal})
            connection.close()
            return
        self._members[number] = _Member(lines, hello)
        self._selector.register(connection, selectors.EVENT_READ, number)
        if len(self._members) == self._count:
            self._begin()

    def _refusal(self, number: int, hello: dict[str, Any]) -> dict[str, str] | None:
        """Why a process cannot join, as the fields of a `UserError`."""
        if hello["count"] != self._count:
            return {
                "name": f"--num_processes={hello['count']}",
                "wanted": f"{self._count}, as process 0 has",
                "got": f"another number in process {number} on {hello['host']}",
                "fix": "Start all processes with the same --num_processes.",
            }
        if number in self._members:
            return {
                "name": f"--process_id={number}",
                "wanted": "a number that no other process has",
                "got": f"it twice, on {self._members[number].place} and on "
                f"{hello['host']}",
                "fix": f"Number the processes from 0 to {self._count - 1}.",
            }
        return None

    def _begin(self) -> None:
        """Lets JAX's service take the port, and the processes begin."""
        from jaxlib import _jax

        self._selector.unregister(self._listener)
        self._listener.close()
        self._service = _jax.get_distributed_runtime_service(
            f"[::]:{self._port}",
            self._count,
            heartbeat_timeout=_NEVER,
            shutdown_timeout=60,
        )
        members = [self._members[number] for number in range(self._count)]
        ready = {
            "hosts": [member.place for member in members],
            "ahead": [round(member.ahead, 3) for member in members],
        }
        for member in members:
            member.heard = time.monotonic()
            member.lines.send({"ready": ready})

    def _refuse_all(self) -> None:
        missing = [n for n in range(self._count) if n not in self._members]
        refusal = {
            "name": f"process {', '.join(map(str, missing))}",
            "wanted": f"all {self._count} processes within {self._seconds:g} s",
            "got": f"{len(self._members)}",
            "fix": "Look at its log; start all with the same --coordinator and "
            "--num_processes, and each with its own --process_id.",
        }
        for member in self._members.values():
            member.lines.send({"refused": refusal})

    def _hear(self, number: int) -> None:
        member = self._members.get(number)
        if member is None:
            return
        messages = member.lines.receive()
        if messages is None:
            if self._service is None:  # it may come again
                self._forget(number)
            else:
                self._lose(number, "ended without a word")
            return
        member.heard = time.monotonic()
        for message in messages:
            if "end" in message:
                member.ended = True
                self._tell({"ended": [number, *message["end"]]}, but=number)
            elif "bye" in message:
                member.ended = True
            elif "stop" in message and not self._asked:
                self._asked = True
                self._tell({"where": True})
            elif "at" in message:
                member.position = message["at"]
                self._agree()

    def _agree(self) -> None:
        """Tells where to stop, once all have said where they are."""
        positions = [member.position for member in self._members.values()]
        if None not in positions:
            self._tell({"stop_at": max(positions) + 1})

    def _lose(self, number: int, why: str) -> None:
        ended = self._members[number].ended
        place = self._members[number].place
        self._forget(number)
        if not ended:
            self._tell({"lost": [number, place, why]})

    def _forget(self, number: int) -> None:
        connection = self._members.pop(number).lines.socket
        self._selector.unregister(connection)
        connection.close()

    def _tell(self, message: Any, but: int | None = None) -> None:
        for number, member in self._members.items():
            if number != but:
                member.lines.send(message)


def main() -> None:
    port, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    try:
        hub = Hub(port, count, seconds)
    except OSError as error:
        print(error.strerror or error, flush=True)
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # they are for the processes
        signal.signal(number, signal.SIG_IGN)
    print("listening", flush=True)
    hub.run()
    os._exit(0)  # JAX's service would wait for those that were killed


if __name__ == "__main__":
    main()
