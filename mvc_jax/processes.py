"""The processes of one run: one program, started on each machine or group of devices.

JAX's distributed runtime joins them (`join`), and its key-value store, which process 0
keeps for all, carries what they tell each other here: short JSON values, no arrays. One
process is all there is until `join` was called, and every function has its answer then.

All processes call these functions in the same order, from the main thread.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mvc_jax.errors import UserError

_Item = TypeVar("_Item")
_WAIT_SECONDS = 1800.0  # a shard of images may take minutes longer here than there
_MOST_SECONDS_BETWEEN_LOOKS = 1.0
_turns = itertools.count()


def index() -> int:
    """This process's number, 0 to `count() - 1`."""
    state = _state()
    return state.process_id if state else 0


def count() -> int:
    """How many processes take part; starts no backend."""
    state = _state()
    return state.num_processes if state else 1


def is_first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return index() == 0


def share(items: Sequence[_Item]) -> list[_Item]:
    """The items that this process does: every `count()`-th, from its own number on."""
    return list(items[index() :: count()])


def barrier(name: str, seconds: float = _WAIT_SECONDS) -> None:
    """Waits until every process is here; `gather` without a value."""
    gather(name, None, seconds)


def gather(name: str, value: Any, seconds: float = _WAIT_SECONDS) -> list[Any]:
    """The value of every process, by its number.

    Args:
      name: what is waited for, for people.
      value: of this process, a JSON value.
      seconds: to wait for the others.

    Raises:
      UserError: another process did not come in time.
    """
    if count() == 1:
        return [value]
    client, place = _state().client, f"mvc_jax/{next(_turns)}/{name}/"
    client.key_value_set(f"{place}{index()}", json.dumps(value))
    began, pause = time.monotonic(), 0.001
    while True:
        said = {
            int(k.rpartition("/")[2]): v for k, v in client.key_value_dir_get(place)
        }
        if len(said) == count():
            return [json.loads(said[number]) for number in range(count())]
        if time.monotonic() - began > seconds:
            missing = [str(n) for n in range(count()) if n not in said]
            raise UserError(
                f"process {', '.join(missing)}",
                wanted=f"all {count()} processes at {name} within {seconds:g} s",
                got=f"{len(said)}",
                fix="Look at its log, then run the same command in every process.",
            )
        time.sleep(pause)
        pause = min(2 * pause, _MOST_SECONDS_BETWEEN_LOOKS)


def on_first(name: str, function: Callable[[], Any]) -> Any:
    """What `function` returns, a JSON value, called by the first process alone.

    The others wait for it. A `UserError` that it raises is raised in all processes.
    """
    if count() == 1:
        return function()
    said: dict[str, Any] = {}
    failure: UserError | None = None
    if is_first():
        try:
            said = {"value": function()}
        except UserError as error:
            failure, said = error, {"error": error.fields()}
    said = gather(name, said)[0]
    if failure is not None:
        raise failure
    if "error" in said:
        raise UserError(**said["error"])
    return said["value"]


def _state() -> Any:
    """JAX's record of the processes; None for a single one."""
    import sys

    if "jax" not in sys.modules:  # flags are parsed and checked without it
        return None
    from jax._src import distributed

    state = distributed.global_state
    return state if state.client is not None else None
