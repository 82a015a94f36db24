"""Checkpoints of the training state, by Orbax, with checksums.

Resume rules:
1. A checkpoint appears by a rename, so a kill during a save leaves the previous one.
2. Training resumes from the newest checkpoint; its step determines the data order and
   the randomness from there on.
3. The checksums of a restored state are compared with those of the saved one, on any
   mesh. A checkpoint that fails this, or cannot be read, is damaged: it is quarantined
   (renamed to `damaged-<step>`) with a warning, and the previous one is restored.
4. If every checkpoint is damaged, or the newest is of another model, the run stops and
   changes nothing.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import pathlib
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mvc_jax import files, object_store, processes
from mvc_jax.errors import UserError, no_room, require_disk_space
from mvc_jax.training.checksums import checksums
from mvc_jax.training.stored_steps import StoredSteps

_STEPS_BETWEEN_QUESTIONS = 8
_STATE, _RECORD = "state", "record"  # the two items of a checkpoint
# The fault of the machine or of the user; the checkpoint may be intact.
_NO_DAMAGE = (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_FULL_DISK = {
    "what": "a checkpoint",
    "fix": "Free some, then rerun the same command to resume.",
}


class Checkpoints:
    """Checkpoints of one training loop, in a folder of their own.

    Saves run in the background; their errors are raised by the next call.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        every: int,
        minutes: float = 0.0,
        keep: int = 2,
        best: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens `folder`, and deletes what a killed save left there.

        Args:
          folder: contains nothing but the checkpoints.
          every: steps between two saves.
          minutes: a save is also due this long after the last one; 0: never.
          keep: number of newest checkpoints to keep.
          best: a metric; the checkpoint with its lowest value is kept as well.
          clock: monotonic time in seconds.
        """
        self._every, self._seconds = every, 60 * minutes
        self._clock, self._saved = clock, clock()
        self._lowest = _Lowest(best)
        policies = [ocp.checkpoint_managers.LatestN(keep), self._lowest]
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            lightweight_initialize=True,  # else a damaged checkpoint may raise here
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            **_many(epath.Path(folder)),
        )
        self._folder = epath.Path(folder).absolute()
        # Orbax does so too, but in the background, maybe after `save` measured the free
        # disk space.
        self._remove_leftovers()
        self._saving, self._size = self._folder, 0  # the last save, for its errors
        self._link = _link_for_orbax(self._folder)
        self._disk = (
            epath.Path(self._link.name) / "folder" if self._link else self._folder
        )
        self._stored: StoredSteps | None = None
        if object_store.is_remote(self._folder):
            self._stored = StoredSteps(self._folder, keep=keep)
            self._disk = epath.Path(self._stored.local)
            options = dataclasses.replace(options, **self._stored.options())
        self._manager = ocp.CheckpointManager(self._disk, options=options)
        for step in self._all_steps():
            with contextlib.suppress(Exception):  # damage is reported by `restore`
                self._lowest.add(step, self._read_record(step)["metrics"])

    def due(self, step: int) -> bool:
        """Whether a save is due after `step` steps."""
        late = 0 < self._seconds <= self._clock() - self._saved
        if self._seconds and processes.count() > 1:
            # They must save together, but their clocks differ; to ask takes a moment.
            asked = step % _STEPS_BETWEEN_QUESTIONS == 0
            late = asked and processes.gather("the time of a save", late)[0]
        return step % self._every == 0 or late

    def restore(self, state: Any) -> Any:
        """The newest undamaged state, with the shardings of `state`; else `state`.

        Args:
          state: arrays, which are deleted before a checkpoint is read, or
            `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: all checkpoints are damaged, or one is of another model.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: dict[int, str] = {}
        for step in sorted(self._all_steps(), reverse=True):
            try:
                record = self._read_record(step)
                self._check_leaves(step, record["leaves"], abstract)
                _delete(state)  # the device may not have memory for two states
                state = self._read_state(step, record["leaves"], abstract)
            except _NO_DAMAGE:
                raise
            except Exception as error:  # any damage: try the previous checkpoint
                damaged[step] = _one_line(error)
                continue
            self._quarantine(damaged, step)
            return state
        if damaged:
            raise UserError(
                str(self._folder),
                wanted="an undamaged checkpoint",
                got=f"{len(damaged)} damaged",
                fix="Restore the folder from a backup, or delete it to start again.",
                details=[f"{step}: {reason}" for step, reason in damaged.items()],
            )
        return state

    @property
    def best_step(self) -> int | None:
        """The step with the lowest metric, of all that are on disk or were saved."""
        return self._lowest.step

    def restore_best(self, state: Any) -> Any:
        """The state at `best_step`, with the shardings of `state`; else `state`.

        Raises:
          UserError: that checkpoint is damaged, or of another model.
        """
        self._finish()
        step = self.best_step
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            leaves = self._read_record(step)["leaves"]
            self._check_leaves(step, leaves, abstract)
            return self._read_state(step, leaves, abstract)
        except _NO_DAMAGE:
            raise
        except Exception as error:
            raise UserError(
                str(self._folder / f"{step}"),
                wanted="an undamaged best checkpoint",
                got=f"a damaged one ({_one_line(error)})",
                fix=f"Delete {self._folder} to train this one again.",
            ) from error

    def save(
        self, step: int, state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to save `state`; returns once it is copied to the host.

        Waits for the previous save first. A step that has been saved is skipped: a run
        may be stopped right after a regular save.

        Args:
          step: number of steps taken.
          state: tree of arrays.
          metrics: values to record, including the one named by `best`.

        Raises:
          UserError: the disk is too full for this save, or was for the previous one.
        """
        self._finish()
        if step in self._all_steps():
            return
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._saving = self._folder / f"{step}"
        require_disk_space(self._disk, self._size, **_FULL_DISK)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        sums = checksums(state)
        leaves = {
            name: [*described, sum_]
            for (name, described), sum_ in zip(
                _leaves(state).items(), sums, strict=True
            )
        }
        self._lowest.add(step, metrics)
        if self._stored:
            state = self._stored.gathered(state)
        items = {
            _STATE: ocp.args.StandardSave(state),
            _RECORD: ocp.args.JsonSave(
                _with_checksum({"leaves": leaves, "metrics": metrics})
            ),
        }
        args = ocp.args.Composite(**items)
        with self._explain_no_room():
            if self._stored is None:
                self._manager.save(step, args=args, force=True)
            else:
                self._stored.save(step, self._manager, args, best=self._lowest.step)
        self._saved = self._clock()

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          UserError: the disk was too full for it.
        """
        try:
            self._finish()
        finally:
            self._manager.close()
            _await_writers()
            if self._stored:
                self._stored.close()
            with contextlib.suppress(OSError):  # of a disk that became read-only
                self._remove_leftovers()  # of a disk that became full
            if self._link:
                self._link.cleanup()

    def _finish(self) -> None:
        with self._explain_no_room():
            if self._stored:
                self._stored.wait()
            self._manager.wait_until_finished()

    def _all_steps(self) -> Sequence[int]:
        return self._stored.all() if self._stored else self._manager.all_steps()

    def _restore_item(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        if self._stored and self._stored.fetch(step, item):
            self._manager.reload()
        args = ocp.args.Composite(**{item: args})
        return self._manager.restore(step, args=args)[item]

    @contextlib.contextmanager
    def _explain_no_room(self) -> Iterator[None]:
        """Turns an error of a disk that is full into a `UserError`."""
        try:
            yield
        except Exception as error:
            full = no_room(error, self._saving, self._size)
            if full is None:
                raise
            raise full from error

    def _remove_leftovers(self) -> None:
        """Deletes what a save that did not end has written."""
        if object_store.is_remote(self._folder):
            return  # `StoredSteps` has
        if jax.process_index() == 0 and self._folder.exists():
            pattern = f"*{ocp.utils.TMP_DIR_SUFFIX}*"
            for leftover in files.matching(self._folder, pattern):
                leftover.rmtree()

    def _read_record(self, step: int) -> dict[str, Any]:
        record = self._restore_item(step, _RECORD, ocp.args.JsonRestore())
        return _without_checksum(record)

    def _check_leaves(self, step: int, saved: dict[str, list], abstract: Any) -> None:
        """Raises if the arrays of a checkpoint have other names, dtypes or shapes."""
        wanted = _leaves(abstract)
        found = {name: [dtype, shape] for name, (dtype, shape, _) in saved.items()}
        differing = sorted(
            name
            for name in wanted.keys() | found.keys()
            if wanted.get(name) != found.get(name)
        )
        if differing:
            details = [
                f"{name}: {wanted.get(name)}, {found.get(name)}" for name in differing
            ]
            raise UserError(
                str(self._folder / f"{step}"),
                wanted="the arrays of this model and optimiser",
                got=f"{len(differing)} different ones (array: wanted, got)",
                fix="Use the settings that it was made with or another --workdir, or "
                "delete the folder of checkpoints to start again.",
                details=details,
            )

    def _read_state(self, step: int, saved: dict[str, list], abstract: Any) -> Any:
        state = self._restore_item(step, _STATE, ocp.args.StandardRestore(abstract))
        for name, sum_ in zip(_leaves(state), checksums(state), strict=True):
            if saved[name][-1] != sum_:
                raise ValueError(f"the checksum of {name} is wrong")
        return state

    def _quarantine(self, damaged: dict[int, str], restored: int) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again.

        Args:
          damaged: step -> what is wrong with its checkpoint.
          restored: the step of the checkpoint used instead, for the warning.
        """
        for step, reason in damaged.items():
            suffixes = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            paths = (self._folder / f"damaged-{step}{suffix}" for suffix in suffixes)
            new = next(path for path in paths if not path.exists())
            logging.warning(
                "checkpoint %s/%d is damaged (%s); renamed to %s, step %d is restored",
                self._folder,
                step,
                reason,
                new.name,
                restored,
            )
            if jax.process_index() == 0:
                (self._folder / f"{step}").rename(new)
            if self._stored:
                self._stored.forget(step)
        if damaged:
            processes.barrier("damaged checkpoints are renamed")
            self._manager.reload()


def _many(folder: epath.Path) -> dict[str, Any]:
    """Options of Orbax's manager for several processes; {} for one.

    They wait for each other through JAX's coordination service. By default Orbax sums
    an array over all devices, in a thread, which takes turns with nothing, and needs
    as many devices in each process.
    """
    if processes.count() == 1:
        return {}
    processes.on_first(
        "the folder of checkpoints",
        lambda: folder.mkdir(parents=True, exist_ok=True),
    )
    options = ocp.options.MultiprocessingOptions(
        active_processes={*range(processes.count())}
    )
    return {"create": False, "multiprocessing_options": options}


class _Lowest:
    """Preserves the checkpoint with the lowest metric, the newest of equal ones.

    Orbax's `BestN` reads the metrics of all checkpoints when it opens their folder, and
    fails if one of these files is damaged.
    """

    def __init__(self, metric: str | None):
        self._metric = metric
        self._values: dict[int, float] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._metric, math.inf)
        self._values[step] = math.inf if math.isnan(value) else value

    @property
    def step(self) -> int | None:
        """The step with the lowest metric, the newest of equal ones; None: no step."""
        lowest = min(self._values.values(), default=math.inf)
        equal = [step for step, v in self._values.items() if v == lowest < math.inf]
        return max(equal, default=None)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        del context
        values = [self._values.get(info.step, math.inf) for info in checkpoints]
        lowest = min(values, default=math.inf)
        last = max(
            (i for i, value in enumerate(values) if value == lowest < math.inf),
            default=-1,
        )
        return [i == last for i in range(len(values))]


def _leaves(tree: Any) -> dict[str, list]:
    """Path -> [dtype, shape] of every leaf, in JSON's types."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    }


def _link_for_orbax(folder: epath.Path) -> tempfile.TemporaryDirectory | None:
    """A temporary folder with a link, `folder`, to one whose path is a pattern.

    Orbax lists folders by `glob`, to which the whole path is one: below `lr[1e-4]` it
    would find no files of a save, and the checkpoint could not be restored. None for
    other paths.
    """
    if object_store.is_remote(folder) or glob.escape(str(folder)) == str(folder):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    link = tempfile.TemporaryDirectory(prefix="mvc_jax-")
    (pathlib.Path(link.name) / "folder").symlink_to(folder, target_is_directory=True)
    return link


def _await_writers() -> None:
    """Waits for threads of Orbax that go on writing after one of them has failed."""
    for thread in threading.enumerate():
        if type(thread).__name__ == "_SignalingThread":
            threading.Thread.join(thread)  # its own raises its exception


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _delete(state: Any) -> None:
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def _with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "crc32": _crc32(record)}


def _without_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Removes and checks what `_with_checksum` added."""
    record = dict(record)
    if record.pop("crc32", None) != _crc32(record):
        raise ValueError("the checksum of its record is wrong")
    return record


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
