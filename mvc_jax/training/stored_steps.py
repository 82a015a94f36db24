"""Checkpoints in a bucket: Orbax writes them to local scratch, from which they are put.

A checkpoint is there once its last object is, `committed.json`, which lists the others.
Each process reads those that it needs; of many, the first one writes.
"""

import concurrent.futures
import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mvc_jax import files, object_store, scratch, servers, store_folders

_COMMITTED = "committed.json"


class StoredSteps:
    """The checkpoints below a folder in a bucket, and local copies of some.

    Args:
      folder: in the bucket; what an interrupted save left there is deleted.
      keep: number of newest checkpoints to keep.

    Attributes:
      local: a folder in local scratch, for Orbax.
    """

    def __init__(self, folder: epath.Path, *, keep: int):
        self._folder, self._keep = folder, keep
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future | None = None
        self.local = scratch.temporary("checkpoints")
        self.local.mkdir()
        if jax.process_index() == 0:
            store_folders.remove_incomplete(folder)
        there = object_store.below(folder)
        steps = {x.split("/")[0] for x in there}
        steps = {x for x in steps if x.isdigit()}
        done = {x for x in steps if f"{x}/{_COMMITTED}" in there}
        for step in steps - done if jax.process_index() == 0 else ():
            (folder / step).rmtree()
        self._steps = {int(step) for step in done}

    def options(self) -> dict[str, Any]:
        """Of Orbax's manager: one of many processes does not wait for the others."""
        me = jax.process_index()
        if jax.process_count() == 1:
            return {}
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
        )
        # Else Orbax would make the folder together.
        return {"multiprocessing_options": alone, "create": False}

    def gathered(self, state: Any) -> Any:
        """The state as it is put: of many processes, all parts, on the host."""
        if jax.process_count() == 1:
            return state
        return multihost_utils.process_allgather(state, tiled=True)

    def all(self) -> list[int]:
        return sorted(self._steps)

    def save(
        self, step: int, manager: ocp.CheckpointManager, args: Any, best: int | None
    ) -> None:
        """Starts to save and to put a checkpoint; then others than these are deleted.

        Args:
          step: number of steps taken.
          manager: of `local`.
          args: for its `save`.
          best: the step of one that is kept besides the newest ones.
        """
        first = jax.process_index() == 0
        if first:
            manager.save(step, args=args, force=True)
        self._steps.add(step)
        kept = {*self.all()[-self._keep :], best}

        def put() -> None:
            if first:
                manager.wait_until_finished()
                self._upload(step)
            for other in self._steps - kept:
                if first:
                    self._delete(other)
                self.forget(other)

        self._saving = self._writer.submit(put)

    def wait(self) -> None:
        """Waits for the last save, of all processes; raises its error."""
        if self._saving:
            saving, self._saving = self._saving, None
            saving.result()
            multihost_utils.sync_global_devices("a checkpoint is in its bucket")

    def fetch(self, step: int, part: str) -> bool:
        """Copies the files of a checkpoint below `part` that are missing.

        Returns:
          whether there were any.

        Raises:
          OSError, ValueError, LookupError: it is damaged.
        """
        if (self.local / f"{step}" / part).exists():
            return False
        listed = files.read_json(self._folder / f"{step}" / _COMMITTED)["files"]

        def fetch_one(name: str) -> None:
            target = self.local / f"{step}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self._folder / f"{step}" / name
            object_store.fetch(source, target, size=listed[name])

        names = [x for x in listed if x.startswith(f"{part}/") or "/" not in x]
        there = object_store.below(self._folder / f"{step}")
        for name in names:
            if name not in there or there[name].size != listed[name]:
                raise ValueError(f"{name} is missing, or has another size")
        with _deleting_on_error(self.local / f"{step}"):
            servers.parallel(fetch_one, names)
        return True

    def _upload(self, step: int) -> None:
        folder, target = self.local / f"{step}", self._folder / f"{step}"
        names = store_folders.local_files(folder)
        servers.parallel(lambda x: object_store.put(folder / x, target / x), names)
        sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
        files.write_json(target / _COMMITTED, {"files": sizes})

    def _delete(self, step: int) -> None:
        (self._folder / f"{step}" / _COMMITTED).unlink()  # first
        (self._folder / f"{step}").rmtree()

    def forget(self, step: int) -> None:
        """Leaves a checkpoint out that was deleted or renamed."""
        self._steps.discard(step)
        shutil.rmtree(self.local / f"{step}", ignore_errors=True)

    def close(self) -> None:
        self._writer.shutdown()
        shutil.rmtree(self.local, ignore_errors=True)


@contextlib.contextmanager
def _deleting_on_error(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
