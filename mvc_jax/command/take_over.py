"""--from: finished stages of another workdir become those of this one, or parts do.

A stage whose settings and inputs are the same is taken over as it is. Of one that has
others, parts may still be what this run would make again: the classifiers that see real
images alone, where recipes have changed. `parts` of a stage's module names them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import artifacts, object_store, stage, store_folders
from mvc_jax.command import pipeline, run_folder
from mvc_jax.errors import UserError

# What comparing may raise of a file that is missing or damaged: its part is made again.
_UNREADABLE = (UserError, OSError, ValueError, LookupError, TypeError)


def take_over(sources: Mapping[str, epath.Path], workdir: epath.Path) -> None:
    """Links or copies stages, each of which appears by a rename.

    So a kill leaves complete stages and a temporary folder, which the next run deletes.

    Args:
      sources: finished stage, in the pipeline's order -> the workdir that has it.
      workdir: of the run, which has not.
    """
    for name, source in sources.items():
        with _appearing(workdir, name) as temporary:
            run_folder.link_or_copy(source / name, temporary)
            run_folder.copy_records(name, source, workdir)
    for source in dict.fromkeys(sources.values()):
        names = [name for name, other in sources.items() if other == source]
        logging.info("taken over from %s: %s", source, ", ".join(names))


def take_over_parts(
    name: str, config: ConfigDict, workdir: epath.Path, sources: Sequence[epath.Path]
) -> list[str]:
    """Begins a stage with what finished ones of other workdirs have of it.

    It appears by a rename, with the record of a stage that was begun with these
    settings, so that it goes on as one that was interrupted.

    Args:
      name: of a stage whose inputs are finished.
      config: of the run.
      workdir: of the run; one that has files of the stage keeps to them.
      sources: other workdirs; each part is of the first that has it.

    Returns:
      the names of the parts.
    """
    folder, module = workdir / name, pipeline.module(name)
    if not sources or (folder.exists() and [*folder.iterdir()]):
        return []
    if not hasattr(module, "parts"):
        return []
    spec, found = module.stage_spec(config), {}
    for source in sources:
        if not stage.is_complete(source, name):
            continue
        with contextlib.suppress(*_UNREADABLE):
            for part in module.parts(config, workdir, source):
                if part.name not in found and _is_intact(source / name, part):
                    found[part.name] = part, source
    if not found:
        return []
    with _appearing(workdir, name) as temporary:
        for part, source in found.values():
            for path in part.paths:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                run_folder.link_or_copy(source / name / path, temporary / path)
            run_folder.copy_part_records(name, part, source, workdir)
        stage.begin(workdir, spec, temporary)
    for source in dict.fromkeys(source for _, source in found.values()):
        mine = [part.name for part, other in found.values() if other == source]
        logging.info("%s: taken over from %s: %s", name, source, ", ".join(mine))
    return [*found]


@contextlib.contextmanager
def _appearing(workdir: epath.Path, name: str) -> Iterator[epath.Path]:
    """A temporary folder that becomes the stage's at the end of the block.

    In a bucket, which has no renames, it is the stage's, marked until then.
    """
    if object_store.is_remote(workdir):
        with store_folders.appearing(workdir / name):
            yield workdir / name
        return
    temporary = workdir / f".tmp-{name}"
    try:
        yield temporary
        if (workdir / name).exists():  # and is empty
            (workdir / name).rmdir()
        temporary.rename(workdir / name)
    except BaseException:
        if temporary.exists():
            temporary.rmtree()
        raise


def _is_intact(folder: epath.Path, part: stage.Part) -> bool:
    """Whether a part is there and holds what its stage wrote."""
    if not all((folder / path).exists() for path in part.paths):
        return False
    digests = artifacts.digests_of(folder, read_only=True)
    known = {
        **digests.recorded(),
        **stage.read_manifest(folder.parent, folder.name)["artifacts"],
    }
    return all(
        digests.holds(folder / name, content)
        for name, content in known.items()
        if part.has(name)
    )
