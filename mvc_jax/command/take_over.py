"""--from: finished stages of another workdir become those of this one."""

from collections.abc import Sequence

from absl import logging
from etils import epath

from mvc_jax.command import run_folder


def take_over(names: Sequence[str], source: epath.Path, workdir: epath.Path) -> None:
    """Links or copies stages, each of which appears by a rename.

    So a kill leaves complete stages and a temporary folder, which the next run deletes.

    Args:
      names: finished stages, in the pipeline's order.
      source: the workdir that has them.
      workdir: of the run, which has not.
    """
    for name in names:
        temporary = workdir / f".tmp-{name}"
        try:
            run_folder.link_or_copy(source / name, temporary)
            run_folder.copy_records(name, source, workdir)
            if (workdir / name).exists():  # and is empty
                (workdir / name).rmdir()
            temporary.rename(workdir / name)
        except BaseException:
            if temporary.exists():
                temporary.rmtree()
            raise
    logging.info("taken over from %s: %s", source, ", ".join(names))
