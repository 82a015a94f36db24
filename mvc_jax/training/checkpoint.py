"""Training state on disk, by Orbax: only whole checkpoints count.

Resume rules:
1. A checkpoint appears by a rename: a kill during a save leaves the one before.
2. A run goes on from the newest checkpoint; its step fixes data order and randomness.
3. What is restored has the checksums of what was saved, on whatever mesh. A checkpoint
   that has not, or cannot be read, is damaged: it is named in a warning and put aside,
   and the one before is taken.
4. Where every checkpoint is damaged, or they are of another model, the run stops and
   touches nothing.
"""

import contextlib
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mvc_jax.errors import UserError, is_full_disk, require_disk_space
from mvc_jax.training.checksums import checksums

_STATE, _RECORD = "state", "record"  # the two items of a checkpoint
# The machine's fault, or the user's: the checkpoint may be whole.
_NO_DAMAGE = (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_FULL = {
    "what": "a checkpoint",
    "fix": "Free some; the same command goes on from the checkpoint before.",
}


class Checkpoints:
    """Checkpoints of one training loop in one folder.

    Saves run in the background. What fails there is raised by the next call.
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
        """Opens `folder`, and clears away what a killed save left there.

        Args:
          folder: of the checkpoints alone.
          every: steps between two saves.
          minutes: a save is due after this long, too; 0 for never.
          keep: how many of the newest are kept.
          best: a metric whose lowest checkpoint is kept besides.
          clock: seconds that only grow.
        """
        self._every, self._seconds = every, 60 * minutes
        self._clock, self._saved = clock, clock()
        self._lowest = _Lowest(best)
        policies = [ocp.checkpoint_managers.LatestN(keep), self._lowest]
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            lightweight_initialize=True,  # or a damaged checkpoint may raise here
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        )
        self._folder = epath.Path(folder).absolute()
        if jax.process_index() == 0 and self._folder.exists():
            # Orbax does so too, but in the background, when room may be asked for.
            for leftover in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                leftover.rmtree()
        self._saving, self._size = self._folder, 0  # the last save, for its errors
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(Exception):  # damaged: told when it is restored
                self._lowest.add(step, self._read_record(step)["metrics"])

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        late = 0 < self._seconds <= self._clock() - self._saved
        if self._seconds:  # hosts save together, and their clocks differ
            late = bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
        return step % self._every == 0 or late

    def restore(self, state: Any) -> Any:
        """The newest valid state in the shapes and shardings of `state`, or `state`.

        Args:
          state: arrays, given up as soon as there is a checkpoint to take their place,
            or `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: no checkpoint is whole, or they are of another model.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = self._read_record(step)
                self._check_leaves(step, record["leaves"], abstract)
                _free(state)  # or it would lie beside what takes its place
                state = self._read_state(step, record["leaves"], abstract)
            except _NO_DAMAGE:
                raise
            except Exception as error:  # whatever the damage, the one before may serve
                damaged[step] = _in_words(error)
                continue
            self._put_aside(damaged, step)
            return state
        if damaged:
            raise UserError(
                str(self._folder),
                wanted="a checkpoint that is whole",
                got=f"{len(damaged)} damaged",
                fix="Restore the folder from a copy, or delete it to start anew.",
                details=[f"{step}: {reason}" for step, reason in damaged.items()],
            )
        return state

    @property
    def best_step(self) -> int | None:
        """The step with the lowest metric, of those that are on disk or were saved."""
        return self._lowest.step

    def restore_best(self, state: Any) -> Any:
        """The state at `best_step`; `state`, which it takes the place of, without one.

        Raises:
          UserError: it is damaged, or of another model.
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
                wanted="the best checkpoint, whole",
                got=f"a damaged one ({_in_words(error)})",
                fix=f"Delete {self._folder} to train this one anew.",
            ) from error

    def save(
        self, step: int, state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to write `state`; returns once it is copied to the host.

        Waits for a save that is still under way. A step that is saved already, as when
        a run is stopped right after a save, is not saved again.

        Raises:
          UserError: the disk has no room for it, or had none for the one before.
        """
        self._finish()
        if step in self._manager.all_steps():
            return
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._saving = self._folder / f"{step}"
        require_disk_space(self._folder, self._size, **_FULL)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        sums = checksums(state)
        leaves = {
            name: [*described, sum_]
            for (name, described), sum_ in zip(
                _leaves(state).items(), sums, strict=True
            )
        }
        self._lowest.add(step, metrics)
        items = {
            _STATE: ocp.args.StandardSave(state),
            _RECORD: ocp.args.JsonSave(_sealed({"leaves": leaves, "metrics": metrics})),
        }
        with self._telling_of_a_full_disk():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._saved = self._clock()

    def close(self) -> None:
        """Waits for a save under way.

        Raises:
          UserError: the disk had no room for it.
        """
        try:
            self._finish()
        finally:
            self._manager.close()

    def _finish(self) -> None:
        with self._telling_of_a_full_disk():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _telling_of_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_full_disk(error):
                raise
            raise UserError(
                str(self._saving),
                wanted=f"{self._size} bytes of free disk for {_FULL['what']}",
                got="a disk that filled up",
                fix=_FULL["fix"],
            ) from error

    def _read_record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
        return _unsealed(self._manager.restore(step, args=args)[_RECORD])

    def _check_leaves(self, step: int, saved: dict[str, list], abstract: Any) -> None:
        """Refuses a checkpoint whose arrays have other names, types or shapes."""
        wanted = _leaves(abstract)
        found = {name: [dtype, shape] for name, (dtype, shape, _) in saved.items()}
        differing = sorted(
            name
            for name in wanted.keys() | found.keys()
            if wanted.get(name) != found.get(name)
        )
        if differing:
            show = [
                f"{name}: {wanted.get(name)}, {found.get(name)}" for name in differing
            ]
            raise UserError(
                str(self._folder / f"{step}"),
                wanted="the arrays of this model and optimiser",
                got=f"{len(differing)} others (array: wanted, got)",
                fix="Take the settings it was made with, another --workdir, or delete "
                "the folder of checkpoints to start anew.",
                details=show,
            )

    def _read_state(self, step: int, saved: dict[str, list], abstract: Any) -> Any:
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        state = self._manager.restore(step, args=args)[_STATE]
        for name, sum_ in zip(_leaves(state), checksums(state), strict=True):
            if saved[name][-1] != sum_:
                raise ValueError(f"{name} is not what was saved")
        return state

    def _put_aside(self, damaged: dict[int, str], taken: int) -> None:
        """Renames damaged checkpoints, so that their steps can be saved anew."""
        for step, reason in damaged.items():
            names = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            paths = (self._folder / f"damaged-{step}{name}" for name in names)
            aside = next(path for path in paths if not path.exists())
            logging.warning(
                "checkpoint %s/%d is damaged (%s); it is now %s, and step %d is taken",
                self._folder,
                step,
                reason,
                aside.name,
                taken,
            )
            if jax.process_index() == 0:
                (self._folder / f"{step}").rename(aside)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
            self._manager.reload()


class _Lowest:
    """Preserves the checkpoint whose metric is lowest, the newest of equal ones.

    Orbax's `BestN` reads the metrics of older checkpoints when it opens their folder,
    which fails as a whole if one of these files is damaged.
    """

    def __init__(self, metric: str | None):
        self._metric = metric
        self._values: dict[int, float] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._metric, math.inf)
        self._values[step] = math.inf if math.isnan(value) else value

    @property
    def step(self) -> int | None:
        """Where it is lowest; the newest of equal ones. None: nowhere."""
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
    """Path -> [dtype, shape] of every leaf, as JSON reads it back."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    }


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _free(state: Any) -> None:
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with a checksum of its own, so that it can be believed."""
    return record | {"crc32": _crc32(record)}


def _unsealed(record: dict[str, Any]) -> dict[str, Any]:
    record = dict(record)
    if record.pop("crc32", None) != _crc32(record):
        raise ValueError("its record is not what was saved")
    return record


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
