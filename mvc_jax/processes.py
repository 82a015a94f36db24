"""The processes of one run: one program, started on each machine or group of devices.

JAX's distributed runtime joins them (joining.py), and its key-value store carries what
they tell each other here: short JSON values, no arrays. One process is all there is
before, and every function has its answer then.

All processes call these functions in the same order, from the main thread; `note` and
`noted` may be called by some, at any time.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mvc_jax.errors import UserError

_Item = TypeVar("_Item")
_WAIT_SECONDS = 1800.0  # a shard of images may take minutes longer here than there
WORK_SECONDS = 6 * 3600.0  # a process may have a shard more than the others
_MOST_SECONDS_BETWEEN_LOOKS = 1.0
_NOTES = "mvc_jax/notes/"
_turns = itertools.count()
_LAST_KEY = "mvc_jax_last_key"  # of the last `gather`, which others may still read
_alone: list[str] = []  # what the first process does alone at this moment
hosts: list[str] = []  # by the number of the process


def index() -> int:
    """This process's number, 0 to `count() - 1`."""
    state = _state()
    return state.process_id if state else 0


def count() -> int:
    """How many processes take part; starts no backend.

    1 inside of what the first process does alone (`on_first`).
    """
    state = _state()
    return state.num_processes if state and not _alone else 1


def named(number: int) -> str:
    """A process, for people: its number and its host."""
    host = f" on {hosts[number]}" if number < len(hosts) else ""
    return f"process {number}{host}"


def prefix() -> str:
    """What lines of this process start with on a terminal; "" for the first."""
    return f"process {index()}: " if index() else ""


def is_first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return index() == 0


def share(items: Sequence[_Item], weights: Sequence[int] | None = None) -> list[_Item]:
    """The items that this process does, in their order.

    Equal ones are dealt in turns. Of others the heaviest is first, each for the process
    that has least.

    Args:
      items: the same in every process.
      weights: the work of each; None: all are equal.
    """
    loads = [0] * count()
    weights = [1] * len(items) if weights is None else weights
    mine = []
    for i in sorted(range(len(items)), key=lambda i: -weights[i]):
        least = loads.index(min(loads))
        loads[least] += weights[i]
        if least == index():
            mine.append(i)
    return [items[i] for i in sorted(mine)]


def barrier(name: str, seconds: float = _WAIT_SECONDS) -> None:
    """Waits until every process is here; `gather` without a value."""
    gather(name, None, seconds)


def gather(name: str, value: Any, seconds: float = _WAIT_SECONDS) -> list[Any]:
    """The value of every process, by its number.

    Args:
      name: what is waited for, for people.
      value: of this process, a JSON value.
      seconds: to wait for the others, since the last time that one said how far it is.

    Raises:
      UserError: another process did not come in time.
    """
    if count() == 1:
        return [value]
    state = _state()
    client, place = state.client, f"mvc_jax/{next(_turns)}/{name}/"
    mine = f"{place}{index()}"
    client.key_value_set(mine, json.dumps(value))
    began, pause, noted = time.monotonic(), 0.001, None
    while True:
        said = {
            int(k.rpartition("/")[2]): v for k, v in client.key_value_dir_get(place)
        }
        if len(said) == count():
            if before := getattr(state, _LAST_KEY, None):
                client.key_value_delete(before)  # all are here, and so have read it
            setattr(state, _LAST_KEY, mine)
            return [json.loads(said[number]) for number in range(count())]
        if noted != (noted := client.key_value_dir_get(_NOTES)):
            began = time.monotonic()
        if time.monotonic() - began > seconds:
            missing = [named(n) for n in range(count()) if n not in said]
            raise UserError(
                ", ".join(missing),
                wanted=f"all {count()} processes at {name} within {seconds:g} s",
                got=f"{len(said)}",
                fix="Look at its log, then run the same command in every process.",
            )
        time.sleep(pause)
        pause = min(2 * pause, _MOST_SECONDS_BETWEEN_LOOKS)


def on_first(
    name: str, function: Callable[[], Any], seconds: float = WORK_SECONDS
) -> Any:
    """What `function` returns, a JSON value, called by the first process alone.

    The others wait for it, up to `seconds`. A `UserError` that it raises is raised in
    all processes, with `shared` set.
    """
    if count() == 1:
        return function()
    said: dict[str, Any] = {}
    failure: UserError | None = None
    if is_first():
        try:
            with alone(name):
                said = {"value": function()}
        except UserError as error:
            failure, said = error, {"error": error.fields()}
    said = gather(name, said, seconds)[0]
    if failure is None and "error" in said:
        failure = UserError(**said["error"])
    if failure is not None:
        failure.shared = True
        raise failure
    return said["value"]


def first_then_all(name: str, function: Callable[[], _Item]) -> _Item:
    """What `function` returns, called by the first process and then by the others.

    So they find the files that the first one wrote.
    """
    if count() == 1:
        return function()
    found: list[_Item] = []
    on_first(name, lambda: found.append(function()))
    return found[0] if found else function()


def on_all(what: str, function: Callable[[], _Item]) -> _Item:
    """What `function` returns, called by every process: what may fail on one host.

    A `UserError` that it raises in one of them is raised in all, with `shared` set, and
    names the process, unless all raise one.
    """
    if count() == 1:
        return function()
    failure, result = None, None
    try:
        result = function()
    except UserError as error:
        failure = error
    said = gather(what, failure and failure.fields())
    failed = [number for number, fields in enumerate(said) if fields]
    if not failed:
        return result
    fields = said[failed[0]]
    if len(failed) < count():
        fields["name"] = f"{named(failed[0])}: {fields['name']}"
    error = UserError(**fields)
    error.shared = True
    raise error from failure


def require_same(what: str, values: Mapping[str, Any], fix: str) -> None:
    """Compares values of all processes with those of the first.

    Args:
      what: they are, for people.
      values: name -> JSON value of this process.
      fix: of the error.

    Raises:
      UserError: a process, which is named, has others.
    """
    if count() == 1:
        return
    first, *others = gather(what, values)
    for number, other in enumerate(others, start=1):
        differing = [x for x in {**first, **other} if first.get(x) != other.get(x)]
        if differing:
            field = differing[0]
            more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
            error = UserError(
                f"{named(number)}: {field}",
                wanted=f"{_short(first.get(field))}, as {named(0)} has",
                got=f"{_short(other.get(field))}{more}",
                fix=fix,
            )
            error.shared = True
            raise error


def note(name: str, number: int) -> None:
    """Says how far this process is with something that it works on with the others."""
    if state := _state():
        client, key = state.client, f"{_NOTES}{name}/{state.process_id}"
        client.key_value_set(key, json.dumps(number), allow_overwrite=True)


def noted(name: str) -> int:
    """How far all other processes are, together."""
    state = _state()
    if not state:
        return 0
    said = state.client.key_value_dir_get(f"{_NOTES}{name}/")
    mine = f"/{state.process_id}"
    return sum(json.loads(number) for key, number in said if not key.endswith(mine))


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """What is called in the block runs as in a single process."""
    _alone.append(what)
    try:
        yield
    finally:
        _alone.pop()


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _state() -> Any:
    """JAX's record of the processes; None for a single one."""
    import sys

    if "jax" not in sys.modules:  # flags are parsed and checked without it
        return None
    from jax._src import distributed

    state = distributed.global_state
    return state if state.client is not None else None
