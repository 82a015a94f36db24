"""Checkpoints by name: asked of the Hugging Face hub once, for the files needed.

Cache, token, mirror and offline mode are the library's, by its environment variables
(`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`).
"""

import errno
import functools
import re
from collections.abc import Sequence

import huggingface_hub
from absl import logging
from etils import epath
from huggingface_hub import constants, errors

from mvc_jax.errors import UserError

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFUSALS = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
_PATIENCE = 10.0  # seconds


def is_local(name: str) -> bool:
    """Whether `name` is a path: it exists here, or no hub name is written like it."""
    return not _NAME.fullmatch(name) or epath.Path(name).exists()


def offline() -> bool:
    """Whether the library may not ask the hub, and its cache must hold everything."""
    return constants.HF_HUB_OFFLINE


@functools.cache  # several stages check what they share
def check_name(name: str, *, field: str, revision: str = "") -> None:
    """Refuses a name or revision of which the hub says that it has none.

    Asks it for a few kB, so that a mistyped name does not wait for its stage. Where it
    cannot be asked, or may not, nothing is refused: `download` will see.

    Args:
      name: of a hub's model; what `is_local` calls a path is not looked at.
      field: the setting that holds the name, for errors.
      revision: a branch, tag or commit; `""`: the hub's default branch.

    Raises:
      UserError: the hub knows no such model, or no such revision of it.
    """
    if is_local(name) or offline():
        return
    try:
        huggingface_hub.model_info(name, revision=revision or None, timeout=_PATIENCE)
    except (*_REFUSALS, ValueError) as error:  # the latter of names that cannot be
        raise _refused(field, error) from error
    except OSError as error:  # no network; or the hub is at odds with itself
        logging.info(
            "the Hugging Face hub cannot be asked about %s now (%s)",
            name,
            type(error).__name__,
        )


def locate(
    name: str, patterns: Sequence[str], *, field: str, revision: str = ""
) -> epath.Path:
    """A path as it is, whether anything is there or not; a hub's name by `download`."""
    if is_local(name):
        return epath.Path(name).expanduser()
    return download(name, patterns, field=field, revision=revision)


def download(
    name: str, patterns: Sequence[str], *, field: str, revision: str = ""
) -> epath.Path:
    """The folder of a snapshot, whose missing files are downloaded first.

    Without a network, or in offline mode, it is the one of the cache, which may lack
    files: what it must hold is for the caller to check.

    Args:
      name: `organisation/model`.
      patterns: of the files, as `fnmatch` reads them.
      field: the setting that holds the name, for errors.
      revision: a branch, tag or commit; `""`: the hub's default branch.

    Raises:
      UserError: the hub does not give it.
    """
    options = {"revision": revision} if revision else {}
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(patterns), **options
        )
    except (OSError, ValueError) as error:  # what its own errors derive from
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise _refused(field, error) from error
    return epath.Path(folder)


def commit_of(folder: epath.PathLike) -> str | None:
    """The commit of a snapshot in the hub's cache; None for any other folder."""
    folder = epath.Path(folder)
    cached = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if cached else None


def _refused(field: str, error: Exception) -> UserError:
    first_line = next(iter(str(error).splitlines()), "")
    return UserError(
        field,
        wanted="a checkpoint folder, or a name that the Hugging Face hub gives",
        got=f"no such folder, and from the hub {type(error).__name__}: {first_line}",
        fix="Check the name. A gated or private one needs `hf auth login`; without "
        "a network, download it elsewhere and name its folder.",
    )
