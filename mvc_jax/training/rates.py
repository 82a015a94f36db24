"""How long a stage took on this hardware, kept to price later runs.

A file for each stage, settings and hardware, `rates/<stage>-<settings>-<hardware>.json`
in the folder of the compilation cache:

    {"stage": "finetune", "settings": {...}, "hardware": {...},
     "unit": "steps", "count": 1000, "seconds": 812.4, "compile_seconds": 61.0,
     "program_bytes": 21474836480}

The last run of its kind replaces the file, by a rename. The settings are those on which
the time depends, for `caption` with the name of the source. Nothing else of a run is
kept, and a file that is damaged or deleted is a time not known.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from typing import Any

from etils import epath

from mvc_jax import files


@dataclasses.dataclass(frozen=True)
class Rate:
    """A finished stage.

    Attributes:
      unit: what was counted.
      count: how many of it were made, at least 1.
      seconds: of the whole stage.
      compile_seconds: those of them that compiled programs.
      program_bytes: memory of its largest training step on a device, as compiled; 0:
        not known.
    """

    unit: str
    count: int
    seconds: float
    compile_seconds: float = 0.0
    program_bytes: int = 0

    def seconds_for(self, count: int) -> float:
        """Seconds that so many would take: compilation once, the rest in proportion."""
        running = max(self.seconds - self.compile_seconds, 0.0)
        return self.compile_seconds + running * count / self.count


@dataclasses.dataclass(frozen=True)
class Rates:
    """The files of a machine, in `<cache>/rates`; without a cache nothing is kept."""

    cache: str

    def known(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether there is a rate of this stage and these settings on any hardware."""
        start = f"{stage}-{_hash(settings)}-"
        return self._folder is not None and any(
            path.name.startswith(start) for path in files.matching(self._folder, "*")
        )

    def find(
        self, stage: str, settings: dict[str, Any], hardware: dict[str, Any]
    ) -> Rate | None:
        """The rate of a stage with these settings on this hardware, if it is known."""
        if self._folder is None:
            return None
        try:
            found = files.read_json(self._path(stage, settings, hardware))
            rate = Rate(
                str(found["unit"]),
                int(found["count"]),
                float(found["seconds"]),
                float(found["compile_seconds"]),
                int(found["program_bytes"]),
            )
        except (OSError, ValueError, LookupError, TypeError, OverflowError):
            return None
        numbers = (rate.seconds, rate.compile_seconds, rate.program_bytes)
        sane = rate.count >= 1 and all(0 <= x < math.inf for x in numbers)
        return rate if sane else None

    def record(
        self,
        stage: str,
        settings: dict[str, Any],
        hardware: dict[str, Any],
        rate: Rate,
    ) -> None:
        """Writes a rate; a cache that cannot be written is left as it is."""
        if self._folder is None or rate.count < 1:
            return
        named = {"stage": stage, "settings": settings, "hardware": hardware}
        with contextlib.suppress(OSError, ImportError):
            path = self._path(stage, settings, hardware)
            files.write_json(path, named | dataclasses.asdict(rate))

    @property
    def _folder(self) -> epath.Path | None:
        return epath.Path(self.cache).expanduser() / "rates" if self.cache else None

    def _path(
        self, stage: str, settings: dict[str, Any], hardware: dict[str, Any]
    ) -> epath.Path:
        assert self._folder is not None
        return self._folder / f"{stage}-{_hash(settings)}-{_hash(hardware)}.json"


@functools.cache
def processor() -> dict[str, Any]:
    """Name and number of the processors that this process may use."""
    name = ""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"processor": name, "cores": cores}


def _hash(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
