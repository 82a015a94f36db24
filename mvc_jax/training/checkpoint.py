"""Training state on disk, by Orbax: only whole checkpoints count.

Resume rules:
1. A checkpoint appears by a rename: a kill during a save leaves the one before.
2. A run goes on from the newest checkpoint; its step fixes data order and randomness.
3. A damaged newest checkpoint is named in a warning and removed; the one before is
   taken.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mvc_jax.errors import require_room


class Checkpoints:
    """Checkpoints of one training loop in one folder; keeps the newest two."""

    def __init__(self, folder: epath.PathLike, *, every: int):
        """Opens `folder`; `every` is the number of steps between two saves."""
        self.every = every
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        folder = epath.Path(folder).absolute()
        self._manager = ocp.CheckpointManager(folder, options=options)

    def restore(self, state: Any) -> Any:
        """The newest readable state in the shapes and shardings of `state`, or it."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._manager.restore(
                    step, args=ocp.args.StandardRestore(abstract)
                )
            except Exception as error:  # whatever the damage, the one before may serve
                logging.warning(
                    "checkpoint %s/%d is damaged (%s); taking the one before",
                    self._manager.directory,
                    step,
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
                self._manager.delete(step)  # or the run could not save it anew
        return state

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`; returns once it is copied to the host.

        Raises:
          UserError: the disk has no room for it.
        """
        require_room(
            self._manager.directory,
            sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            what="a checkpoint",
            fix="Free some; the same command goes on from the checkpoint before.",
        )
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def close(self) -> None:
        """Waits for a save under way."""
        self._manager.wait_until_finished()
        self._manager.close()
