"""What a run takes before it starts: counts, disk, memory, and hours where known.

A stage counts its own work, by its function `price`; here are the sizes that it is
given, the rates of earlier runs, and what does not fit this machine. Nothing is written
and no device is started.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mvc_jax import object_store
from mvc_jax.command import pipeline, plan
from mvc_jax.errors import UserError
from mvc_jax.reporting import formats
from mvc_jax.stage import is_complete, read_manifest
from mvc_jax.training import rates, runtime
from mvc_jax.work import BaseSizes, Sizes, Work

_MARGIN = 1.1  # of free disk, as `errors.require_disk_space` asks for
_NO_WORK = ("done", "refused")
# What counting may raise of a missing or damaged file: the stage that reads it reports
# it, and a price stops no run for it.
_UNREADABLE = (UserError, OSError, ValueError, LookupError, TypeError)
_THROUGH_SCRATCH = ("checkpoints", "model", "classifiers", "pixels")
_OVER = "over"  # what is certain of the memory of all devices
_STATES = {
    "done": "done",
    "run": "to do",
    "resume": "to do, begun",
    "grow": "to do, grows",
    "refused": "blocked",
}


@dataclasses.dataclass(frozen=True)
class Price:
    """What one stage takes.

    Attributes:
      step: what the stage would do.
      work: what it would make from nothing; None: nothing to do, or not known.
      why: why that is not known.
      seconds: by an earlier run on this hardware; None: not known.
      program_bytes: memory of its largest training step on a device, as an earlier run
        compiled it; 0: not known.
    """

    step: plan.Step
    work: Work | None = None
    why: str = ""
    seconds: float | None = None
    program_bytes: int = 0


def make(
    steps: Sequence[plan.Step],
    config: ConfigDict,
    workdir: epath.Path,
) -> list[Price]:
    """Prices each step of a plan.

    Args:
      steps: of the plan.
      config: of the run, checked.
      workdir: of the run; it need not exist.
    """
    if all(step.state in _NO_WORK for step in steps):
        return [Price(step) for step in steps]
    sizes = _sizes(steps, config, workdir)
    priced = []
    for step in steps:
        work, why = None, ""
        if step.state not in _NO_WORK:
            try:
                work = pipeline.module(step.name).price(config, sizes)
            except _UNREADABLE as error:
                why = f"not known: {error}"
        priced.append(Price(step, work, why))
    return _with_rates(priced, rates.Rates(config.compilation_cache))


def record(price: Price, cache: str, timing: Mapping[str, float]) -> None:
    """Keeps the rate of a stage that was made from nothing, for later prices.

    Args:
      price: of the stage, before it ran.
      cache: `config.compilation_cache`.
      timing: the `seconds` that it took, and of them `compile_seconds`.
    """
    work = price.work
    if price.step.state != "run" or work is None or not work.unit:
        return
    devices = runtime.own_devices() if work.on_devices else None
    if work.on_devices and devices is None:
        return
    rates.Rates(cache).record(
        price.step.name,
        work.speed,
        _hardware(devices),
        rates.Rate(
            work.unit,
            work.makes[work.unit],
            timing["seconds"],
            timing["compile_seconds"],
            runtime.program_bytes(price.step.name),
        ),
    )


def require_room(prices: Sequence[Price], workdir: epath.Path) -> None:
    """Checks that the run can fit this machine's memory, and the workdir's disk.

    Only what must be there counts, so that no run is refused that would have ended: of
    memory the arrays that are known before compilation, of disk what a stage asks for
    at its start, after what the ones before it are sure to have written. What is there
    of a stage that was begun is not known here: that stage checks its disk by itself.

    Raises:
      UserError: of the first stage that does not fit.
    """
    free, written = free_bytes(workdir), 0
    for price in prices:
        if price.work is None:
            continue
        name, work = price.step.name, price.work
        _require_memory(name, work)
        if price.step.state != "run":
            continue
        asks = work.disk_bytes if work.asks is None else work.asks
        if free is not None and free - written <= _MARGIN * asks:
            what = ", ".join(
                f"{formats.size(n)} {k}" for k, n in work.disk.items() if n
            )
            raise UserError(
                f"stage {name}",
                wanted=f"{formats.size(round(_MARGIN * asks))} of free disk for {what}",
                got=f"{formats.size(max(free - written, 0))} of {workdir}'s disk after "
                "the stages before it",
                fix="Free some, name a --workdir on another disk, or make less; "
                "--dry_run shows what each stage takes.",
            )
        written += work.disk_bytes if work.leaves is None else work.leaves


def free_bytes(workdir: epath.Path) -> int | None:
    """Free bytes of the disk that the workdir is, or would be, on; None if remote."""
    if "://" in str(workdir):
        return None
    folder = workdir.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def scratch_bytes(prices: Sequence[Price]) -> int:
    """What a run in a bucket has on a local disk at one time, about.

    Arrays that are mapped, and the checkpoints and models of one stage. What finished
    stages have of them is not counted.
    """
    disks = {price.step.name: price.work.disk for price in prices if price.work}
    mapped = [sum(disks.pop(name, {}).values()) for name in ("caption", "encode")]
    others = [sum(disk.get(x, 0) for x in _THROUGH_SCRATCH) for disk in disks.values()]
    return sum(mapped) + max(others, default=0)


def table(prices: Sequence[Price], workdir: epath.Path) -> str:
    """The price of each stage and of the whole run, as lines for a terminal."""
    rows = [("stage", "", "makes", "disk, about", "memory", "time")]
    for price in prices:
        work, state = price.work, _STATES[price.step.state]
        if work is None:
            rows.append(
                (price.step.name, state, price.why or price.step.reason, "", "", "")
            )
            continue
        makes = ", ".join(f"{n:,} {what}" for what, n in work.makes.items() if n)
        disk = formats.size(work.disk_bytes) if work.disk_bytes else ""
        rows.append((price.step.name, state, makes, disk, _memory(price), _time(price)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if any(row[4].startswith(_OVER) for row in rows):
        lines += ["", f"{_OVER}: activations are not known before a step is compiled"]
    remarks = [f"{p.step.name}: {p.work.remark}" for p in prices if p.work]
    remarks = [remark for remark in remarks if not remark.endswith(": ")]
    lines += ["", *remarks] if remarks else []
    return "\n".join([*lines, "", line(prices, workdir)])


def line(prices: Sequence[Price], workdir: epath.Path) -> str:
    """The price of the whole run, in one line."""
    count = sum(price.step.state not in _NO_WORK for price in prices)
    if not count:
        return "nothing to do"
    todo = [(price, price.work) for price in prices if price.work is not None]
    counts = {"synthetic images": 0, "UNet evaluations": 0, "optimiser steps": 0}
    for price, work in todo:
        counts["optimiser steps"] += work.makes.get("steps", 0)
        if price.step.name == "generate":
            counts["synthetic images"] += work.makes["images"]
            counts["UNet evaluations"] += work.makes["UNet evaluations"]
    parts = [f"{count} of {len(prices)} stages to do"]
    parts += [f"{n:,} {what}" for what, n in counts.items() if n]
    disk, free = sum(work.disk_bytes for _, work in todo), free_bytes(workdir)
    room = "" if free is None else f" ({formats.size(free)} free)"
    if object_store.is_remote(workdir):
        parts.append(f"about {formats.size(disk)} in the bucket")
        place = epath.Path(tempfile.gettempdir())
        room = f"{place} ({formats.size(free_bytes(place))} free)"
        parts.append(
            f"{formats.size(scratch_bytes(prices))} of local scratch in {room}"
        )
    else:
        parts.append(f"about {formats.size(disk)} of disk{room}")
    known = [price.seconds for price, _ in todo if price.seconds is not None]
    unknown = [
        price.step.name
        for price in prices
        if price.step.state not in _NO_WORK and price.seconds is None
    ]
    if not known:
        parts.append("time not known yet: none of these stages was run like this here")
    elif unknown:
        seconds = _duration(sum(known))
        names = ", ".join(dict.fromkeys(unknown))  # of a sweep the same from each run
        parts.append(f"{seconds} without {names}: not known yet")
    else:
        parts.append(f"about {_duration(sum(known))}")
    return "; ".join(parts)


def _sizes(
    steps: Sequence[plan.Step],
    config: ConfigDict,
    workdir: epath.Path,
) -> Sizes:
    """How much there is to work on; the arguments are those of `make`."""
    planned = {step.name: step for step in steps}

    def folder(name: str) -> epath.Path | None:
        """The workdir that has a stage as the run will find it."""
        step = planned.get(name)
        if step is not None and step.state != "done":
            return None
        found = workdir if step is None or step.source is None else step.source
        return found if is_complete(found, name) else None

    def recipes(images: int) -> int:
        if found := folder("mix"):
            return read_manifest(found, "mix")["counts"]["recipes"]
        return pipeline.module("mix").count(config, images)

    def base() -> BaseSizes:
        found = folder("pretrain")
        if found is None and not config.base.path:
            return pipeline.module("pretrain").base_of(config)
        return pipeline.module("encode").base_of(config, found)

    def images() -> dict[str, tuple[int, ...]]:
        found = pipeline.module("caption").count_images(config, folder("caption"))
        return {name: tuple(counts.tolist()) for name, counts in found.items()}

    by_template = config.caption.captioner == "template"
    return Sizes(images, recipes, base, one_prompt_per_class=by_template)


def _with_rates(prices: Sequence[Price], known: rates.Rates) -> list[Price]:
    """Adds the seconds and the memory of earlier runs on this hardware."""
    devices, priced = None, []
    for price in prices:
        name, work = price.step.name, price.work
        if work is None or not known.known(name, work.speed):
            priced.append(price)
            continue
        if work.on_devices and devices is None:
            with contextlib.suppress(UserError):  # another process may hold them
                devices = runtime.ask_devices()
        rate = None
        if devices or not work.on_devices:
            hardware = _hardware(devices if work.on_devices else None)
            rate = known.find(name, work.speed, hardware)
        if rate and rate.unit == work.unit:
            price = dataclasses.replace(
                price,
                seconds=rate.seconds_for(work.makes[work.unit]),
                program_bytes=rate.program_bytes,
            )
        priced.append(price)
    return priced


def _hardware(devices: runtime.Devices | None) -> dict[str, Any]:
    """What the time of a stage depends on, besides its settings."""
    if devices is None:
        return rates.processor()
    return {**rates.processor(), "devices": devices.kind, "count": devices.count}


def _require_memory(name: str, work: Work) -> None:
    import psutil

    host = psutil.virtual_memory().total + psutil.swap_memory().total
    needed, where, size = work.host, "this machine", host
    # Devices are asked only where they would have to be larger than the host.
    if sum(work.host.values()) <= host < sum(work.devices.values()):
        found = runtime.ask_devices()
        needed, size = work.devices, found.bytes or host
        where = f"{found.count} x {found.kind}"
    if sum(needed.values()) > size:
        what = ", ".join(f"{formats.size(n)} {k}" for k, n in needed.items() if n)
        raise UserError(
            f"stage {name}",
            wanted=f"what fits the {formats.size(size)} of memory of {where}",
            got=f"{what}, at least",
            fix=f"Lower {' or '.join(f'config.{field}' for field in work.lower)}.",
        )


def _memory(price: Price) -> str:
    work = price.work
    if price.program_bytes:
        return f"{formats.size(price.program_bytes)} per device"
    if work is None or not work.devices:
        return ""
    return f"{_OVER} {formats.size(sum(work.devices.values()))}"


def _time(price: Price) -> str:
    if price.seconds is None:
        return "not known yet"
    most = "at most " if price.step.state in ("resume", "grow") else ""
    return most + _duration(price.seconds)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
